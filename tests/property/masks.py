"""Mask conditions: each as PyTorch source and, apart from it, as a NumPy condition on the indices b, h, q, k.

A near miss is a field of an atom (another comparison, a shifted diagonal, one entry of a buffer turned over, the wrong axis): the
same two descriptions hold for it, so nothing else needs to know that it is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from property.emit import LONGEST, Emitter

Compare = Literal["<=", "<", ">=", ">"]
Align = Literal["top_left", "bottom_right"]
_NUMPY = {"<=": np.less_equal, "<": np.less, ">=": np.greater_equal, ">": np.greater, "==": np.equal, "!=": np.not_equal}


@dataclass
class World:
    """The indices as arrays that broadcast to [B, H, S, T], the sizes, and every tensor by name in float64 or integers."""

    B: int
    H: int
    S: int
    T: int
    tensors: dict[str, np.ndarray]
    b: np.ndarray = field(init=False)
    h: np.ndarray = field(init=False)
    q: np.ndarray = field(init=False)
    k: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.b, self.h, self.q, self.k = np.ogrid[: self.B, : self.H, : self.S, : self.T]

    def corner(self, align: Align) -> int:
        return self.T - self.S if align == "bottom_right" else 0


class Mask:
    """True where a key is visible."""

    def code(self, e: Emitter) -> str:
        """Source of a bool tensor that broadcasts to [B, H, S, T]; ``i`` [S, 1] and ``j`` [1, T] are positions."""
        raise NotImplementedError

    def truth(self, w: World) -> np.ndarray:
        raise NotImplementedError

    def parts(self) -> Iterator[Mask]:
        yield self

    @property
    def conjuncts(self) -> tuple[Mask, ...]:
        return (self,)


def _corner(align: Align) -> str:
    return " + (T - S)" if align == "bottom_right" else ""


def _plus(n: int) -> str:
    return f" + {n}" if n > 0 else f" - {-n}" if n < 0 else ""


@dataclass(frozen=True)
class Diagonal(Mask):
    """``k op q + shift``, counted from the top left or the bottom right corner. Causal with ``<=`` and no shift."""

    op: Compare = "<="
    shift: int = 0
    align: Align = "top_left"
    spelling: Literal["arange", "flipped", "difference", "triangle", "complement", "cumsum", "buffer"] = "arange"
    wrong: tuple[int, int] | None = None
    """An entry of the buffer that is turned over."""

    def code(self, e: Emitter) -> str:
        shift = _corner(self.align) + _plus(self.shift)
        if self.spelling == "arange":
            return f"(j {self.op} i{shift})"
        if self.spelling == "flipped":
            other = {"<=": ">=", "<": ">", ">=": "<=", ">": "<"}[self.op]
            return f"(i{shift} {other} j)"
        if self.spelling == "difference":
            return f"(j - i {self.op} 0{shift})"
        if self.spelling == "cumsum":
            return f"((torch.ones(T, dtype=torch.int64).cumsum(0) - 1)[None, :] {self.op} i{shift})"
        at = {"<=": 0, "<": -1, ">=": 0, ">": 1}[self.op] + self.shift
        low = self.op in ("<=", "<")
        if self.spelling == "triangle":
            return f"torch.ones(S, T, dtype=torch.bool).{'tril' if low else 'triu'}(0{_corner(self.align)}{_plus(at)})"
        if self.spelling == "complement":
            return f"(torch.ones(S, T).{'triu' if low else 'tril'}(0{_corner(self.align)}{_plus(at + (1 if low else -1))}) == 0)"
        name = e.fresh("triangle")
        e.state(f"torch.ones({LONGEST}, {LONGEST}, dtype=torch.bool).{'tril' if low else 'triu'}({at})", name)
        if self.wrong is not None:
            e.init.append(f"self.{name}[{self.wrong[0]}, {self.wrong[1]}].logical_not_()")
        rows = "T - S:T" if self.align == "bottom_right" else ":S"
        return f"self.{name}[{rows}, :T]"

    def truth(self, w: World) -> np.ndarray:
        seen = _NUMPY[self.op](w.k, w.q + w.corner(self.align) + self.shift)
        if self.wrong is not None and self.spelling == "buffer":
            seen = seen ^ ((w.q + w.corner(self.align) == self.wrong[0]) & (w.k == self.wrong[1]))
        return seen

    @property
    def needs_no_more_queries(self) -> bool:
        """A buffer sliced from the bottom right has rows only while there are at least as many keys as queries."""
        return self.spelling == "buffer" and self.align == "bottom_right"


@dataclass(frozen=True)
class Window(Mask):
    """``q - left <= k <= q + right``; None is unbounded."""

    left: int | None
    right: int | None
    align: Align = "top_left"
    spelling: Literal["arange", "difference", "abs", "band", "strict"] = "arange"

    def code(self, e: Emitter) -> str:
        c = _corner(self.align)
        sides: list[str] = []
        if self.spelling == "abs" and self.left == self.right and self.left is not None:
            return f"((i{c} - j).abs() <= {self.left})"
        if self.spelling == "band":
            if self.left is not None:
                sides.append(f"torch.ones(S, T, dtype=torch.bool).triu(0{c}{_plus(-self.left)})")
            if self.right is not None:
                sides.append(f"torch.ones(S, T, dtype=torch.bool).tril(0{c}{_plus(self.right)})")
        elif self.spelling == "difference":
            if self.left is not None:
                sides.append(f"(i{c} - j <= {self.left})")
            if self.right is not None:
                sides.append(f"(i{c} - j >= {-self.right})")
        elif self.spelling == "strict":
            if self.left is not None:
                sides.append(f"(j > i{c}{_plus(-self.left - 1)})")
            if self.right is not None:
                sides.append(f"(j < i{c}{_plus(self.right + 1)})")
        else:
            if self.left is not None:
                sides.append(f"(j >= i{c}{_plus(-self.left)})")
            if self.right is not None:
                sides.append(f"(j <= i{c}{_plus(self.right)})")
        return f"({' & '.join(sides)})" if sides else "torch.ones(S, T, dtype=torch.bool)"

    def truth(self, w: World) -> np.ndarray:
        d = w.q + w.corner(self.align) - w.k
        seen = np.ones(d.shape, bool)
        if self.left is not None:
            seen = seen & (d <= self.left)
        if self.right is not None:
            seen = seen & (d >= -self.right)
        return seen


@dataclass(frozen=True)
class Padding(Mask):
    """A tensor says which keys there are. ``axis="q"`` is the near miss that reads it along queries."""

    spelling: Literal["bool", "hidden", "long", "nonzero", "positive", "is one"] = "bool"
    axis: Literal["k", "q"] = "k"

    def tensor(self, e: Emitter) -> str:
        kind = "bool" if self.spelling in ("bool", "hidden") else "zero or one"
        return e.input(self.name, ("B", "T" if self.axis == "k" else "S"), kind)

    @property
    def name(self) -> str:
        return f"pad_{'b' if self.spelling in ('bool', 'hidden') else 'l'}_{self.axis}"

    def code(self, e: Emitter) -> str:
        x = f"{self.tensor(e)}{'[:, None, None, :]' if self.axis == 'k' else '[:, None, :, None]'}"
        return {"bool": x, "hidden": f"(~{x})", "long": f"{x}.bool()", "nonzero": f"({x} != 0)", "positive": f"({x} > 0)", "is one": f"({x} == 1)"}[self.spelling]

    def truth(self, w: World) -> np.ndarray:
        x = w.tensors[self.name]
        seen = (x[:, None, None, :] if self.axis == "k" else x[:, None, :, None]) != 0
        return ~seen if self.spelling == "hidden" else seen


@dataclass(frozen=True)
class Document(Mask):
    """Query and key belong to the same document: one tensor of ids for both, or one for each."""

    spelling: Literal["eq", "not ne", "two tensors", "earlier"] = "eq"

    def code(self, e: Emitter) -> str:
        if self.spelling == "two tensors":
            a, c = e.input("ids_q", ("B", "S"), "ids"), e.input("ids_k", ("B", "T"), "ids")
        else:
            a = c = e.input("ids", ("B", "T"), "ids")
        left, right = f"{a}[:, None, :, None]", f"{c}[:, None, None, :]"
        return {"eq": f"({left} == {right})", "two tensors": f"({left} == {right})", "not ne": f"(~({left} != {right}))", "earlier": f"({left} >= {right})"}[self.spelling]

    def truth(self, w: World) -> np.ndarray:
        a, c = (w.tensors["ids_q"], w.tensors["ids_k"]) if self.spelling == "two tensors" else (w.tensors["ids"], w.tensors["ids"])
        left, right = a[:, None, :, None], c[:, None, None, :]
        return left >= right if self.spelling == "earlier" else left == right


@dataclass(frozen=True)
class Below(Mask):
    """Keys (or queries) before a position: a prefix, a global token. ``n`` None takes one length a batch from a tensor."""

    n: int | None
    of: Literal["k", "q"] = "k"

    def code(self, e: Emitter) -> str:
        x = "j" if self.of == "k" else "i"
        return f"({x} < {self.n})" if self.n is not None else f"({x} < {e.input('lengths', ('B',), 'lengths')}[:, None, None, None])"

    def truth(self, w: World) -> np.ndarray:
        n = self.n if self.n is not None else w.tensors["lengths"][:, None, None, None]
        return (w.k if self.of == "k" else w.q) < n


@dataclass(frozen=True)
class Chunk(Mask):
    """Query and key stand in the same block of ``size`` positions (or the key's block is not later)."""

    size: int
    op: Literal["==", "<="] = "=="
    align: Align = "top_left"
    spelling: Literal["//", "div", "minus"] = "//"

    def code(self, e: Emitter) -> str:
        i = f"(i{_corner(self.align)})"
        if self.spelling == "div":
            return f'(torch.div(j, {self.size}, rounding_mode="floor") {self.op} torch.div({i}, {self.size}, rounding_mode="floor"))'
        if self.spelling == "minus":
            return f"(j // {self.size} - {i} // {self.size} {self.op} 0)"
        return f"(j // {self.size} {self.op} {i} // {self.size})"

    def truth(self, w: World) -> np.ndarray:
        return {"==": np.equal, "<=": np.less_equal}[self.op](w.k // self.size, (w.q + w.corner(self.align)) // self.size)


@dataclass(frozen=True)
class Stride(Mask):
    """Every n-th key, counted from the query."""

    n: int

    def code(self, e: Emitter) -> str:
        return f"((i - j) % {self.n} == 0)"

    def truth(self, w: World) -> np.ndarray:
        return (w.q - w.k) % self.n == 0


@dataclass(frozen=True)
class Entry(Mask):
    """One pair of positions."""

    at: tuple[int, int]

    def code(self, e: Emitter) -> str:
        return f"((i == {self.at[0]}) & (j == {self.at[1]}))"

    def truth(self, w: World) -> np.ndarray:
        return (w.q == self.at[0]) & (w.k == self.at[1])


@dataclass(frozen=True)
class Heads(Mask):
    """Only the first heads."""

    n: int

    def code(self, e: Emitter) -> str:
        return f"(torch.arange(H)[:, None, None] < {self.n})"

    def truth(self, w: World) -> np.ndarray:
        return w.h < self.n


@dataclass(frozen=True)
class Joined(Mask):
    """``and``, ``or`` or ``xor`` of two, with the operator, the function or, for ``and``, a product of numbers."""

    how: Literal["and", "or", "xor"]
    left: Mask
    right: Mask
    spelling: Literal["operator", "logical", "bitwise", "number"] = "operator"

    def code(self, e: Emitter) -> str:
        a, c = self.left.code(e), self.right.code(e)
        if self.spelling == "logical":
            return f"torch.logical_{self.how}({a}, {c})"
        if self.spelling == "bitwise":
            return f"torch.bitwise_{self.how}({a}, {c})"
        if self.spelling == "number" and self.how == "and":
            return f"({a}.float() * {c}.float() > 0)"
        if self.spelling == "number" and self.how == "or":
            return f"({a}.long() + {c}.long() >= 1)"
        return f"({a} {({'and': '&', 'or': '|', 'xor': '^'})[self.how]} {c})"

    def truth(self, w: World) -> np.ndarray:
        return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[self.how](self.left.truth(w), self.right.truth(w))

    def parts(self) -> Iterator[Mask]:
        yield self
        yield from self.left.parts()
        yield from self.right.parts()

    @property
    def conjuncts(self) -> tuple[Mask, ...]:
        return (*self.left.conjuncts, *self.right.conjuncts) if self.how == "and" else (self,)


@dataclass(frozen=True)
class Not(Mask):
    of: Mask
    spelling: Literal["~", "logical", "== False"] = "~"

    def code(self, e: Emitter) -> str:
        x = self.of.code(e)
        return {"~": f"(~{x})", "logical": f"torch.logical_not({x})", "== False": f"({x} == False)"}[self.spelling]

    def truth(self, w: World) -> np.ndarray:
        return ~self.of.truth(w)

    def parts(self) -> Iterator[Mask]:
        yield self
        yield from self.of.parts()
