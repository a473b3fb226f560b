"""A buffer that was proven to be causal is part of the graph: when it changes, the graph no longer holds."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import attnopt


class Triangle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        s = x.shape[1]
        w = (x @ x.mT * 0.2).masked_fill(self.bias[:, :s, :s] == 0, float("-inf"))
        return w.softmax(-1) @ x


def optimized() -> nn.Module:
    return attnopt.optimize(Triangle(), torch.randn(2, 9, 16), config=attnopt.OptimizeConfig(verify=False))


def assert_as_written(module: nn.Module) -> None:
    x = torch.randn(3, 12, 16)
    torch.testing.assert_close(module(x), module.attnopt_reference(x))


def test_the_buffer_is_folded() -> None:
    module = optimized()
    (site,) = module.attnopt_report.sites
    assert site.spec.causal == "top_left"
    assert_as_written(module)
    assert len(module.attnopt_variants) == 1


def test_a_buffer_written_in_place_is_noticed() -> None:
    module = optimized()
    module.bias[0, 2, 5] = 1
    assert_as_written(module)
    assert len(module.attnopt_variants) == 2
    assert module.attnopt_report.sites[0].spec.causal is None


def test_a_buffer_that_is_replaced_or_loaded_is_noticed() -> None:
    module = optimized()
    module.bias = torch.ones(1, 32, 32)
    assert_as_written(module)
    assert module.attnopt_report.sites[0].spec.causal is None
    module = optimized()
    module.load_state_dict({"bias": torch.ones(1, 32, 32).triu()})
    assert_as_written(module)
    assert module.attnopt_report.sites[0].spec.causal is None


def test_the_same_values_need_no_new_capture() -> None:
    module = copy.deepcopy(optimized())
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
    assert_as_written(module)
    assert len(module.attnopt_variants) == 1


class Slopes(nn.Module):
    """A registered table of ALiBi, of which the formula reads one element per head."""

    def __init__(self) -> None:
        super().__init__()
        i = torch.arange(32)
        self.register_buffer("bias", 2.0 ** -torch.arange(1.0, 5.0)[:, None, None] * (i[None] - i[:, None]))
        self.q = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 4, 4).transpose(1, 2)
        return ((q @ q.mT * 0.5 + self.bias[:, :s, :s]).softmax(-1) @ q).transpose(1, 2).flatten(2)


def test_a_table_that_became_a_formula_has_no_gradient_to_compare() -> None:
    optimized = attnopt.optimize(Slopes(), torch.randn(2, 9, 16))
    (site,) = optimized.attnopt_report.sites
    assert (site.status, site.spec.alibi) == ("replaced", True), site.why
    assert optimized.attnopt_report.verdict.passed
