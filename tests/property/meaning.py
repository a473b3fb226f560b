"""What a program computes, in NumPy and float64, from its description alone: operands, scores, visible keys, output.

Nothing here uses attnopt, and nothing reads the module's code; ``judge.py`` also compares this with the module itself run in
float64, so a program whose source and meaning differ does not pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from property.emit import Sizes
from property.masks import World
from property.program import DTYPES, Program
from property.steps import Hide

HIDDEN = -3e4
"""A logit at or below this hides its key."""
VANISHED = -1e3
"""The same where exponentials are taken of the logits as they stand: this one is zero."""
UNCLEAR = -5e2
"""Between the two a key has no weight beside others, and whether it counts as hidden is a matter of words."""


@dataclass
class Meaning:
    world: World
    q: np.ndarray
    """[B, H, S, D], as they enter the product."""
    k: np.ndarray
    """[B, H, T, D], repeated for each query head."""
    v: np.ndarray
    raw: np.ndarray
    """[B, H, S, T], q . k without any factor."""
    logits: np.ndarray
    """What the softmax is taken of."""
    output: np.ndarray
    """[B, H, S, Dv]. Rows without a visible key hold whatever float64 gives."""
    sink: np.ndarray | None
    """[H], a logit that takes weight and has no value."""
    hidden: float = HIDDEN

    @property
    def clear(self) -> bool:
        """Whether each logit either hides its key for good or is an ordinary number."""
        return not bool(((self.logits > self.hidden) & (self.logits < UNCLEAR)).any())

    @property
    def empty(self) -> np.ndarray:
        """[B, H, S], rows in which no key is visible."""
        return ~(self.logits > UNCLEAR).any(-1)


def tensors_of(program: Program, module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    named = dict(zip(program.inputs(), inputs, strict=True)) | dict(module.named_parameters()) | dict(module.named_buffers())
    return {n: (t.detach().double() if t.is_floating_point() else t.long()).numpy() for n, t in named.items()}


def meaning(program: Program, module: nn.Module, inputs: tuple[Tensor, ...], sizes: Sizes) -> Meaning:
    t = tensors_of(program, module, inputs)
    w = World(sizes.B, program.H, sizes.S, sizes.T, t)
    q, k, v = (np.asarray(x) for x in _operands(program, t, sizes))
    heads = np.arange(program.H)
    heads = heads % program.Hkv if program.heads == "tiled" else heads // program.groups
    k, v = k[:, heads], v[:, heads]
    if program.norm == "rms":
        q, k = (y / np.sqrt(np.mean(y * y, -1, keepdims=True) + 1e-6) for y in (q, k))
    elif program.norm == "l2":
        q, k = (y / np.maximum(np.sqrt(np.sum(y * y, -1, keepdims=True)), 1e-12) for y in (q, k))
    raw = np.einsum("bhqd,bhkd->bhqk", q, k)
    with np.errstate(all="ignore"):
        logits = np.broadcast_to(_logits(program, raw, w), raw.shape)
        sink = None if program.sink == "none" else t["sink"] if program.sink.startswith("joined") else np.zeros(program.H)
        peak = logits.max(-1, keepdims=True)
        if sink is not None:
            peak = np.maximum(peak, sink[:, None, None])
        e = np.exp(logits - peak)
        total = e.sum(-1, keepdims=True)
        if sink is not None:
            total = total + np.exp(sink[:, None, None] - peak)
        p = e / total
        output = np.einsum("bhqk,bhkd->bhqd", p, v)
    return Meaning(w, q, k, v, raw, logits, output, sink, VANISHED if program.softmax == "exp over sum" and program.call is None and sink is None else HIDDEN)


def _operands(program: Program, t: dict[str, np.ndarray], sizes: Sizes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [B, H, S, D], k [B, Hkv, T, D] and v [B, Hkv, T, Dv] before norm and repetition."""
    s, H, K = program.source, program.H, program.Hkv
    if s == "inputs":
        return t["q"], t["k"], t["v"]
    if s == "sequence first":
        return t["q"].transpose(0, 2, 1, 3), t["k"].transpose(0, 2, 1, 3), t["v"].transpose(0, 2, 1, 3)
    if s == "past":
        return t["q"], np.concatenate([t["past_k"], t["new_k"]], 2), np.concatenate([t["past_v"], t["new_v"]], 2)
    if s == "keys transposed":
        return t["q"], t["kt"].transpose(0, 1, 3, 2), t["v"]
    if s == "learned queries":
        return np.broadcast_to(t["query"], (sizes.B, *t["query"].shape[1:])), t["k"], t["v"]

    def project(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def split(x: np.ndarray, n: int) -> np.ndarray:
        return x.reshape(x.shape[0], x.shape[1], n, -1).transpose(0, 2, 1, 3)

    if s.startswith("packed"):
        y, d = project(t["x"], "qkv"), program.D
        if s == "packed select":  # features run head, part, channel; otherwise part, head, channel
            parts = y.reshape(*y.shape[:2], H, 3, d)
            return tuple(parts[:, :, :, n].transpose(0, 2, 1, 3) for n in range(3))  # type: ignore[return-value]
        return tuple(split(y[..., n * H * d : (n + 1) * H * d], H) for n in range(3))  # type: ignore[return-value]
    other = t["x"] if s == "linear" else t["y"]
    return split(project(t["x"], "q"), H), split(project(other, "k"), K), split(project(other, "v"), K)


def _logits(program: Program, raw: np.ndarray, w: World) -> np.ndarray:
    x = raw * (program.q_scale * program.k_scale)
    if program.call is None:
        for step, dtype in program.staged():
            x = step.truth(x, w, dtype)
        return x
    x = x * (program.D**-0.5 if program.call.scale is None else program.call.scale)
    if program.call.mask == "bool":
        for step in program.steps:
            assert isinstance(step, Hide)
            x = np.where(step.mask.truth(w), x, -np.inf)
    elif program.call.mask == "float":
        added = np.zeros((1, 1, w.S, w.T))
        for step, dtype in program.staged():
            added = step.truth(added, w, dtype)
        x = x + added
    if program.call.is_causal:
        x = np.where(w.k <= w.q, x, -np.inf)
    return x


def compared(program: Program, output: Tensor, sizes: Sizes) -> np.ndarray:
    """The module's output as [B, H, S, Dv]."""
    x = output.detach().double().numpy()
    return x if program.output == "heads" else x.reshape(sizes.B, sizes.S, program.H, -1).transpose(0, 2, 1, 3)


def double_of(program: Program) -> nn.Module:
    """The program's own module in float64, with the same parameters and the fills of its own dtype."""
    return program.module(literal=True).double()


def doubled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def eps(program: Program) -> float:
    return torch.finfo(DTYPES[program.dtype]).eps
