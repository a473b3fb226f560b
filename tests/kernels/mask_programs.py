"""Random mask programs and the tensors that they read, as hypothesis strategies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Dims

SENTINELS = [-(1 << 63), (1 << 62) + 1, (1 << 52) + 1, -1]
"""Ids that models mark padding with, and integers that float64 does not hold."""


@dataclass(frozen=True)
class Shape:
    B: int
    H: int
    Sq: int
    Skv: int

    @property
    def dims(self) -> Dims:
        c = E.const
        same = self.Sq == self.Skv
        sq = E.sym("s1")
        return Dims(E.sym("s0"), c(self.H), c(self.H), sq, sq if same else E.sym("s2"), c(8), c(8))

    @property
    def sizes(self) -> dict[str, int]:
        return {"s0": self.B, "s1": self.Sq} | ({} if self.Sq == self.Skv else {"s2": self.Skv})

    @property
    def extents(self) -> tuple[int, int, int, int]:
        return self.B, self.H, self.Sq, self.Skv


SHAPES = st.builds(Shape, st.integers(1, 2), st.integers(1, 2), st.integers(1, 13), st.integers(1, 13))


@dataclass(frozen=True)
class Program:
    mask: Expr
    loads: list[Tensor]


@st.composite
def programs(draw: st.DrawFn, shape: Shape) -> Program:
    """A mask of a few conjuncts, disjuncts and comparisons, over indices, lengths, ids, tables, gathers and dense tensors."""
    d = shape.dims
    seed = draw(st.integers(0, 1 << 20))
    g = torch.Generator().manual_seed(seed)
    S = max(shape.Sq, shape.Skv)
    extent = {"b": shape.B, "h": shape.H, "q": shape.Sq, "k": shape.Skv}
    variables = {"b": d.b, "h": d.h, "q": d.q, "k": d.k}
    loads: list[Tensor] = []

    def tensor(kind: E.Kind, size: list[int]) -> Tensor:
        if kind == "bool":
            # runs of equal values, so that some tiles are all of one kind
            return torch.rand(size, generator=g).cumsum(-1).fmod(5.0) < 3.5
        if kind == "float":
            x = torch.randint(-2, 3, size, generator=g).float() * 0.1
            odd = draw(st.sampled_from([None, torch.nan, torch.inf, -torch.inf]))
            return x if odd is None else torch.where(torch.rand(size, generator=g) < 0.2, odd, x)
        x = torch.randint(0, 6, size, generator=g)
        x = x.sort(-1).values if draw(st.booleans()) and size else x
        odd = draw(st.sampled_from([None, *SENTINELS]))
        return x if odd is None else torch.where(torch.rand(size, generator=g) < 0.2, odd, x)

    def load(kind: E.Kind) -> Expr:
        names = draw(st.sampled_from(["", "b", "h", "bk", "bq", "k", "q", "qk", "bhqk", "kk", "kb"]))
        size = [S + 2 if n in "qk" else extent[n] for n in names]
        index: list[Expr] = []
        for n in names:
            shift = draw(st.integers(-2, 3)) if n in "qk" and draw(st.integers(0, 3)) == 0 else 0
            index.append(E.add(variables[n], E.const(shift)))
        x = tensor(kind, size)
        if "h" in names and draw(st.booleans()):
            x = x.narrow(names.index("h"), 0, 1).expand(size)
        loads.append(x)
        return E.load(len(loads) - 1, index, kind)

    def table(kind: E.Kind, depth: int) -> Expr:
        """A load at a computed index, or at two."""
        index = [integer(depth - 1) for _ in range(draw(st.integers(1, 2)))]
        loads.append(tensor(kind, [draw(st.integers(1, 7)) for _ in index]))
        return E.load(len(loads) - 1, index, kind)

    def integer(depth: int) -> Expr:
        leaf = depth <= 0
        op = draw(
            st.sampled_from(
                ["q", "k", "const", "size", "load"]
                if leaf
                else ["q", "k", "load", "table", "add", "sub", "mul", "floordiv", "mod", "min", "max", "abs", "where", "trunc"]
            )
        )
        if op == "const":
            return E.const(draw(st.integers(-3, 9)))
        if op == "size":
            return draw(st.sampled_from([d.Sq, d.Skv]))
        if op in "qk":
            return variables[op]
        if op == "load":
            return load("int")
        if op == "table":
            return table("int", depth)
        if op in ("floordiv", "mod"):
            by = E.const(draw(st.sampled_from([2, 3, 4, -3])))
            divisor = by if draw(st.booleans()) else E.maximum(E.absolute(load("int")), E.const(2))
            return E.build(op, integer(depth - 1), divisor)
        if op == "abs":
            return E.absolute(integer(depth - 1))
        if op == "where":
            return E.where(boolean(depth - 1), integer(depth - 1), integer(depth - 1))
        if op == "trunc":
            return E.as_int(real(depth - 1))
        a, b = integer(depth - 1), integer(depth - 1)
        return {"add": E.add, "sub": E.sub, "mul": E.mul, "min": E.minimum, "max": E.maximum}[op](a, b)

    def real(depth: int) -> Expr:
        op = draw(st.sampled_from(["load", "const"] if depth <= 0 else ["load", "integer", "min", "max", "abs", "neg", "where", "sum", "scaled"]))
        if op == "load":
            return load("float")
        if op == "const":
            return E.const(draw(st.sampled_from([0.0, 0.1, -0.2, 1e15])))
        if op == "integer":
            return E.as_float(integer(depth - 1))
        if op == "where":
            return E.where(boolean(depth - 1), real(depth - 1), real(depth - 1))
        if op == "abs":
            return E.absolute(real(depth - 1))
        if op == "neg":
            return E.neg(real(depth - 1))
        if op == "scaled":
            return E.mul(E.const(0.3), real(depth - 1))
        a, b = real(depth - 1), real(depth - 1)
        return {"min": E.minimum, "max": E.maximum, "sum": E.add}[op](a, b)

    def boolean(depth: int) -> Expr:
        op = draw(st.sampled_from(["load", "le", "eq"] if depth <= 0 else ["load", "table", "le", "lt", "eq", "causal", "and", "or", "not", "same", "float"]))
        if op == "load":
            return load("bool")
        if op == "table":
            return table("bool", depth)
        if op == "causal":
            return E.le(d.k, E.add(d.q, E.const(draw(st.integers(-3, 3)))))
        if op == "float":
            return draw(st.sampled_from([E.le, E.lt, E.eq]))(real(depth - 1), real(depth - 1))
        if op == "not":
            return E.negate(boolean(depth - 1))
        if op in ("and", "or", "same"):
            a, b = boolean(depth - 1), boolean(depth - 1)
            return {"and": E.all_of, "or": E.any_of, "same": E.eq}[op](a, b)
        return {"le": E.le, "lt": E.lt, "eq": E.eq}[op](integer(depth - 1), integer(depth - 1))

    return Program(boolean(draw(st.integers(1, 3))), loads)
