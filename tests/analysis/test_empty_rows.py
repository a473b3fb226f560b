"""Rows in which several fills together hide every key: they compute what the original computes there, and fills hide nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_spellings import lifted
from torch import Tensor, nn

import attnopt
from attnopt.passes.pipeline import PipelineResult

INF, MIN = -torch.inf, torch.finfo(torch.float32).min
S = 6
ODD = torch.tensor([[0, 1, 1, 0, 1, 0]], dtype=torch.bool)
Scores = Callable[[nn.Module, Tensor, Tensor], Tensor]


def causal(w: Tensor) -> Tensor:
    return torch.ones(w.shape[-2:], dtype=torch.bool).tril()


def late(w: Tensor) -> Tensor:
    """Beside the diagonal this hides all keys of the first rows."""
    return torch.ones(w.shape[-2:], dtype=torch.bool).tril(-2)


class Attention(nn.Module):
    """Scores as ``scores`` makes them from those of queries and keys, and an argument that is a mask of some form."""

    def __init__(self, scores: Scores, finish: Callable[[Tensor], Tensor] = lambda w: w.softmax(-1)) -> None:
        super().__init__()
        self.scores, self.finish = scores, finish
        self.temperature = nn.Parameter(torch.full((S, 1), 1.7))
        self.table = nn.Parameter(torch.randn(S))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.finish(self.scores(self, q @ k.transpose(-1, -2) * 0.5, mask)) @ v


def same(module: nn.Module, mask: Tensor, dtype: torch.dtype = torch.float32) -> PipelineResult:
    """The rewritten graph after checking that it computes what the module does, on every row and with NaN in the same places."""
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 2, S, 4, dtype=dtype) for _ in range(3))
    module = module.to(dtype)
    result = lifted(module, *inputs, mask, dynamic=False)
    assert [s.status for s in result.sites] == ["replaced"]
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(*inputs, mask), module(*inputs, mask), rtol=2e-5, atol=2e-6, equal_nan=True)
    return result


def two_fills(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    return w.masked_fill(~causal(w), MIN).masked_fill(~mask[:, None, None], -1e9)


def clamped_between(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    w = w.masked_fill(~late(w), INF).clamp(max=2.0)
    return w.masked_fill(~mask[:, None, None], MIN)


def sums_of_fills(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    return w + torch.where(causal(w), 0.0, MIN) + torch.where(mask[:, None, None], 0.0, MIN)


def doubled(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    return sums_of_fills(m, w, mask) * 2.0


def fills_that_cancel(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    return w.masked_fill(~causal(w), MIN) - torch.where(mask[:, None, None], 0.0, MIN)


def below_a_factor(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    w = w.masked_fill(~late(w), MIN) * m.temperature
    return w.masked_fill(~mask[:, None, None], MIN)


def finite_below_infinite(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    return w.masked_fill(~late(w), MIN).masked_fill(~mask[:, None, None], INF)


def halved_fill(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    """-4e4 hides, half of it does not."""
    return w.masked_fill(~causal(w), -4e4) * 0.5 + torch.where(mask[:, None, None], 0.0, -2e4)


@pytest.mark.parametrize("scores", [two_fills, clamped_between, sums_of_fills, doubled, fills_that_cancel, below_a_factor, finite_below_infinite, halved_fill], ids=lambda f: f.__name__)
def test_fills_that_hide_a_row_together(scores: Scores) -> None:
    same(Attention(scores), torch.cat([ODD, torch.zeros_like(ODD)]))


def test_zeros_where_a_mixed_row_is_all_infinite() -> None:
    """Nothing but -inf is zero after nan_to_num, and a row of finite fills is not."""
    result = same(Attention(finite_below_infinite, lambda w: w.softmax(-1).nan_to_num()), torch.cat([ODD, torch.zeros_like(ODD)]))
    assert (result.sites[0].spec.empty_rows, result.sites[0].spec.weightless) == ("program", "zero")


def given(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    return w.masked_fill(~late(w), MIN) + mask[:, None, None]


@pytest.mark.parametrize("hidden", [MIN, INF, -1e9, -5e4])
def test_a_mask_of_numbers_beside_a_fill(hidden: float) -> None:
    """What the caller gives may hide what the model's own mask shows: then the row is computed from all of its keys."""
    mask = torch.zeros(2, S).masked_fill(~torch.cat([ODD, ODD]), hidden)
    mask[1, :3] = hidden
    spec = same(Attention(given), mask).sites[0].spec
    assert any(x.op == "load" for x in spec.mask.leaves)


@pytest.mark.parametrize("hidden", [MIN, INF, -1e9])
def test_a_mask_of_whole_queries_before_a_scale(hidden: float) -> None:
    """It is the same for all keys of a row, and is added: no temperature, though a factor follows it."""
    mask = torch.zeros(2, S).masked_fill(~torch.cat([ODD, ODD]), hidden)
    same(Attention(lambda m, w, mask: ((w + mask[:, None, :, None]) * 0.25).masked_fill(~causal(w), -1e9)), mask)


def test_a_mask_of_numbers_beside_minus_infinity_stays_in_the_score() -> None:
    mask = torch.zeros(2, S).masked_fill(~torch.cat([ODD, ODD]), MIN)
    result = same(Attention(lambda m, w, mask: w.masked_fill(~causal(w), INF) + mask[:, None, None]), mask)
    assert not any(x.op == "load" for x in result.sites[0].spec.mask.leaves)


def test_a_learned_bias_beside_a_fill_is_no_mask() -> None:
    result = same(Attention(lambda m, w, mask: (w + m.table).masked_fill(~causal(w), MIN)), torch.zeros(2, S))
    spec = result.sites[0].spec
    assert spec.causal == "top_left" and spec.traits.mask_rest.value is True and spec.empty_rows == "uniform"


def test_a_learned_decay_beside_a_fill_is_no_mask() -> None:
    """How much is forgotten between two positions: sums of what an activation makes of a projection."""

    class Forgets(Attention):
        def __init__(self) -> None:
            super().__init__(lambda m, w, mask: w)
            self.gate = nn.Linear(4, 1)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            kept = F.logsigmoid(self.gate(k)).squeeze(-1).cumsum(-1)
            w = q @ k.mT + (kept[..., :, None] - kept[..., None, :])
            return w.masked_fill(~causal(w), MIN).softmax(-1) @ v

    spec = same(Forgets(), torch.zeros(2, S)).sites[0].spec
    assert spec.causal == "top_left" and spec.traits.mask_rest.value is True and spec.bias is not None


def test_a_buffer_of_numbers_beside_a_fill_may_be_a_mask() -> None:
    module = Attention(lambda m, w, mask: (w + m.hides).masked_fill(~late(w), MIN))
    module.register_buffer("hides", torch.zeros(S, S).masked_fill(ODD & (torch.arange(S)[:, None] % 3 > 0), MIN))
    spec = same(module, torch.zeros(2, S)).sites[0].spec
    assert any(x.op == "load" for x in spec.mask.leaves) and spec.empty_rows == "program"


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_mask_that_shows_nothing(kernel: str, zeros: bool) -> None:
    """Two conditions that exclude each other."""

    class Nothing(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            i, j = torch.arange(S)[:, None], torch.arange(S)[None, :]
            seen = (j < i) & (j > i)
            if zeros:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            return (q @ k.mT).masked_fill(~seen, INF).softmax(-1) @ v

    inputs = tuple(torch.randn(2, 2, S, 4) for _ in range(3))
    fast = attnopt.optimize(Nothing(), inputs, config=attnopt.OptimizeConfig(backend=kernel))
    assert [s.status for s in fast.attnopt_report.sites] == ["replaced"]
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), Nothing()(*inputs), equal_nan=True)


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("zeros", [True, False])
def test_a_row_whose_visible_scores_overflow(kernel: str, zeros: bool) -> None:
    """The least number times two is -inf: the mask shows keys, and none has weight. That is NaN, or zero where the program makes it so."""

    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor, self.table = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(S))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            hidden = self.table.masked_fill(~mask, MIN).nan_to_num() * self.factor + torch.zeros(S, S).masked_fill(~causal(q @ k.mT), INF)
            if zeros:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
            return (q @ k.mT + hidden).softmax(-1) @ v

    torch.manual_seed(0)
    inputs = (*(torch.randn(2, 2, S, 4) for _ in range(3)), ODD[0])
    fast = attnopt.optimize(Overflows(), inputs, config=attnopt.OptimizeConfig(backend=kernel))
    assert [s.status for s in fast.attnopt_report.sites] == ["replaced"], fast.attnopt_report
    with torch.no_grad():
        want = Overflows()(*inputs)
        assert bool((want[:, :, 0] == 0).all() if zeros else want[:, :, 0].isnan().all())
        torch.testing.assert_close(fast(*inputs), want, equal_nan=True)


def unshifted(w: Tensor) -> Tensor:
    p = w.exp()
    return p / p.sum(-1, keepdim=True)


def test_an_unshifted_softmax_hides_at_what_its_exponential_makes_zero() -> None:
    """exp(-1e4) is zero: a row of nothing else is 0/0."""
    result = same(Attention(lambda m, w, mask: w.masked_fill(~late(w), -1e4), unshifted), torch.zeros(2, S))
    assert result.sites[0].spec.empty_rows == "nan" and result.sites[0].spec.mask.value is not True
    shifted = same(Attention(lambda m, w, mask: w.masked_fill(~late(w), -1e4)), torch.zeros(2, S))
    assert shifted.sites[0].spec.mask.value is True


def test_an_unshifted_softmax_with_a_mask_of_numbers() -> None:
    mask = torch.zeros(2, S).masked_fill(~ODD, -1e4)
    mask[1] = -1e4
    same(Attention(lambda m, w, mask: w + mask[:, None, None], unshifted), mask)


def test_a_call_with_fills_of_both_kinds() -> None:
    class Call(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            w = torch.zeros(S, S)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=w.masked_fill(~late(w), MIN).masked_fill(~mask, INF))

    for mask in (ODD[0], torch.zeros_like(ODD[0])):
        assert same(Call(), mask).sites[0].spec.weightless == "zero"


def test_what_the_graph_rounds_to_float32_is_read_in_float64() -> None:
    """A logarithm of positions in float32 is not the float64 one; a triangle of ones is the same in both."""

    def scores(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
        i = torch.arange(S)[:, None]
        w = w * (torch.log(i + 1.0) * 0.5 + 1.0)
        return w.masked_fill(torch.ones(S, S).tril() == 0, INF)

    torch.manual_seed(0)
    module = Attention(scores).double()
    inputs = (*(torch.randn(2, 2, S, 4, dtype=torch.float64) for _ in range(3)), torch.zeros(2, S))
    result = lifted(module, *inputs, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(*inputs), module(*inputs), rtol=1e-13, atol=1e-13)
    assert result.sites[0].spec.causal == "top_left"
    assert len(result.sites[0].spec.loads) == 1 and len(lifted(Attention(scores), *(x.float() for x in inputs), dynamic=False).sites[0].spec.loads) == 0


def test_flat_heads_that_share_by_turns() -> None:
    """Batch and heads on one axis, keys repeated head by head: read by the number of heads and by that of the keys' heads."""

    class Tiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 10)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, k, v = (f(z).view(z.shape[0], z.shape[1], n, -1).transpose(1, 2) for f, z, n in ((self.q, x, 4), (self.k, y, 2), (self.v, y, 2)))
            q, k, v = q * 0.5, (k * 0.7).repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
            B, H, S, T = q.shape[0], 4, q.shape[2], k.shape[2]
            q, k, v = (z.expand(B, H, -1, -1).reshape(B * H, z.shape[2], z.shape[3]) for z in (q, k, v))
            w = torch.baddbmm(torch.empty(B * H, S, T), q, k.transpose(1, 2), beta=0, alpha=1.0)
            return (w.softmax(-1) @ v).view(B, H, S, -1)

    torch.manual_seed(0)
    module, inputs = Tiled(), (torch.randn(3, 7, 6), torch.randn(3, 9, 6))
    result = lifted(module, *inputs, dynamic=False)
    assert [s.status for s in result.sites] == ["replaced"], [str(r) for s in result.sites for r in s.remarks]
    with torch.no_grad():
        torch.testing.assert_close(result.graph_module(*inputs), module(*inputs))


LOWEST = torch.finfo(torch.float16).min


def chosen(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    return w.masked_fill(~(causal(w) & mask[:, None, None]), LOWEST)


def added(m: nn.Module, w: Tensor, mask: Tensor) -> Tensor:
    return w + torch.where(causal(w) & mask[:, None, None], 0.0, LOWEST).to(w.dtype)


@pytest.mark.parametrize("scores", [chosen, added])
@pytest.mark.parametrize("cast", [lambda w: w.softmax(-1), lambda w: w.float().softmax(-1).to(w.dtype), lambda w: w.softmax(-1, dtype=torch.float32).to(w.dtype)])
def test_the_lowest_number_of_float16_swallows_scores_in_float16(scores: Scores, cast: Callable[[Tensor], Tensor]) -> None:
    """A padded row is the average of all values, as the model computes it: next to -65504 numbers are 32 apart."""
    module, hidden = Attention(scores, cast).half(), torch.zeros(2, S, dtype=torch.bool)
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 2, S, 4, dtype=torch.float16) for _ in range(3))
    result = lifted(module, *inputs, hidden, dynamic=False)
    (site,) = result.sites
    assert site.status == "replaced" and site.spec is not None and site.spec.empty_rows == "uniform"
    with torch.no_grad():
        got, expected = result.graph_module(*inputs, hidden), module(*inputs, hidden)
    torch.testing.assert_close(expected, inputs[2].mean(-2, keepdim=True).expand_as(expected), rtol=4e-3, atol=1e-3)
    torch.testing.assert_close(got, expected, rtol=4e-3, atol=1e-3)


@pytest.mark.parametrize("finish", [lambda w: w.softmax(-1), lambda w: w.double().softmax(-1).to(w.dtype)])
def test_it_swallows_none_in_float32(finish: Callable[[Tensor], Tensor]) -> None:
    spec = same(Attention(added, finish), torch.zeros(2, S, dtype=torch.bool)).sites[0].spec
    assert spec is not None and spec.empty_rows == "program"


def test_a_fill_that_is_added_to_wider_scores_swallows_none() -> None:
    """Scores in float16, their sum with the fill in float32."""
    module = Attention(lambda m, w, mask: added(m, w.float(), mask), lambda w: w.softmax(-1).half()).half()
    result = lifted(module, *(torch.randn(2, 2, S, 4, dtype=torch.float16) for _ in range(3)), torch.zeros(2, S, dtype=torch.bool), dynamic=False)
    assert [s.spec.empty_rows for s in result.sites if s.spec is not None] == ["program"]
