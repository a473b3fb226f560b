"""What happens to the scores between the product and the softmax, step by step: source of a statement on ``w``, and NumPy.

NumPy computes in float64 with the program's own fills, so whether a key is hidden is read off the number that comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from property.biases import Bias
from property.emit import LONGEST, Emitter
from property.masks import Mask, World

Fill = Literal["-inf", "smallest", "-1e9", "-1e4"]


def fill_value(fill: Fill, dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min if fill == "smallest" else float(fill)


@dataclass(frozen=True)
class Stage:
    """What a step's source needs to know of the rest: the number of heads, the program's dtype, and how an operand that
    broadcasts to [B, H, S, T] is brought to the layout of the scores (``{}`` stands for it)."""

    H: int
    dtype: torch.dtype
    wrap: str
    literal: bool = False
    """Write the dtype's smallest number as a number."""


class Step:
    def code(self, e: Emitter, s: Stage) -> str:
        raise NotImplementedError

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True)
class Scale(Step):
    by: float
    spelling: Literal["mul", "div", "in place"] = "mul"

    def code(self, e: Emitter, s: Stage) -> str:
        return {"mul": f"w = w * {self.by!r}", "div": f"w = w / {1 / self.by!r}", "in place": f"w = w.mul_({self.by!r})"}[self.spelling]

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        return x * self.by


@dataclass(frozen=True)
class Softcap(Step):
    cap: float
    spelling: Literal["div", "mul"] = "div"

    def code(self, e: Emitter, s: Stage) -> str:
        return f"w = torch.tanh(w / {self.cap!r}) * {self.cap!r}" if self.spelling == "div" else f"w = {self.cap!r} * (w * {1 / self.cap!r}).tanh()"

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        return self.cap * np.tanh(x / self.cap)


@dataclass(frozen=True)
class Add(Step):
    bias: Bias
    sign: Literal["+", "-", "reversed"] = "+"

    def code(self, e: Emitter, s: Stage) -> str:
        x = s.wrap.format(self.bias.code(e, s.H))
        return {"+": f"w = w + {x}", "-": f"w = w - {x}", "reversed": f"w = {x} + w"}[self.sign]

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        return x - self.bias.truth(w) if self.sign == "-" else x + self.bias.truth(w)


@dataclass(frozen=True)
class Hide(Step):
    """A mask, in one of the ways it is applied."""

    mask: Mask
    fill: Fill = "-inf"
    spelling: Literal["masked_fill", "in place", "where", "add where", "add filled", "one minus", "add one minus", "multiplied"] = "masked_fill"

    def code(self, e: Emitter, s: Stage) -> str:
        name = e.fresh("mask")
        e.line(f"{name} = {self.mask.code(e)}")
        value = (repr(fill_value(self.fill, s.dtype)) if s.literal else "torch.finfo(w.dtype).min") if self.fill == "smallest" else f'float("{self.fill}")' if self.fill == "-inf" else self.fill
        m = s.wrap.format(name)
        if self.spelling in ("masked_fill", "in place"):
            return f"w = w.masked_fill{'_' if self.spelling == 'in place' else ''}(~{m}, {value})"
        if self.spelling == "where":
            return f"w = torch.where({m}, w, {value})"
        if self.spelling == "add where":
            return f"w = w + {s.wrap.format(f'torch.where({name}, 0.0, {value}).to(w.dtype)')}"
        if self.spelling == "add filled":
            return f"w = w + {s.wrap.format(f'torch.zeros({name}.shape, dtype=w.dtype).masked_fill({name}.logical_not(), {value})')}"
        if self.spelling == "one minus":
            return f"w = w + {s.wrap.format(f'(1.0 - {name}.to(w.dtype)) * {value}')}"
        if self.spelling == "add one minus":
            return f"w = torch.add(w, {s.wrap.format(f'({name}.to(w.dtype) - 1.0) * {value}')}, alpha=-1)"
        return f"w = w * {s.wrap.format(f'{name}.to(w.dtype)')} + {s.wrap.format(f'(1.0 - {name}.to(w.dtype)) * {value}')}"

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        m, value = self.mask.truth(w), fill_value(self.fill, dtype)
        if self.spelling in ("masked_fill", "in place", "where"):
            return np.where(m, x, value)
        if self.spelling == "multiplied":
            return np.where(m, x, 0.0 * np.where(np.isinf(x), 0, x) + value)
        return x + np.where(m, 0.0, value)


@dataclass(frozen=True)
class Given(Step):
    """An additive mask that the caller makes: zeros, and the dtype's smallest number where a key, or a whole query, is hidden."""

    of: Literal["keys", "queries"] = "keys"

    def code(self, e: Emitter, s: Stage) -> str:
        name, axes = ("additive", ("B", 1, 1, "T")) if self.of == "keys" else ("additive_rows", ("B", 1, "S", 1))
        return f"w = w + {s.wrap.format(e.input(name, axes, 'one hidden'))}"

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        return x + w.tensors["additive" if self.of == "keys" else "additive_rows"]


@dataclass(frozen=True)
class Clamp(Step):
    low: float | None
    high: float | None

    def code(self, e: Emitter, s: Stage) -> str:
        return f"w = w.clamp({self.low}, {self.high})"

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        return np.clip(x, self.low, self.high)


@dataclass(frozen=True)
class Temperature(Step):
    """A factor for each query position, computed or learned."""

    spelling: Literal["computed", "learned", "divided"]

    def code(self, e: Emitter, s: Stage) -> str:
        if self.spelling == "learned":
            t = e.state(f"torch.rand({LONGEST}, 1) + 0.5", "temperature", True) + "[:S]"
        else:
            t = "(torch.log(i + 1.0) * 0.5 + 1.0).to(w.dtype)"
        return f"w = w {'/' if self.spelling == 'divided' else '*'} {s.wrap.format(t)}"

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        t = w.tensors["temperature"][: w.S] if self.spelling == "learned" else np.log(w.q + 1.0) * 0.5 + 1.0
        return x / t if self.spelling == "divided" else x * t


@dataclass(frozen=True)
class HeadScale(Step):
    """A learned factor for each head."""

    def code(self, e: Emitter, s: Stage) -> str:
        return f"w = w * {s.wrap.format(e.state(f'torch.rand({s.H}, 1, 1) + 0.5', 'head_scale', True))}"

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        return x * w.tensors["head_scale"]


@dataclass(frozen=True)
class Island(Step):
    """The rest up to the softmax in float32 (or float64)."""

    def code(self, e: Emitter, s: Stage) -> str:
        return "w = w.float()" if s.dtype is not torch.float64 and not s.literal else "w = w.double()"

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        return x


@dataclass(frozen=True)
class NoNan(Step):
    """``nan_to_num`` on scores: nothing is NaN there, and -inf becomes the smallest number."""

    def code(self, e: Emitter, s: Stage) -> str:
        return "w = torch.nan_to_num(w)"

    def truth(self, x: np.ndarray, w: World, dtype: torch.dtype) -> np.ndarray:
        return np.nan_to_num(x, neginf=torch.finfo(dtype).min)
