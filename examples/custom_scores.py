"""Scores of one's own: ALiBi, a sliding window, a soft cap. No pattern knows these files; what they compute is read from them.

    attnopt optimize examples/custom_scores.py:alibi
    attnopt optimize examples/custom_scores.py:sliding_window
    attnopt optimize examples/custom_scores.py:softcap
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HEADS, WINDOW, CAP = 256, 8, 64, 30.0
HEAD_SIZE = WIDTH // HEADS


class Attention(nn.Module):
    """Causal attention; subclasses change the scores or narrow what is visible."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def score(self, score: Tensor, distance: Tensor) -> Tensor:
        """Scores [B, H, S, S] and ``distance`` [S, S] = key position - query position."""
        return score

    def visible(self, distance: Tensor) -> Tensor:
        return distance <= 0

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, HEADS, HEAD_SIZE).unbind(2)
        position = torch.arange(S, device=x.device)
        distance = position[None, :] - position[:, None]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_SIZE**-0.5
        scores = self.score(scores, distance).masked_fill(~self.visible(distance), float("-inf"))
        return self.out(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, S, WIDTH))


class ALiBi(Attention):
    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS))

    def score(self, score: Tensor, distance: Tensor) -> Tensor:
        return score + self.slopes[:, None, None] * distance


class SlidingWindow(Attention):
    def visible(self, distance: Tensor) -> Tensor:
        return (distance <= 0) & (distance > -WINDOW)


class Softcap(Attention):
    def score(self, score: Tensor, distance: Tensor) -> Tensor:
        return CAP * torch.tanh(score / CAP)


def alibi() -> nn.Module:
    return nn.Sequential(ALiBi(), ALiBi()).eval()


def sliding_window() -> nn.Module:
    return nn.Sequential(SlidingWindow(), SlidingWindow()).eval()


def softcap() -> nn.Module:
    return nn.Sequential(Softcap(), Softcap()).eval()


def example_inputs() -> Tensor:
    return torch.randn(2, 512, WIDTH, generator=torch.Generator().manual_seed(0))
