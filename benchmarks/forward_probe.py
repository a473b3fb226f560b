"""Configurations of the Hopper forward on a CUDA device, side by side with cuDNN and with the Triton kernel: how ``gluon/config.py`` came about.

For each cell of ``cells.py`` (plain forwards and variants; bf16, 16384 tokens, cold L2) every configuration that fits is compiled first, side by
side in processes, and compared with the Triton kernel's result; then all are timed in turn. TFLOP/s of visible scores, medians.

    python benchmarks/forward_probe.py [--only REGEX] [--jobs 15] [--output probe.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from cells import CELLS, Cell, Inputs, sets_needed
from timing import Stopwatch, Timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnopt.kernels.block_map import BlockMap, block_map
from attnopt.kernels.gluon import launch
from attnopt.kernels.gluon.config import SHARED_MEMORY, Config, bytes_of
from attnopt.kernels.tiling import bind_sizes
from attnopt.kernels.triton import launch as triton_launch

CONFIGS = {
    64: [
        Config(2, 128, 3, 2, q_registers=True),
        Config(2, 128, 3, 2),
        Config(3, 128, 2, 2),
        *(Config(2, 64, stages, 2, q_registers=held) for stages in (4, 6) for held in (False, True)),
    ],
    128: [Config(2, 128, 2, 2), Config(2, 128, 2, 1, q_registers=True), Config(2, 64, 4, 2)],
    256: [Config(2, 64, 2, 1, 2), Config(2, 32, 4, 1, 2)],
}
WRONG = 1e-2


def name(c: Config) -> str:
    return f"c{c.consumers} n{c.BLOCK_N} s{c.stages} q{c.q_buffers}{'r' if c.q_registers else ''}"


def blocks_of(cell: Cell, inputs: Inputs, c: Config) -> BlockMap | None:
    """Made once, as a model's layers share it."""
    spec, (q, k, v, _) = cell.spec(), inputs.sets[0]
    if not launch.kernel_for(spec, cell.D, cell.D, cell.S, c).source.mapped:
        return None
    return block_map(spec.mask, inputs.loads, bind_sizes(spec, [], q, k, v), (*q.shape[:3], k.shape[2]), c.BLOCK_M, c.BLOCK_N, q.device)


def compile_one(job: tuple[int, int]) -> str | None:
    """Runs a configuration once, which leaves its code in Triton's cache. None, or what it raised."""
    cell, c = CELLS[job[0]], CONFIGS[CELLS[job[0]].D][job[1]]
    try:
        inputs = Inputs.of(cell, torch.device("cuda"), torch.bfloat16, 1)
        launch.attention(*inputs.sets[0][:3], inputs.loads, [], cell.spec(), chosen=c)
        torch.cuda.synchronize()
    except Exception as e:  # noqa: BLE001 - whatever it is, it is printed beside the configuration
        return f"{cell.name}, {name(c)}: {e}"
    return None


def measure(cell: Cell) -> dict[str, float | str]:
    spec, device = cell.spec(), torch.device("cuda")
    count = sets_needed(cell, torch.cuda.get_device_properties(device).L2_cache_size)
    inputs = Inputs.of(cell, device, torch.bfloat16, count)

    def cudnn(n: int) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*inputs.sets[n][:3], is_causal=cell.causal, scale=cell.scale, enable_gqa=cell.Hq != cell.Hkv)

    calls = {"triton": lambda n: triton_launch.attention(*inputs.sets[n][:3], inputs.loads, [], spec)[0]}
    want = calls["triton"](0).float()
    if cell.variant_name == "plain":
        calls["cudnn"] = cudnn
    out: dict[str, float | str] = {}
    for c in CONFIGS[cell.D]:
        if bytes_of(c, cell.D, cell.D) > SHARED_MEMORY:
            continue
        blocks = blocks_of(cell, inputs, c)

        def own(n: int, c: Config = c, blocks: BlockMap | None = blocks) -> Tensor:
            return launch.attention(*inputs.sets[n][:3], inputs.loads, [], spec, blocks=blocks, chosen=c)[0]

        error = ((own(0).float() - want).norm() / want.norm()).item()
        if error <= WRONG:
            calls[name(c)] = own
        else:
            out[name(c)] = f"wrong by {error:.2g}"
    for label, timed in Stopwatch(device, count, 0.3).measure(calls).items():
        out[label] = inputs.flops / timed.ms / 1e9 if isinstance(timed, Timed) else timed
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the cell's name must contain")
    parser.add_argument("--jobs", type=int, default=15, help="processes that compile")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if reason := launch.available():
        sys.exit(f"benchmarks/forward_probe.py times the Hopper kernels: {reason}.")
    wanted = [i for i, c in enumerate(CELLS) if c.group != "backward" and re.search(options.only, c.name)]
    first = {(c.D, c.causal, c.variant_name, c.Hkv, c.B if c.variant_name != "plain" else 0): i for i in reversed(wanted) for c in [CELLS[i]]}
    jobs = [(i, j) for i in first.values() for j, c in enumerate(CONFIGS[CELLS[i].D]) if bytes_of(c, CELLS[i].D, CELLS[i].D) <= SHARED_MEMORY]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        print(*(x for x in pool.imap_unordered(compile_one, jobs) if x is not None), sep="\n")
    rows = []
    for i in wanted:
        rows.append({"cell": CELLS[i].name, **measure(CELLS[i])})
        print({k: round(v) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
