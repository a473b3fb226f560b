"""Whole models, forward in inference: as transformers runs them in each of its ways, with torch.compile, and with attnopt.

Each model (``shapes.py``: published shapes, random weights, bf16, made on the device) is prepared in every way, then all are
timed in turn, in rounds, each call on an idle device so that launching counts; quoted are medians. Peak memory is what a call
takes over weights and inputs. The error is norm(result - truth) / norm(truth) of the last hidden state against the eager model in
float32, on the first sequences; a way whose error is several times eager's computes something else, and does not count as a peer.

    python benchmarks/models.py [--models llama-s8192,bloom] [--variants sdpa,attnopt+compile] [--budget SECONDS]
    python benchmarks/models.py --device cpu --quick

Rows go to benchmarks/results/models.json after each model, and replace those of the same model and variant there.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import verdicts
from common import RESULTS, provenance, save, show, stored
from running import Lost, add_options, again, alive, begin, left_out, message, patience, spent
from shapes import SHAPES, Shape
from timing import Stopwatch, Timed
from torch import Tensor, nn

import attnopt
from attnopt.cli.measure import peak_memory

OTHER = 4.0
"""An error that is this many times eager's own is that of another function."""
COMPARED = 2
"""Sequences that are compared with float32."""

Prepared = tuple[Callable[[], Tensor], dict[str, Any]]


# ------------------------------------------------------------------------------------------------ ways to run a model


@dataclass
class Instances:
    """One model over the same weights in transformers' implementations of attention, and optimized."""

    shape: Shape
    inputs: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    dynamic: str
    compiler: str
    made: dict[str, nn.Module] = field(default_factory=dict)

    def model(self, implementation: str) -> nn.Module:
        if implementation not in self.made:
            new = self.shape.model(implementation, self.device, self.dtype)
            if self.made:
                new.load_state_dict(next(iter(self.made.values())).state_dict(), assign=True)
            self.made[implementation] = new
        return self.made[implementation]

    def compiled(self, model: nn.Module, **options: Any) -> Any:
        return torch.compile(model, **{"backend": self.compiler, "dynamic": False, **options})

    def run(self, model: Callable[..., Any]) -> Callable[[], Tensor]:
        return lambda: model(**self.inputs)[0]  # type: ignore[no-any-return]

    def prepare(self, variant: str) -> Prepared:
        """A function of no arguments that gives the last hidden state, and what to note."""
        if variant == "attnopt backend":
            # just in time, handed on to Inductor; the report stands after the first call
            attnopt.compile_report(clear=True)
            options = {"inductor": self.compiler == "inductor"}
            call = self.run(torch.compile(self.model("eager"), backend="attnopt", options=options, dynamic=False))
            call()
            return call, replaced(attnopt.compile_report())
        way, _, compiled = variant.partition("+")
        if way == "attnopt":
            if way not in self.made:
                config = attnopt.OptimizeConfig(verify=False)
                self.made[way] = attnopt.optimize(self.model("eager"), kwargs=self.inputs, dynamic_shapes=self.dynamic, config=config)
            optimized = self.made[way]
            return self.run(self.compiled(optimized) if compiled else optimized), replaced(optimized.attnopt_report)  # type: ignore[arg-type]
        model = self.model({"flex": "flex_attention"}.get(way, way))
        return self.run(self.compiled(model) if compiled else model), {}


def replaced(report: attnopt.Report) -> dict[str, Any]:
    kernels: dict[str, int] = {}
    for site in report.replaced:
        kernels[f"{site.kernel}: {site.why}"] = kernels.get(f"{site.kernel}: {site.why}", 0) + 1
    seconds = {k: round(v, 1) for k, v in report.seconds.items()}
    return {"replaced": f"{len(report.replaced)}/{len(report.attentions)}", "kernels": kernels, "optimize_s": seconds}


VARIANTS = ("eager", "eager+compile", "sdpa", "sdpa+compile", "flex+compile", "attnopt", "attnopt+compile", "attnopt backend")


# ------------------------------------------------------------------------------------------------ one model


@dataclass
class Truth:
    """The last hidden state of the eager model in float32, on the first sequences."""

    values: Tensor
    keep: Tensor | None
    """Which positions are no padding [B, S]."""

    @staticmethod
    def of(instances: Instances) -> Truth:
        inputs = {k: v[:COMPARED] if isinstance(v, Tensor) else v for k, v in instances.inputs.items()}
        exact = copy.deepcopy(instances.model("eager")).float()
        mask = inputs.get("attention_mask")
        return Truth(exact(**inputs)[0], None if mask is None else mask.bool())

    def error(self, got: Tensor) -> float:
        want, got = self.values, got[:COMPARED].float()
        if self.keep is not None:
            want, got = want[self.keep], got[self.keep]
        return float((got - want).norm() / want.norm())


def measure(shape: Shape, variants: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    instances = Instances(shape, shape.inputs(device), device, dtype, options.dynamic_shapes, options.compiler)
    truth = Truth.of(instances)
    collect(device)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[int], object]] = {}
    for variant in variants:
        row = rows[variant] = describe(shape, variant, options)
        if spent() > options.budget:
            row.update(status="failed", note=f"not begun within {options.budget:.0f} s")
            continue
        start = time.perf_counter()
        try:
            with patience(options.patience):
                call, notes = instances.prepare(variant)
                row.update(notes)
                row["error"] = truth.error(call())
        except Exception as e:  # noqa: BLE001 - a peer may raise anything; its message stands in its row
            row.update(status="failed", note=message(e))
            alive(device, f"{shape.name}:{variant}")
        else:
            row["prepare_s"] = round(time.perf_counter() - start, 1)
            peak = peak_memory(call, device)
            row["peak_gib"] = None if peak is None else peak / 2**30
            calls[variant] = lambda n, f=call: f()
            print(f"  {variant}: ready after {row['prepare_s']} s", flush=True)
        collect(device)
    watch = Stopwatch(device, 1, options.seconds, most_rounds=20, alone=True)
    for variant, timed in watch.measure(calls).items():
        if isinstance(timed, Timed):
            rows[variant].update(ms=timed.ms, quartiles=list(timed.quartiles), host_us=timed.host_us, runs=timed.runs)
        else:
            rows[variant].update(status="failed", note=timed)
            alive(device, f"{shape.name}:{variant}")
    judge(list(rows.values()))
    return list(rows.values())


def judge(rows: list[dict[str, Any]]) -> None:
    """Mark what computes something else than the model."""
    own = next((r["error"] for r in rows if r["variant"] == "eager" and r["error"]), None)
    for r in rows:
        if r["error"] is None:
            continue
        if not math.isfinite(r["error"]) or (own is not None and r["error"] > OTHER * own):
            r.update(
                status="wrong",
                note=f"error {r['error']:.3g} against float32, eager's is {own or math.nan:.3g}",
                error=r["error"] if math.isfinite(r["error"]) else None,
            )


def collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(shape: Shape, variant: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "kind": "models",
        "model": shape.name,
        "remark": shape.remark,
        "B": shape.B,
        "S": shape.S,
        "variant": variant,
        "dtype": options.dtype,
        "status": "ok",
        "note": "",
        "ms": None,
        "peak_gib": None,
        "error": None,
        **options.provenance,
    }


# ------------------------------------------------------------------------------------------------ all models


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Old rows, with those of ``new`` in place of the same model and variant."""
    table = {(r["model"], r["variant"]): r for r in old}
    table.update({(r["model"], r["variant"]): r for r in new})
    return list(table.values())


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(s.name for s in SHAPES))
    parser.add_argument("--variants", default=",".join(VARIANTS[:-1]), help=f"also: {VARIANTS[-1]} (torch.compile with backend='attnopt')")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--dynamic-shapes", default="auto", choices=("auto", "static"), help="how attnopt captures; torch.compile on top makes sizes constant either way"
    )
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing for each model")
    parser.add_argument("--quick", action="store_true", help="two small layers, to see that everything runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "models.json")
    add_options(parser, budget=500, patience=150)
    return parser


@torch.no_grad()
def main() -> None:
    options = arguments().parse_args()
    begin(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/models.py times on a CUDA device, and PyTorch sees none; --device cpu --quick tries the script.")
    options.provenance = provenance()
    known, asked = {s.name: s for s in SHAPES}, options.models.split(",")
    if unknown := [n for n in asked if n not in known] + [v for v in options.variants.split(",") if v not in VARIANTS]:
        raise SystemExit(f"There is no {', '.join(unknown)}; models are {', '.join(known)}, variants are {', '.join(VARIANTS)}.")
    without, rows, done = left_out(options), stored(options.output), []
    print(f"{len(asked)} models on {options.provenance['device']}, commit {options.provenance['commit']}, {options.provenance['versions']}", flush=True)
    for number, name in enumerate(asked):
        if number <= options.after:
            continue
        if spent() > options.budget:
            print(f"stopped after {options.budget:.0f} s, before {','.join(asked[number:])}")
            break
        shape = known[name]
        if options.quick:
            shape = replace(shape, config={**shape.config, **shape.small}, B=2, S=48)
        start = time.time()
        try:
            found = measure(shape, [v for v in options.variants.split(",") if f"{name}:{v}" not in without], options)
        except Lost as lost:
            again(number, lost.pair, options)
        except torch.OutOfMemoryError as e:
            print(f"[{number}] {name}: {message(e)}", flush=True)
            continue
        finally:
            torch._dynamo.reset()
            collect(torch.device(options.device))
        rows, done = merged(rows, found), [*done, *found]
        save(options.output, rows)
        print(
            f"[{number}] {name} {time.time() - start:.0f}s " + " ".join(f"{r['variant'].replace(' ', '-')}={r['ms']:.1f}" for r in found if r["ms"]), flush=True
        )
    for r in done:
        if r["status"] != "ok" or r.get("replaced"):
            print(f"{r['model']} {r['variant']}: {r['status']} {r['note']} {r.get('replaced', '')} {r.get('kernels', '')} {r.get('optimize_s', '')}"[:260])
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    for title, key in (("ms", "ms"), ("peak GiB over weights", "peak_gib"), ("error against float32", "error")):
        names = [v for v in VARIANTS if any(r["variant"] == v and r["ms"] for r in rows)]
        table = []
        for model in dict.fromkeys(r["model"] for r in rows):
            found = {r["variant"]: r for r in rows if r["model"] == model}
            mark = {n: "!" if n in found and found[n]["status"] == "wrong" else "" for n in names}
            table.append({"model": model, **{n: f"{found[n][key]:.3g}{mark[n]}" if n in found and found[n][key] is not None else None for n in names}})
        if table and names:
            show(f"{title} (! another function)" if key == "ms" else title, table, lines=False)
    verdicts.show_models(rows)


if __name__ == "__main__":
    sys.setrecursionlimit(10000)
    main()
