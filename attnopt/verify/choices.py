"""Comparing models that choose: given the original's choices, and the scores by which the others chose.

A router takes the greatest few of some scores. Where two of them are as close as the roundings of the dtype, two right computations may choose differently, and all that follows is another function of
the token. Comparing the outputs then says nothing of the computation: it refuses what is right, or, where the original itself chooses otherwise than the truth, allows an error of that size. So it is compared in two parts, each within the budget that holds for every output:

* the outputs, where all models are made to choose as the original did in its own dtype, the float64 truth too;
* the scores of each choice, computed under the same choices before it. Choosing itself is PyTorch's own operator in each of them.

A model that computes something else fails one of these: with equal choices before it, a wrong score is a wrong score, and a wrong output a wrong output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Replay = Callable[[int, Tensor], Tensor]
"""(which choice of the call, its scores) -> the indices to take instead."""


class Unlike(Exception):
    """The choices of two runs cannot be matched: their number or their shapes differ."""


class Choices(TorchDispatchMode):
    """Notes each ``topk`` along the last axis of floating-point scores [..., n]: ``scores`` and ``taken`` [..., k]. With ``replay`` others are taken, and ``differ`` counts where it would have chosen otherwise."""

    def __init__(self, replay: Replay | None = None) -> None:
        super().__init__()
        self.replay = replay
        self.scores: list[Tensor] = []
        self.taken: list[Tensor] = []
        self.kinds: list[tuple[int, bool]] = []
        """How many each takes, and whether the greatest."""
        self.differ = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind = _kind(*args, **(kwargs or {})) if func is torch.ops.aten.topk.default else None
        if kind is None:
            return out
        scores, (values, taken) = args[0], out
        if self.replay is not None:
            own, taken = taken, self.replay(len(self.scores), scores)
            if taken.shape != own.shape:
                raise Unlike
            self.differ += int((own.sort(-1).values != taken.sort(-1).values).any(-1).sum())
            values = scores.gather(-1, taken)
        self.scores.append(scores.detach().clone())
        self.taken.append(taken)
        self.kinds.append(kind)
        return values, taken


def _kind(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[int, bool] | None:  # noqa: A002 - as the operator calls it
    return (k, largest) if x.is_floating_point() and x.dim() > 0 and dim in (-1, x.dim() - 1) else None


def by_token(x: Tensor, tokens: int) -> Tensor:
    """[tokens, rows of each, n] of [..., n], whose rows are those of the tokens in order. Raises Unlike where they are none."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows % tokens:
        raise Unlike
    return x.reshape(tokens, rows // tokens, x.shape[-1])


def scores_by_token(runs: Sequence[Choices], lengths: Sequence[int]) -> list[list[Tensor]]:
    """For each request, the scores of each choice [tokens, rows of each, n]. Raises Unlike where the choices of one are others."""
    if any(c.kinds != runs[0].kinds for c in runs):
        raise Unlike
    return [[by_token(x, n) for x in c.scores] for c, n in zip(runs, lengths, strict=True)]


def same_choices(recorded: Choices) -> Replay:
    """To choose as another run on the same inputs did."""

    def replay(which: int, scores: Tensor) -> Tensor:
        if which >= len(recorded.taken):
            raise Unlike
        return recorded.taken[which]

    return replay


class PackedChoices:
    """What the originals chose for each request alone, for packed tokens of them; gathers the scores of these by request."""

    def __init__(self, recorded: Sequence[Choices], lengths: Sequence[int]) -> None:
        self.kinds = recorded[0].kinds
        self.count = len(self.kinds)
        if any(c.kinds != self.kinds for c in recorded):
            raise Unlike
        self.lengths = lengths
        self.taken = [[by_token(x, n) for x in c.taken] for c, n in zip(recorded, lengths, strict=True)]
        self.scores: list[list[Tensor]] = [[torch.full_like(by_token(x, n), torch.nan) for x in c.scores] for c, n in zip(recorded, lengths, strict=True)]
        self.differ = self.rows = 0

    def run(self, function: Callable[[], Tensor], requests: Tensor, positions: Tensor) -> Tensor:
        """One call over packed tokens, token t being number ``positions[t]`` of ``requests[t]``."""
        places = list(zip(requests.tolist(), positions.tolist(), strict=True))

        def replay(which: int, scores: Tensor) -> Tensor:
            if which >= self.count:
                raise Unlike
            taken = torch.stack([self.taken[r][which][p] for r, p in places])
            if by_token(scores, len(places)).shape[1] != taken.shape[1]:
                raise Unlike
            return taken.reshape(*scores.shape[:-1], taken.shape[-1])

        with Choices(replay) as mode:
            out = function()
        if mode.kinds != self.kinds:
            raise Unlike
        for which, scores in enumerate(mode.scores):
            for (r, p), row in zip(places, by_token(scores, len(places)), strict=True):
                self.scores[r][which][p] = row
            self.rows += scores.numel() // scores.shape[-1]
        self.differ += mode.differ
        return out


def finite(*scores: Tensor) -> list[Tensor]:
    """The same scores of several runs, zero where none of them is finite: what was left out of a choice before."""
    none = torch.stack([~x.isfinite() for x in scores]).all(0)
    return [x.masked_fill(none, 0.0) for x in scores]
