"""Parts of a score or mask program that are better computed by PyTorch, once, than again in each tile of a kernel.

Where a program turns floats into integers or decisions (a relative-position bucket is ``trunc(log(distance) * c)``), the last
bit decides which bucket: a kernel that rounds otherwise, as by fusing a product into a sum, computes another function. Such
parts are evaluated here and reach the kernel as one more load. A part that depends on query and key by their distance only
becomes a table over distances, which is linear in the sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.kernels.evaluate import Env, Range, Value, as_tensor, capturing, evaluate, once

QUERIES = E.sym("@Sq", 0)
"""The number of queries, as a kernel knows it."""

DISTANCE = E.load("@distance", (), "int")
"""k - q as an integer of which nothing is known: a variable would be taken for non-negative."""

_DECISIONS = {"trunc", "floor", "ceil", "round", "le", "lt", "eq"}
_EXACT = {"const", "load", "float", "where", "min", "max", "abs"}
FOREIGN = {"pow"}
"""Operations that the Triton emitter does not have."""


@dataclass(frozen=True)
class Part:
    """One part evaluated beforehand. ``axes`` are the variables that it has; ``d`` stands for the distance k - q."""

    expr: Expr
    """In terms of ``DISTANCE`` where ``axes`` has ``d``."""
    axes: str
    kind: E.Kind

    @cached_property
    def constant(self) -> bool:
        """Whether it is the same for all tensors: it reads none."""
        return not any(x.op == "load" and x is not DISTANCE for x in self.expr.leaves)

    @cached_property
    def shareable(self) -> bool:
        """Whether it is a table over distances that is made anew for each call, and that a call may be given instead (``attnopt::distance_table``)."""
        return "d" in self.axes and self.kind == "float" and not self.constant

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """The sizes that it reads."""
        return tuple(s.value[0] for s in sorted(self.expr.leaves, key=lambda e: e.key) if s.op == "sym")

    @property
    def levels(self) -> bool:
        """Whether the distance reaches it through values that may be the same for many distances, as bucket numbers are (``runs``)."""
        return "d" in self.axes and DISTANCE not in _fixed(self.expr)

    def index(self, variables: Mapping[str, Expr]) -> tuple[Expr, ...]:
        """How the kernel indexes its tensor."""
        return tuple(E.add(E.sub(variables["k"], variables["q"]), E.sub(QUERIES, E.ONE)) if a == "d" else variables[a] for a in self.axes)

    def env(
        self,
        shape: Mapping[str, int],
        loads: Sequence[Tensor],
        sizes: Mapping[str, int],
        device: torch.device,
        known: Mapping[Expr, Value] | None = None,
        limits: Mapping[Expr, Range] | None = None,
        margin: int = 0,
    ) -> Env:
        """Where ``expr`` is evaluated: distances lie along the last axis. ``shape`` gives the extents of b, h, q and k. For the rest see ``tensor``."""
        ranges = {name: (0, n) for name, n in shape.items() if "d" not in self.axes or name in "bh"}
        env = Env(ranges, loads, sizes, torch.float32, device, known=known or {}, limits=limits or {})
        if "d" in self.axes and not known:
            env.known = {DISTANCE: torch.arange(1 - shape["q"] - margin, shape["k"] + margin, device=device).view(1, 1, 1, -1)}
        return env

    def tensor(
        self,
        shape: Mapping[str, int],
        loads: Sequence[Tensor],
        sizes: Mapping[str, int],
        device: torch.device,
        known: Mapping[Expr, Value] | None = None,
        limits: Mapping[Expr, Range] | None = None,
        margin: int = 0,
    ) -> Tensor:
        """Its values, one axis per letter of ``axes``; ``shape`` gives the extents of b, h, q and k. ``known`` are values below it, of all
        that reads the distance if of any, and ``limits`` the least and greatest of those that are.

        With a ``margin`` the memory holds that many more distances at each end, for a kernel that reads whole tiles.
        """
        margin = margin if "d" in self.axes else 0
        env = self.env(shape, loads, sizes, device, known, limits, margin)
        extents = [shape.get(a, shape["q"] + shape["k"] - 1 + 2 * margin) for a in self.axes]
        (value,), _ = evaluate((self.expr,), env)
        x = as_tensor(value, self.kind, env)
        x = x.view((1,) * (4 - x.dim()) + tuple(x.shape))
        full = [
            n if a in self.axes or (a == "k" and "d" in self.axes) else 1
            for a, n in zip("bhqk", (shape["b"], shape["h"], shape["q"], extents[-1] if extents else 1), strict=True)
        ]
        x = x.expand(full).reshape(extents)
        return x.contiguous()[..., margin : x.shape[-1] - margin] if margin else x


def part_tensor(part: Part, shape: Mapping[str, int], loads: Sequence[Tensor], sizes: Mapping[str, int], device: torch.device, margin: int = 0) -> Tensor:
    """``part.tensor``, where what is the same for all tensors (a distance's bucket, say) is computed once."""
    if part.constant:
        return once(_constant_part, device)(part, tuple(shape.items()), _needed(part, sizes), device, margin)
    if "d" not in part.axes:
        return part.tensor(shape, loads, sizes, device, margin=margin)
    key = part, tuple(shape.items()), _needed(part, sizes), device, margin
    # to look at numbers is to wait for the device: not while a CUDA graph is captured
    limits = {} if capturing(device) else _fixed_limits(*key)
    return part.tensor(shape, loads, sizes, device, once(_fixed_values, device)(*key), limits, margin)


def runs(part: Part, shape: Mapping[str, int], sizes: Mapping[str, int], device: torch.device) -> Tensor:
    """int32 [distances]: for the index of a distance the last index up to which the part surely has one value. See ``Part.levels``."""
    return once(_runs, device)(part, tuple(shape.items()), _needed(part, sizes), device)


Shape = tuple[tuple[str, int], ...]


def _needed(part: Part, sizes: Mapping[str, int]) -> Shape:
    return tuple([(name, sizes[name]) for name in part.symbols])


@lru_cache(maxsize=256)
def _constant_part(part: Part, shape: Shape, sizes: Shape, device: torch.device, margin: int) -> Tensor:
    return part.tensor(dict(shape), (), dict(sizes), device, margin=margin)


@lru_cache(maxsize=256)
def _fixed_values(part: Part, shape: Shape, sizes: Shape, device: torch.device, margin: int = 0) -> dict[Expr, Value]:
    env = part.env(dict(shape), (), dict(sizes), device, margin=margin)
    fixed = _fixed(part.expr)
    return dict(zip(fixed, evaluate(fixed, env)[0], strict=True))


@lru_cache(maxsize=256)
def _fixed_limits(part: Part, shape: Shape, sizes: Shape, device: torch.device, margin: int = 0) -> dict[Expr, Range]:
    values = _fixed_values(part, shape, sizes, device, margin).items()
    return {e: (int(x.min()), int(x.max())) for e, x in values if isinstance(x, Tensor) and e.kind == "int" and x.numel()}


@lru_cache(maxsize=256)
def _runs(part: Part, shape: Shape, sizes: Shape, device: torch.device) -> Tensor:
    values = [x.flatten() for x in once(_fixed_values, device)(part, shape, sizes, device).values() if isinstance(x, Tensor)]
    n = dict(shape)["q"] + dict(shape)["k"] - 1
    changes = torch.zeros(n, dtype=torch.bool, device=device)
    changes[-1] = True
    for x in values:
        changes[:-1] |= x[1:] != x[:-1]
    last = torch.where(changes, torch.arange(n, device=device), n - 1)
    return last.flip(0).cummin(0).values.flip(0).to(torch.int32)


@lru_cache(maxsize=1024)
def _fixed(expr: Expr) -> tuple[Expr, ...]:
    """The largest parts of ``expr`` that read the distance and no tensor."""
    if not any(x is DISTANCE for x in expr.leaves):
        return ()
    if all(x.op != "load" or x is DISTANCE for x in E.postorder(expr)) and not expr.variables:
        return (expr,)
    return tuple(dict.fromkeys(f for a in expr.args for f in _fixed(a)))


def load_tensors(
    parts: Sequence[Part],
    shape: Mapping[str, int],
    loads: Sequence[Tensor],
    sizes: Mapping[str, int],
    device: torch.device,
    margin: int = 0,
    tables: Sequence[Tensor] = (),
) -> list[Tensor]:
    """The tensors of all load slots of a generated kernel: ``loads`` and then the parts, booleans as bytes.

    ``tables``: those of the ``shareable`` parts, in order, with a margin, where they were worked out before; one whose margin is smaller than ``margin``
    is worked out again, since the tensors have moved to another kernel since it was asked for.
    """
    given = given_tables(parts, shape, margin, tables)
    tensors = [*loads, *(part_tensor(p, shape, loads, sizes, device, margin) if given.get(p) is None else given[p] for p in parts)]
    return [x.view(torch.uint8) if x.dtype == torch.bool else x for x in tensors]


def given_tables(parts: Sequence[Part], shape: Mapping[str, int], margin: int, tables: Sequence[Tensor]) -> dict[Part, Tensor]:
    """The given tables without their margins, by their parts; of those that have one of at least ``margin``."""
    if not tables:
        return {}
    shared = [p for p in parts if p.shareable]
    if len(shared) != len(tables):
        raise AttnoptError(f"This attention reads {len(shared)} tables over distances that may be given, and was given {len(tables)}.")
    found = {}
    for part, x in zip(shared, tables, strict=True):
        n = shape["q"] + shape["k"] - 1
        spare, odd = divmod(x.shape[-1] - n, 2)
        if x.dim() != len(part.axes) or ("h" in part.axes and x.shape[0] != shape["h"]) or spare < 0 or odd:
            raise AttnoptError(
                f"The table {tuple(x.shape)} over distances does not fit {shape['q']} queries and {shape['k']} keys of {shape['h']} heads: its last axis has {n} entries, with as many before as behind."
            )
        if spare >= margin:
            found[part] = x.narrow(-1, spare, n)
    return found


def materialise(programs: Sequence[Expr], first_slot: int) -> tuple[tuple[Expr, ...], tuple[Part, ...]]:
    """``programs`` with their delicate parts replaced by loads from slot ``first_slot`` on, and these parts in order."""
    parts: list[Part] = []
    table: dict[Expr, Expr] = {}
    variables = {v.value: v for p in programs for v in p.variables}
    delicate = _delicate(programs)

    def visit(e: Expr) -> None:
        if e in table or e not in delicate:
            return
        part = _part(e)
        if part is not None:
            table[e] = E.load(first_slot + len(parts), part.index(variables), part.kind)
            parts.append(part)
            return
        for a in e.args:
            visit(a)

    for p in programs:
        visit(p)
    return tuple(E.substitute(p, table) for p in programs), tuple(parts)


def _delicate(programs: Sequence[Expr]) -> set[Expr]:
    """Nodes at or below which a decision is taken on rounded floats, other than on the score."""
    inexact: set[Expr] = set()
    out: set[Expr] = set()
    for e in E.postorder(*programs):
        negation = e.op == "mul" and len(e.args) == 2 and e.args[0].is_const and abs(e.args[0].value) == 1
        if (e.kind == "float" and e.op not in _EXACT and not negation) or any(a in inexact for a in e.args):
            inexact.add(e)
        here = (e.op in _DECISIONS or e.op in FOREIGN) and any(a in inexact or e.op in FOREIGN for a in e.args) and E.score() not in e.leaves
        if here or any(a in out for a in e.args):
            out.add(e)
    return out


def _part(e: Expr) -> Part | None:
    """``e`` as a part: a function of distance is taken whole, anything else only where the decision itself is taken."""
    if E.score() in e.leaves:
        return None
    names = {v.value: v for v in e.variables}
    whole = by_distance(e)
    if whole is not None:
        return whole
    if e.op in _DECISIONS or e.op in FOREIGN:
        return Part(e, "".join(a for a in "bhqk" if a in names), e.kind)
    return None


def by_distance(e: Expr) -> Part | None:
    """``e`` as a function of the distance from query to key (and the head), or None where it is not one."""
    names = {v.value: v for v in e.variables}
    if not {"q", "k"} <= set(names):
        return None
    moved = E.substitute(e, {names["k"]: E.add(names["q"], DISTANCE)})
    left = {v.value for v in moved.variables}
    return None if left & {"b", "q", "k"} else Part(moved, ("h" if "h" in left else "") + "d", e.kind)
