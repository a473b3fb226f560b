"""How an attention is cut into tiles of queries, and which keys each tile can see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import KeyRange, key_range
from attnopt.ir.spec import AttentionSpec

cached_key_range = lru_cache(maxsize=1024)(key_range)


@lru_cache(maxsize=1024)
def may_be_empty(spec: AttentionSpec) -> bool:
    """``spec.rows_may_be_empty()``, proven once."""
    return spec.rows_may_be_empty()


@dataclass(frozen=True)
class Tile:
    """Batches [b0, b1), queries [q0, q1), and the keys [k0, k1) outside of which none of the queries sees any."""

    b0: int
    b1: int
    q0: int
    q1: int
    k0: int
    k1: int

    def ranges(self, heads: int, row: int = 0, first: int = 0) -> dict[str, tuple[int, int]]:
        """The values of the index variables, where batch 0 of the tensors is batch ``row`` and query 0 is query ``first``."""
        return {"b": (self.b0 + row, self.b1 + row), "h": (0, heads), "q": (self.q0 + first, self.q1 + first), "k": (self.k0, self.k1)}


def bind_sizes(spec: AttentionSpec, sizes: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """The value of every symbolic size by name: those that the op received, and those that the shapes of q, k and v give."""
    if len(sizes) != len(spec.sizes):
        raise AttnoptError(f"This attention reads {len(spec.sizes)} sizes {spec.sizes} and was given {len(sizes)}.")
    d = spec.dims
    shape = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    found = {x.value[0]: n for x, n in zip((d.B, d.Hq, d.Hkv, d.Sq, d.Skv, d.D, d.Dv), shape, strict=True) if x.op == "sym"}
    return found | dict(zip(spec.sizes, sizes, strict=True))


def integer(e: Expr, sizes: Mapping[str, int]) -> int:
    """The value of an integer expression over sizes and constants."""
    x = e if e.is_const else E.substitute(e, {s: E.const(sizes[s.value[0]]) for s in e.leaves if s.op == "sym"})
    if not x.is_const:
        raise ValueError(f"{e} is not made of sizes and constants only")
    return int(x.value)


@dataclass(frozen=True)
class Bounds:
    """Visible keys satisfy q - left <= k <= q + right (None: no such bound) and ``rest``."""

    left: int | None
    right: int | None
    rest: Expr

    def shifted(self, first: int) -> Bounds:
        """The bounds for queries that are counted from query ``first`` on."""
        return Bounds(None if self.left is None else self.left - first, None if self.right is None else self.right + first, self.rest)

    def keys(self, q0: int, q1: int, Skv: int) -> tuple[int, int]:
        """The range of keys that queries [q0, q1) can see, cut to [0, Skv).

        It holds at least one key where there is any, so that a row that sees none is still seen to be empty.
        """
        start = 0 if self.left is None else min(max(0, q0 - self.left), max(Skv - 1, 0))
        stop = Skv if self.right is None else min(Skv, q1 + self.right)
        return start, max(stop, min(start + 1, Skv))

    def all_visible(self, q0: int, q1: int, k0: int, k1: int) -> bool:
        """Whether every query of [q0, q1) sees every key of [k0, k1)."""
        inside = (self.left is None or k0 >= q1 - 1 - self.left) and (self.right is None or k1 - 1 <= q0 + self.right)
        return inside and self.rest is E.TRUE


    def empty_rows(self, Sq: int, Skv: int) -> tuple[int, int]:
        """Queries before the first number and from the second on see no key, as far as the diagonal bounds say. For left + right >= 0."""
        first = 0 if self.right is None else min(Sq, max(0, -self.right))
        last = Sq if self.left is None else min(Sq, max(0, Skv + self.left))
        return first, max(first, last)


def bounds(spec: AttentionSpec, sizes: Mapping[str, int]) -> Bounds:
    """The diagonal bounds of the spec's mask, with sizes put in."""
    r: KeyRange = cached_key_range(spec.mask)
    return Bounds(
        left=min((integer(x, sizes) for x in r.left), default=None),
        right=min((integer(x, sizes) for x in r.right), default=None),
        rest=r.rest,
    )


def tiles(B: int, row: int, Sq: int, Skv: int, limits: Bounds | None, budget: int, at_least: int = 32) -> Iterator[Tile]:
    """Tiles of at most ``budget`` elements, where one query of one batch takes ``row`` elements.

    A tile spans several queries before it spans several batches, since a product with few rows is slow; it is never
    less than ``at_least`` queries tall, so that memory is linear in Skv whatever the budget.
    """
    rows = max(min(Sq, at_least), budget // max(row, 1))
    height = min(Sq, rows)
    batches = max(1, min(B, rows // max(height, 1)))
    for b0 in range(0, B, batches):
        for q0 in range(0, Sq, max(height, 1)):
            q1 = min(Sq, q0 + height)
            k0, k1 = (0, Skv) if limits is None else limits.keys(q0, q1, Skv)
            yield Tile(b0, min(B, b0 + batches), q0, q1, k0, k1)


def empty_output(q: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output [B, Hq, Sq, Dv] laid out in memory as [B, Sq, Hq, Dv]: what the projection that follows reads."""
    B, Hq, Sq, _ = q.shape
    return v.new_empty((B, Sq, Hq, v.shape[3]), dtype=dtype).transpose(1, 2)


def as_bshd(o: Tensor) -> Tensor:
    """``o`` [B, H, S, D], laid out in memory as [B, S, H, D]; copied where it is not."""
    return o.transpose(1, 2).contiguous().transpose(1, 2)
