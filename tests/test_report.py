"""What counts as an attention, and what does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.errors import VerificationError


class Routed(nn.Module):
    """An attention, and a router's softmax that is none."""

    def __init__(self, returned: bool = False) -> None:
        super().__init__()
        self.gate, self.a, self.b = nn.Linear(16, 2), nn.Linear(16, 16), nn.Linear(16, 16)
        self.returned = returned

    def forward(self, x: Tensor) -> object:
        p = (x @ x.mT * 0.25).softmax(-1)
        y = p @ x
        g = self.gate(y).softmax(-1)
        out = g[..., :1] * self.a(y) + g[..., 1:] * self.b(y)
        return (out, p) if self.returned else out


def test_a_router_is_listed_and_not_counted() -> None:
    optimized = attnopt.optimize(Routed(), torch.randn(2, 9, 16), config=attnopt.OptimizeConfig(require_all=True))
    report = optimized.attnopt_report
    assert [(s.status, s.is_attention) for s in report.sites] == [("replaced", True), ("missed", False)]
    assert (len(report.attentions), report.missed) == (1, [])
    assert str(report).startswith("1 of 1 attentions replaced")
    assert [s["attention"] for s in report.to_dict()["sites"]] == [True, False]


def test_an_attention_that_is_missed_fails_require_all() -> None:
    with pytest.raises(VerificationError, match="1 of 1 attentions were not replaced: model"):
        attnopt.optimize(Routed(returned=True), torch.randn(2, 9, 16), config=attnopt.OptimizeConfig(require_all=True))
