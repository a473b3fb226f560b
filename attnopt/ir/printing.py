"""Expressions as a person writes them: ``0.125 * s + slope[h] * (k - q)``."""

from __future__ import annotations

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

_LEVEL = {"or": 1, "and": 2, "not": 3, "ge0": 4, "eq0": 4, "le": 4, "lt": 4, "eq": 4, "same": 4, "add": 5, "mul": 6, "div": 6, "floordiv": 6, "mod": 6, "pow": 8}


def _number(v: float | int | bool) -> str:
    if isinstance(v, int):
        return str(v)
    return f"{v:.6g}"


def render(e: Expr, names: dict[int, str] | None = None) -> str:
    """``e`` in infix. ``names`` gives a name for each load slot."""

    def wrap(x: Expr, level: int) -> str:
        s = go(x)
        return f"({s})" if _LEVEL.get(x.op, 9) < level else s

    def a_factor(a: Expr) -> str:
        return go(a) if a.op == "mul" else wrap(a, 7)

    def total(parts: list[tuple[E.Number, Expr | None]]) -> str:
        out = ""
        for c, a in parts:
            size = _number(abs(c)) if a is None else wrap(a, 6) if abs(c) == 1 else f"{_number(abs(c))} * {a_factor(a)}"
            sign = "-" if c < 0 else "+"
            out = f"{out} {sign} {size}" if out else (f"-{size}" if c < 0 else size)
        return out or "0"

    def compare(x: Expr, sign: str) -> str:
        left = [(c, a) for c, a in E.terms(x) if c > 0]
        right = [(-c, a) for c, a in E.terms(x) if c < 0]
        if sign == ">=" and left and right and len(right) <= len(left):
            return f"{total(right)} <= {total(left)}"
        return f"{total(left)} {sign} {total(right)}"

    def go(x: Expr) -> str:
        if x.op == "const":
            return _number(x.value)
        if x.op == "sym":
            return str(x.value[0])
        if x.op in ("var", "score"):
            return str(x.value)
        if x.op == "load":
            name = (names or {}).get(x.value, f"load{x.value}") if isinstance(x.value, int) else str(x.value)
            return f"{name}[{', '.join(go(a) for a in x.args)}]"
        if x.op == "add":
            return total(sorted(E.terms(x), key=lambda t: (t[1] is None, t[0] < 0)))
        if x.op == "mul":
            return total([E.split_term(x)]) if x.args[0].is_const else " * ".join(wrap(a, 7) for a in x.args)
        if x.op in ("floordiv", "mod", "div"):
            return f"{wrap(x.args[0], 6)} { {'floordiv': '//', 'mod': '%', 'div': '/'}[x.op] } {wrap(x.args[1], 7)}"
        if x.op == "pow":
            return f"{wrap(x.args[0], 9)} ** {wrap(x.args[1], 9)}"
        if x.op == "ge0":
            return compare(x.args[0], ">=")
        if x.op == "eq0":
            return compare(x.args[0], "==")
        if x.op in ("le", "lt", "eq", "same"):
            return f"{wrap(x.args[0], 5)} { {'le': '<=', 'lt': '<', 'eq': '==', 'same': '=='}[x.op] } {wrap(x.args[1], 5)}"
        if x.op == "not":
            return f"not {wrap(x.args[0], 3)}"
        if x.op in ("and", "or"):
            return f" {x.op} ".join(wrap(a, _LEVEL[x.op] + 1) for a in x.args)
        if x.op == "float":
            return go(x.args[0]) if _LEVEL.get(x.args[0].op, 9) > 6 else f"({go(x.args[0])})"
        return f"{x.op}({', '.join(go(a) for a in x.args)})"

    return go(e)
