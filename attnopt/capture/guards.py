"""Which other inputs a captured graph holds for: the conditions that export met on the way, as one small function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges

Holds = Callable[[Sequence[Any]], bool]


@dataclass
class SymbolicSizes:
    """The symbolic sizes of the input leaves: where each symbol is read, its bounds, and the conditions on all of them."""

    values: list[Any]
    """Per leaf: a fake tensor, or the value of a leaf that is no tensor."""
    env: ShapeEnv | None
    bounds: dict[sympy.Symbol, tuple[int, int | None]]
    home: dict[sympy.Symbol, tuple[int, int]]
    """Symbol to the (leaf, dim) that it is read from."""
    conditions: list[sympy.Basic]
    """Besides the bounds and the equality of sizes that share a symbol."""

    def where(self, symbol: sympy.Symbol) -> list[tuple[int, int]]:
        """All (leaf, dim) whose size is this symbol."""
        return [(i, d) for i, v in enumerate(self.values) if isinstance(v, torch.Tensor) for d in range(v.dim()) if expr_of(v.shape[d]) == symbol]


    def places(self, at: dict[sympy.Symbol, int]) -> dict[tuple[int, int], int]:
        """The size of every (leaf, dim) that changes when these symbols do, sums of symbols included; the others as in the example."""
        values = {s: at.get(s, hint_of(self.values[leaf].shape[dim])) for s, (leaf, dim) in self.home.items()}
        out: dict[tuple[int, int], int] = {}
        for i, v in enumerate(self.values):
            for d, size in enumerate(v.shape if isinstance(v, torch.Tensor) else ()):
                expr = expr_of(size)
                if expr.free_symbols & set(at) and expr.free_symbols <= set(values):
                    out[i, d] = int(expr.xreplace(values))
        return out


def is_symbolic(size: object) -> bool:
    return isinstance(size, torch.SymInt)


def expr_of(size: Any) -> sympy.Expr:
    """The expression of one entry of a shape."""
    return size.node.expr if is_symbolic(size) else sympy.Integer(size)


def environment_of(values: Iterable[Any]) -> ShapeEnv | None:
    """The shape environment of the first fake tensor."""
    for v in values:
        mode = getattr(v, "fake_mode", None)
        if mode is not None:
            return cast(ShapeEnv | None, mode.shape_env)
    return None


def hint_of(size: Any) -> int:
    """The size that the example had."""
    return int(size.node.hint if is_symbolic(size) else size)


def symbolic_sizes(values: list[Any], ranges: dict[sympy.Symbol, ValueRanges[Any]]) -> SymbolicSizes:
    """Read the symbols of the placeholders' fake values; ``ranges`` is ``ExportedProgram.range_constraints``."""
    env: ShapeEnv | None = None
    home: dict[sympy.Symbol, tuple[int, int]] = {}
    for i, v in enumerate(values):
        if not isinstance(v, torch.Tensor):
            continue
        size: Any
        for d, size in enumerate(v.shape):
            if is_symbolic(size):
                env = size.node.shape_env
                expr = expr_of(size)
                if isinstance(expr, sympy.Symbol):
                    home.setdefault(expr, (i, d))
    bounds: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for symbol in home:
        r = ranges.get(symbol)
        lower = 0 if r is None else int(r.lower)
        unbounded = r is None or r.upper in (int_oo, sympy.oo) or int(r.upper) >= 2**62
        bounds[symbol] = (lower, None if unbounded or r is None else int(r.upper))
    conditions: list[sympy.Basic] = []
    for guard in env.guards if env is not None else ():
        assert env is not None
        expr = env.simplify(guard.expr.xreplace(env.replacements))
        if expr.free_symbols and expr not in conditions and not _is_bound(expr, bounds):
            conditions.append(expr)
    return SymbolicSizes(values, env, bounds, home, conditions)


def tie_batches(values: list[Any]) -> None:
    """Give the leading dimensions of all leaves that had the same size in the example one symbol.

    A model may index one input by the row numbers of another without ever comparing the two sizes, and export then keeps
    two symbols for what is one batch. The guard demands their equality; other calls are captured on their own.
    """
    first: dict[int, sympy.Symbol] = {}
    for v in values:
        if not isinstance(v, torch.Tensor) or v.dim() == 0 or not is_symbolic(v.shape[0]):
            continue
        size: Any = v.shape[0]
        symbol = expr_of(size)
        other = first.setdefault(hint_of(size), symbol)
        if isinstance(symbol, sympy.Symbol) and other != symbol:
            size.node.shape_env._set_replacement(symbol, other, "same batch")


def _is_bound(expr: sympy.Basic, bounds: dict[sympy.Symbol, tuple[int, int | None]]) -> bool:
    """Whether the expression only repeats a bound."""
    if not isinstance(expr, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)) or not isinstance(expr.lhs, sympy.Symbol) or not expr.rhs.is_Integer:
        return False
    lower, upper = bounds.get(expr.lhs, (0, None))
    limit = int(expr.rhs)
    if isinstance(expr, sympy.Le):
        return upper is not None and upper <= limit
    if isinstance(expr, sympy.Lt):
        return upper is not None and upper < limit
    return lower >= limit if isinstance(expr, sympy.Ge) else lower > limit


def compile_guard(sizes: SymbolicSizes) -> Holds:
    """A function of the call's leaves: whether their sizes satisfy everything. Dtypes, devices and values are not looked at."""
    printer = PythonPrinter()
    lines = ["def holds(leaves):"]
    names = {symbol: f"n{i}" for i, symbol in enumerate(sizes.home)}
    for symbol, (leaf, dim) in sizes.home.items():
        lines.append(f"    {names[symbol]} = leaves[{leaf}].shape[{dim}]")
    terms: list[str] = []
    for i, v in enumerate(sizes.values):
        if not isinstance(v, torch.Tensor):
            continue
        for d, size in enumerate(v.shape):
            expr = expr_of(size)
            if sizes.home.get(expr) != (i, d):
                text = _print(printer, expr, names) if expr.free_symbols <= set(names) else str(hint_of(size))
                terms.append(f"leaves[{i}].shape[{d}] == {text}")
    for symbol, (lower, upper) in sizes.bounds.items():
        terms.append(f"{lower} <= {names[symbol]}" + ("" if upper is None else f" <= {upper}"))
    for condition in sizes.conditions:
        if condition.free_symbols <= set(names):
            terms.append(f"({_print(printer, condition, names)})")
        else:
            # A condition on something that is no input size cannot be tested: only the captured sizes are safe.
            terms += [f"leaves[{i}].shape[{d}] == {hint_of(sizes.values[i].shape[d])}" for i, d in sizes.home.values()]
    lines.append(f"    return {' and '.join(terms) or 'True'}")
    space: dict[str, Any] = {"math": math}
    exec(compile("\n".join(lines), "<attnopt guard>", "exec"), space)
    holds: Holds = space["holds"]
    return holds


def _print(printer: PythonPrinter, expr: sympy.Basic, names: dict[sympy.Symbol, str]) -> str:
    text: str = printer.doprint(expr.xreplace({s: sympy.Symbol(n, integer=True, positive=True) for s, n in names.items()}))
    return text
