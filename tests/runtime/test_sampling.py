"""Sampling: filters against a plain loop over tokens, and frequencies against probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from attnopt.errors import ServingError
from attnopt.runtime import SamplingParams, sample
from attnopt.runtime.sampling import uniform


def probabilities(logits: list[float], p: SamplingParams) -> dict[int, float]:
    """The distribution by its definition, one token after the other."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    e = {i: math.exp((logits[i] - logits[order[0]]) / p.temperature) for i in order}
    kept = order[: p.top_k or len(order)]
    total, sum_, out = sum(e[i] for i in kept), 0.0, {}
    for i in kept:
        if out and sum_ >= p.top_p:
            break
        out[i] = e[i] / total
        sum_ += e[i] / total
    return {i: x / sum(out.values()) for i, x in out.items()}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5, top_k=3),
        SamplingParams(temperature=2.0, top_p=0.7),
        SamplingParams(temperature=1.0, top_k=4, top_p=0.8),
        SamplingParams(temperature=1.0, top_p=0.01),
    ],
    ids=["temperature", "top-k", "top-p", "both", "one-token-left"],
)
def test_frequencies_are_the_probabilities(params: SamplingParams) -> None:
    logits = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.0, 1.4, -torch.inf])
    n = 20000
    drawn = sample(logits.expand(n, 7), [params] * n, [7] * n, list(range(n))).read()
    expected = probabilities(logits.tolist(), params)
    counts = torch.bincount(torch.tensor(drawn), minlength=7) / n
    assert {i for i in range(7) if counts[i] > 0} == {i for i, x in expected.items() if x > 0}
    for i, x in expected.items():
        # five standard deviations
        assert abs(counts[i] - x) <= 5 * math.sqrt(x * (1 - x) / n) + 1e-9


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(6, 40)
    params = [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=0.3, top_k=5), SamplingParams(temperature=1.0, top_p=0.4)]
    params += [SamplingParams(temperature=9.0, top_k=1), SamplingParams(temperature=1.0, top_k=1000)]
    seeds, counters = [0, 1, 2, 3, 4, 5], [3, 1, 4, 1, 5, 9]
    together = sample(logits, params, seeds, counters).read()
    assert together == [sample(logits[i : i + 1], params[i : i + 1], [seeds[i]], [counters[i]]).read()[0] for i in range(6)]
    assert together[0] == int(logits[0].argmax()) and together[4] == int(logits[4].argmax())


def test_numbers_are_even_and_of_seed_and_counter_alone() -> None:
    draws = torch.tensor([[uniform(seed, n) for n in range(500)] for seed in range(40)], dtype=torch.float64)
    assert draws.min() >= 0 and draws.max() < 1
    assert len(draws.unique()) == draws.numel()
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.var() - 1 / 12) < 0.003
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.25 and torch.corrcoef(draws[:, :40].T).fill_diagonal_(0).abs().max() < 0.75


def test_rows_from_which_nothing_can_be_chosen_are_told() -> None:
    rows = torch.tensor([[0.0, torch.nan, 1.0], [-torch.inf] * 3, [0.0, torch.inf, torch.inf], [-torch.inf, 1.0, -torch.inf]])
    for temperature in (0.0, 1.0, 1e-300):
        found = sample(rows, [SamplingParams(temperature=temperature)] * 4, [1] * 4, [0] * 4).read()
        assert found[:2] == [None, None] and found[2] in (1, 2) and found[3] == 1


def test_of_equal_logits_greedy_takes_the_lowest_id() -> None:
    assert sample(torch.tensor([[0.0, 3.0, 3.0]]), [SamplingParams()], [0], [0]).read() == [1]


def test_no_row_gives_no_token() -> None:
    assert sample(torch.empty(0, 5), [], [], []).read() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1."),
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0"),
        ({"temperature": math.nan}, "temperature is nan; it must be 0"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"seed": -1}, "seed is -1; it must be from 0"),
    ],
)
def test_parameters_out_of_range_are_one_clear_error(options: dict[str, float], message: str) -> None:
    with pytest.raises(ServingError) as e:
        SamplingParams(**options)  # type: ignore[arg-type]
    assert str(e.value).startswith(message)
