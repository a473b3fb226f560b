"""Distances, budgets and what a check says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attnopt.verify.budget import apart, band, computing_dtype, factor, judge
from attnopt.verify.compare import FAR, Distance, distance
from attnopt.verify.scatter import OwnErrors

T = torch.tensor
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("actual", "truth", "norm"),
    [
        pytest.param(T([1.0, 2.0]), T([1.0, 2.0]), 0.0, id="equal"),
        pytest.param(T([3.0, 4.5]), T([3.0, 4.0]), 0.1, id="a tenth"),
        pytest.param(T([NAN, 2.0]), T([NAN, 2.0]), 0.0, id="nan in both"),
        pytest.param(T([NAN, 2.0]), T([1.0, 2.0]), INF, id="nan where there is none"),
        pytest.param(T([1.0, 2.0]), T([NAN, 2.0]), INF, id="no nan where there is one"),
        pytest.param(T([INF, 2.0]), T([INF, 2.0]), 0.0, id="infinite in both"),
        pytest.param(T([-INF, 2.0]), T([INF, 2.0]), INF, id="the other infinity"),
        pytest.param(T([INF, 2.0]), T([1.0, 2.0]), INF, id="infinite where it is not"),
        pytest.param(T([NAN, 2.0]), T([INF, 2.0]), INF, id="nan for infinity"),
        pytest.param(T([0.0, 0.0]), T([0.0, 0.0]), 0.0, id="zero"),
        pytest.param(T([1e-30, 0.0]), T([0.0, 0.0]), INF, id="something for zero"),
        pytest.param(T([1.0]), T([1.0, 2.0]), INF, id="another shape"),
        pytest.param(T([[1.0, 2.0]]), T([1.0, 2.0]), INF, id="another rank"),
        pytest.param(T([1, 2, 3, 4]), T([1, 2, 3, 5]), 0.25, id="integers"),
        pytest.param(T([True, False]), T([True, False]), 0.0, id="booleans"),
        pytest.param(T([1, 2]), T([1, 2], dtype=torch.int32), INF, id="another integer type"),
        pytest.param(torch.empty(0), torch.empty(0), 0.0, id="empty"),
        pytest.param(T([3 + 4j]), T([3 + 4.5j]), 0.5 / abs(3 + 4.5j), id="complex"),
        pytest.param(3, 3, 0.0, id="numbers"),
        pytest.param(3, 4, INF, id="other numbers"),
        pytest.param(None, None, 0.0, id="none"),
        pytest.param(T([1.0]), None, INF, id="a tensor for none"),
        pytest.param(True, 1, INF, id="another type"),
    ],
)
def test_distance(actual: Any, truth: Any, norm: float) -> None:
    assert distance(actual, truth).norm == pytest.approx(norm, rel=1e-6)


def test_one_wrong_row_among_many_shows_in_the_row_distance() -> None:
    truth = torch.randn(10000, 8, dtype=torch.float64)
    actual = truth.clone()
    actual[1234] *= 1.1
    found = distance(actual, truth)
    assert found.norm < 0.0015
    assert found.row > 0.02


def test_a_row_that_cancels_is_not_blown_up() -> None:
    truth = torch.ones(100, 8, dtype=torch.float64)
    truth[0] = 1e-12
    assert distance(truth + 1e-9, truth).row == pytest.approx(1e-9, rel=0.05)


def test_gradients_that_cancel_are_measured_against_the_floor() -> None:
    assert distance(T([1e-9, 0.0]), T([0.0, 0.0]), floor=1.0).norm < 1e-9
    assert distance(T([5.0, 2.0]), T([NAN, 2.0]), ignore_nan_truth=True).norm == 0.0
    assert distance(T([NAN, NAN]), T([NAN, 2.0]), ignore_nan_truth=True) == FAR


class TestJudge:
    truth = torch.linspace(1, 2, 64, dtype=torch.float64)

    def off(self, error: float) -> torch.Tensor:
        return self.truth * (1 + error)

    @pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 4.0), (torch.bfloat16, 1.5), (torch.float16, 1.5)], ids=str)
    def test_k_times_the_original_error_and_the_band(self, dtype: torch.dtype, k: float) -> None:
        own = 100 * torch.finfo(dtype).eps
        limit = k * own + band(dtype)
        assert factor(dtype) == k
        for used, passed in ((0.99, True), (1.01, False)):
            check = judge("x", [self.off(used * limit)], [self.off(own)], [self.truth], dtype)
            assert check.passed is passed
            assert check.budget == pytest.approx(limit, rel=1e-6)
            assert check.error == pytest.approx(used * limit, rel=1e-6)

    def test_without_truth_they_are_compared_with_each_other(self) -> None:
        for used, passed in ((0.9, True), (1.1, False)):
            check = judge("x", [self.off(used * apart(torch.float32)).float()], [self.truth.float()], None, torch.float32)
            assert check.passed is passed and check.budget == apart(torch.float32)

    def test_the_worst_leaf_is_told(self) -> None:
        check = judge("x", [self.off(0), self.off(1e-3)], [self.off(1e-7)] * 2, [self.truth] * 2, torch.float32)
        assert not check.passed and check.detail == "output 1"

    def test_a_wrong_row_fails_though_the_norm_is_within_budget(self) -> None:
        truth = torch.randn(4000, 8, dtype=torch.float64)
        noise = torch.randn_like(truth) * 0.004
        actual = truth + noise
        actual[17] = truth[17] * 1.3
        check = judge("x", [actual], [truth + noise], [truth], torch.bfloat16)
        assert distance(actual, truth).norm < 1.5 * distance(truth + noise, truth).norm + band(torch.bfloat16)
        assert not check.passed

    def test_another_dtype_and_another_number_of_outputs(self) -> None:
        assert not judge("x", [self.truth.float()], [self.truth], [self.truth], torch.float32).passed
        assert not judge("x", [self.truth] * 2, [self.truth], [self.truth], torch.float32).passed

    def test_where_the_original_overflows_nothing_is_said_but_that(self) -> None:
        check = judge("x", [self.off(1.0)], [self.truth * math.nan], [self.truth], torch.float16)
        assert check.passed and check.detail == "the original itself is not finite where the truth is"

    def test_where_the_truth_overflows_they_are_compared_with_each_other(self) -> None:
        truth = torch.cat([self.truth, torch.tensor([math.nan])])
        original = torch.cat([self.truth, torch.ones(1)])
        assert judge("x", [original], [original], [truth], torch.float32).passed
        check = judge("x", [original * 1.001], [original], [truth], torch.float32)
        assert not check.passed and check.budget == apart(torch.float32) and "own dtype" in check.detail

    def test_gradients_count_together(self) -> None:
        tiny = [self.truth, self.truth * 0]
        noise = self.truth * 1e-9
        assert judge("x", [self.truth, noise], tiny, tiny, torch.float32, gradient=True).passed
        assert not judge("x", [self.truth, noise], tiny, tiny, torch.float32).passed
        assert not judge("x", [self.truth, self.truth * 1e-3], tiny, tiny, torch.float32, gradient=True).passed

    def test_a_gradient_that_cancels_in_float64_is_rounding(self) -> None:
        """The roundings of terms as large as the other gradients; they are the truth's own as well."""
        rounded, nothing = self.truth * 0, [self.truth, self.truth * 0]
        rounded[0] = 8 * torch.finfo(torch.float64).eps
        assert judge("x", [self.truth, rounded], nothing, nothing, torch.float64, gradient=True).passed
        assert not judge("x", [self.truth, self.truth * 1e-9], nothing, nothing, torch.float64, gradient=True).passed

    def test_what_is_wrong_in_float64_is_no_rounding(self) -> None:
        assert judge("x", [self.off(1e-12)], [self.truth], [self.truth], torch.float64).passed
        assert not judge("x", [self.off(1e-10)], [self.truth], [self.truth], torch.float64).passed
        assert not judge("x", [self.truth.float().double()], [self.truth], [self.truth], torch.float64).passed

    def test_an_output_of_few_numbers_is_judged_by_several_errors_of_the_original(self) -> None:
        """The original that was seen may happen to have no error at all."""
        def off(n: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            return [torch.full((1, 1), 1 + 1e-5 * (-1) ** n, dtype=torch.float64)], [torch.ones(1, 1)]

        for shape, error, draw, passed in (
            ((1, 1), 2e-5, off, True),
            ((1, 1), 5e-5, off, False),  # K times 1e-5 and the band are less
            ((1, 1), 2e-5, lambda n: ([torch.ones(1, 1)], [torch.ones(1, 1)]), False),  # another original has no error
            ((1, 1), 2e-5, None, False),
            ((4, 4), 2e-5, off, False),  # sixteen numbers say enough
        ):
            truth = torch.ones(shape)
            check = judge("x", [truth * (1 + error)], [truth], [truth.double()], torch.float32, own_errors=None if draw is None else OwnErrors(draw))
            assert check.passed is passed, (shape, error, check)

    def test_further_errors_never_make_a_budget_smaller(self) -> None:
        """Roundings before the attention are the same on both sides: where the original was unlucky there, so is the optimized model."""
        none = OwnErrors(lambda n: ([torch.ones(1)], [torch.ones(1)]))
        truth = torch.ones(1)
        for error, passed in ((3e-5, True), (5e-5, False)):
            assert judge("x", [truth * (1 + error)], [truth * (1 + 1e-5)], [truth.double()], torch.float32, own_errors=none).passed is passed

    @pytest.mark.parametrize(("n", "passed"), [(4, True), (64, False)])
    def test_a_gradient_of_few_elements_scatters_like_a_row(self, n: int, passed: bool) -> None:
        truth, own = self.truth[:n], 100 * torch.finfo(torch.float32).eps
        assert judge("x", [truth * (1 + 6 * own)], [truth * (1 + own)], [truth], torch.float32, gradient=True).passed is passed
        assert not judge("x", [truth * (1 + 9 * own)], [truth * (1 + own)], [truth], torch.float32, gradient=True).passed


def test_the_coarsest_dtype_counts() -> None:
    assert computing_dtype([torch.ones(1), torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.int64), 3]) == torch.bfloat16
    assert computing_dtype([torch.ones(1, dtype=torch.float64)]) == torch.float64
    assert computing_dtype([3]) == torch.float32


def test_distances_are_values() -> None:
    assert Distance(0.0, 0.0) == distance(T([1.0]), T([1.0]))
