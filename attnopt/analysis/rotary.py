"""Rotary embeddings on queries and keys, recognised by what they compute.

An operand of a site is read as a function of its feature ``d``. It is rotary when a range of features falls into pairs,
each of which is one pair of features of an earlier tensor, turned: ``(c * x - s * y, c * y + s * x)`` with the same expressions
c and s in both, which depend on the token and not on the head. How the model spells the turn, its layout, its tables and
whether it takes detours through complex numbers or another dtype does not matter. What is not proven is not claimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.analysis.complex import reader
from attnopt.analysis.lift import Lifter
from attnopt.analysis.linear import Cell, affine, cells, combination, factors, index_of, reads
from attnopt.analysis.pointwise import POINTWISE
from attnopt.analysis.site import AttentionSite, Operand
from attnopt.analysis.views import Index
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.index import IndexMap, View
from attnopt.ir.printing import render
from attnopt.ir.rotary import Pairing, Positions, Rotary


@dataclass(frozen=True)
class Rotation:
    """How one operand of a site came from the tensor before its rotary embedding.

    Target pair i of the operand is ``(cos * x - sin * y, cos * y + sin * x)`` of source pair i; see ``Rotary`` for where pairs stand.
    """

    form: Rotary
    source: fx.Node
    views: tuple[View, ...] | None
    """Views that bring ``source`` to [B, H, S, D] where ``whole``, otherwise to its rotated features [B, H, S, dim]; None where no views do."""
    whole: bool
    """Whether the features that are not rotated come from the same tensor, in place, multiplied with no more than ``factor``."""
    cos: Expr
    """In ``b``, ``s`` and the pair ``i`` (over dim / 2), with loads from nodes of the graph. Without ``factor``."""
    sin: Expr
    factor: Expr
    """What all features are multiplied with as well, such as a scale or an inverse norm; 1.0 for nothing."""


def annotate(site: AttentionSite, lifter: Lifter) -> None:
    """Write into a site what is proven of its rotary embeddings."""
    q, k = site.rotations = rotation(lifter, site.q), rotation(lifter, site.k)
    if q is not None and k is not None and replace(k.form, positions=q.form.positions, offset=q.form.offset) == q.form:
        site.spec = site.spec.replace(traits=replace(site.spec.traits, rotary=q.form))


def rotation(lifter: Lifter, operand: Operand) -> Rotation | None:
    """The rotary embedding that an operand went through last; None where none is proven."""
    shape = _shapes(operand)[-1]
    if not shape[-1].is_const or shape[-1] is E.ONE:
        return None
    out, index = operand_variables(operand)
    for source in _candidates(operand.node, lifter.written):
        value = lifter.lift(operand.node, index, reader(lifter, source))
        if not reads(value, source):
            continue
        tried: list[Cell] | None = None
        for strided in (True, False):
            parts = cells(value, out[-1], strided)
            found = None if parts is None or parts == tried else _proven(parts, source, shape, out, lifter)
            if found is not None:
                return found
            tried = parts
    return None


# ------------------------------------------------------------------------------------------------ the operand as a function


def _shapes(operand: Operand) -> list[tuple[Expr, ...]]:
    """The shape before each view, and after the last."""
    shape = N.shape(operand.node)
    out = [shape]
    for name, args in operand.views:
        if name == "select":
            shape = tuple(n for d, n in enumerate(shape) if d != args[0])
        elif name == "narrow":
            shape = tuple(args[2] if d == args[0] else n for d, n in enumerate(shape))  # type: ignore[misc]
        elif name == "permute":
            shape = tuple(shape[d] for d in args)  # type: ignore[call-overload]
        else:
            shape = args  # type: ignore[assignment]
        out.append(shape)
    return out


def operand_variables(operand: Operand) -> tuple[Index, Index]:
    """The variables b, h, s, d of an operand [B, H, S, D] (zero for axes of size one), and the index into its node behind its views."""
    out = tuple(E.ZERO if n is E.ONE else E.var(name, n) for name, n in zip("bhsd", _shapes(operand)[-1], strict=True))
    index = list(out)
    for (name, args), before, after in reversed(list(zip(operand.views, _shapes(operand), _shapes(operand)[1:], strict=False))):
        at: Any = args[0]
        if name == "select":
            index.insert(at, args[1])  # type: ignore[arg-type]
        elif name == "narrow":
            index[at] = E.add(index[at], args[1])  # type: ignore[arg-type]
        elif name == "permute":
            index = [index[args.index(d)] for d in range(len(args))]
        elif name == "reshape":
            index = list(views.reindex(after, before, tuple(index)))
        else:
            index = list(views.broadcast(tuple(index), before))
    return out, tuple(index)


_CASTS = {f"aten::{n}" for n in ("to", "_to_copy", "type_as")}
_JOINS = {f"aten::{n}" for n in ("cat", "concat", "concatenate", "stack", "view_as_real", "view_as_complex", "constant_pad_nd", "real", "imag", "complex")}
_SPLITS = {f"aten::{n}" for n in ("split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_split", "unsafe_chunk")}
_TRIES = 8


def _candidates(operand: fx.Node, written: frozenset[fx.Node]) -> Iterator[fx.Node]:
    """Tensors that could be the one before the rotation, nearest first: what is read at two places, or as complex numbers."""
    cone: set[fx.Node] = set()
    stack = [operand]
    while stack and len(cone) < 400:
        n = stack.pop()
        if n in cone or not (N.is_tensor(n) or _is_passed(n)):
            continue
        cone.add(n)
        if _is_passed(n) or N.op_name(n) in POINTWISE or N.op_name(n) in _JOINS:
            stack += n.all_input_nodes
    order = {n: i for i, n in enumerate(operand.graph.nodes) if n in cone}
    readers: dict[fx.Node, int] = {}
    tries = 0
    for n in sorted(cone, key=order.__getitem__, reverse=True):
        readers[n] = sum(readers.get(u, 0) if _is_passed(u) else 2 if N.op_name(u) == "aten::view_as_complex" else _times(u, n) for u in n.users if u in cone)
        if readers[n] > 1 and not _is_passed(n) and n not in written and N.op_name(n) not in _JOINS and N.value(n).dtype.is_floating_point:
            yield n
            tries += 1
            if tries == _TRIES:
                return


def _is_passed(n: fx.Node) -> bool:
    """Views, casts, splits and their parts are the tensor that they are made of."""
    name = N.op_name(n)
    return name in views.RULES or name in _CASTS or name in _SPLITS or (name == "getitem" and N.is_tensor(n))


def _times(user: fx.Node, n: fx.Node) -> int:
    return sum(x is n for a in (*user.args, *user.kwargs.values()) for x in (a if isinstance(a, (list, tuple)) else (a,)))


# ------------------------------------------------------------------------------------------------ the proof


@dataclass(frozen=True)
class _Turn:
    """Pairs ``(low, high)`` of target features, turned from ``x`` and ``y``, elements of the source."""

    low: Cell
    high: Cell
    x: Expr
    y: Expr
    cos: Expr
    sin: Expr


def _proven(parts: Sequence[Cell], source: fx.Node, shape: Sequence[Expr], out: Index, lifter: Lifter) -> Rotation | None:
    forms = [(cell, combination(cell.value, source)) for cell in parts]
    turned = [(cell, form) for cell, form in forms if form is not None and len(form) == 2]
    turns = _pairs(turned)
    if not turns:
        return None
    _, h, s, d = out
    pieces = [_angle(t, s, h, lifter) for t in turns]
    if any(p is None for p in pieces):
        return None
    angles = [p for p in pieces if p is not None]
    factor = angles[0].factor
    if any(a.factor is not factor for a in angles):
        return None
    target = _merge([(t.low.first, t.high.first, t.low.step, t.low.count) for t in turns])
    origin = _origin(turns)
    if target is None or origin is None:
        return None
    base, axis, lowest, inside = origin
    before = _merge(inside)
    dim = 2 * sum(t.low.count for t in turns)
    start = min(t.low.first for t in turns)
    if before is None or not _covers(target, dim, start) or not _covers(before, dim, 0):
        return None
    size = int(shape[-1].value)
    whole = dim == size or _rest_is_same([(c, f) for c, f in forms if f is None or len(f) != 2], base, axis, lowest - start, factor, size - dim)
    positions, offset = _positions([a.positions for a in angles])
    form = Rotary(dim, size, start, replace(before, first=before.first), replace(target, first=target.first - start, second=target.second - start), positions, offset)
    feature = d if whole else E.var("d", dim)
    index = tuple(E.add(x, E.const(lowest - (start if whole else 0)), feature) if a == axis else x for a, x in enumerate(base))
    axes = tuple(E.var(name, n) for name, n in zip("bhs", shape, strict=False))
    found = IndexMap((*axes, feature), index).realise(N.shape(source))
    cos, sin = (_piecewise([(x, t.low.count) for x, t in zip(xs, turns, strict=True)]) for xs in ([a.cos for a in angles], [a.sin for a in angles]))
    return Rotation(form, source, None if found is None else tuple(found), whole, cos, sin, factor)


def _pairs(turned: Sequence[tuple[Cell, dict[Expr, Expr]]]) -> list[_Turn] | None:
    """Each cell with its partner, in the order of the first ones; None when one has none."""
    left = sorted(turned, key=lambda p: p[0].first)
    out: list[_Turn] = []
    while left:
        (low, a), *left = left
        found = next((t for other in left if (t := _turn(low, a, *other)) is not None), None)
        if found is None:
            return None
        left = [p for p in left if p[0] is not found.high]
        out.append(found)
    return out


def _turn(low: Cell, a: dict[Expr, Expr], high: Cell, b: dict[Expr, Expr]) -> _Turn | None:
    """low = cos * x - sin * y and high = cos * y + sin * x, for some x and y of the two elements that both read."""
    if low.count != high.count or low.step != high.step or a.keys() != b.keys():
        return None
    for x, y in (tuple(a), tuple(a)[::-1]):
        if a[x] is b[y] and E.neg(a[y]) is b[x]:
            return _Turn(low, high, x, y, a[x], b[x])
    return None


def _merge(blocks: Sequence[tuple[int, int, int, int]]) -> Pairing | None:
    """Blocks (first, second, step, count) of pairs as one run of pairs."""
    first, second, step, count = blocks[0]
    for at_first, at_second, at_step, n in blocks[1:]:
        if count == 1:
            step = at_step if n > 1 else at_first - first
        if (n > 1 and at_step != step) or at_first != first + step * count or at_second != second + step * count:
            return None
        count += n
    return Pairing(first, second, step if count > 1 else 1)


def _covers(p: Pairing, dim: int, start: int) -> bool:
    return {f + p.step * i for f in (p.first, p.second) for i in range(dim // 2)} == set(range(start, start + dim))


def _origin(turns: Sequence[_Turn]) -> tuple[Index, int, int, list[tuple[int, int, int, int]]] | None:
    """Where in the source the pairs stand: (index without the feature, the feature's axis, the lowest feature, blocks counted from it)."""
    base: Index | None = None
    axis = -1
    blocks: list[tuple[int, int, int, int]] = []
    for t in turns:
        differ = [a for a, (p, q) in enumerate(zip(t.x.args, t.y.args, strict=True)) if p is not q]
        if len(differ) != 1:
            return None
        i = index_of(t.low.count)
        spots = [_spot(e.args[differ[0]], i) for e in (t.x, t.y)]
        if spots[0] is None or spots[1] is None:
            return None
        (step, first, rest), (other, second, other_rest) = spots[0], spots[1]
        here = tuple(rest if a == differ[0] else p for a, p in enumerate(t.x.args))
        if other_rest is not rest or other != step or (base is not None and (here != base or differ[0] != axis)) or any(i.op == "var" and i in p.leaves for p in here):
            return None
        base, axis = here, differ[0]
        blocks.append((first, second, step, t.low.count))
    assert base is not None
    lowest = min(min(f, s) + min(0, step * (n - 1)) for f, s, step, n in blocks)
    return base, axis, lowest, [(f - lowest, s - lowest, step, n) for f, s, step, n in blocks]


def _spot(x: Expr, i: Expr) -> tuple[int, int, Expr] | None:
    """``x`` as (slope along i, constant, the rest)."""
    line = affine(x, i) if i.op == "var" else (1, x)
    if line is None:
        return None
    slope, rest = line
    constant = next((int(c) for c, a in E.terms(rest) if a is None), 0)
    return slope, constant, E.sub(rest, E.const(constant))


def _rest_is_same(others: Sequence[tuple[Cell, dict[Expr, Expr] | None]], base: Index, axis: int, zero: int, factor: Expr, count: int) -> bool:
    """Whether the features that are not turned are those of the source, where they stood."""
    for cell, form in others:
        if form is None or len(form) != 1:
            return False
        ((element, c),) = form.items()
        line = E.add(E.const(zero + cell.first), E.mul(E.const(cell.step), index_of(cell.count)))
        if c is not factor or element.args != tuple(E.add(x, line) if a == axis else x for a, x in enumerate(base)):
            return False
    return sum(cell.count for cell, _ in others) == count


def _piecewise(parts: Sequence[tuple[Expr, int]]) -> Expr:
    """Expressions in the pair's number within each block, as one in its number over all."""
    end = sum(n for _, n in parts)
    i = index_of(end)
    out: Expr | None = None
    for x, n in reversed(parts):
        start = end - n
        here = E.substitute(x, {index_of(n): E.sub(i, E.const(start))}) if n > 1 else x
        out = here if out is None else E.where(E.lt(i, E.const(end)), here, out)
        end = start
    assert out is not None
    return out


# ------------------------------------------------------------------------------------------------ cos and sin


@dataclass(frozen=True)
class _Angle:
    cos: Expr
    sin: Expr
    factor: Expr
    positions: tuple[Positions, str]


def _angle(turn: _Turn, s: Expr, h: Expr, lifter: Lifter) -> _Angle | None:
    """The two coefficients as a common factor times cos and sin of one angle, or times one row of two tables."""
    (m, of_cos), (n, of_sin) = factors(turn.cos), factors(turn.sin)
    common = [f for f in of_cos if f in of_sin]
    of_cos, of_sin = [f for f in of_cos if f not in common], [f for f in of_sin if f not in common]
    if abs(m) != abs(n) or len(of_cos) != 1 or len(of_sin) != 1:
        return None
    (c,), (z,) = of_cos, of_sin
    i = index_of(turn.low.count)
    if h in c.leaves | z.leaves or any(i.op == "var" and i in f.leaves for f in common):
        return None
    if c.op == "cos" and z.op == "sin" and c.args == z.args:
        positions = _of_angle(c.args[0], s)
    elif c.op == z.op == "load" and _is_table(c, lifter) and _is_table(z, lifter) and _same_row(c, z):
        positions = _of_row(c, s)
    else:
        return None
    return None if positions is None else _Angle(c, z if m == n else E.neg(z), E.mul(E.const(m), *common), positions)


def _is_table(x: Expr, lifter: Lifter) -> bool:
    """Whether a load reads a tensor that is given, or a constant: one that the model computes could be anything."""
    return x.value.op == "placeholder" or (x.value.op == "get_attr" and lifter.constants(x.value) is not None)


def _same_row(a: Expr, b: Expr) -> bool:
    """Whether two loads read the same token's row: of two tables at one index, or of one table that holds both side by side."""
    if a.value is not b.value:
        return a.args == b.args
    differ = [(p, q) for p, q in zip(a.args, b.args, strict=True) if p is not q]
    return len(differ) == 1 and E.sub(*differ[0]).is_const and not any(v.value == "s" for p in differ[0] for v in p.variables) and not _reads_any(differ[0])


def _reads_any(xs: Sequence[Expr]) -> bool:
    return any(e.op == "load" for x in xs for e in x.leaves)


def _of_angle(angle: Expr, s: Expr) -> tuple[Positions, str] | None:
    """What the position in an angle ``position * frequency`` is; None where the angle is the same for all tokens."""
    position = E.mul(E.ONE, *(f for f in factors(angle)[1] if _of_token(f)))
    if position is E.ONE:
        return ("computed", "0") if s is E.ZERO else None  # of a single token the position is a number like any other
    return _position(position, s)


def _of_row(row: Expr, s: Expr) -> tuple[Positions, str] | None:
    """What the position is by which a table is read."""
    at = next((a for a in row.args if s in a.leaves or _reads_any([a])), None)
    if at is None:
        return ("given", "0") if s is E.ZERO else None
    if row.value.op == "placeholder" and at is s:
        return "given", "0"  # a table of the call: what its rows stand for is the caller's
    return _position(at, s)


def _of_token(x: Expr) -> bool:
    return any(v.value in ("b", "s") for v in x.variables)


def _position(x: Expr, s: Expr) -> tuple[Positions, str]:
    x = x.args[0] if x.op == "float" else x
    if _reads_any([x]):
        return "given", "0"
    offset = E.sub(x, s) if x.kind == "int" else None
    if offset is not None and not offset.variables:
        return "sequence", render(offset)
    return "computed", "0"


def _positions(found: Sequence[tuple[Positions, str]]) -> tuple[Positions, str]:
    if len(set(found)) == 1:
        return found[0]
    return ("given", "0") if any(p == "given" for p, _ in found) else ("computed", "0")
