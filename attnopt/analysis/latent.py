"""Keys and values that are made of a few features of each token, which all heads share (MLA).

``shared_key_features``: keys that are in part the same for all heads, as where each token has one rotary key beside the keys of its heads. ``latent_of``: the other
features of the keys, and all values, are products of one *latent* of the token with a matrix of each head::

    k[b, h, s, d] = shared[b, s, d]  or  sum_c latent[b, s, c] * W_k[h, d, c]
    v[b, h, s, e] =                      sum_c latent[b, s, c] * W_v[h, e, c]

Operands are read as functions of batch, head, token and feature, through everything that moves or combines elements. What is claimed is
proven of these expressions, and what cannot be read is not claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.analysis.complex import reader
from attnopt.analysis.contraction import Contraction, contraction
from attnopt.analysis.layout import Refusal
from attnopt.analysis.lift import Lifter
from attnopt.analysis.linear import Cell, affine, cells, index_of
from attnopt.analysis.rotary import operand_variables
from attnopt.analysis.site import AttentionSite, Operand
from attnopt.analysis.views import Index
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.index import View

Source = tuple[fx.Node, list[View]]
"""A node, and the views of it."""


def annotate(site: AttentionSite, lifter: Lifter) -> None:
    """Write into a site which features of its keys all heads share."""
    found = shared_key_features(site, lifter)
    if found is not None:
        site.spec = site.spec.replace(traits=replace(site.spec.traits, shared_key_features=found))


def shared_key_features(site: AttentionSite, lifter: Lifter) -> tuple[int, int] | None:
    """(start, count) of the features that no head has for itself; None when there are none, or only such, or several runs."""
    out, index = operand_variables(site.k)
    head, feature = out[1], out[3]
    if head is E.ZERO or feature is E.ZERO or not feature.extent or not feature.extent.is_const:
        return None
    parts = cells(lifter.lift(site.k.node, index, reader(lifter, None)), feature)
    shared = [c for c in parts or () if head not in c.value.leaves]
    if parts is None or len(shared) == len(parts):
        return None
    features = sorted(c.first + c.step * i for c in shared for i in range(c.count))
    if not features or features[-1] - features[0] + 1 != len(features):
        return None
    return features[0], len(features)


# ------------------------------------------------------------------------------------------------ latents


@dataclass(frozen=True)
class Run:
    """The features ``first .. first + count`` of an operand: products of the latent with ``weight`` [H, count, C]."""

    first: int
    count: int
    weight: Source


@dataclass(frozen=True)
class Latent:
    """What the keys and values of an attention are made of."""

    latent: Source
    """[B, S, C]"""
    width: int
    """C"""
    keys: tuple[Run, ...]
    values: Run
    shared: Source | None
    """[B, 1, S, count]: the features of the keys that all heads share."""


def latent_of(k: fx.Node, v: fx.Node, shared: tuple[int, int] | None, lifter: Lifter) -> Latent:
    """The form above of keys [B, H, S, D] and values [B, H, S, Dv], of which ``shared_key_features`` gave ``shared``. Raises Refusal (AO218) where it was not proven."""
    first, count = shared or (0, 0)
    keys = _products(k, "key", lifter, range(first, first + count))
    values = _products(v, "value", lifter, range(0))
    if len(values) != 1:
        raise _refused(v, f"the values {N.said(v)} are made in {len(values)} parts")
    latents = {(node, tuple(made)): width for _, _, (node, made), _, width in (*keys, *values)}
    if len(latents) != 1:
        names = " and ".join(sorted({N.said(node) for node, _ in latents}))
        raise _refused(
            k, f"keys and values are made of {names}" if len({node for node, _ in latents}) > 1 else f"keys and values are made of different parts of {names}"
        )
    (((node, made), width),) = latents.items()
    runs = [Run(first, count, weight) for first, count, _, weight, _ in (*keys, *values)]
    rest = None if shared is None else _shared(k, *shared)
    return Latent((node, list(made)), width, tuple(runs[:-1]), runs[-1], rest)


def _products(x: fx.Node, what: str, lifter: Lifter, leave_out: range) -> list[tuple[int, int, Source, Source, int]]:
    """(first feature, how many, latent, weight, its width) of the pieces of an operand outside of ``leave_out``."""
    (b, h, s, d), index = operand_variables(Operand(x, ()))
    parts = cells(lifter.lift(x, index, reader(lifter, None)), d, strided=False)
    if parts is None:
        raise _refused(x, f"the {what}s {N.said(x)} are made of very many parts")
    found = []
    for first, count, value in _whole([c for c in parts if c.first not in leave_out], d):
        made = value.value if value.op == "load" else None
        if not isinstance(made, fx.Node):
            raise _refused(x, f"the {what} features {first} to {first + count - 1} of {N.said(x)} are not the result of a projection alone")
        i = index_of(count)
        latent, weight, width = _projected(made, E.substitute(value, {d: E.add(E.const(first), i)}).args, (b, h, s, i), what)
        found.append((first, count, latent, weight, width))
    return found


def _whole(parts: Sequence[Cell], d: Expr) -> list[tuple[int, int, Expr]]:
    """(first, count, value as a function of the feature ``d``), cells that stand side by side and are one function of it put together."""
    out: list[tuple[int, int, Expr]] = []
    for c in parts:
        value = E.substitute(c.value, {index_of(c.count): E.sub(d, E.const(c.first))}) if c.count > 1 else c.value
        if out:
            first, count, before = out[-1]
            # of one feature alone it is not seen how the value depends on it: there it has to agree with its neighbour
            one = value if count == 1 < c.count else before
            left, right = (E.substitute(one, {d: E.const(at)}) if n == 1 else one for at, n in ((first, count), (c.first, c.count)))
            if first + count == c.first and left is before and right is value:
                out[-1] = (first, count + c.count, one)
                continue
        out.append((c.first, c.count, value))
    return out


def _projected(node: fx.Node, index: Index, variables: Index, what: str) -> tuple[Source, Source, int]:
    """The latent and the weight [H, count, C] of which ``node[index]`` is the product, and C."""
    b, h, s, i = variables
    product = _linear(node, index) if N.op_name(node) == "aten::linear" else contraction(node, index, "c")
    if product is None:
        raise _refused(node, f"the {what}s are read from {N.said(node)}, which is no projection")
    if product.addend is not None or product.alpha is not E.FONE:
        raise _refused(node, f"the projection {N.said(node)} of the {what}s has a bias or a factor")
    c = product.summed
    sides = [(product.left, product.left_index), (product.right, product.right_index)]
    tokens = [side for side in sides if not any(v in (h, i) for x in side[1] for v in x.variables)]
    heads = [side for side in sides if not any(v in (b, s) for x in side[1] for v in x.variables)]
    if len(tokens) != 1 or len(heads) != 1 or tokens == heads or c.extent is None or not c.extent.is_const:
        raise _refused(
            node, f"{N.said(node)}, of which the {what}s are made, is not the product of features of a token, which all heads share, with a matrix of each head"
        )
    latent = views.source(*tokens[0], (b, s, c))
    weight = _weight(*heads[0], (h, i, c))
    if latent is None or weight is None:
        raise _refused(node, f"the heads and features of {N.said(node)} are in an order that no view of its operands has")
    return latent, weight, int(c.extent.value)


def _linear(node: fx.Node, index: Index) -> Contraction | None:
    """``linear`` as a product with its weight transposed."""
    args = N.arguments(node)
    x, weight, bias = args["input"], args["weight"], args["bias"]
    if len(N.shape(weight)) != 2:
        return None
    c = E.var("c", N.shape(x)[-1])
    return Contraction(node, x, (*index[:-1], c), weight, (index[-1], c), c, addend=bias, addend_index=index[-1:])


def _weight(node: fx.Node, index: Index, out: Index) -> Source | None:
    """A matrix at a row that is made of head and feature, as views to [H, count, C]; also where each head has further rows, those of other features."""
    found = views.source(node, index, out)
    if found is not None:
        return found
    while (moved := views.step(node, index)) is not None:
        node, index = moved
    h, i, c = out
    if len(index) != 2 or c not in index:
        return None
    axis = index.index(c)
    row = index[1 - axis]
    by_head = affine(row, h)
    by_feature = None if by_head is None else (1, by_head[1]) if i is E.ZERO else affine(by_head[1], i)
    if by_head is None or by_feature is None or by_feature[0] != 1 or not by_feature[1].is_const:
        return None
    assert h.extent is not None and c.extent is not None
    heads, stride, offset = int(h.extent.value), by_head[0], int(by_feature[1].value)
    count = 1 if i.extent is None else int(i.extent.value)
    start, inner = offset - offset % stride, offset % stride
    rows = N.shape(node)[1 - axis]
    if stride < 1 or inner + count > stride or not rows.is_const or start + heads * stride > rows.value:
        return None
    made: list[View] = [] if axis == 1 else [("permute", (1, 0))]
    if (start, heads * stride) != (0, rows.value):
        made.append(("narrow", (0, E.const(start), E.const(heads * stride))))
    made.append(("reshape", (E.const(heads), E.const(stride), c.extent)))
    if (inner, count) != (0, stride):
        made.append(("narrow", (1, E.const(inner), E.const(count))))
    return node, made


def _shared(k: fx.Node, first: int, count: int) -> Source:
    """Features of the first head of keys [B, H, S, D], as those of all heads, read as far up as it goes: [B, 1, S, count]."""
    b, _, s, _ = operand_variables(Operand(k, ()))[0]
    i = E.ZERO if count == 1 else E.var("i", count)
    found = views.source(k, (b, E.ZERO, s, E.add(E.const(first), i)), (b, E.ZERO, s, i), _through_joins)
    assert found is not None, "a slice of a tensor is a view of it"
    return found


def _through_joins(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """A view, or the one tensor of several put behind one another that holds all elements that ``index`` names."""
    if N.op_name(node) not in ("aten::cat", "aten::concat"):
        return views.step(node, index)
    args = N.arguments(node)
    d = N.axis(args["dim"], len(index))
    at = index[d]
    line = (0, at) if at.is_const else next((x for v in at.variables if (x := affine(at, v)) is not None), None)
    if line is None or not line[1].is_const or line[0] not in (0, 1):
        return None
    low = int(line[1].value)
    (extent,) = [v.extent for v in at.variables] or [E.ONE]
    start = 0
    for x in args["tensors"]:
        n = N.shape(x)[d] if N.is_tensor(x) and len(N.shape(x)) == len(index) else E.ZERO
        if not n.is_const or extent is None or not extent.is_const:
            return None
        if start <= low and low + extent.value <= start + n.value:
            return x, (*index[:d], E.sub(at, E.const(start)), *index[d + 1 :])
        start += int(n.value)
    return None


def starts_with(k: fx.Node, v: fx.Node) -> bool:
    """Whether v [B, H, S, Dv] is the first features of k [B, H, S, D]."""
    index: Index = tuple(E.ZERO if n is E.ONE else E.var(name, n) for name, n in zip("bhsd", N.shape(v), strict=True))
    at: tuple[fx.Node, Index] | None = (v, index)
    while at is not None:
        if at == (k, index):
            return N.shape(k)[:3] == N.shape(v)[:3]
        at = views.step(*at)
    return v is k


def _refused(node: fx.Node, what: str) -> Refusal:
    return Refusal(
        "AO218", f"{what}; supported are products of one latent of each token with a matrix of each head, beside key features that all heads share.", node
    )
