"""The count beside ours is that of Inductor's matcher at work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.inductor import count_fused


class Attention(nn.Module):
    def __init__(self, times: int, spoiled: bool = False) -> None:
        super().__init__()
        self.times, self.spoiled = times, spoiled

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(self.times):
            scores = torch.matmul(q, k.transpose(-2, -1)).div(4.0)
            weights = (scores.tanh() if self.spoiled else scores).softmax(dim=-1)
            q = weights.matmul(v)
        return q


@pytest.mark.parametrize(("times", "spoiled", "fused"), [(1, False, 1), (3, False, 3), (2, True, 0)], ids=["one", "three", "no-pattern-of-its"])
def test_counts_what_inductor_fuses(times: int, spoiled: bool, fused: int) -> None:
    q, k, v = torch.randn(3, 2, 4, 8, 16)
    assert count_fused(Attention(times, spoiled), {"q": q, "k": k, "v": v}) == fused
