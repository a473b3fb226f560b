"""Score and mask programs as Triton source.

Each node of an expression becomes one assignment. What does not depend on the key stands before the loop over keys. Shapes are
minimal, as in ``evaluate``: scalars for what depends on batch and head, [BLOCK_M, 1] on the query, [1, BLOCK_N] on the key.
Indices are 32 bits wide and products of two of them 64, floats are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from attnopt.ir import expr as E
from attnopt.ir.bounds import nonnegative
from attnopt.ir.expr import Expr
from attnopt.kernels.materialise import FOREIGN, QUERIES

_CALLS = {
    "exp": "tl.exp",
    "log": "tl.log",
    "sqrt": "tl.sqrt",
    "rsqrt": "tl.rsqrt",
    "sigmoid": "tl.sigmoid",
    "sin": "tl.sin",
    "cos": "tl.cos",
    "floor": "tl.floor",
    "ceil": "tl.ceil",
    "erf": "tl.erf",
}
_HELPERS = {"tanh": "tanh", "round": "round_half_even"}

HELPERS = """
@triton.jit
def tanh(x):
    # A series where 1 - exp(-2x) would lose digits; no device library, so that it runs under the interpreter too.
    x2 = x * x
    near = x * (1.0 + x2 * (-0.3333333333333333 + x2 * (0.13333333333333333 + x2 * (-0.05396825396825397 + x2 * 0.021869488536155203))))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))


@triton.jit
def round_half_even(x):
    low = tl.floor(x)
    odd = low - 2.0 * tl.floor(low * 0.5)
    up = (x - low > 0.5) | ((x - low == 0.5) & (odd == 1.0))
    return tl.where(up, low + 1.0, low)


@triton.jit
def floor_div(x, d):
    return x // d - ((x % d != 0) & ((x < 0) != (d < 0))).to(tl.int32)


@triton.jit
def floor_mod(x, d):
    r = x % d
    return tl.where((r != 0) & ((r < 0) != (d < 0)), r + d, r)
"""


def unsupported(programs: Iterable[Expr]) -> str | None:
    """Why these programs cannot be written in Triton, as a phrase; None when they can."""
    for e in E.postorder(*programs):
        if e.op in FOREIGN:
            return f"the generated kernel has no {e.op} of the score"
    return None


def literal(v: float | int | bool) -> str:
    """A number as Triton reads it."""
    if isinstance(v, float) and not math.isfinite(v):
        return f'float("{v}")'
    return repr(v)


@dataclass
class Emitter:
    """Names and lines for the programs of one kernel.

    ``clamped`` are the load slots whose computed indices may fall outside of the tensor in branches that are not taken.
    """

    programs: Sequence[Expr]
    clamped: frozenset[int]
    names: dict[Expr, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = list(E.postorder(*self.programs))
        self.sizes = sorted({e.value[0] for e in self.order if e.op == "sym" and e is not QUERIES})
        self.loads = {e.value: len(e.args) for e in self.order if e.op == "load"}
        self.measured = sorted({(e.value, d) for e in self.order if e.op == "load" for d, a in enumerate(e.args) if self.needs_clamp(e, a)})
        for i, e in enumerate(self.order):
            self.names[e] = self._leaf(e) or f"t{i}"

    def _leaf(self, e: Expr) -> str | None:
        if e.op == "const":
            return literal(e.value) if e.value >= 0 else f"({literal(e.value)})"
        if e is QUERIES:
            return "Sq"
        if e.op == "sym":
            return f"size{self.sizes.index(e.value[0])}"
        if e.op == "var":
            return {"b": "b", "h": "h", "q": "q_index", "k": "k_index"}[str(e.value)]
        return "s" if e.op == "score" else None

    def needs_clamp(self, e: Expr, a: Expr) -> bool:
        return e.value in self.clamped and a.op != "var"

    @staticmethod
    def depends(e: Expr) -> str:
        """``tile`` when it changes with the key, ``row`` with the query, otherwise ``scalar``."""
        names = {x.value for x in e.leaves if x.op == "var"}
        return "tile" if "k" in names or E.score() in e.leaves else "row" if "q" in names else "scalar"

    def before_loop(self) -> list[str]:
        """Assignments for all nodes that do not change with the key."""
        return [f"{self.names[e]} = {self.source(e, False)}" for e in self.order if self._own(e) and self.depends(e) != "tile"]

    def in_loop(self, roots: Sequence[Expr], tail: bool) -> list[str]:
        """Assignments in a loop over keys that compute ``roots``; ``tail`` where some keys may lie beyond the last."""
        return [f"{self.names[e]} = {self.source(e, tail)}" for e in E.postorder(*roots) if self._own(e) and self.depends(e) == "tile"]

    def _own(self, e: Expr) -> bool:
        return self._leaf(e) is None

    # ---- one node

    def source(self, e: Expr, tail: bool) -> str:
        """The right-hand side for ``e``."""
        # In a sum the score comes last: large terms beside it may cancel.
        operands = sorted(e.args, key=lambda a: E.score() in a.leaves) if e.op == "add" else e.args
        args = [self.names[a] for a in operands]
        if e.op == "load":
            return self._load(e, tail)
        if e.op in _CALLS:
            return f"{_CALLS[e.op]}({self._tensor(e.args[0])})"
        if e.op in _HELPERS:
            return f"{_HELPERS[e.op]}({self._tensor(e.args[0])})"
        if e.op == "mul" and e.kind == "int" and sum(not a.is_const for a in e.args) > 1:
            return " * ".join(x if a.is_const else f"{x}.to(tl.int64)" for a, x in zip(e.args, args, strict=True))
        if e.op in ("floordiv", "mod"):
            plain = nonnegative(e.args[0]) and nonnegative(e.args[1])
            sign = "//" if e.op == "floordiv" else "%"
            return (
                f"{args[0]} {sign} {args[1]}"
                if plain
                else f"floor_{'div' if e.op == 'floordiv' else 'mod'}({self._tensor(e.args[0])}, {self._tensor(e.args[1])})"
            )
        return _FORMS[e.op](args)

    def _tensor(self, a: Expr) -> str:
        """The operand as a tensor: functions do not take bare numbers."""
        if not a.is_const:
            return self.names[a]
        return f"tl.full((), {literal(a.value)}, tl.{'float32' if a.kind == 'float' else 'int32'})"

    def _load(self, e: Expr, tail: bool) -> str:
        slot = e.value
        address = [f"L{slot}"]
        # scalars first: the address of a tile is then one scalar plus a row plus a column
        for d, a in sorted(enumerate(e.args), key=lambda p: ("scalar", "row", "tile").index(self.depends(p[1]))):
            i = self.names[a]
            if self.needs_clamp(e, a):
                i = f"tl.minimum(tl.maximum({self._tensor(a)}, 0), L{slot}_n{d} - 1)"
            address.append(f"{i} * L{slot}_s{d}" if a.is_const and not self.needs_clamp(e, a) else f"({i}).to(tl.int64) * L{slot}_s{d}")
        names = {x.value for x in e.leaves if x.op == "var"}
        inside = (["row_inside"] if "q" in names else []) + (["key_inside"] if "k" in names and tail else [])
        guard = f", mask={' & '.join(inside)}, other=0" if inside else ""
        x = f"tl.load({' + '.join(address)}{guard})"
        return {"float": f"{x}.to(tl.float32)", "int": f"{x}.to(tl.int64)", "bool": f"({x} != 0)"}[e.kind]


_FORMS: dict[str, Callable[[list[str]], str]] = {
    "add": " + ".join,
    "mul": " * ".join,
    "and": " & ".join,
    "or": " | ".join,
    "div": lambda a: f"{a[0]} / {a[1]}",
    "min": lambda a: f"tl.minimum({a[0]}, {a[1]})",
    "max": lambda a: f"tl.maximum({a[0]}, {a[1]})",
    "abs": lambda a: f"tl.abs({a[0]})",
    "where": lambda a: f"tl.where({a[0]}, {a[1]}, {a[2]})",
    "ge0": lambda a: f"{a[0]} >= 0",
    "eq0": lambda a: f"{a[0]} == 0",
    "le": lambda a: f"{a[0]} <= {a[1]}",
    "lt": lambda a: f"{a[0]} < {a[1]}",
    "eq": lambda a: f"{a[0]} == {a[1]}",
    "same": lambda a: f"{a[0]} == {a[1]}",
    "not": lambda a: f"({a[0]} == 0)",
    "float": lambda a: f"({a[0]}).to(tl.float32)",
    "trunc": lambda a: f"({a[0]}).to(tl.int64)",
}
