"""Sizes that belong together: found, recorded with the site that rests on them, and tested at each call."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor, nn

import attnopt
from attnopt.capture.relations import _pinched


class Cached(nn.Module):
    """Attention over a past and new keys, causal from the end."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        i = torch.arange(q.shape[2])[:, None] + past_k.shape[2]
        later = torch.arange(k.shape[2])[None] > i
        return (q @ k.mT * 0.5).masked_fill(later, float("-inf")).softmax(-1) @ v


def _inputs(new: int, past: int, batch: int = 2, queries: int | None = None) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(new + past)
    return tuple(torch.randn(batch, 2, n, 4, generator=g) for n in (new if queries is None else queries, new, new, past, past))


def _agrees(optimized: nn.Module, model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    want = model(*(x.double() for x in inputs))
    return bool((optimized(*inputs) - want).norm() <= 1e-6 * want.norm())


def _sizes(optimized: attnopt.OptimizedModule) -> int:
    """How often the model was captured again for other sizes."""
    return sum(r.code == "AO305" for r in optimized.attnopt_report.remarks)


def test_four_sizes_of_which_export_knows_the_sums_only_are_two() -> None:
    optimized = attnopt.optimize(Cached(), _inputs(5, 3))
    (site,) = optimized.attnopt_report.sites
    assert site.status == "replaced", site.why
    assert set(site.relations) == {"v.shape[2] == k.shape[2]", "past_v.shape[2] == past_k.shape[2]"}
    assert _agrees(optimized, Cached(), _inputs(1, 9, batch=3))
    assert _sizes(optimized) == 0
    # the same total, otherwise split: no part of what was captured
    q, k, _, past_k, _ = _inputs(2, 9)
    _, _, v, _, past_v = _inputs(4, 7)
    assert _agrees(optimized, Cached(), (q, k, v, past_k, past_v))
    assert _sizes(optimized) == 1


class Masked(nn.Module):
    """The mask input is as long as past and new keys together; that makes it causal from the end."""

    def forward(self, x: Tensor, keep: Tensor, past: Tensor) -> Tensor:
        k = torch.cat([past, x], 1)
        j = torch.arange(keep.shape[1])[None]
        i = torch.arange(x.shape[1])[:, None] + keep.shape[1] - x.shape[1]
        visible = (j <= i) & keep[:, None, :]
        return (x @ k.mT * 0.5).masked_fill(~visible, float("-inf")).softmax(-1) @ k


def test_a_mask_as_long_as_past_and_new_keys_is_bottom_right_causal() -> None:
    def inputs(new: int, past: int) -> tuple[Tensor, ...]:
        keep = torch.ones(2, past + new, dtype=torch.bool)
        keep[0, 0] = past == 0
        return torch.randn(2, new, 4), keep, torch.randn(2, past, 4)

    optimized = attnopt.optimize(Masked(), inputs(5, 3))
    (site,) = optimized.attnopt_report.sites
    assert site.spec is not None
    assert site.spec.causal == "bottom_right"
    assert site.spec.key_padding
    assert any("keep.shape[1]" in r and "past.shape[1]" in r and "x.shape[1]" in r for r in site.relations), site.relations
    x, keep, past = inputs(1, 12)
    want = Masked()(x.double(), keep, past.double())
    assert (optimized(x, keep, past) - want).norm() <= 1e-6 * want.norm()
    assert _sizes(optimized) == 0


def test_a_tensor_that_is_passed_twice_is_two_inputs() -> None:
    class Cross(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).softmax(-1) @ v

    x = torch.randn(2, 2, 5, 4)
    optimized = attnopt.optimize(Cross(), (x, x, x[:, :, :]))
    q, k, v = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    torch.testing.assert_close(optimized(q, k, v), Cross()(q, k, v))


@pytest.mark.parametrize("past", [0, 4])
def test_a_length_that_the_example_ties_by_chance_is_not_tied(past: int) -> None:
    """Queries as many as new keys in the example are no relation that export demands."""
    optimized = attnopt.optimize(Cached(), _inputs(5, 6))
    assert _agrees(optimized, Cached(), _inputs(3, 4 + past, queries=2))
    assert _sizes(optimized) == 0


def test_two_bounds_by_one_sum_are_an_equality() -> None:
    new, past, mask, other = sympy.symbols("new past mask other", integer=True, positive=True)
    assert _pinched([sympy.Le(mask, new + past), sympy.Ge(mask, new + past)]) == [(mask, new + past)]
    assert _pinched([sympy.Le(mask, new + past), sympy.Ge(mask, new + other)]) == []
    assert _pinched([sympy.Lt(mask, new + past), sympy.Ge(mask, new + past)]) == []
