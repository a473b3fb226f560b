"""Exported files side by side on ONNX Runtime's CPU provider: attentions that are fused nodes, time, peak memory and error, attnopt's beside its peers'.

Each model is exported once by everyone, with batch and length open. The files then run in turn in one process, a round after the other, and medians are
taken, since other work may run on the machine; peak memory is that of a process of its own for each file. Rows are kept by model, length and threads in one file of results:
a run that was cut off goes on where it stopped, since rows of this code are not measured again (--again: all are).
With several threads there is a pause before each run, since the threads of the file before spin on for a while.

torch.onnx.export takes a mixture of experts only with `batched_mm` (a matrix gathered for each token), so that is what the peers' rows are of; attnopt's are of the library's default, which is what a user
exports. Each row of such a model names it.

    python benchmarks/onnx_export.py [llama bert ...] [--length 2048] [--rounds 7] [--threads 1 2] [--again]
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from common import RESULTS, ROOT, provenance, save, show, stored
from onnx_models import HEADS, MODELS, WIDTH, Model
from torch import nn

import attnopt
from attnopt.config import OptimizeConfig

FUSED = {"Attention", "MultiHeadAttention", "GroupQueryAttention"}
BASE = "torch, eager"
PAUSE = 0.1
"""Seconds."""
RESULT = RESULTS / "onnx_export.json"
MADE_BY = [*(f"attnopt/{x}" for x in ("analysis", "capture", "emit", "ir", "passes")), "benchmarks/onnx_export.py", "benchmarks/onnx_models.py"]
"""What decides how a row comes out."""


# ---- the exporters: each writes a file


def by_torch(model: Model, path: Path, attention: str, opset: int) -> None:
    """torch.onnx.export, with every axis of indices and the batch of everything else left open."""
    inputs = model.example(2, 40)
    auto = torch.export.Dim.DYNAMIC
    shapes = {name: dict.fromkeys(range(1 if x.is_floating_point() else 2), auto) for name, x in inputs.items()}
    module = _Plain(model.build(attention, model.experts))
    program = torch.export.export(module, (), {"inputs": inputs}, dynamic_shapes={"inputs": shapes}, strict=False)
    torch.onnx.export(program, dynamo=True, opset_version=opset, input_names=list(inputs), verbose=False, optimize=True).save(path)  # type: ignore[union-attr]


class _Plain(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return _tensors(self.model(**inputs))


def _tensors(result: Any) -> list[torch.Tensor]:
    from torch.utils import _pytree as pytree

    def plain(x: Any) -> Any:
        return {k: plain(v) for k, v in x.items()} if hasattr(x, "items") else x

    return [x for x in pytree.tree_leaves(plain(result)) if isinstance(x, torch.Tensor)]


def by_ort_optimizer(model: Model, path: Path, eager: Path) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    optimize_model(str(eager), model_type=model.optimizer, num_heads=HEADS, hidden_size=WIDTH, opt_level=0).save_model_to_file(str(path))


def by_onnxscript(model: Model, path: Path, eager: Path) -> None:
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    optimized, _ = optimize_for_ort(ir.load(eager))
    ir.save(optimized, path)


def by_attnopt(model: Model, path: Path, target: str) -> None:
    module, inputs = model.build("eager"), dict[str, Any](model.example(2, 40))
    if "use_cache" in inspect.signature(module.forward).parameters:
        inputs["use_cache"] = False  # a cache among the results is no tensor
    config = OptimizeConfig(backend="reference", verify=False, capture="export")
    attnopt.optimize(module, kwargs=inputs, config=config).export_onnx(path, target=target)


def exporters(model: Model, folder: Path) -> dict[str, Callable[[Path], None]]:
    eager = folder / "0.onnx"
    return {
        BASE: lambda path: by_torch(model, path, "eager", 20),
        "torch, sdpa, opset 24": lambda path: by_torch(model, path, "sdpa", 24),
        "onnxruntime.transformers": lambda path: by_ort_optimizer(model, path, eager),
        "onnxscript": lambda path: by_onnxscript(model, path, eager),
        "attnopt onnx": lambda path: by_attnopt(model, path, "onnx"),
        "attnopt ort": lambda path: by_attnopt(model, path, "ort"),
    }


# ---- what is measured


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def fed(runtime: onnxruntime.InferenceSession, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """The inputs by the file's own names, which exporters choose: by name where it is known, else by place."""
    names = [i.name for i in runtime.get_inputs()]
    order = names if set(names) <= set(inputs) else list(inputs)
    return {name: inputs[key].numpy() for name, key in zip(names, order, strict=True)}


def peak_of(path: Path, name: str, length: int, threads: int) -> float:
    """MiB that one run takes beyond the loaded file, in a process of its own."""
    command = [sys.executable, __file__, name, "--peak-of", str(path), "--length", str(length), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
    return float(done.stdout.splitlines()[-1])


def _status(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def print_peak(path: Path, model: Model, length: int, threads: int) -> None:
    runtime = session(path, threads)
    feed = fed(runtime, model.example(1, length))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was loading
    runtime.run(None, feed)
    print(_status("VmHWM") - before)


def error_of(got: list[Any], expected: list[torch.Tensor]) -> float:
    """The largest relative distance of a result from PyTorch's."""
    if len(got) != len(expected):
        return math.inf
    pairs = [(torch.from_numpy(np.asarray(g)).double(), e.double()) for g, e in zip(got, expected, strict=True)]
    return max(float((g - e).norm() / e.norm()) if g.shape == e.shape else math.inf for g, e in pairs)


def measure(name: str, length: int, rounds: int, threads: Sequence[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The rows of a model for each number of threads; files are exported once."""
    model = MODELS[name]
    inputs = model.example(1, length)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        files, failures = {}, {}
        for i, (who, export) in enumerate(exporters(model, folder).items()):
            files[who] = folder / f"{i}.onnx"
            try:
                with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
                    warnings.simplefilter("ignore")
                    export(files[who])
            except Exception as error:  # noqa: BLE001 - what a peer raises is the finding
                failures[who] = said(error)
        with torch.no_grad():
            expected = _tensors(model.build("eager", model.experts)(**inputs))
        for n in threads:
            yield n, run_all(name, length, rounds, n, files, failures, expected)


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def run_all(
    name: str, length: int, rounds: int, threads: int, files: dict[str, Path], failures: dict[str, str], expected: list[torch.Tensor]
) -> list[dict[str, Any]]:
    model = MODELS[name]
    inputs = model.example(1, length)
    rows: list[dict[str, Any]] = []
    good: dict[str, Path] = {}
    for who, path in files.items():
        row: dict[str, Any] = {
            "model": name,
            "S": length,
            "exporter": who,
            "fused": None,
            "of": model.sites,
            "error": None,
            "ms": None,
            "faster": None,
            "peak MiB": None,
            "note": failures.get(who, ""),
        }
        if model.experts is not None:
            row["experts"] = "the library's default" if who.startswith("attnopt") else model.experts
        rows.append(row)
        if who in failures:
            continue
        try:
            nodes = ir.load(path).graph.all_nodes()  # with those in the bodies of loops
            row["fused"] = sum(n.op_type in FUSED for n in nodes)
            runtime = session(path, threads)
            got = runtime.run(None, fed(runtime, inputs))
        except Exception as error:  # noqa: BLE001 - what ONNX Runtime raises of a peer's file is the finding
            row["note"] = said(error)
            continue
        row["error"] = e if math.isfinite(e := error_of(got, expected)) else None
        row["note"] = "" if row["error"] is not None and row["error"] < 1e-3 else "wrong results"
        del runtime, got
        row["peak MiB"] = peak_of(path, name, length, threads)
        good[who] = path
    # Loaded files keep the memory of their runs: large ones do not fit together, and run beside the first alone.
    groups = [[BASE, who] for who in good if who != BASE] if model.large else [list(good)]
    for group in groups:
        times = interleaved({who: good[who] for who in group}, inputs, rounds, threads)
        for row in rows:
            if row["exporter"] in times and row["ms"] is None:
                row["ms"] = statistics.median(times[row["exporter"]]) * 1e3
                row["faster"] = statistics.median(b / t for b, t in zip(times[BASE], times[row["exporter"]], strict=True)) if BASE in times else None
    return rows


def is_current(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether rows are there and what made them is the code of this checkout."""
    made = {str(r["commit"]) for r in rows}
    if len(made) != 1 or not (name := next(iter(made))).isalnum():
        return False
    return subprocess.run(["git", "diff", "--quiet", name, "--", *MADE_BY], cwd=ROOT, stderr=subprocess.DEVNULL, check=False).returncode == 0


def interleaved(files: dict[str, Path], inputs: dict[str, torch.Tensor], rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each file's runs, a round after the other."""
    turns = [(who, runtime, fed(runtime, inputs)) for who, runtime in ((who, session(path, threads)) for who, path in files.items())]
    for _, runtime, feed in turns:
        runtime.run(None, feed)
    times: dict[str, list[float]] = {who: [] for who in files}
    for i in range(rounds):
        for who, runtime, feed in turns[i % len(turns) :] + turns[: i % len(turns)]:  # nobody is always first
            time.sleep(0 if threads == 1 else PAUSE)
            start = time.perf_counter()
            runtime.run(None, feed)
            times[who].append(time.perf_counter() - start)
    return times


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line a model: the attentions that each exporter fused, and for attnopt's files speed and peak memory against torch's eager export."""
    who = list(dict.fromkeys(r["exporter"] for r in rows))
    lines = ["| model | attentions | " + " | ".join(who) + " |", "|" + "---|" * (len(who) + 2)]
    for name in dict.fromkeys(r["model"] for r in rows):
        found = {r["exporter"]: r for r in rows if r["model"] == name}
        base, cells = found[BASE], []
        for x in who:
            r = found[x]
            if r["ms"] is None:
                cells.append("fails" if r["fused"] is None else f"{r['fused']}, does not run")
            elif x == BASE:
                cells.append(f"{r['fused']} ({r['ms']:.0f} ms, {r['peak MiB']:.0f} MiB)")
            else:
                wrong = f", {r['note']}" if r["note"] else ""
                cells.append(f"{r['fused']} ({r['faster']:.2f}x, {r['peak MiB'] / base['peak MiB']:.2f} of the memory{wrong})")
        lines.append(f"| {name} | {base['of']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--again", action="store_true", help="measure rows anew that this code has measured already")
    parser.add_argument("--peak-of", type=Path, help="run this file of the model once, and print how much memory that took")
    parser.add_argument("--markdown", action="store_true", help="measure nothing, and print the stored rows of this length as a table")
    options = parser.parse_args()
    if options.markdown:
        print(markdown([r for r in stored(RESULT) if (r["S"], r["threads"]) == (options.length, options.threads[0])]))
        return
    logging.disable(logging.ERROR)
    if options.peak_of is not None:
        print_peak(options.peak_of, MODELS[options.models[0]], options.length, options.threads[0])
        return
    for name in options.models:
        there = {n: [r for r in stored(RESULT) if (r["model"], r["S"], r["threads"]) == (name, options.length, n)] for n in options.threads}
        wanted = [n for n, rows in there.items() if options.again or not is_current(rows)]
        print(f"{name}: {', '.join(f'{n} thread(s)' for n in wanted) or 'is there'}", flush=True)
        start, made_by = time.perf_counter(), provenance()  # before, since a commit may follow while this runs
        for threads, found in measure(name, options.length, options.rounds, wanted) if wanted else ():
            keep(name, options.length, found, {**made_by, "threads": threads, "rounds": options.rounds, "onnxruntime": onnxruntime.__version__})
        if wanted:
            print(f"{name} took {time.perf_counter() - start:.0f} s", flush=True)


def keep(name: str, length: int, found: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write rows into the file of results in place of those of the same model, length and threads, and show them. ``about`` stands beside each."""
    threads = about["threads"]
    rows = [r for r in stored(RESULT) if (r["model"], r["S"], r["threads"]) != (name, length, threads)] + [{**r, **about} for r in found]
    order = {n: i for i, n in enumerate(MODELS)}
    save(
        RESULT,
        sorted(rows, key=lambda r: (r["S"], r["threads"], order[r["model"]])),
        note="ms: medians of interleaved rounds on a machine that other work shared; faster: median of the ratios to torch, eager, round by round",
    )
    show(f"{name}, batch 1, S={length}, {threads} thread(s)", [{k: v for k, v in r.items() if k not in ("model", "S")} for r in found])


if __name__ == "__main__":
    main()
