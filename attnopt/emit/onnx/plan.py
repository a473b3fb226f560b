"""Which ONNX form an attention gets, decided from its spec alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.affine import affine, capped

Target = Literal["onnx", "decomposed"]
TARGETS: tuple[Target, ...] = ("onnx", "decomposed")


@dataclass(frozen=True)
class Plan:
    """``fused``: the standard operator ``Attention``; otherwise MatMul, the programs and a softmax."""

    fused: bool
    causal: bool
    why: str

    @property
    def lowered_to(self) -> str:
        return "Attention" if self.fused else "standard ops"


def plan(spec: AttentionSpec, target: Target, dtype: str) -> Plan:
    """The form of ``spec`` on operands of ``dtype`` (``float32``, ``float16``, ``float64``), with the reason."""
    reason = "--target decomposed" if target == "decomposed" else refusal(spec, dtype)
    if reason is not None:
        return Plan(False, False, reason)
    if is_square_causal(spec):
        return Plan(True, True, "is_causal: as many queries as keys, proven")
    if spec.mask is E.TRUE and _bias(spec) is None:
        return Plan(True, False, "no mask")
    return Plan(True, False, "boolean mask" if _bias(spec) is None and spec.empty_rows != "program" else "additive mask")


def is_square_causal(spec: AttentionSpec) -> bool:
    """Whether the score is scale * s and the mask k <= q, over as many queries as keys: what ``is_causal`` means by itself."""
    d = spec.dims
    return d.Sq is d.Skv and spec.mask is E.le(d.k, d.q) and _bias(spec) is None


def refusal(spec: AttentionSpec, dtype: str) -> str | None:
    """Why ``Attention`` cannot stand for ``spec``; None where it can."""
    if spec.sinks:
        return "Attention has no sinks"
    form = affine(spec.score)
    if form is None:
        cap = capped(spec.score)
        if cap is not None and cap.softcap is not None:
            return f"softcap {cap.softcap:g}: ONNX Runtime's Attention is slower with it than its parts on a CPU"
        return "the score is not scale * s + bias"
    if form.scale <= 0:
        return f"the scale is {form.scale:g}: runtimes multiply both sides by its root"
    if dtype == "float64":
        return "ONNX Runtime has no Attention in float64"
    if spec.empty_rows == "program" and spec.rows_may_be_empty():
        other = None if spec.empty_score is None else affine(spec.empty_score)
        if other is None or other.scale != form.scale:
            return "rows without a visible key have a score of another form"
    return None


def _bias(spec: AttentionSpec) -> E.Expr | None:
    form = affine(spec.score)
    return None if form is None else form.bias
