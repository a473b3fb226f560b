"""What was proven of a rotary embedding: which features are turned in pairs, by which angle's position.

Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021 (arXiv:2104.09864). Pair i of the
rotated features is turned as a point of the plane, ``(c * x - s * y, c * y + s * x)``, with one c and s a token and a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Positions = Literal["sequence", "computed", "given"]
"""``sequence``: token i stands at position i + offset; ``computed``: its position is another formula of i; ``given``: a tensor says it,
or holds the cos and sin of each token."""


@dataclass(frozen=True)
class Pairing:
    """Pair i is made of the features ``first + step * i`` and ``second + step * i``, counted from the first rotated one."""

    first: int
    second: int
    step: int

    def style(self, dim: int) -> str:
        """``half`` (feature i with i + dim / 2), ``interleaved`` (2i with 2i + 1), or ``paired`` in another way."""
        if self == Pairing(0, dim // 2, 1):
            return "half"
        return "interleaved" if self == Pairing(0, 1, 2) else "paired"


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding of features ``start .. start + dim`` of ``size``."""

    dim: int
    size: int
    start: int
    source: Pairing
    """Where the members of a pair stand before the rotation."""
    target: Pairing
    """Where they stand after it. Mostly the same; some models turn interleaved features and leave them in halves."""
    positions: Positions
    offset: str = "0"
    """Added to the index of a token to give its position, an expression in symbolic sizes; where ``positions`` is ``sequence``."""

    @property
    def style(self) -> str:
        return self.source.style(self.dim)

    def __str__(self) -> str:
        words = "rotary" if self.style == "half" else f"rotary {self.style}"
        if self.dim == self.size:
            return words
        return f"{words} {self.dim}/{self.size}" if self.start == 0 else f"{words} {self.dim} of features {self.start}..{self.start + self.dim}"

    def to_list(self) -> list[Any]:
        """As JSON holds it."""
        pairs = [[p.first, p.second, p.step] for p in (self.source, self.target)]
        return [self.dim, self.size, self.start, *pairs, self.positions, self.offset]

    @staticmethod
    def from_list(data: Sequence[Any]) -> Rotary:
        """The inverse of ``to_list``."""
        dim, size, start, source, target, positions, offset = data
        return Rotary(dim, size, start, Pairing(*source), Pairing(*target), positions, offset)
