"""Index maps: for each element of an output, which element of an input it is, and the views that realise such a map.

A map gives one expression in the output's variables for each input dimension. Chains of views compose by
substitution, and a composed map can be made real again by at most: narrow and select, reshape, permute, expand, reshape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.dims import product
from attnopt.ir.expr import Expr

View = tuple[str, tuple[object, ...]]
"""One view: ``("select", (dim, index))``, ``("narrow", (dim, start, length))``, ``("reshape", shape)``,
``("permute", dims)`` or ``("expand", shape)``; shapes, starts and lengths are expressions, dims are ints."""


@dataclass(frozen=True)
class IndexMap:
    """``input[exprs]`` for each value of the output's variables ``out``."""

    out: tuple[Expr, ...]
    exprs: tuple[Expr, ...]

    def realise(self, in_shape: Sequence[Expr]) -> list[View] | None:
        """Views that turn a tensor of ``in_shape`` into one of the output's shape; None where no such views exist."""
        views: list[View] = []
        atoms_in: list[Expr] = []  # the pieces of output variables that the input's axes run over, in memory order
        axis = 0
        for e, extent in zip(self.exprs, in_shape, strict=True):
            digits = _digits(e)
            if digits is None:
                return None
            offset, atoms = digits
            if not atoms:
                if extent is E.ONE and offset is E.ZERO:
                    views.append(("select", (axis, E.ZERO)))
                else:
                    views.append(("select", (axis, offset)))
                continue
            covered = product([_extent(a) for a in atoms])
            if covered is not extent or offset is not E.ZERO:
                views.append(("narrow", (axis, offset, covered)))
            atoms_in.extend(atoms)
            axis += 1
        if len(set(atoms_in)) != len(atoms_in):
            return None
        atoms_out: list[Expr] = []
        missing: list[bool] = []
        for v in self.out:
            pieces = _pieces(v, atoms_in)
            if pieces is None:
                return None
            for p in pieces:
                atoms_out.append(p)
                missing.append(p not in atoms_in)
        if set(atoms_in) - set(atoms_out):
            return None
        if len(atoms_in) != axis:
            views.append(("reshape", tuple(_extent(a) for a in atoms_in)))
        kept = [a for a, gone in zip(atoms_out, missing, strict=True) if not gone]
        order = tuple(atoms_in.index(a) for a in kept)
        if order != tuple(range(len(order))):
            views.append(("permute", order))
        out_shape = tuple(_whole(v) for v in self.out)
        if any(missing):
            views.append(("reshape", tuple(E.ONE if gone else _extent(a) for a, gone in zip(atoms_out, missing, strict=True))))
            full = tuple(_extent(a) for a in atoms_out)
            if any(_extent(a) is not E.ONE for a, gone in zip(atoms_out, missing, strict=True) if gone):
                views.append(("expand", full))
            if full != out_shape:
                views.append(("reshape", out_shape))
        elif tuple(_extent(a) for a in kept) != out_shape:
            views.append(("reshape", out_shape))
        return views

    @property
    def is_permutation(self) -> bool:
        """Whether every input axis is one whole output variable or a constant: realising it copies nothing."""
        seen = [e for e in self.exprs if not e.is_const]
        return all(e.op == "var" for e in seen) and len(set(seen)) == len(seen)


def _whole(v: Expr) -> Expr:
    assert v.extent is not None
    return v.extent


def _extent(atom: Expr) -> Expr:
    """How many values a piece takes: a variable, ``v // c``, ``v % c`` or ``(v // c) % d``."""
    if atom.op == "var":
        return _whole(atom)
    inner, d = atom.args
    return d if atom.op == "mod" else E.floordiv(_extent(inner), d)


def _digits(e: Expr) -> tuple[Expr, list[Expr]] | None:
    """``e`` as offset + a number written in mixed radix: its digits, most significant first."""
    offset: list[Expr] = []
    parts: list[tuple[Expr, Expr]] = []  # (weight, atom)
    for c, a in E.terms(e):
        if a is None:
            offset.append(E.const(c))
            continue
        factors = list(a.args) if a.op == "mul" else [a]
        moving = [f for f in factors if f.variables]
        rest = [f for f in factors if not f.variables]
        if not moving:
            offset.append(E.mul(E.const(c), *rest))
        elif len(moving) == 1 and c > 0 and _is_piece(moving[0]):
            parts.append((E.mul(E.const(c), *rest), moving[0]))
        else:
            return None
    atoms: list[Expr] = []
    weight = E.ONE
    while parts:
        found = next((p for p in parts if p[0] is weight), None)
        if found is None:
            return None
        parts.remove(found)
        atoms.append(found[1])
        weight = E.mul(weight, _extent(found[1]))
    return E.add(E.ZERO, *offset), atoms[::-1]


def _is_piece(a: Expr) -> bool:
    if a.op == "var":
        return True
    if a.op not in ("floordiv", "mod") or a.args[1].variables:
        return False
    return a.args[0].op == "var" or (a.op == "mod" and a.args[0].op == "floordiv" and _is_piece(a.args[0]))


def _pieces(v: Expr, atoms: Sequence[Expr]) -> list[Expr] | None:
    """How ``v`` is put together from ``atoms``, most significant first; pieces that no atom covers are added."""
    mine = [a for a in atoms if v in a.variables]
    if not mine:
        return [v]
    if mine == [v]:
        return [v]
    divisors = {a.args[1] for a in mine if a.op in ("floordiv", "mod")}
    if len(divisors) != 1 or any(a.op not in ("floordiv", "mod") or a.args[0] is not v for a in mine):
        return None
    (d,) = divisors
    whole = _whole(v)
    if E.mod(whole, d) is not E.ZERO:
        return None
    return [E.floordiv(v, d), E.mod(v, d)]
