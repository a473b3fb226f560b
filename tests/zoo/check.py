"""One model in one variant: optimize it, and hold what came out against what must be true."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import attnopt
from attnopt.ir import expr as E
from attnopt.ir.printing import render
from attnopt.report import Report, Site
from zoo.case import BATCH, LENGTH, Case, Variant

FACTOR, BAND = 4.0, 1e-6
"""An optimized float32 output may be FACTOR times as far from float64 as the original's, plus eight roundings: norm-relative."""


@dataclass
class Row:
    """What one variant came to. Plain data: it travels between processes and into the scoreboard."""

    model: str
    family: str
    variant: str
    form: str
    padded: bool
    dynamic: bool
    expected: int
    """Attentions that the model computes."""
    found: int = 0
    replaced: int = 0
    verified: int = 0
    refused: int = 0
    """Attentions that were left alone, as they must be."""
    exported: bool = True
    words: list[list[str]] = field(default_factory=list)
    """[site, what it was proven to be] of each replaced attention."""
    missed: list[list[str]] = field(default_factory=list)
    """[site, code, reason] of each attention that stayed as it was."""
    error: float = 0.0
    """The largest part of its error budget that any output used, at all sizes that were run here."""
    seconds: dict[str, float] = field(default_factory=dict)
    deviations: list[str] = field(default_factory=list)
    """In what it differs from what must be true; empty is good."""
    fused_by_inductor: int | None = None
    inductor_note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def empty_row(case: Case, variant: Variant, *deviations: str) -> Row:
    return Row(case.name, case.family, variant.name, variant.form, variant.padded, variant.dynamic, case.sites, deviations=list(deviations))


def check(case: Case, variant: Variant) -> Row:
    """Optimize the model as a user would, with verification, and check the report, the specs, and other sizes."""
    row = empty_row(case, variant)
    clock = time.perf_counter()
    model = case.build(variant.form)
    inputs = case.inputs(variant.padded, BATCH, LENGTH)
    row.seconds["build"] = time.perf_counter() - clock
    clock = time.perf_counter()
    optimized = attnopt.optimize(model, kwargs=inputs, dynamic_shapes="auto" if variant.dynamic else "static", config=attnopt.OptimizeConfig(inductor=False))
    row.seconds["optimize"] = time.perf_counter() - clock
    report: Report = optimized.attnopt_report
    row.seconds.update(report.seconds)
    _judge_report(case, variant, report, row)
    clock = time.perf_counter()
    sizes = [(BATCH, LENGTH), *case.other_sizes(variant)]
    for b, s in sizes:
        _compare(model, optimized, case.inputs(variant.padded, b, s), f"batch {b}, length {s}", row)
    row.seconds["compare"] = time.perf_counter() - clock
    captures = len(optimized.attnopt_variants)
    if row.exported and captures != 1:
        row.deviations.append(f"captured {captures} times for {len(sizes)} sizes: {'; '.join(r.message for r in report.remarks if r.code == 'AO301')}")
    return row


# ---- the report


def _judge_report(case: Case, variant: Variant, report: Report, row: Row) -> None:
    codes = {r.code: r.message for r in report.remarks}
    row.exported = "AO302" not in codes
    row.found = len(report.attentions)
    row.replaced = len(report.replaced)
    row.verified = row.replaced if report.verdict.passed else 0
    row.words = [[s.name, str(s.spec)] for s in report.replaced]
    row.missed = [[s.name, s.remarks[0].code if s.remarks else "", s.why] for s in report.missed]
    if row.exported != case.exported:
        row.deviations.append(f"captured by {'torch.export' if row.exported else 'torch.compile: ' + codes['AO302']}")
    if row.found != case.sites:
        row.deviations.append(f"{row.found} attentions found instead of {case.sites}")
    if report.verdict.passed is not True:
        failed = [f"{c.name}: error {c.error:.1e}, budget {c.budget:.1e} {c.detail}" for c in report.verdict.checks if not c.passed]
        row.deviations.append(f"verification: {report.verdict}" + "".join(f"; {f}" for f in failed[:3]))
    for site in report.attentions:
        refusal = case.refusal(site.name)
        if site.status == "replaced" and refusal is None:
            row.deviations += _judge_spec(site, case.facts(site.name, variant))
        elif site.status == "replaced":
            row.deviations.append(f"{site.name} was replaced, and should not be: {refusal.reason if refusal else ''}")
        elif refusal is None:
            row.deviations.append(f"{site.name} {site.status}: {' '.join(row.missed[report.missed.index(site)][1:])} ({site.source})")
        elif refusal.code not in {r.code for r in site.remarks}:
            row.deviations.append(f"{site.name} refused with {[r.code for r in site.remarks]} instead of {refusal.code} ({refusal.reason})")
        else:
            row.refused += 1


def _judge_spec(site: Site, facts: dict[str, Any]) -> list[str]:
    spec = site.spec
    assert spec is not None
    found = []
    for name, want in facts.items():
        if name == "dense":
            got: Any = sum(r.code == "AO303" for r in site.remarks)
        elif name == "rest":
            got = "" if spec.traits.mask_rest is E.TRUE else render(spec.traits.mask_rest, spec.load_names)
        elif name == "words":
            got = tuple(w for w in want if w in str(spec))
        else:
            got = getattr(spec, name)
        if not (want(got) if callable(want) else got == want):
            found.append(f"{site.name}: {name} is {_text(got)} instead of {want.__name__ if callable(want) else want!r} ({spec})")
    return found


def _text(value: Any, limit: int = 300) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


# ---- the outputs


def floats(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _compare(model: nn.Module, optimized: nn.Module, inputs: dict[str, Any], where: str, row: Row) -> None:
    """Both models against the original in float64: this does not rest on the package's own verification."""
    with torch.no_grad():
        want, got = floats(model(**inputs)), floats(optimized(**inputs))
        exact = floats(_in_float64(model, inputs))
    if not len(want) == len(got) == len(exact) or any(x.shape != y.shape for x, y in zip(want, got, strict=True)):
        row.deviations.append(f"{where}: other outputs than the original's")
        return
    for i, (w, g, e) in enumerate(zip(want, got, exact, strict=True)):
        budget = FACTOR * _distance(w, e) + BAND
        used = _distance(g, e) / budget
        row.error = max(row.error, used)
        if not used <= 1:
            row.deviations.append(f"{where}, output {i}: {used:.1f} times the error budget {budget:.1e}")


class Float64(TorchDispatchMode):
    """Nothing is float32: models that compute parts of themselves in float32 are no truth there, and their masks overflow."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _in_float64(model: nn.Module, inputs: dict[str, Any]) -> Any:
    model = copy.deepcopy(model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product of experts has no float64
    standard = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            return model(**pytree.tree_map(_double, inputs))
    finally:
        torch.set_default_dtype(standard)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _distance(x: Tensor, exact: Tensor) -> float:
    x = x.double()
    same = (x.isnan() & exact.isnan()) | (x == exact)
    difference, size = torch.where(same, 0.0, x - exact), torch.where(exact.isfinite(), exact, 0.0)
    return float(difference.norm() / size.norm().clamp_min(1e-30))
