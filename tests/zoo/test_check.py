"""The judge of the zoo sees what is wrong: each expectation that is not met is a deviation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from zoo.case import Case, Refusal, Variant, says
from zoo.check import _compare, check, empty_row
from zoo.models import CASES

STATIC = Variant("eager", padded=False, dynamic=False)
CASE = CASES["hand_gpt"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sites": 3}, "2 attentions found instead of 3"),
        ({"expect": {}}, "causal is 'top_left' instead of None"),
        ({"expect": {"": {"causal": "top_left", "window": (15, 0)}}}, "window is (None, None) instead of (15, 0)"),
        ({"expect": {"": {"causal": "top_left", "words": ("chunk",)}}}, "words is () instead of ('chunk',)"),
        (
            {"refusals": {"attention.1": Refusal("AO203", "its probabilities are returned")}},
            "attention.1 was replaced, and should not be: its probabilities are returned",
        ),
        ({"exported": False}, "captured by torch.export"),
    ],
    ids=["sites", "causal", "window", "words", "refusal", "capture"],
)
def test_what_is_not_as_expected_is_a_deviation(change: dict[str, Any], complaint: str) -> None:
    found = check(replace(CASE, **change), STATIC).deviations
    assert any(complaint in text for text in found), found


def test_a_wrong_code_is_a_deviation() -> None:
    case = replace(CASES["xt_talking_heads"], refusals={"": Refusal("AO203", "another reason")})
    assert any("instead of AO203 (another reason)" in text for text in check(case, STATIC).deviations)


def test_a_missed_attention_is_a_deviation() -> None:
    case = replace(CASES["xt_talking_heads"], refusals={})
    row = check(case, STATIC)
    assert row.refused == 0
    assert any("missed: AO212" in text for text in row.deviations), row.deviations


def test_another_result_is_a_deviation() -> None:
    model, other = CASE.build("eager"), CASE.build("eager")
    row = empty_row(CASE, STATIC)
    _compare(model, other, CASE.inputs(False, 2, 9), "same", row)
    assert row.deviations == []
    with torch.no_grad():
        other.attention[1].qkv.weight[0, 0] += 0.01
    _compare(model, other, CASE.inputs(False, 2, 9), "other", row)
    assert len(row.deviations) == 1
    assert "times the error budget" in row.deviations[0]


def test_every_capture_is_counted() -> None:
    """A model that fixes its length is captured for each length, and the zoo says so."""
    case: Case = replace(CASES["xt_window"], open="bs", other=((2, 37),))
    assert any("captured 2 times for 2 sizes" in text for text in check(case, Variant("eager", padded=False, dynamic=True)).deviations)


def test_says_reads_in_order() -> None:
    assert says("a", "b")("a.b")
    assert not says("b", "a")("a.b")
