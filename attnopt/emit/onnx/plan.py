"""Which ONNX form an attention gets, decided from its spec alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnopt.emit.onnx.lost import bias_of
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Dims
from attnopt.kernels.affine import affine, capped

Target = Literal["onnx", "ort", "decomposed"]
TARGETS: tuple[Target, ...] = ("onnx", "ort", "decomposed")
Operator = Literal["Attention", "GroupQueryAttention", "MultiHeadAttention"]
OPERATORS: tuple[Operator, ...] = ("Attention", "GroupQueryAttention", "MultiHeadAttention")


@dataclass(frozen=True)
class Plan:
    """One operator for the whole attention, or None: MatMul, the programs and a softmax."""

    operator: Operator | None
    why: str
    causal: bool = False
    """The operator itself hides the keys behind a query."""
    window: int | None = None
    """Keys that the operator itself leaves visible to a query, the query's own included."""
    lengths: E.Expr | None = None
    """The number of visible keys of each sequence of the batch, which the operator takes as a tensor [B]."""
    rest: E.Expr | None = None
    """The part of the mask that an additive mask has to bring; None: all of it."""
    past: bool = False
    """The operator itself puts new keys and values behind those of the past."""
    parts: bool = False
    """By parts of the queries, each with the keys from the window of its first query to its last; what is said above holds for a part, but for the window, which the mask has to bring."""

    @property
    def fused(self) -> bool:
        return self.operator is not None

    @property
    def lowered_to(self) -> str:
        return self.operator or "standard ops"


def plan(spec: AttentionSpec, target: Target, dtype: str, past: bool = False) -> Plan:
    """The form of ``spec`` on operands of ``dtype`` (``float32``, ``float16``, ``float64``), with the reason. ``past``: keys and values are those of an input and,
    behind them, one for each query.
    """
    if target == "decomposed":
        return Plan(None, "--target decomposed")
    if target == "onnx":
        return _standard(spec, dtype)
    if not past and may_be_parted(spec, dtype):
        return _parted(spec, dtype)
    found = _group_query(spec, dtype, past)
    if isinstance(found, Plan):
        return found
    multi = _multi_head(spec, dtype)
    if isinstance(multi, Plan):
        return multi
    form = _standard(spec, dtype)
    return Plan(form.operator, f"{form.why}; no GroupQueryAttention: {found}; no MultiHeadAttention: {multi}", form.causal, rest=form.rest)


# ---- the standard operator


def _standard(spec: AttentionSpec, dtype: str) -> Plan:
    reason = refusal(spec, dtype)
    if reason is not None:
        return Plan(None, reason)
    if is_square_causal(spec):
        return Plan("Attention", "is_causal: as many queries as keys, proven", causal=True, rest=E.TRUE)
    return Plan("Attention", _mask_words(spec))


def _mask_words(spec: AttentionSpec) -> str:
    if spec.sinks:
        return "additive mask with a column for the sinks"
    if spec.mask is E.TRUE and added(spec) is None:
        return "no mask"
    return "boolean mask" if added(spec) is None and spec.empty_rows != "program" else "additive mask"


def is_square_causal(spec: AttentionSpec) -> bool:
    """Whether the score is scale * s and the mask k <= q, over as many queries as keys: without sinks: what ``is_causal`` means by itself."""
    d = spec.dims
    return d.Sq is d.Skv and spec.mask is E.le(d.k, d.q) and added(spec) is None and not spec.sinks


def refusal(spec: AttentionSpec, dtype: str) -> str | None:
    """Why ``Attention`` cannot stand for ``spec``; None where it can."""
    if spec.sinks and spec.empty_rows == "program":
        return "rows without a visible key have weights of their own beside a sink"
    if spec.sinks and not spec.dims.Hq.is_const:
        return "sinks over a number of heads that is no constant"
    form = affine(spec.score)
    if form is None:
        cap = _softcap(spec)
        if cap is not None:
            return f"softcap {cap:g}: ONNX Runtime's Attention is slower with it than its parts on a CPU"
        return "the score is not scale * s + bias"
    if form.scale <= 0:
        return f"the scale is {form.scale:g}: runtimes multiply both sides by its root"
    if dtype == "float64":
        return "ONNX Runtime has no Attention in float64"
    if spec.empty_rows == "program" and spec.rows_may_be_empty():
        if spec.empty_score is None or bias_of(spec.empty_score, form.scale) is None:
            return "rows without a visible key have a score of another form"
    return None


def _softcap(spec: AttentionSpec) -> float | None:
    form = capped(spec.score)
    return None if form is None else form.softcap


def added(spec: AttentionSpec) -> E.Expr | None:
    """What is added to scale * s; None where nothing is, or the score has another form."""
    form = affine(spec.score)
    return None if form is None else form.bias


# ---- by parts of the queries

PART = 128
"""Queries of a part. Fewer queries multiply fewer keys for nothing, and each turn copies its keys: why 128 stands in docs/decisions/0039-queries-by-parts.md."""


def may_be_parted(spec: AttentionSpec, dtype: str) -> bool:
    """Whether no query sees a key behind it, over as many queries as keys, and a part has no use for keys behind its last query: rows without a visible key that weigh all keys by a program would.

    A bias of query and key is written once for all layers, and cutting it for each part takes longer than it saves (T5).
    """
    d, bias = spec.dims, added(spec)
    if bias is not None and {d.q, d.k} <= set(bias.variables):
        return False
    if dtype != "float32" or d.Sq is not d.Skv or causal_part(d) not in E.conjuncts(spec.mask) or (d.Sq.is_const and d.Sq.value <= PART):
        return False
    return all(x.is_const for x in (d.Hq, d.Hkv, d.D, d.Dv)) and not (spec.empty_rows == "program" and spec.rows_may_be_empty())


def _parted(spec: AttentionSpec, dtype: str) -> Plan:
    form, window = _standard(spec, dtype), window_of(spec)
    keys = "the keys up to its last" if window is None else f"the keys from {window - 1} before its first to its last"
    why = f"in parts of at most {PART} queries, each with {keys}"
    if form.operator is None:
        return Plan(None, f"{why}; {form.why}", window=window, parts=True)
    if spec.sinks:
        return Plan(form.operator, f"{why}, {form.why}", window=window, parts=True)
    rest = E.all_of(*(p for p in E.conjuncts(spec.mask) if p is not causal_part(spec.dims)))
    more = ", additive mask" if added(spec) is not None else "" if rest is E.TRUE else ", boolean mask"
    return Plan(form.operator, f"{why}{more}", True, window, rest=rest, parts=True)


# ---- operators of ONNX Runtime


def _group_query(spec: AttentionSpec, dtype: str, past: bool) -> Plan | str:
    """GroupQueryAttention always hides the keys behind a query, and counts queries and keys from the same place, or queries from the end of a past: only a causal spec is
    one that is square or has a past.
    """
    d = spec.dims
    parts = E.conjuncts(spec.mask)
    if d.Sq is not d.Skv and not past:
        return "as many queries as keys is not proven"
    if causal_part(d) not in parts:
        return "it is not causal"
    reason = _operands(d, dtype)
    if reason is not None:
        return reason
    if d.D is not d.Dv:
        return f"values have {d.Dv} features and keys {d.D}"
    if d.D.value % 8:
        return f"{d.D} features are not a multiple of 8"
    form = affine(spec.score)
    if form is None:
        cap = _softcap(spec)
        return "the score is not scale * s + bias" if cap is None else f"softcap {cap:g}: it is slower with it than the parts of the attention on a CPU"
    if form.scale <= 0:
        return f"the scale is {form.scale:g}"
    if spec.sink is not None and not set(spec.sink.variables) <= {d.h}:
        return "a sink differs between queries"
    if spec.empty_rows == "program" and spec.rows_may_be_empty():
        return "rows without a visible key see keys behind the query"
    if past and form.bias is not None and dtype != "float32":
        return f"its bias is added in float32, and the past is {dtype}"
    window, lengths = window_of(spec), None if past else _lengths(spec)
    held = [causal_part(d)]
    if window is not None:
        held.append(band(d, window))
    if lengths is not None:
        held.append(E.lt(d.k, lengths))
    rest = E.all_of(*(p for p in parts if p not in held))
    words = {
        "causal over as many queries as keys, proven": not past,
        "causal from the end of the past, proven": past,
        f"local_window_size {window}": window is not None,
        "seqlens_k": lengths is not None,
        "head_sink": spec.sinks,
        "attention_bias": rest is not E.TRUE or form.bias is not None,
        "several new tokens after a past with a batch of one only": past,
    }
    return Plan("GroupQueryAttention", ", ".join(w for w, said in words.items() if said), True, window, lengths, rest, past)


def _multi_head(spec: AttentionSpec, dtype: str) -> Plan | str:
    """MultiHeadAttention with every mask as ``attention_bias``: its own mask adds a finite -1e4, and ``unidirectional`` is wrong over rectangles."""
    reason = _operands(spec.dims, dtype)
    if reason is not None:
        return reason
    if spec.groups != 1:
        return f"{spec.groups} query heads share a KV head, and it takes one for each"
    reason = refusal(spec, dtype)
    if reason is not None:
        return reason
    if spec.sinks:
        return "it has no sinks"
    return Plan("MultiHeadAttention", "no mask" if spec.mask is E.TRUE and added(spec) is None else "attention_bias")


def _operands(d: Dims, dtype: str) -> str | None:
    if dtype not in ("float32", "float16"):
        return f"it has no {dtype} on a CPU"
    if not all(x.is_const for x in (d.Hq, d.Hkv, d.D, d.Dv)):
        return "numbers of heads and features are not constants"
    return None


def causal_part(d: Dims) -> E.Expr:
    """``k <= q``, queries counted from the end of what stands before the new keys."""
    return E.le(d.k, E.add(d.q, E.sub(d.Skv, d.Sq)))


def band(d: Dims, window: int) -> E.Expr:
    """``q < k + window``, queries counted likewise."""
    return E.le(E.add(d.q, E.sub(d.Skv, d.Sq)), E.add(d.k, E.const(window - 1)))


def window_of(spec: AttentionSpec) -> int | None:
    """The number of keys in the mask's part ``q < k + window``; None where it has none."""
    d = spec.dims
    for part in E.conjuncts(spec.mask):
        if part.op == "ge0":
            constant = [int(c) for c, a in E.terms(part.args[0]) if a is None]
            window = (constant[0] if constant else 0) + 1
            if window > 0 and part is band(d, window):
                return window
    return None


def _lengths(spec: AttentionSpec) -> E.Expr | None:
    """The load in the mask's part ``k < lengths[b]``: padding that is proven to be on the right."""
    d = spec.dims
    for part in E.conjuncts(spec.mask):
        for x in part.leaves:
            if x.op == "load" and x.kind == "int" and x.args == (d.b,) and part is E.lt(d.k, x):
                return x
    return None
