"""Nodes of the expression language and its leaves; the constructors that normalise stand in ``arithmetic`` and ``logic``."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable
from typing import Any, Literal

Kind = Literal["int", "float", "bool"]
Number = int | float
RANK: dict[Kind, int] = {"bool": 0, "int": 1, "float": 2}
_TABLE: weakref.WeakValueDictionary[Any, Expr] = weakref.WeakValueDictionary()

class Expr:
    """One node. Build it with the functions of this module, never directly.

    ``op`` names the operation, ``args`` are its operands, ``value`` is what a leaf holds (a number, a name, a load's
    slot) and ``kind`` is ``int``, ``float`` or ``bool``. A variable also has an ``extent``: it runs over [0, extent).
    """

    __slots__ = ("__weakref__", "_atoms", "_simplified", "args", "extent", "key", "kind", "op", "value")

    op: str
    args: tuple[Expr, ...]
    value: Any
    kind: Kind
    extent: Expr | None
    key: bytes
    _atoms: frozenset[Expr] | None

    def __repr__(self) -> str:
        from attnopt.ir.printing import render

        return render(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Through the constructor, which keeps equal expressions one object: they are compared by identity."""
        return make, (self.op, self.args, self.kind, self.value, self.extent)

    def __deepcopy__(self, memo: dict[int, Any]) -> Expr:
        return self

    @property
    def leaves(self) -> frozenset[Expr]:
        """All variables, sizes, scores and loads below this node, itself included (a load's own index too)."""
        if self._atoms is None:
            out: set[Expr] = set()
            for a in self.args:
                out |= a.leaves
            if self.op in LEAVES:
                out.add(self)
            self._atoms = frozenset(out)
        return self._atoms

    @property
    def variables(self) -> frozenset[Expr]:
        return frozenset(x for x in self.leaves if x.op == "var")

    @property
    def is_const(self) -> bool:
        return self.op == "const"

LEAVES = {"var", "sym", "score", "load"}

def make(op: str, args: tuple[Expr, ...], kind: Kind, value: Any = None, extent: Expr | None = None) -> Expr:
    ident = (op, args, kind, type(value), repr(value) if isinstance(value, float) else value, extent)
    found = _TABLE.get(ident)
    if found is not None:
        return found
    e = object.__new__(Expr)
    e.op, e.args, e.kind, e.value, e.extent, e._atoms = op, args, kind, value, extent, None
    # A digest of the structure orders operands the same way in every process.
    h = hashlib.blake2b(f"{op}|{kind}|{value!r}".encode(), digest_size=8)
    for a in args:
        h.update(a.key)
    e.key = h.digest()
    _TABLE[ident] = e
    return e


def const(value: Number | bool) -> Expr:
    kind: Kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
    return make("const", (), kind, value)

TRUE, FALSE = const(True), const(False)
ZERO, ONE = const(0), const(1)
FZERO, FONE = const(0.0), const(1.0)

def sym(name: str, low: int = 1) -> Expr:
    """A symbolic size, at least ``low``."""
    return make("sym", (), "int", (name, low))


def var(name: str, extent: Expr | int) -> Expr:
    """An index that runs over [0, extent)."""
    return make("var", (), "int", name, extent if isinstance(extent, Expr) else const(extent))


def score() -> Expr:
    """The raw product q . k of the current query and key, before any scale."""
    return make("score", (), "float", "s")


def load(slot: Any, index: Iterable[Expr], kind: Kind) -> Expr:
    """Element ``index`` of a tensor. ``slot`` is an FX node during analysis and a position in ``loads`` in a spec."""
    return make("load", tuple(index), kind, slot)
