"""What is an attention: near misses of each condition on a softmax, its products and an existing call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mutation.graphs import K, Q, V, only, refused, rewritten, sites, tensor


def scores() -> Tensor:
    return Q @ K.mT


def test_probabilities_that_meet_two_values_are_refused() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT).softmax(-1)
        return p @ v + p @ (v * v)

    refused("AO203", f, Q, K, V, saying="multiplied with 2 tensors")


def test_a_softmax_alone_is_no_attention() -> None:
    refused("AO201", lambda x: x.softmax(-1), Q)


def test_a_softmax_of_a_product_that_is_returned_says_so() -> None:
    refused("AO203", lambda q, k: (q @ k.mT).softmax(-1), Q, K, saying="returned")


def test_a_softmax_along_queries_is_refused() -> None:
    refused("AO205", lambda q, k, v: (q @ k.mT).softmax(-2) @ v, Q, K, V, saying="sums another axis")


def test_a_key_axis_that_is_also_the_query_axis_is_refused() -> None:
    """The diagonal of the probabilities: out[b, h, d] = sum_k p[b, h, k, k] v[b, h, k, d]."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT).softmax(-1)
        return torch.einsum("bhkk,bhkd->bhd", p, v)

    found = sites(f, Q, K, V)
    assert [s.status for s in found] == ["missed"]


def test_a_product_with_an_addend_is_refused() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.baddbmm(v, (q @ k.mT).softmax(-1), v)

    refused("AO204", f, Q[0], K[0], V[0], saying="adds another tensor or a factor")


def test_a_product_with_a_factor_is_refused() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.baddbmm(v, (q @ k.mT).softmax(-1), v, beta=0, alpha=2.0)

    refused("AO204", f, Q[0], K[0], V[0], saying="adds another tensor or a factor")


def test_scores_that_are_mixed_along_heads_are_refused() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ k.mT
        return (w + w.cumsum(1)).softmax(-1) @ v

    refused("AO212", f, Q, K, V, saying="cumsum")


def test_scores_that_are_sorted_are_refused() -> None:
    refused("AO212", lambda q, k, v: (q @ k.mT).sort(-1).values.softmax(-1) @ v, Q, K, V)


def test_scores_that_someone_else_reads_are_refused() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ k.mT
        return w.softmax(-1) @ v + w.sum()

    refused("AO203", f, Q, K, V, saying="also used by")


def test_a_column_of_scores_is_no_sink() -> None:
    """The key that is left out takes weight, and it has a score of its own."""
    refused("AO205", lambda q, k, v: (q @ k.mT).softmax(-1)[..., 1:] @ v[:, :, 1:], Q, K, V)


def test_two_columns_left_out_are_refused() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = torch.cat([q @ k.mT, torch.zeros(2, 2, 5, 2)], -1)
        return w.softmax(-1)[..., :-2] @ v

    refused("AO205", f, Q, K, V, saying="normalises over 7")


def test_a_cast_to_whole_numbers_is_not_looked_through() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1).mul(3).long().float() @ v

    assert [s.status for s in sites(f, Q, K, V)] == ["missed"]


def test_a_rounded_quotient_is_no_normalisation() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return torch.div(e, e.sum(-1, keepdim=True), rounding_mode="floor") @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


def test_a_product_rounded_after_division_is_no_normalisation() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return torch.div(e @ v, e.sum(-1, keepdim=True), rounding_mode="floor")

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


def test_a_product_divided_by_a_number_is_not_normalised() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e @ v) / 3.0 + 0 * e.sum(-1, keepdim=True)

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


def test_a_product_divided_by_another_sum_is_not_normalised() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e @ v) / (e.sum(-1, keepdim=True) * 2)

    refused("AO204", f, Q, K, V, saying="never divided by their sum")


def test_a_sum_along_queries_is_no_normalisation() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e / e.sum(-2, keepdim=True)) @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


def test_a_sum_over_two_axes_is_no_normalisation() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e / e.sum((-1, -2), keepdim=True)) @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


def test_a_sum_that_broadcasts_along_another_axis_is_no_normalisation() -> None:
    """Without keepdim [.., S] stands against the key axis."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e / e.sum(-1)[:, :, None, :]) @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


def test_the_sum_of_another_tensor_is_no_normalisation() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ k.mT
        return (w.exp() / (w * 2).exp().sum(-1, keepdim=True)) @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


def test_the_logsumexp_of_another_tensor_is_no_normalisation() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ k.mT
        return torch.exp(w - torch.logsumexp(w * 2, -1, keepdim=True)) @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


def test_the_logsumexp_of_two_axes_is_no_normalisation() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ k.mT
        return torch.exp(w - torch.logsumexp(w, (-1, -2), keepdim=True)) @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


def test_a_logsumexp_along_another_axis_is_no_normalisation() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = q @ k.mT
        return torch.exp(w - torch.logsumexp(w, -1)[:, :, None, :]) @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


# ------------------------------------------------------------------------------------------------ existing calls


def test_a_call_with_a_variable_head_size_is_refused() -> None:
    refused("AO208", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), Q, K, V, saying="head size", dynamic=True)


@pytest.mark.parametrize("heads", [2, 4])
def test_a_call_with_shared_heads_keeps_which_is_whose(heads: int) -> None:
    q = tensor(2, heads, 5, 4)
    site = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, K, V)
    assert site.status == "replaced" and site.spec is not None and site.spec.groups == heads // 2


# ------------------------------------------------------------------------------------------------ channels


def test_keys_of_fixed_number_and_features_of_variable_number_are_channels() -> None:
    def f(x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x

    module_input = tensor(2, 3, 7)
    exported = torch.export.export(_Channels(), (module_input,), dynamic_shapes={"x": {2: torch.export.Dim.AUTO}}, strict=False)
    from attnopt.config import OptimizeConfig
    from attnopt.passes.pipeline import run_pipeline

    found = run_pipeline(exported.module(check_guards=False), OptimizeConfig(backend="reference")).sites
    assert [[r.code for r in s.remarks] for s in found] == [["AO211"]]
    assert only(f, module_input).status == "replaced"


class _Channels(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


def test_the_channels_of_a_projection_are_no_keys() -> None:
    w = tensor(4, 4)

    def f(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w)
        return (y.mT @ y).softmax(-1) @ y.mT

    refused("AO211", f, tensor(2, 5, 4), w)


def test_rows_and_columns_of_a_product_are_told_apart() -> None:
    assert rewritten(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, Q, K, V).sites[0].status == "replaced"


# ------------------------------------------------------------------------------------------------ sinks in the denominator


def with_sink(make: Callable[[Tensor, Tensor], Tensor], sink: Tensor) -> list[str]:
    """The status of ``e / (sum of e + make(sink, peak))`` for exponentials whose peak was taken off."""

    def f(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        w = q @ k.mT
        peak = w.amax(-1, keepdim=True)
        e = torch.exp(w - peak)
        return (e / (e.sum(-1, keepdim=True) + make(sink, peak))) @ v

    return [s.status for s in sites(f, Q, K, V, sink)]


def test_a_sink_from_which_the_peak_was_taken() -> None:
    assert with_sink(lambda z, peak: torch.exp(z - peak), tensor(1, 2, 1, 1)) == ["replaced"]
    assert with_sink(lambda z, peak: torch.exp(-peak), tensor(1)) == ["replaced"]


def test_a_sink_with_another_peak_is_none() -> None:
    assert "replaced" not in with_sink(lambda z, peak: torch.exp(z), tensor(1, 2, 1, 1))
    assert "replaced" not in with_sink(lambda z, peak: torch.exp(-z), tensor(1, 2, 1, 1))
    assert "replaced" not in with_sink(lambda z, peak: torch.exp(z - 2 * peak), tensor(1, 2, 1, 1))


def test_a_number_that_is_no_exponential_is_no_sink() -> None:
    assert "replaced" not in with_sink(lambda z, peak: z.square(), tensor(1, 2, 1, 1))


def test_a_number_that_is_no_exponential_is_no_sink_without_a_peak() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e / (e.sum(-1, keepdim=True) + z.square())) @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V, tensor(1, 2, 1, 1))]


def test_a_quotient_that_is_larger_than_the_product() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e @ v) / e.sum(-1, keepdim=True)[None].expand(3, -1, -1, -1, -1)

    sites(f, Q, K, V)


def test_a_sink_that_varies_along_the_keys_is_none() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e / (e.sum(-1, keepdim=True) + z.exp())) @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V, tensor(1, 1, 1, 5))]


def test_the_largest_exponential_is_no_sum() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e / e.amax(-1, keepdim=True)) @ v

    assert "replaced" not in [s.status for s in sites(f, Q, K, V)]


def test_parts_of_a_packed_projection() -> None:
    """The parts are results of one operator, taken by Python's own getitem."""

    def f(x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v

    assert [s.status for s in sites(f, tensor(2, 5, 12))] == ["replaced"]


def test_of_two_products_the_plainer_one_is_the_score() -> None:
    """Both stand below the softmax; the other one is read as it stands."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + (k @ q.mT).mT * 0.5 + (q @ k.mT).mT).softmax(-1) @ v

    site = only(f, Q, K, V)
    assert site.spec is not None and len(site.spec.loads) >= 1


def test_heads_mixed_after_the_softmax_are_said_to_be_mixed() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return torch.einsum("bhqk,hg->bgqk", (q @ k.mT).softmax(-1), m) @ v

    refused("AO204", f, Q, K, V, tensor(2, 2), saying="mixed by")


def test_a_quotient_of_another_shape_says_what_is_missing() -> None:
    """The product is repeated by the division: the sum has an axis more."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e @ v) / torch.stack([e.sum(-1, keepdim=True)] * 3)

    refused("AO204", f, Q, K, V, saying="never divided")


def test_a_softmax_over_a_single_key_is_refused() -> None:
    refused("AO202", lambda q, k, v: (q @ k.mT).softmax(-1) @ v, Q, K[:, :, :1], V[:, :, :1], saying="size one")
