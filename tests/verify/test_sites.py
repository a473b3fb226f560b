"""What the comparison of graphs accepts, and what each of its checks catches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

import attnopt
from attnopt.verify import verify_graphs
from attnopt.verify.end_to_end import compare_graphs
from tests.verify.pairs import HEADS, WIDTH, Function, GraphPair, Replacement, aten, calls, decoder, example, replaced, sdpa

SCALE = (WIDTH // HEADS) ** -0.5
HALVES = [torch.bfloat16, torch.float16]


def right(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q.float() @ k.float().mT * SCALE + bias, -1).to(v.dtype) @ v


def failures(pair: GraphPair) -> set[str]:
    """The names of the failing checks."""
    result = compare_graphs(pair.reference, pair.optimized, pair.outputs, example(), {})
    names = {c.name for c in result.checks if not c.passed}
    assert set(result.failed) == {n.split(":")[0] for n in names if n.startswith("site")}
    assert result.whole_failed == any(n.startswith("whole") for n in names)
    return names


class TestAccepts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
    def test_sdpa(self, dtype: torch.dtype) -> None:
        pair = replaced(decoder(dtype=dtype), sdpa)
        verdict, failing = verify_graphs(pair.reference, pair.optimized, pair.outputs, example(), {})
        assert verdict.passed and not failing, [c for c in verdict.checks if not c.passed]
        names = {c.name for c in verdict.checks}
        for variant in ("example", "other values", "shorter", "longer", "right padding", "left padding", "a padded row"):
            assert {f"site0: {variant}", f"whole model: {variant}"} <= names
        # the second layer is like the first: its own values are compared, and what depends on the form alone is not asked again
        assert {n for n in names if n.startswith("site1")} == {"site1: other values", "site1: longer"}
        assert {"site0: large scores", "site0: gradients", "whole model: gradients"} <= names
        assert ("site0: other values in bfloat16" in names and "site0: longer in float16" in names) == (dtype == torch.float32)

    def test_rows_that_are_nan_in_both(self) -> None:
        assert failures(replaced(decoder(hidden=-math.inf), calls(right))) == set()

    def test_a_graph_with_fixed_sizes(self) -> None:
        pair = replaced(decoder(dynamic=False), sdpa)
        verdict, _ = verify_graphs(pair.reference, pair.optimized, pair.outputs, example(), {})
        assert verdict.passed
        assert not any("longer" in c.name or "shorter" in c.name for c in verdict.checks)

    def test_the_graph_itself(self) -> None:
        reference = decoder()
        pair = replaced(reference, {})
        assert pair.outputs == {}
        assert failures(pair) == set()

    def test_nothing_is_changed(self) -> None:
        reference = decoder()
        before = {n: p.clone() for n, p in reference.state_dict().items()}
        state = torch.random.get_rng_state()
        failures(replaced(reference, sdpa))
        assert all(torch.equal(before[n], p) for n, p in reference.state_dict().items())
        assert all(p.grad is None for p in reference.parameters())
        assert torch.equal(state, torch.random.get_rng_state())


def shifted(g: Graph, q: Node, k: Node, v: Node, bias: Node) -> Node:
    """The mask is one element off."""
    return sdpa(g, q, k, v, g.call_function(aten.roll.default, (bias, [1], [-1])))


def transposed(g: Graph, q: Node, k: Node, v: Node, bias: Node) -> Node:
    return sdpa(g, q, k, v, g.call_function(aten.transpose.int, (bias, -1, -2)))


def one_percent(g: Graph, q: Node, k: Node, v: Node, bias: Node) -> Node:
    return sdpa(g, q, k, v, bias, SCALE * 1.01)


class TestRejectsEverywhere:
    @pytest.mark.parametrize("wrong", [shifted, transposed, one_percent], ids=lambda f: f.__name__)
    @pytest.mark.parametrize("site", [0, 1])
    def test_a_site_that_is_wrong(self, wrong: Replacement, site: int) -> None:
        pair = replaced(decoder(), {0: sdpa, 1: sdpa, site: wrong})
        verdict, failing = verify_graphs(pair.reference, pair.optimized, pair.outputs, example(), {})
        assert verdict.passed is False
        assert failing == {f"site{site}"}
        failed = {c.name for c in verdict.checks if not c.passed}
        assert {f"site{site}: example", f"site{site}: gradients", "whole model: example", "whole model: gradients"} <= failed

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_a_wrong_mask_in_half_precision(self, dtype: torch.dtype) -> None:
        assert {"site0: example", "whole model: example"} <= failures(replaced(decoder(dtype=dtype), shifted))

    def test_another_dtype(self) -> None:
        def narrowed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return right(q, k, v, bias).half().float() if q.shape[1] else v

        def doubled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return right(q, k, v, bias).double()

        for wrong in (narrowed, doubled):
            assert "site0: example" in failures(replaced(decoder(), {0: calls(wrong)}))

    def test_a_kernel_that_raises(self) -> None:
        def raises(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            raise RuntimeError("no such block size\nmore")

        pair = replaced(decoder(), {1: calls(raises)})
        verdict, failing = verify_graphs(pair.reference, pair.optimized, pair.outputs, example(), {})
        assert failing == {"site1"}
        assert any("raises RuntimeError: no such block size" in c.detail and "more" not in c.detail for c in verdict.checks)


def unstable(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Right, as long as exp does not overflow: the row's maximum is not subtracted. Rows without a visible key are averages."""
    s = q.float() @ k.float().mT * SCALE + bias.float()
    e = torch.where((s < -1e30).all(-1, keepdim=True), 1.0, s.exp())
    return (e / e.sum(-1, keepdim=True)).to(v.dtype) @ v


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 1.001


class TestEachCheckCatchesWhatNoOtherDoes:
    """Wrong attentions that only one kind of input shows."""

    def wrong(self, function: Function, dtype: torch.dtype = torch.float32) -> set[str]:
        return {n.split(": ", 1)[1].split(",")[0] for n in failures(replaced(decoder(1, dtype=dtype), calls(function)))}

    def test_large_scores(self) -> None:
        assert self.wrong(unstable) == {"large scores"}

    def test_lengths(self) -> None:
        def baked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return right(q, k, v, bias) if q.shape[2] % 8 == 0 else right(q, k, v, bias.roll(1, -1))

        assert self.wrong(baked) == {
            "shorter",
            "longer",
            "longer in bfloat16",
            "longer in float16",
            "long sums",
            "long sums in bfloat16",
            "long sums in float16",
        }

    def test_shorter_than_the_example(self) -> None:
        def block(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return right(q, k, v, bias if q.shape[2] >= 24 else bias.roll(1, -1))

        assert self.wrong(block) == {"shorter"}

    def test_batch(self) -> None:
        def baked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return right(q, k, v, bias if q.shape[0] == 2 else bias.flip(0).roll(1, -1))

        assert self.wrong(baked) == {"longer", "longer in bfloat16", "longer in float16", "long sums", "long sums in bfloat16", "long sums in float16"}

    def test_other_values(self) -> None:
        """The values of the first call were folded into the graph."""
        seen: dict[torch.Size, Tensor] = {}

        def folded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            first = seen.setdefault(v.shape, v.detach())
            return right(q, k, v + (first - v).detach().to(v.dtype), bias)

        failed = {n.removeprefix("site0: ") for n in failures(replaced(decoder(), {0: calls(folded)}))}
        assert "other values" in failed
        assert not failed & {"example", "right padding", "left padding", "shorter", "longer"}

    def test_padding_on_the_right(self) -> None:
        def causal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            rowless = bool((bias[:, 0, 0, 0] != 0).any())
            return right(q, k, v, bias if rowless else bias - (bias - bias[:1]).detach())

        assert self.wrong(causal) == {"right padding"}

    def test_rows_without_a_key(self) -> None:
        def zeros(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return torch.where((bias < -1e30).all(-1, keepdim=True), 0.0, right(q, k, v, bias))

        assert self.wrong(zeros) == {"left padding", "a padded row"}

    def test_rows_without_a_key_that_should_be_nan(self) -> None:
        def finite(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return right(q, k, v, bias).nan_to_num()

        found = failures(replaced(decoder(hidden=-math.inf), calls(finite)))
        assert {n.split(": ", 1)[1] for n in found} == {"left padding", "a padded row"}

    def test_nan_where_there_is_none(self) -> None:
        def nan(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return torch.where((bias < -1e30).all(-1, keepdim=True), math.nan, right(q, k, v, bias))

        assert self.wrong(nan) == {"left padding", "a padded row"}

    def test_sums_in_bfloat16(self) -> None:
        def summed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            if q.dtype != torch.bfloat16:
                return right(q, k, v, bias)
            p, out = torch.softmax(q.float() @ k.float().mT * SCALE + bias, -1).bfloat16(), torch.zeros_like(q)
            for i in range(k.shape[2]):
                out = out + p[..., i : i + 1] * v[..., i : i + 1, :]
            return out

        assert self.wrong(summed) == {"long sums in bfloat16"}

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_sums_in_the_models_own_half_precision(self, dtype: torch.dtype) -> None:
        def summed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            p, out = torch.softmax(q.float() @ k.float().mT * SCALE + bias, -1).to(v.dtype), torch.zeros_like(q)
            for i in range(k.shape[2]):
                out = out + p[..., i : i + 1] * v[..., i : i + 1, :]
            return out

        assert "long sums" in self.wrong(summed, dtype)

    def test_float16(self) -> None:
        def overflows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return right(q, k, v, bias) if q.dtype != torch.float16 else (right(q, k, v, bias) * 6e4 / 6e4 * (1 + 2e-3)).to(v.dtype)

        assert self.wrong(overflows) == {"other values in float16", "longer in float16", "long sums in float16"}

    def test_gradients(self) -> None:
        def backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return right(q, WrongBackward.apply(k), v, bias)

        assert self.wrong(backward) == {"gradients"}

    def test_gradients_that_are_lost(self) -> None:
        def detached(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return right(q.detach(), k, v, bias)

        assert self.wrong(detached) == {"gradients"}

    def test_the_whole_model(self) -> None:
        """Something outside of every site is changed: only the end-to-end comparison can see it."""
        pair = replaced(decoder(), sdpa)
        (norm,) = [n for n in pair.optimized.graph.nodes if n.name == "layer_norm_1"]
        norm.args = (*norm.args[:4], 1e-2, norm.args[5])
        pair.optimized.recompile()
        found = failures(pair)
        assert "whole model: example" in found
        assert all(n.startswith("whole model") for n in found)


class Tied(torch.nn.Module):
    """A mask that the module makes of sizes alone, as a product, and a least value at which both operands are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        there = torch.ones(x.shape[:2])
        seen = torch.minimum(torch.ones(x.shape[1]), torch.einsum("bq,bk->bqk", there, there))
        return torch.softmax(q @ k.mT * SCALE + (1.0 - seen) * -1e4, -1) @ v


def test_a_mask_made_of_sizes_has_no_gradient_to_compare() -> None:
    """torch.minimum shares its gradient between equal operands, and a clamp does not: either is right, and nothing learns from it."""
    report = attnopt.optimize(Tied(), (torch.randn(2, 24, WIDTH),)).attnopt_report
    assert [s.status for s in report.sites] == ["replaced"], report
    assert any("gradients" in c.name and c.error > 0 for c in report.verdict.checks)
