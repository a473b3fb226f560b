"""What is added to scores: each as PyTorch source and, apart from it, in NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from property.emit import LONGEST, Emitter
from property.masks import World


class Bias:
    def code(self, e: Emitter, H: int) -> str:
        """Source of a tensor in the score's dtype that broadcasts to [B, H, S, T]."""
        raise NotImplementedError

    def truth(self, w: World) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True)
class Given(Bias):
    """An argument of forward, over the axes named."""

    axes: tuple[str | int, ...]

    @property
    def name(self) -> str:
        return "bias_" + "".join(str(a) for a in self.axes)

    def code(self, e: Emitter, H: int) -> str:
        return e.input(self.name, self.axes)

    def truth(self, w: World) -> np.ndarray:
        return w.tensors[self.name]


@dataclass(frozen=True)
class Learned(Bias):
    """A parameter [H, longest, longest] (or without heads), sliced."""

    per_head: bool

    @property
    def name(self) -> str:
        return "learned_heads" if self.per_head else "learned"

    def code(self, e: Emitter, H: int) -> str:
        shape = f"{H}, {LONGEST}, {LONGEST}" if self.per_head else f"{LONGEST}, {LONGEST}"
        return e.state(f"torch.randn({shape})", self.name, True) + ("[:, :S, :T]" if self.per_head else "[:S, :T]")

    def truth(self, w: World) -> np.ndarray:
        return w.tensors[self.name][..., : w.S, : w.T]


@dataclass(frozen=True)
class Table(Bias):
    """A table [entries, H] read at a function of k - q: the distance, its size, or logarithmic buckets."""

    by: Literal["distance", "size", "logarithm"]
    spelling: Literal["index", "embedding", "gather"] = "index"

    def code(self, e: Emitter, H: int) -> str:
        table = e.state(f"torch.randn({2 * LONGEST + 1}, {H})", "table", True)
        at = {
            "distance": f"(j - i).clamp({-LONGEST}, {LONGEST}) + {LONGEST}",
            "size": "(j - i).abs() // 2",
            "logarithm": f"torch.where((i - j).abs() < 4, (i - j).abs(), 4 + (torch.log((i - j).abs().clamp(min=1).float() / 4) / {math.log(4.0)!r} * 4).long().clamp(max=8)) + (j > i).long() * 13",
        }[self.by]
        if self.spelling == "embedding":
            return f"F.embedding({at}, {table}).permute(2, 0, 1)"
        if self.spelling == "gather":
            return f"{table}.t()[:, {at}]"
        return f"{table}[{at}].permute(2, 0, 1)"

    def truth(self, w: World) -> np.ndarray:
        d = (w.k - w.q)[0, 0]
        if self.by == "distance":
            at = np.clip(d, -LONGEST, LONGEST) + LONGEST
        elif self.by == "size":
            at = np.abs(d) // 2
        else:
            # The buckets are a matter of float32, as PyTorch computes them.
            far = np.log(np.maximum(np.abs(d), 1).astype(np.float32) / np.float32(4)) / np.float32(np.log(4.0)) * np.float32(4)
            at = np.where(np.abs(d) < 4, np.abs(d), 4 + np.minimum(np.trunc(far).astype(int), 8)) + (d > 0) * 13
        return w.tensors["table"][at].transpose(2, 0, 1)


@dataclass(frozen=True)
class Slopes(Bias):
    """ALiBi and its like: a slope a head times a function of the positions."""

    position: Literal["key", "relative", "distance", "count", "query minus key", "square"]
    slopes: Literal["buffer", "computed", "parameter"] = "buffer"

    def code(self, e: Emitter, H: int) -> str:
        if self.slopes == "computed":
            slope = "(2.0 ** -torch.arange(1, H + 1))"
        else:
            learned = self.slopes == "parameter"
            slope = e.state(f"2.0 ** -torch.arange(1, {H + 1})", "learned_slopes" if learned else "slopes", learned)
        if self.position == "count":
            mask = e.input("pad_l_k", ("B", "T"), "zero or one")
            return f"({slope}[:, None, None] * (({mask}.cumsum(-1) - 1) * {mask})[:, None, None, :]).to(w.dtype)"
        at = {"key": "j", "relative": "(j - i)", "distance": "(i - j).abs()", "query minus key": "(i - j)", "square": "((j - i) * (j - i))"}[self.position]
        return f"({slope}[:, None, None] * {at}).to(w.dtype)"

    def truth(self, w: World) -> np.ndarray:
        slope = 2.0 ** -np.arange(1, w.H + 1)[:, None, None]
        if self.position == "count":
            mask = w.tensors["pad_l_k"]
            return slope * ((np.cumsum(mask, -1) - 1) * mask)[:, None, None, :]
        d = w.k - w.q
        return slope * {"key": w.k, "relative": d, "distance": np.abs(d), "query minus key": -d, "square": d * d}[self.position]


@dataclass(frozen=True)
class Row(Bias):
    """The same for all keys of a row: softmax does not see it."""

    def code(self, e: Emitter, H: int) -> str:
        return e.input("row", ("B", H, "S", 1))

    def truth(self, w: World) -> np.ndarray:
        return w.tensors["row"]
