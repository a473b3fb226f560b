"""Score and mask programs as source in one of Triton's dialects.

Each node of an expression becomes one assignment. What does not depend on the key stands before the loop over keys. Shapes are
minimal, as in ``evaluate``: scalars for what depends on batch and head, [BLOCK_M, 1] on the query, [1, BLOCK_N] on the key.
Indices are 32 bits wide and products of two of them 64, floats are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from attnopt.ir import expr as E
from attnopt.ir.bounds import nonnegative
from attnopt.ir.expr import Expr
from attnopt.kernels.materialise import FOREIGN, QUERIES

_CALLS = ("exp", "log", "sqrt", "rsqrt", "sin", "cos", "floor", "ceil", "erf")
_HELPERS = {"tanh": "tanh", "sigmoid": "sigmoid", "round": "round_half_even"}

_HELPER_SOURCE = """
@{jit}
def tanh(x):
    {tanh}


@{jit}
def sigmoid(x):
    return 1.0 / (1.0 + {ns}.exp(-x))


@{jit}
def round_half_even(x):
    low = {ns}.floor(x)
    odd = low - 2.0 * {ns}.floor(low * 0.5)
    up = (x - low > 0.5) | ((x - low == 0.5) & (odd == 1.0))
    return {ns}.where(up, low + 1.0, low)


@{jit}
def floor_div(x, d):
    return x // d - ((x % d != 0) & ((x < 0) != (d < 0))).to({ns}.int32)


@{jit}
def floor_mod(x, d):
    r = x % d
    return {ns}.where((r != 0) & ((r < 0) != (d < 0)), r + d, r)
"""

_TANH_SERIES = """# A series where 1 - exp(-2x) would lose digits; no device library, so that it runs under the interpreter too.
    x2 = x * x
    near = x * (1.0 + x2 * (-0.3333333333333333 + x2 * (0.13333333333333333 + x2 * (-0.05396825396825397 + x2 * 0.021869488536155203))))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))"""

_TANH_UNIT = """# The hardware's own, with a relative error of 2^-11: less than the rounding of the scores' operands to half precision.
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)"""


@dataclass(frozen=True)
class Dialect:
    """How one of Triton's languages spells what a program needs."""

    ns: str
    """The name under which its functions are imported."""
    jit: str
    scalar: str
    """A number as something that functions take, with its value and its dtype."""
    tanh: str

    @property
    def helpers(self) -> str:
        """Functions that the emitted lines call."""
        return _HELPER_SOURCE.format(ns=self.ns, jit=self.jit, tanh=self.tanh)


TRITON = Dialect("tl", "triton.jit", "tl.full((), {value}, tl.{dtype})", _TANH_SERIES)
GLUON = Dialect("gl", "gluon.jit", "gl.to_tensor({value}).to(gl.{dtype})", _TANH_UNIT)
HELPERS = TRITON.helpers


def unsupported(programs: Iterable[Expr]) -> str | None:
    """Why these programs cannot be written in Triton, as a phrase; None when they can."""
    for e in E.postorder(*programs):
        if e.op in FOREIGN:
            return f"the generated kernel has no {e.op} of the score"
    return None


def literal(v: float | int | bool) -> str:
    """A number as Triton reads it; a float that float32 does not hold is infinite, as it is there."""
    if isinstance(v, float) and not abs(v) <= _GREATEST:
        return f'float("{math.copysign(math.inf, v) if v == v else v}")'
    return repr(v)


_GREATEST = 3.4028235677973366e38
"""The bound from which a float rounds to infinity in float32."""


@dataclass
class Emitter:
    """Names and lines for the programs of one kernel.

    ``clamped`` are the load slots whose computed indices may fall outside of the tensor in branches that are not taken.
    ``inner`` is the index over which the kernel's loop runs: the key, or the query in a kernel whose tiles are [BLOCK_N, BLOCK_M].
    """

    programs: Sequence[Expr]
    clamped: frozenset[int]
    dialect: Dialect = TRITON
    inner: Literal["q", "k"] = "k"
    known: Mapping[Expr, str] = field(default_factory=dict)
    """Leaves that the kernel has computed, by their names in it."""
    spelled: dict[Expr, str] = field(default_factory=dict)
    """Loads for which the kernel has a way of its own, as it writes them."""
    prefix: str = "t"
    names: dict[Expr, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = {QUERIES: "Sq", **self.known}
        self.order = list(E.postorder(*self.programs))
        self.sizes = sorted({e.value[0] for e in self.order if e.op == "sym" and e not in self.known})
        loads = [e for e in self.order if e.op == "load" and e not in self.known and isinstance(e.value, int)]
        self.loads = {e.value: len(e.args) for e in loads}
        self.measured = sorted({(e.value, d) for e in loads for d, a in enumerate(e.args) if self.needs_clamp(e, a)})
        others = {a for e in self.order if e.op not in ("eq", "same", "le", "lt") for a in e.args}
        # integers that are only compared stay as narrow as they are in memory
        self.compared = {e for e in loads if e not in others and e not in self.programs}
        for i, e in enumerate(self.order):
            self.names[e] = self._leaf(e) or f"{self.prefix}{i}"

    def _leaf(self, e: Expr) -> str | None:
        if e.op == "const":
            return literal(e.value) if e.value >= 0 else f"({literal(e.value)})"
        if e in self.known:
            return self.known[e]
        if e.op == "sym":
            return f"size{self.sizes.index(e.value[0])}"
        if e.op == "var":
            return {"b": "b", "h": "h", "q": "q_index", "k": "k_index"}[str(e.value)]
        return "s" if e.op == "score" else None

    def needs_clamp(self, e: Expr, a: Expr) -> bool:
        return e.value in self.clamped and a.op != "var"

    def depends(self, e: Expr) -> str:
        """``tile`` when it changes with the loop's index, ``row`` with the other one, otherwise ``scalar``."""
        names = {x.value for x in e.leaves if x.op == "var"}
        return "tile" if self.inner in names or E.score() in e.leaves else "row" if names & {"q", "k"} else "scalar"

    def before_loop(self) -> list[str]:
        """Assignments for all nodes that do not change with the loop's index."""
        return [f"{self.names[e]} = {self.source(e, False)}" for e in self.order if self._own(e) and self.depends(e) != "tile"]

    def in_loop(self, roots: Sequence[Expr], tail: bool, only: Callable[[Expr], bool] = lambda e: True) -> list[str]:
        """Assignments in the loop that compute ``roots``; ``tail`` where some of its indices may lie beyond the last. Of those, ``only`` some."""
        return [f"{self.names[e]} = {self.source(e, tail)}" for e in E.postorder(*roots) if self._own(e) and self.depends(e) == "tile" and only(e)]

    def all_lines(self, roots: Sequence[Expr]) -> list[str]:
        """Assignments in a loop in which every index changes, and may lie beyond the last."""
        return [f"{self.names[e]} = {self.source(e, True)}" for e in E.postorder(*roots) if self._own(e)]

    def _own(self, e: Expr) -> bool:
        return self._leaf(e) is None

    # ---- one node

    def source(self, e: Expr, tail: bool) -> str:
        """The right-hand side for ``e``."""
        # In a sum the score comes last: large terms beside it may cancel.
        operands = sorted(e.args, key=lambda a: E.score() in a.leaves) if e.op == "add" else e.args
        args = [self.names[a] for a in operands]
        if e in self.spelled:
            return self.spelled[e]
        if e.op == "load":
            return self._load(e, tail)
        if e.op in _CALLS:
            return f"{self.dialect.ns}.{e.op}({self._tensor(e.args[0])})"
        if e.op in _HELPERS:
            return f"{_HELPERS[e.op]}({self._tensor(e.args[0])})"
        if e.op == "float":
            return self._as_float(e.args[0])
        if e.op == "mul" and e.kind == "int" and sum(not a.is_const for a in e.args) > 1:
            return " * ".join(x if a.is_const else f"{x}.to({self.dialect.ns}.int64)" for a, x in zip(e.args, args, strict=True))
        if e.op in ("floordiv", "mod"):
            plain = nonnegative(e.args[0]) and nonnegative(e.args[1])
            sign = "//" if e.op == "floordiv" else "%"
            return (
                f"{args[0]} {sign} {args[1]}"
                if plain
                else f"floor_{'div' if e.op == 'floordiv' else 'mod'}({self._tensor(e.args[0])}, {self._tensor(e.args[1])})"
            )
        return _FORMS[e.op](self.dialect.ns, args)

    def _as_float(self, e: Expr) -> str:
        """The integer ``e`` as a float. Over sums of indices it is computed in floats from the start, since converting each element of a tile
        takes the slow unit that exponentials need; indices are below 2^24, where that is exact."""
        if e.op == "var" and e.value in ("q", "k"):
            return f"{e.value}_float"
        if e.op == "const":
            return f"{float(e.value)!r}" if e.value >= 0 else f"({float(e.value)!r})"
        linear = [a is None or a.op == "sym" or (a.op == "var" and a.value in ("q", "k")) for _, a in E.terms(e)] if e.op in ("add", "mul") else [False]
        if all(linear):
            # what is the same for all keys is summed first
            found = sorted(E.terms(e), key=lambda t: 0 if t[1] is None else ("scalar", "row", "tile").index(self.depends(t[1])))
            parts = [(c, "1.0" if a is None else self._as_float(a)) for c, a in found]
            return "(" + " + ".join(x if c == 1 else f"({float(c)!r})" if x == "1.0" else f"({float(c)!r}) * {x}" for c, x in parts) + ")"
        if e.op == "abs":
            return f"{self.dialect.ns}.abs({self._as_float(e.args[0])})"
        return f"({self.names[e]}).to({self.dialect.ns}.float32)"

    def _tensor(self, a: Expr) -> str:
        """The operand as a tensor: functions do not take bare numbers."""
        if not a.is_const:
            return self.names[a]
        return self.dialect.scalar.format(value=literal(a.value), dtype="float32" if a.kind == "float" else "int32")

    def _summands(self, a: Expr, clamped: bool) -> list[tuple[int, Expr]]:
        """An index as (factor, summand), where its summands are names that the kernel has; otherwise as it is."""
        found = [] if clamped or a.op != "add" else [(int(c), E.ONE if x is None else x) for c, x in E.terms(a)]
        plain = all(x is E.ONE or x.op in ("var", "sym") for _, x in found)
        return found if found and plain else [(1, a)]

    def _load(self, e: Expr, tail: bool) -> str:
        slot, ns = e.value, self.dialect.ns
        address = [f"L{slot}"]
        # Scalars first: the address of a tile is then one scalar plus a row plus a column. A distance is a row and a column too.
        places = [(d, self.needs_clamp(e, a), a, x) for d, a in enumerate(e.args) for x in self._summands(a, self.needs_clamp(e, a))]
        for d, clamped, a, (factor, x) in sorted(places, key=lambda p: ("scalar", "row", "tile").index(self.depends(p[3][1]))):
            if clamped:
                i = f"({ns}.minimum({ns}.maximum({self._tensor(a)}, 0), L{slot}_n{d} - 1)).to({ns}.int64)"
            else:
                i = literal(x.value) if x.is_const else f"({self.names[x]}).to({ns}.int64)"
            address.append(" * ".join([*([] if factor == 1 else [str(factor)]), i, f"L{slot}_s{d}"]))
        variables = {x.value for x in e.leaves if x.op == "var"}
        inside = [name for v, name in (("q", "row_inside"), ("k", "key_inside")) if v in variables and (tail or v != self.inner)]
        guard = f", mask={' & '.join(inside)}, other=0" if inside else ""
        loaded = f"{ns}.load({' + '.join(address)}{guard})"
        if e.kind == "int" and e in self.compared:
            return loaded
        return {"float": f"{loaded}.to({ns}.float32)", "int": f"{loaded}.to({ns}.int64)", "bool": f"({loaded} != 0)"}[e.kind]


_FORMS: dict[str, Callable[[str, list[str]], str]] = {
    "add": lambda ns, a: " + ".join(a),
    "mul": lambda ns, a: " * ".join(a),
    "and": lambda ns, a: " & ".join(a),
    "or": lambda ns, a: " | ".join(a),
    "div": lambda ns, a: f"{a[0]} / {a[1]}",
    "min": lambda ns, a: f"{ns}.minimum({a[0]}, {a[1]})",
    "max": lambda ns, a: f"{ns}.maximum({a[0]}, {a[1]})",
    "abs": lambda ns, a: f"{ns}.abs({a[0]})",
    "where": lambda ns, a: f"{ns}.where({a[0]}, {a[1]}, {a[2]})",
    "ge0": lambda ns, a: f"{a[0]} >= 0",
    "eq0": lambda ns, a: f"{a[0]} == 0",
    "le": lambda ns, a: f"{a[0]} <= {a[1]}",
    "lt": lambda ns, a: f"{a[0]} < {a[1]}",
    "eq": lambda ns, a: f"{a[0]} == {a[1]}",
    "same": lambda ns, a: f"{a[0]} == {a[1]}",
    "not": lambda ns, a: f"({a[0]} == 0)",
    "trunc": lambda ns, a: f"({a[0]}).to({ns}.int64)",
}
