"""Measured figures are what they say: a known amount of work and memory comes out as that amount."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from torch import Tensor, nn

from attnopt.cli.measure import Comparison, Measured, compare, peak_memory

MIB = 2**20


class Needs(nn.Module):
    """Takes ``seconds`` and touches ``mib`` of memory that it gives back."""

    def __init__(self, seconds: float, mib: int) -> None:
        super().__init__()
        self.seconds, self.mib = seconds, mib
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        held = torch.ones(self.mib * MIB // 4)
        return x * self.weight + held[:4]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory of the CPU is read from /proc, which Linux has")
@pytest.mark.parametrize("mib", [64, 256])
def test_peak_memory_is_what_was_touched(mib: int) -> None:
    model, x = Needs(0, mib), torch.ones(4)
    peak = peak_memory(lambda: model(x), torch.device("cpu"))
    assert peak is not None and 0.9 * mib < peak / MIB < 1.1 * mib + 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory of the CPU is read from /proc, which Linux has")
def test_an_earlier_peak_does_not_count() -> None:
    x = torch.ones(4)
    Needs(0, 512)(x)
    peak = peak_memory(lambda: Needs(0, 64)(x), torch.device("cpu"))
    assert peak is not None and peak / MIB < 128


def test_comparison_takes_both_in_turn() -> None:
    done: list[tuple[int, int]] = []
    # over 32 MiB each: malloc keeps smaller blocks, which then cost nothing that can be seen
    c = compare(Needs(0.1, 160), Needs(0.01, 40), (torch.ones(4),), {}, seconds=0.2, progress=lambda i, n: done.append((i, n)))
    assert c.speedup > 2 and c.what == "forward"
    assert done[-1] == (c.runs, c.runs) and c.runs >= 3
    assert c.memory_ratio is None or 2 < c.memory_ratio < 6


def test_training_runs_backward_and_leaves_no_gradients() -> None:
    model = Needs(0, 1)
    c = compare(model, model, (torch.ones(4),), {}, train=True, seconds=0.01)
    assert c.what == "forward + backward" and model.weight.grad is None


def test_ratios() -> None:
    c = Comparison("forward", 3, Measured(0.2, 300), Measured(0.1, 100))
    assert (c.speedup, c.memory_ratio) == (2.0, 3.0)
    assert c.to_dict()["original"] == {"seconds": 0.2, "peak_bytes": 300}
    assert Comparison("forward", 3, Measured(0.2, None), Measured(0.1, None)).memory_ratio is None
    for before, after in ((0, 100), (100, 0)):
        assert Comparison("forward", 3, Measured(0.2, before), Measured(0.1, after)).memory_ratio is None, "less than can be seen has no ratio"
