"""The words for what is new in a call that captures a model again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: float = 0.25, more: Any = None) -> Tensor:
        y = (x @ x.mT * scale).softmax(-1) @ x
        return y if more is None else y + sum(more)


X = torch.randn(2, 9, 16)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((X,), (X.double(),), "float64 for x, where float32 was captured"),
        ((X,), (X[0],), "of 2 axes for x, where of 3 axes was captured"),
        ((X, 0.5), (X, 0.75), "0.75 for scale, where 0.5 was captured"),
        ((X,), (X, 0.75), "x, scale, where x was captured"),
        ((X, 0.5, [X]), (X, 0.5, [X.double()]), "float64 for more, where float32 was captured"),
        ((X, 0.5, [X]), (X, 0.5, [X, X]), "another structure for more, where one was captured"),
    ],
    ids=["dtype", "rank", "number", "names", "leaf", "structure"],
)
def test_new_arguments(first: tuple[Any, ...], second: tuple[Any, ...], words: str) -> None:
    fast: Any = attnopt.optimize(Scaled(), first, config=attnopt.OptimizeConfig(verify=False))
    # what is float64 here was computed in float32 in part
    torch.testing.assert_close(fast(*second).float(), Scaled()(*second).float())
    assert fast.attnopt_report.remarks[0].message == f"Captured again for the arguments: {words}."


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(32, 32).tril())

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return (x @ x.mT * 0.25).masked_fill(self.seen[:n, :n] == 0, float("-inf")).softmax(-1) @ x


def test_buffers_with_other_values() -> None:
    fast: Any = attnopt.optimize(Masked(), X, config=attnopt.OptimizeConfig(verify=False))
    fast.seen[0, 1] = 1
    torch.testing.assert_close(fast(X), fast.attnopt_reference(X))
    assert fast.attnopt_report.remarks[0].message == "Captured again for other values in the buffers seen."
