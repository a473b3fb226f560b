"""Forward and backward of plain attention on a CUDA device, for several block sizes of the Triton backward, beside PyTorch's own.

Causal, bf16, 16384 tokens a call, forward + backward counted as 3.5 forwards; TFLOP/s, medians (CUDA events; L2 as the call before left it).
The blocks of keys and of queries are tried apart, each timed alone: their best together are the kernel's best. Results are compared
with PyTorch's first, so that no figure is of a kernel that computes another thing.

    python benchmarks/backward_probe.py [--lengths 2048,8192] [--dims 64,128] [--variants]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Dims, Load
from attnopt.kernels.tiling import bind_sizes
from attnopt.kernels.triton import launch, launch_backward
from attnopt.kernels.triton.launch_backward import Blocks

KEYS = [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3)]
QUERIES = [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 128, 8, 2), (128, 32, 4, 3)]


def spec_of(heads: int, D: int, S: int, variant: str) -> AttentionSpec:
    c = E.const
    d = Dims(c(16384 // S), c(heads), c(heads), c(S), c(S), c(D), c(D))
    score = E.mul(c(D**-0.5), E.score())
    loads: tuple[Load, ...] = ()
    if variant == "softcap":
        score = E.mul(c(50.0), E.function("tanh", E.mul(c(1 / 50.0), score)))
    if variant == "alibi":
        score = E.add(score, E.mul(E.load(0, (d.h,), "float"), E.as_float(E.sub(d.k, d.q))))
        loads = (Load("slopes", "float"),)
    return AttentionSpec(d, score, E.le(d.k, d.q), loads=loads, dropout=0.1 if variant == "dropout" else 0.0)


def milliseconds(f: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(f, warmup=30, rep=150, return_mode="median"))


def peers(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    S = q.shape[2]
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return {
        "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
        "flex": lambda: compiled(q, k, v, block_mask=block_mask),
    }


def measure(D: int, S: int, variant: str) -> None:
    heads = 2048 // D
    torch.manual_seed(0)
    q, k, v = (torch.randn(16384 // S, heads, S, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    flops = 4 * 16384 * S * heads * D / 2
    want: list[Tensor] | None = None
    print(f"\nD {D}, S {S}, heads {heads}, {variant}")
    for name, f in peers(q, k, v).items() if variant == "plain" else ():
        o = f()
        want = list(torch.autograd.grad(o, (q, k, v), grad))
        forward = milliseconds(f)
        both = milliseconds(lambda: torch.autograd.grad(f(), (q, k, v), grad))  # noqa: B023
        print(f"  {name:8} forward {flops / forward / 1e9:5.0f}  forward + backward {3.5 * flops / both / 1e9:5.0f}  backward alone {both - forward:.3f} ms")
    spec = spec_of(heads, D, S, variant)
    loads = [2.0 ** -torch.arange(1, heads + 1, device="cuda").float()] if variant == "alibi" else []
    with torch.no_grad():
        o, lse = launch.attention(q, k, v, loads, [], spec, 7)
        run = lambda choice=None: launch_backward.gradients(grad, q, k, v, o, lse, loads, [], spec, 7, [True] * 3 + [False] * len(loads), choice)  # noqa: E731
        for got, w in zip(run(), want or [], strict=False):
            torch.testing.assert_close(got, w, atol=2e-2 * float(w.abs().max()), rtol=2e-2)
        forward, backward = milliseconds(lambda: launch.attention(q, k, v, loads, [], spec, 7)), milliseconds(run)
        print(f"  triton   forward {flops / forward / 1e9:5.0f}  forward + backward {3.5 * flops / (forward + backward) / 1e9:5.0f}  backward alone {backward:.3f} ms (default blocks)")
        kernels = launch_backward.kernels_for(spec, frozenset())
        chosen = launch_backward.config(kernels.source, D, D, S, S, q.dtype, launch.shared_memory(0))
        print(f"           default keys {chosen.keys}, queries {chosen.queries}")
        for what, options in (("keys", KEYS), ("queries", QUERIES)):
            for blocks in [Blocks(*b, early=e) for b in options for e in (False, True)]:
                one = launch_backward._Run(kernels, spec, q, k, v, grad, loads, bind_sizes(spec, [], q, k, v), 7, replace(chosen, **{what: blocks}))
                one.rows(o, lse)
                try:
                    ms = milliseconds(lambda: getattr(one, what)(kernels.source))  # noqa: B023
                except (triton.runtime.errors.OutOfResources, RuntimeError) as e:
                    print(f"  {what:8} {blocks}: {str(e).splitlines()[0][:90]}")
                    continue
                print(f"  {what:8} M {blocks.BLOCK_M:3} N {blocks.BLOCK_N:3} warps {blocks.num_warps} stages {blocks.num_stages} early {blocks.early!s:5}: {ms:.3f} ms")
        print(f"  rows     {milliseconds(lambda: one.rows(o, lse)):.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--variants", action="store_true", help="softcap, ALiBi and dropout too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/backward_probe.py needs a CUDA device, and PyTorch sees none.")
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for variant in ("plain", "softcap", "alibi", "dropout") if options.variants else ("plain",):
        for D in map(int, options.dims.split(",")):
            for S in map(int, options.lengths.split(",")):
                measure(D, S, variant)


if __name__ == "__main__":
    main()
