"""Reading operators: what has no rule, or an argument that no rule knows, is read as it stands, and the result stays right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.analysis.constants import fold
from attnopt.ir import expr as E
from mutation.graphs import K, Q, V, only, sites, tensor


def biased(make: object, *more: Tensor) -> object:
    """The site of an attention to whose scores ``make(w)`` is added."""

    def f(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        w = q @ k.mT
        return (w + make(*more)).softmax(-1) @ v  # type: ignore[operator]

    site = only(f, Q, K, V, *more)
    assert site.status == "replaced", [str(r) for r in site.remarks]
    return site.spec


def test_a_pad_that_repeats_is_not_a_pad_with_a_number() -> None:
    biased(lambda b: F.pad(b, (1, 1), mode="replicate"), tensor(1, 5, 3))


def test_a_pad_that_reflects_is_not_a_pad_with_a_number() -> None:
    biased(lambda b: F.pad(b, (1, 1), mode="reflect"), tensor(1, 5, 3))


def test_a_pad_with_a_number() -> None:
    biased(lambda b: F.pad(b, (1, 1), value=-2.0), tensor(1, 5, 3))


def test_a_second_difference_is_not_a_first() -> None:
    biased(lambda b: torch.diff(b, n=2), tensor(5, 7))


def test_a_difference_with_something_appended() -> None:
    biased(lambda b: torch.diff(b, append=b[:, :1]), tensor(5, 5))


def test_a_difference_with_two_prepended() -> None:
    biased(lambda b: torch.diff(b, prepend=b[:, :2]), tensor(5, 4))


def test_a_gather_by_a_mask_is_not_one_by_numbers() -> None:
    biased(lambda b: b[torch.tensor([True, False, True, True, True, True])], tensor(6, 5))


def test_a_mean_over_two_axes() -> None:
    biased(lambda b: b.mean((0, 1)), tensor(3, 2, 5, 5))


def test_a_mean_over_everything() -> None:
    biased(lambda b: b.mean(), tensor(3, 2, 5, 5))


def test_a_roll_of_the_flattened_tensor() -> None:
    biased(lambda b: torch.roll(b, 3), tensor(5, 5))


def test_repeats_that_differ_by_entry() -> None:
    biased(lambda b: b.repeat_interleave(torch.tensor([2, 1, 2]), dim=1, output_size=5), tensor(5, 3))


def test_repeats_of_the_flattened_tensor() -> None:
    biased(lambda b: b.repeat_interleave(5).view(5, 5), tensor(5))


def test_signs_of_floats() -> None:
    biased(lambda b: torch.sign(b), tensor(5, 5))


def test_nan_to_num_with_numbers_of_its_own() -> None:
    nan = tensor(5, 5).masked_fill(torch.eye(5, dtype=torch.bool), torch.nan)
    biased(lambda b: torch.nan_to_num(b, nan=0.7), nan)


def test_nan_to_num_with_an_infinity_of_its_own() -> None:
    inf = tensor(5, 5).masked_fill(torch.eye(5, dtype=torch.bool), torch.inf)
    biased(lambda b: torch.nan_to_num(b, posinf=3.0), inf)
    biased(lambda b: torch.nan_to_num(b, neginf=-3.0), -inf)


def test_places_where_a_tensor_is_true() -> None:
    biased(lambda b: torch.where(b > 0)[0].float().sum(), tensor(5, 5).abs())


def test_a_join_of_tensors_with_an_empty_one() -> None:
    biased(lambda b: torch.cat([torch.zeros(0), b], -1), tensor(5))
    biased(lambda b: torch.cat([torch.zeros(0), b], -1), tensor(5, 5))


def test_a_gather_counted_from_the_end() -> None:
    site = only(lambda m, q, k, v, b: (q @ k.mT + b[m.at]).softmax(-1) @ v, Q, K, V, tensor(6, 5), at=torch.tensor([-1, 2, -3, 0, 5]))
    assert site.status == "replaced"


def test_an_einsum_of_one_that_sums() -> None:
    biased(lambda b: torch.einsum("qkd->qk", b), tensor(5, 5, 3))


def test_an_einsum_of_one_that_takes_the_diagonal() -> None:
    biased(lambda b: torch.einsum("qqk->qk", b), tensor(5, 5, 5))


def test_a_division_that_truncates() -> None:
    biased(lambda b: torch.div(b, 0.3, rounding_mode="trunc"), tensor(5, 5))


def test_an_integer_division_that_truncates() -> None:
    biased(lambda: torch.div(torch.arange(5) - 2, 2, rounding_mode="trunc"))


# ------------------------------------------------------------------------------------------------ products


def test_an_einsum_of_three() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return torch.einsum("bhqd,bhkd,h->bhqk", q, k, g).softmax(-1) @ v

    assert [s.status for s in sites(f, Q, K, V, tensor(2))] == ["missed"]


def test_an_einsum_with_an_ellipsis() -> None:
    sites(lambda q, k, v: torch.einsum("...qd,...kd->...qk", q, k).softmax(-1) @ v, Q, K, V)


def test_an_einsum_of_a_diagonal() -> None:
    """Only features that stand on the diagonal of the last two axes count."""
    q, k = tensor(2, 5, 4, 4), tensor(2, 6, 4)
    assert [s.status for s in sites(lambda q, k, v: torch.einsum("bqdd,bkd->bqk", q, k).softmax(-1) @ v, q, k, tensor(2, 6, 3))] == ["missed"]


def test_an_einsum_that_sums_two_axes() -> None:
    q, k = tensor(2, 5, 3, 4), tensor(2, 6, 3, 4)
    assert [s.status for s in sites(lambda q, k, v: torch.einsum("bqed,bked->bqk", q, k).softmax(-1) @ v, q, k, tensor(2, 6, 3))] == ["missed"]


def test_an_einsum_that_sums_an_axis_of_one_side() -> None:
    q, k = tensor(2, 5, 4), tensor(2, 6)
    assert "replaced" not in [s.status for s in sites(lambda q, k, v: torch.einsum("bqd,bk->bqk", q, k).softmax(-1) @ v, q, k, tensor(2, 6, 3))]


def test_a_sum_of_products_over_two_axes() -> None:
    q, k = tensor(2, 5, 1, 3, 4), tensor(2, 1, 6, 3, 4)
    assert [s.status for s in sites(lambda q, k, v: (q * k).sum((-1, -2)).softmax(-1) @ v, q, k, tensor(2, 6, 3))] == ["missed"]


def test_a_sum_that_only_one_factor_runs_along() -> None:
    q, k = tensor(2, 5, 1, 4), tensor(2, 1, 6, 1)
    assert "replaced" not in [s.status for s in sites(lambda q, k, v: (q * k).sum(-1).softmax(-1) @ v, q, k, tensor(2, 6, 3))]


def test_a_sum_of_a_sum_is_no_product() -> None:
    q, k = tensor(2, 5, 1, 4), tensor(2, 1, 6, 4)
    assert "replaced" not in [s.status for s in sites(lambda q, k, v: (q + k).sum(-1).softmax(-1) @ v, q, k, tensor(2, 6, 3))]


def test_a_sum_of_a_product_with_a_number() -> None:
    q = tensor(2, 5, 6, 4)
    assert "replaced" not in [s.status for s in sites(lambda q, v: (q * 2.0).sum(-1).softmax(-1) @ v, q, tensor(2, 6, 3))]


def test_a_matrix_times_a_vector() -> None:
    assert "replaced" not in [s.status for s in sites(lambda k, v: ((k @ k[0, 0]).softmax(-1)[:, None] @ v), tensor(2, 6, 4), tensor(2, 6, 3))]


# ------------------------------------------------------------------------------------------------ constants


INDEX = (E.var("i", 4), E.var("j", 4))


def test_complex_numbers_are_no_formula() -> None:
    assert fold(torch.ones(4, 4, dtype=torch.complex64), INDEX) is None


def test_an_empty_tensor_is_no_formula() -> None:
    assert fold(torch.ones(0, 4), INDEX) is None


def test_halves_are_no_whole_numbers() -> None:
    found = fold(torch.arange(4).float()[None, :] * 0.5 + torch.zeros(4, 1), INDEX)
    assert found is None


def test_three_values_are_no_triangle() -> None:
    assert fold(torch.ones(4, 4).tril() + torch.ones(4, 4).tril(-2) * 5, INDEX) is None


def test_nan_is_no_value_of_a_triangle() -> None:
    assert fold(torch.where(torch.ones(4, 4).tril().bool(), torch.nan, 0.0), INDEX) is None


def test_one_entry_off_is_no_triangle() -> None:
    x = torch.ones(4, 4).tril()
    x[1, 3] = 1
    assert fold(x, INDEX) is None
    x = torch.ones(4, 4).tril()
    x[3, 1] = 0
    assert fold(x, INDEX) is None


def test_many_stripes_are_no_band() -> None:
    index = (E.var("i", 12), E.var("j", 12))
    d = torch.arange(12)[:, None] - torch.arange(12)[None, :]
    assert fold(d % 2 == 0, index) is None
