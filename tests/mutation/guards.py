"""The guards of the analysis, read from its source: conditions that stand between a graph and a claim about it.

A guard is an ``if`` that ends in giving up (``return None``, ``return False``, ``raise``, ``continue``, a rejection), or one operand
of an ``and`` that a function returns. Removing it means: the ``if`` is never taken, the operand is always true.
Its name is file, function and condition as text, so it survives any change elsewhere in the file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = [*sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "attnopt" / "analysis").glob("*.py")), "attnopt/ir/mask.py", "attnopt/ir/bounds.py"]


@dataclass(frozen=True)
class Guard:
    file: str
    function: str
    condition: str
    number: int
    """Of several with the same words in one function, which."""
    line: int
    """Of the condition, for people."""
    body: int
    """First line that runs when an ``if`` guards; for an operand, its own."""

    @property
    def name(self) -> str:
        return f"{Path(self.file).parent.name}/{Path(self.file).stem}.{self.function}: {self.condition}{f' #{self.number}' if self.number > 1 else ''}"

    @property
    def module(self) -> str:
        return self.file.removesuffix(".py").replace("/", ".")


def all_guards() -> list[Guard]:
    """Every guard of every file, in order."""
    return [g for f in FILES for g, _ in _of(f, ast.parse((ROOT / f).read_text()))]


def without(guard: Guard) -> str:
    """The source of the guard's file with the guard removed."""
    tree = ast.parse((ROOT / guard.file).read_text())
    for found, place in _of(guard.file, tree):
        if found.name == guard.name:
            if isinstance(place, ast.If):
                place.test = ast.copy_location(ast.Constant(False), place.test)
            else:
                operands, i = place
                operands[i] = ast.copy_location(ast.Constant(True), operands[i])
            return ast.unparse(ast.fix_missing_locations(tree))
    raise LookupError(f"there is no guard {guard.name}")


Place = ast.If | tuple[list[ast.expr], int]


def _of(file: str, tree: ast.Module) -> Iterator[tuple[Guard, Place]]:
    counts: dict[tuple[str, str], int] = {}

    def guard(function: str, test: ast.expr, body: int) -> Guard:
        words = " ".join(ast.unparse(test).split())
        n = counts[function, words] = counts.get((function, words), 0) + 1
        return Guard(file, function, words, n, test.lineno, body)

    for function, node in _walk(tree, ""):
        if isinstance(node, ast.If) and _gives_up(node.body[-1]):
            yield guard(function, node.test, node.body[0].lineno), node
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.BoolOp) and isinstance(node.value.op, ast.And):
            for i, operand in enumerate(list(node.value.values)):
                yield guard(function, operand, node.lineno), (node.value.values, i)


def _walk(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        inner = f"{function}.{child.name}".strip(".") if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else function
        yield inner, child
        yield from _walk(child, inner)


def _gives_up(last: ast.stmt) -> bool:
    if isinstance(last, (ast.Raise, ast.Continue)):
        return True
    if not isinstance(last, ast.Return):
        return False
    value = last.value
    if value is None or (isinstance(value, ast.Constant) and (value.value is None or value.value is False)):
        return True
    if isinstance(value, ast.Tuple):
        return all(isinstance(x, ast.Constant) and x.value is None for x in value.elts)
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in ("Refusal", "Rejection")
