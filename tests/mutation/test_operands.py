"""Operands that are no views of a tensor in batch, head, sequence and feature are refused, and sizes are sorted by what they do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnopt.config import OptimizeConfig
from attnopt.passes.pipeline import run_pipeline
from mutation.graphs import K, Q, V, only, refused, sites, tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def test_every_second_row_of_scores_is_no_view_of_queries() -> None:
    refused("AO206", lambda q, k, v: (q @ k.mT)[:, :, ::2].softmax(-1) @ v, Q, K, V, saying="queries")


def test_scores_turned_around_are_no_view_of_keys() -> None:
    refused("AO206", lambda q, k, v: (q @ k.mT).flip(-1).softmax(-1) @ v, Q, K, V, saying="keys")


def test_probabilities_turned_around_meet_other_values() -> None:
    refused("AO205", lambda q, k, v: (q @ k.mT).softmax(-1).flip(-1) @ v, Q, K, V)


def test_the_entries_of_a_parameter_are_no_constants() -> None:
    """A parameter may change, however regular it is."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(5, 5).tril())

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT + self.bias).softmax(-1) @ v

    module = Learned()
    exported = torch.export.export(module, (Q, K, V), strict=False)
    result = run_pipeline(exported.module(check_guards=False), OptimizeConfig(backend="reference"))
    (site,) = result.sites
    assert site.spec is not None and len(site.spec.loads) == 1 and result.folded == ()


def test_a_buffer_is_a_constant_and_named_as_folded() -> None:
    site = only(lambda m, q, k, v: (q @ k.mT).masked_fill(~m.seen, -torch.inf).softmax(-1) @ v, Q, K, V, seen=torch.ones(5, 5, dtype=torch.bool).tril())
    assert site.spec is not None and site.spec.causal == "top_left" and site.spec.loads == ()


def test_an_operand_that_was_multiplied_with_a_tensor_keeps_it() -> None:
    site = only(lambda q, k, v, t: attend(q * t, k, v), Q, K, V, tensor(1, 2, 5, 1))
    assert site.spec is not None and site.spec.scale == 1.0


def test_an_operand_that_was_multiplied_with_nothing_stays() -> None:
    site = only(lambda q, k, v: attend(q * 0.0, k, v), Q, K, V)
    assert site.spec is not None and site.spec.scale == 1.0


def test_an_operand_that_a_number_made_larger_keeps_its_shape() -> None:
    """A tensor with one row, multiplied with one of five: the factor is no constant of the score."""
    site = only(lambda q, k, v: attend(q * 0.5, k, v), Q[:, :, :1], K, V)
    assert site.spec is not None and site.spec.scale == 0.5


def test_what_a_view_is_of_stands_once() -> None:
    """The same tensor for queries, keys and values, in two layouts."""
    assert [s.status for s in sites(lambda x: attend(x, x, x.reshape(2, 2, 5, 4)), Q)] == ["replaced"]
