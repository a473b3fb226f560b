"""Whose value an element is: the token that a tensor's element belongs to, as an expression of the element's index.

A graph over input ids [B, S] is a function of single tokens, but for its attentions, where an element depends on nothing but
one token, its position in the sequence, and what no token changes (parameters, constants). Tokens are numbered ``b * S + s``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.views import Index
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr


@dataclass(frozen=True)
class Row:
    """What an element depends on. Both None: on no token, and the element is the same at all places of a symbolic axis."""

    token: Expr | None = None
    """The number of its token."""
    position: Expr | None = None
    """The place in the sequence whose position it is a function of, for what depends on no token's content."""

    @property
    def is_static(self) -> bool:
        return self.token is None and self.position is None

    @property
    def variables(self) -> frozenset[Expr]:
        return frozenset(v for x in (self.token, self.position) if x is not None for v in x.variables)

    def at(self, table: Mapping[Expr, Expr]) -> Row:
        """The row where the index variables have other values."""
        return Row(*(None if x is None else E.substitute(x, table) for x in (self.token, self.position)))


STATIC = Row()


def index_of(node: fx.Node) -> Index:
    """A variable for each axis of a node's value, zero for those of size one."""
    return tuple(E.ZERO if n is E.ONE else E.var(f"i{d}", n) for d, n in enumerate(N.shape(node)))


def table(x: fx.Node, index: Index) -> dict[Expr, Expr]:
    """From the index variables of ``x`` to the places of an index into it."""
    return {v: i for v, i in zip(index_of(x), index, strict=True) if not v.is_const}


def has_symbols(node: fx.Node) -> bool:
    """Whether a size of the node's value is not constant."""
    return any(not n.is_const for n in N.shape(node))
