"""Operators that could mix tokens, each with the proof that here it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.analysis.contraction import contraction
from attnopt.analysis.linear import affine
from attnopt.analysis.rows import STATIC, Row, has_symbols, index_of
from attnopt.analysis.token_flow import Rule, TokenFlow, rule
from attnopt.analysis.views import Index
from attnopt.ir import dims
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

# ------------------------------------------------------------------------------------------------ the same elements, other dtypes


@rule("aten::to", "aten::_to_copy", "aten::type_as", "aten::float", "aten::half", "aten::bfloat16", "aten::double", "aten::log_sigmoid", "aten::hardswish")
def _cast(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    x = args.get("self", args.get("input"))
    if x in flow.counts:
        flow.counts[node] = flow.counts[x]
        return STATIC
    if x in flow.numbering:
        if N.kind(node) != "int":
            return None
        flow.numbering.add(node)
        return STATIC
    return flow.row(x, index_of(node))


@rule("aten::dropout", "aten::alpha_dropout", "aten::feature_dropout")
def _dropout(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    if args["train"] and args["p"]:
        raise flow.mixed(node, f"{N.said(node)} drops values at random (the model is in training mode)")
    return flow.row(args["input"], index_of(node))


@rule(*(f"aten::{n}" for n in ("masked_fill", "floor_divide", "polar", "complex")))
def _pointwise(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    return flow.pointwise(node)


# ------------------------------------------------------------------------------------------------ creation


@rule(*(f"aten::{n}" for n in ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")))
@rule(*(f"aten::{n}_like" for n in ("zeros", "ones", "full", "empty")))
def _constant(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """One value everywhere; memory that is not initialised is no value, and is never read."""
    fill = args.get("fill_value", args.get("s"))
    if isinstance(fill, fx.Node):
        raise flow.by_length(node, f"{N.said(node)} is filled with {N.value(fill)}, which the sizes of the whole batch decide")
    return STATIC


# ------------------------------------------------------------------------------------------------ sums over an axis


def _without(flow: TokenFlow, node: fx.Node, x: fx.Node, axes: list[int]) -> Row | None:
    """The row of ``x``, which must not run along ``axes``; in the variables of ``x``. None where an axis is as long as the batch and no token's."""
    if x in flow.numbering or x in flow.counts:
        return None
    index, row = index_of(x), flow.rows[x]
    for a in axes:
        if index[a] in row.variables:
            what = "tokens" if row.token is not None else "positions"
            raise flow.mixed(node, f"{N.said(node)} runs along axis {a} of {N.said(x)}, the axis of the {what}")
    return None if any(not N.shape(x)[a].is_const for a in axes) else row


@rule(
    *(f"aten::{n}" for n in ("mean", "sum", "amax", "amin", "prod", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "any", "all", "argmax", "argmin")),
    *(f"aten::{n}" for n in ("max", "min", "median", "count_nonzero", "nansum", "nanmean", "var_mean", "std_mean", "aminmax", "squeeze")),
)
def _reduction(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    x = args.get("self")
    if N.is_tensor(args.get("other")):  # max and min of two tensors
        return flow.pointwise(node)
    if not isinstance(x, fx.Node):
        return None
    rank = len(N.shape(x))
    dim = args.get("dim")
    axes = list(range(rank)) if dim is None or dim == [] else [N.axis(d, rank) for d in ([dim] if isinstance(dim, int) else dim)]
    row = _without(flow, node, x, axes)
    if row is None:
        return None
    kept = [d for d in range(rank) if d not in axes]
    value = N.value(node)
    shape = dims.shape((value if isinstance(value, torch.Tensor) else value[0]).shape)
    index = tuple(E.ZERO if n is E.ONE else E.var(f"i{d}", n) for d, n in enumerate(shape))
    places = [d if args.get("keepdim") else i for i, d in enumerate(kept)]
    return flow.moved(row, {v: index[p] for v, p in ((index_of(x)[d], p) for d, p in zip(kept, places, strict=True)) if not v.is_const})


def _along(*names: str) -> Callable[[Rule], Rule]:
    return rule(*(f"aten::{n}" for n in names))


@_along("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "argsort", "topk", "kthvalue", "glu")
def scan(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """Along one axis, which stays, at another length perhaps."""
    x = args["self"]
    dim = args.get("dim", -1)
    return _without(flow, node, x, [N.axis(-1 if dim is None else dim, len(N.shape(x)))])


@_along("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _norm(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    x = args["input"]
    rank = len(N.shape(x))
    return _without(flow, node, x, list(range(rank - len(args["normalized_shape"]), rank)))


# ------------------------------------------------------------------------------------------------ products


@_along("matmul", "bmm", "mm", "baddbmm", "addmm", "einsum")
def _product(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    form = contraction(node, index_of(node), "c")
    if form is None:
        return None
    rows = [flow.row(form.left, form.left_index), flow.row(form.right, form.right_index)]
    if form.addend is not None:
        rows.append(flow.row(form.addend, form.addend_index))
    if any(form.summed in r.variables for r in rows):
        raise flow.mixed(node, f"{N.said(node)} sums over the tokens of {N.said(form.left)} and {N.said(form.right)}")
    if form.summed.extent is None or not form.summed.extent.is_const:
        return None
    return flow.joined(node, rows)


@rule("aten::outer", "aten::ger")
def _outer(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    index = index_of(node)
    return flow.joined(node, [flow.row(args["self"], index[:1]), flow.row(args["vec2"], index[1:])])


@rule("aten::linear", "attnopt::merged_linear")
def _linear(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    x = args.get("input", args.get("x"))
    others = [o for o in node.all_input_nodes if o is not x]
    if x in flow.numbering or any(not flow.rows[o].is_static or has_symbols(o) for o in others):
        return None
    return _without(flow, node, x, [len(N.shape(x)) - 1])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ gathers


def picked(flow: TokenFlow, node: fx.Node, x: fx.Node, axis: int, which: fx.Node, at: Index) -> tuple[Row, Expr]:
    """Entries of axis ``axis`` of ``x`` that a tensor of numbers names at ``at``: the row of the numbers, and the entry where it is known."""
    extent = N.shape(x)[axis]
    if which in flow.numbering or (flow.rows[which].is_static and not has_symbols(which)):
        i = flow.lifter.lift(which, at)
        known = not any(v.op == "load" and v.value not in flow.orders and v.value not in flow.inverse for v in i.leaves)
        if which in flow.numbering and (extent.is_const or not known):
            raise flow.mixed(node, f"{N.said(node)} picks entries of {N.said(x)} by the number of a row in the batch")
        if known:
            return STATIC, E.add(extent, i) if i.is_const and i.value < 0 else i
        if not extent.is_const:
            raise flow.mixed(node, f"{N.said(node)} picks tokens of {N.said(x)} by a table")
        return STATIC, E.ZERO
    row = flow.row(which, at)
    if not extent.is_const or index_of(x)[axis] in flow.rows[x].variables:
        raise flow.mixed(node, f"{N.said(node)} picks tokens of {N.said(x)} by numbers that are computed")
    if row.position is not None and flow.rows[x].is_static:
        _limit(flow, node, int(extent.value), which, at)
    return row, E.ZERO


def _limit(flow: TokenFlow, node: fx.Node, entries: int, which: fx.Node, at: Index) -> None:
    """A table that is read by position ends somewhere."""
    i = flow.lifter.lift(which, at)
    for v in i.variables:
        line = affine(i, v) if i.kind == "int" else None
        if line is not None and line[1].is_const and line[0] > 0 and v.extent is flow.S:
            flow.limits.append(((entries - 1 - int(line[1].value)) // line[0] + 1, node))


@rule("aten::embedding")
def _embedding(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    weight, ids = args["weight"], args["indices"]
    if not flow.rows[weight].is_static or has_symbols(weight):
        return None
    row, _ = picked(flow, node, weight, 0, ids, index_of(node)[:-1])
    return row


@rule("aten::index", "aten::_unsafe_index")
def _index(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    x, which = args["self"], list(args["indices"])
    rank = len(N.shape(x))
    which += [None] * (rank - len(which))
    used = [d for d, w in enumerate(which) if w is not None]
    if x in flow.numbering or x in flow.counts or any(N.kind(which[d]) != "int" for d in used):
        return None
    index = index_of(node)
    wide = max(len(N.shape(which[d])) for d in used)
    front = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    gathered, plain = index[front : front + wide], iter(index[:front] + index[front + wide :])
    rows: list[Row] = []
    at: list[Expr] = []
    for d, w in enumerate(which):
        if w is None:
            at.append(next(plain))
        else:
            row, entry = picked(flow, node, x, d, w, views.broadcast(gathered, N.shape(w)))
            rows.append(row)
            at.append(entry)
    found = flow.joined(node, [*rows, flow.row(x, tuple(at))])
    if found.token is not None and flow.picks_last(found.token):
        flow.last.add(node)
    return found


@rule("aten::index_select")
def _index_select(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    x, index = args["self"], index_of(node)
    d = N.axis(args["dim"], len(index))
    row, entry = picked(flow, node, x, d, args["index"], (index[d],))
    return flow.joined(node, [row, flow.row(x, (*index[:d], entry, *index[d + 1 :]))])


@rule("aten::gather", "aten::take_along_dim")
def _gather(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    x, index = args["self"], index_of(node)
    which = args.get("index", args.get("indices"))
    d = N.axis(args["dim"], len(index))
    if not isinstance(which, fx.Node) or which in flow.numbering:
        return None
    row, entry = picked(flow, node, x, d, which, views.broadcast(index, N.shape(which)))
    return flow.joined(node, [row, flow.row(x, (*index[:d], entry, *index[d + 1 :]))])


@rule("aten::scatter", "aten::scatter_add", "aten::scatter_reduce")
def _scatter(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """Written along an axis that is no token's."""
    index = index_of(node)
    d = N.axis(args["dim"], len(index))
    operands: list[fx.Node] = [x for x in (args["self"], args["index"], args.get("src")) if isinstance(x, fx.Node) and N.is_tensor(x)]
    if any(x in flow.numbering or x in flow.counts or not N.shape(x)[d].is_const for x in operands):
        return None
    for x in operands:
        if index_of(x)[d] in flow.rows[x].variables:
            raise flow.mixed(node, f"{N.said(node)} writes along axis {d}, the axis of the tokens")
    if any(N.shape(x)[:d] + N.shape(x)[d + 1 :] != N.shape(node)[:d] + N.shape(node)[d + 1 :] for x in operands):
        return None
    return flow.joined(node, [flow.row(x, tuple(E.ZERO if i == d else v for i, v in enumerate(index))) for x in operands])


@rule("aten::one_hot")
def _one_hot(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    return flow.row(args["self"], index_of(node)[:-1])


# ------------------------------------------------------------------------------------------------ put together and taken apart


@rule("aten::cat", "aten::concat", "aten::concatenate")
def _cat(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    index = index_of(node)
    d = N.axis(args["dim"], len(index))
    tensors = args["tensors"]
    if any(not N.is_tensor(t) or len(N.shape(t)) != len(index) for t in tensors):
        return None
    if any(not N.shape(t)[d].is_const for t in tensors):
        raise flow.mixed(node, f"{N.said(node)} puts sequences behind one another")
    return flow.joined(node, [flow.row(t, (*index[:d], E.ZERO, *index[d + 1 :])) for t in tensors])


@rule("aten::pad", "aten::constant_pad_nd")
def _pad(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """Along axes that are no token's."""
    x, index = args["self"], index_of(node)
    padded = {len(index) - 1 - i // 2 for i, n in enumerate(args["pad"]) if n != 0}
    row = _without(flow, node, x, sorted(padded))
    return None if row is None else flow.moved(row, {v: index[d] for d, v in enumerate(index_of(x)) if d not in padded and not v.is_const})


@rule("aten::stack")
def _stack(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    index = index_of(node)
    d = N.axis(args["dim"], len(index))
    return flow.joined(node, [flow.row(t, index[:d] + index[d + 1 :]) for t in args["tensors"]])


@rule("getitem")
def part(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """One of several results, all of which have the same rows."""
    parent = node.args[0]
    assert isinstance(parent, fx.Node)
    return None if N.op_name(parent) in _PARTS else flow.rows.get(parent)


_PARTS = {f"aten::{n}" for n in ("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk")}


@rule(*_PARTS)
def _parts(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """Its parts are views of its operand, and say it themselves."""
    return STATIC


@rule("aten::view_as_complex")
def _as_complex(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    return flow.row(args["self"], (*index_of(node), E.ZERO))


@rule("aten::view_as_real")
def _as_real(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    return flow.row(args["self"], index_of(node)[:-1])
