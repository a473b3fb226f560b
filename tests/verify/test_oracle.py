"""The float64 run of a graph: what is promoted, what must not be, and what it leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from attnopt.verify.oracle import Float64Interpreter, GraphInterpreter, LowPrecisionInterpreter, to_dtype
from tests.verify.pairs import Decoder, capture, decoder, example


def run(gm: GraphModule, *args: Any, kind: type[GraphInterpreter] = Float64Interpreter) -> Any:
    with torch.no_grad():
        out = kind(gm).run_leaves(args)[0]
    return out[0] if len(out) == 1 else out


class Function(nn.Module):
    """A module around a function, with one parameter ``w`` [4, 4]."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(self.w, *args)


def captured(function: Any, *args: Tensor) -> GraphModule:
    return capture(Function(function).eval(), args, dynamic=False)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_same_as_the_model_in_float64() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    gm = capture(model, example())
    got = run(gm, *example())
    expected = model.double()(*example())  # softmax(dtype=float32) stands in the model, so this one is right to float32 only
    assert got.dtype == torch.float64
    assert float((got - expected).detach().norm() / expected.detach().norm()) < 1e-6
    low = run(capture(Decoder().eval(), example()), *example(), kind=GraphInterpreter)
    assert low.dtype == torch.float32


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.to(torch.float32),
        lambda x: x.float(),
        lambda x: x.to(torch.bfloat16),
        lambda x: x.type_as(torch.ones(1)),
        lambda x: x.to(torch.ones(1, dtype=torch.float16)),
        lambda x: torch.softmax(x, -1, dtype=torch.float32),
        lambda x: x.sum(-1, dtype=torch.float32),
        lambda x: torch.ops.aten._to_copy(x, dtype=torch.float32),
    ],
    ids=["to", "float", "to-bfloat16", "type_as", "to-other", "softmax", "sum", "_to_copy"],
)
def test_baked_casts_stay_float64(cast: Any) -> None:
    gm = captured(lambda w, x: cast(x @ w), X)
    got = run(gm, X)
    assert got.dtype == torch.float64
    w = gm.get_parameter("w").double()
    exact = X.double() @ w
    exact = torch.softmax(exact, -1) if "softmax" in str(gm.graph) else exact.sum(-1) if "sum" in str(gm.graph) else exact
    assert float((got - exact).detach().abs().max()) < 1e-14


def bucket(w: Tensor, distance: Tensor) -> Tensor:
    return (torch.log(distance.float() / 2) / math.log(20 / 2) * 8).long()


def test_a_truncated_logarithm_of_integers_keeps_its_dtype() -> None:
    distance = torch.arange(1, 5000)
    exact = (torch.log(distance.double() / 2) / math.log(20 / 2) * 8).long()
    expected = bucket(torch.empty(0), distance)
    assert not torch.equal(exact, expected), "the example does not tell the two apart"
    assert torch.equal(run(captured(bucket, distance), distance), expected)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda w, i: i.float() @ w,
        lambda w, i: nn.functional.linear(i.float(), w),
        lambda w, i: torch.addmm(i.float(), i.float(), w),
        lambda w, i: nn.functional.layer_norm(i.float(), (4,), w[0], w[1]),
        lambda w, i: nn.functional.scaled_dot_product_attention(i.float()[None], w[None], w[None]),
        lambda w, i: nn.functional.conv1d(i.float()[None], w[:, :, None].transpose(0, 1)[:, :4]) if i.shape[0] == 4 else i.float() @ w,
        lambda w, i: torch.cat([i.float(), w]),
        lambda w, i: torch.where(i > 2, i.float(), w[:3]),
        lambda w, i: i.float() * w[0, 0],
        lambda w, i: w.index_put((i[:, 0].clamp(0, 3),), i.float()),
    ],
    ids=["matmul", "linear", "addmm", "layer_norm", "sdpa", "conv", "cat", "where", "zero-dim", "index_put"],
)
def test_operands_from_integers_are_promoted_beside_float64(mixed: Any) -> None:
    i = torch.arange(12).view(3, 4)
    got = run(captured(mixed, i), i)
    assert got.dtype == torch.float64


def test_masks_and_integers_are_left_alone() -> None:
    gm = captured(lambda w, i: (i, i > 3, torch.zeros(2), torch.arange(3.0)), torch.arange(6))
    got = run(gm, torch.arange(6))
    assert [x.dtype for x in got] == [torch.int64, torch.bool, torch.float32, torch.float32]


def test_complex_numbers() -> None:
    gm = captured(lambda w, x: torch.view_as_real(torch.view_as_complex(x.reshape(3, 2, 2)) * torch.polar(w[:2, 0].abs(), w[:2, 1])), X)
    assert run(gm, X).dtype == torch.float64


def test_bits_are_read_in_the_graphs_own_dtype() -> None:
    gm = captured(lambda w, x: x.view(torch.int32), X)
    assert torch.equal(run(gm, X), X.view(torch.int32))


@pytest.mark.parametrize("kind", [GraphInterpreter, Float64Interpreter, LowPrecisionInterpreter])
def test_dropout_is_the_identity(kind: type[GraphInterpreter]) -> None:
    x = X.to(torch.bfloat16) if kind is LowPrecisionInterpreter else X
    for dropout in (
        lambda w, x: nn.functional.dropout(x, 0.9, True),
        lambda w, x: nn.functional.alpha_dropout(x, 0.9, True),
        lambda w, x: torch.ops.aten.native_dropout(x, 0.9, True)[0],
    ):
        assert torch.equal(run(captured(dropout, X), X, kind=kind).to(x.dtype), x)


def test_dropout_of_an_attention_call() -> None:
    q = torch.randn(1, 2, 5, 4)

    def attend(p: float) -> Any:
        return captured(lambda w, q: nn.functional.scaled_dot_product_attention(q, q, q, None, p), q)

    assert torch.equal(run(attend(0.5), q), run(attend(0.0), q))


def test_buffers_are_not_written() -> None:
    model = nn.BatchNorm1d(4).train()
    gm = capture(model, (X,), dynamic=False)
    before = {n: b.clone() for n, b in gm.named_buffers()}
    for kind in (GraphInterpreter, Float64Interpreter):
        run(gm, X, kind=kind)
    assert before and all(torch.equal(before[n], b) for n, b in gm.named_buffers())


def test_a_no_grad_block_is_run_in_the_same_way() -> None:
    def block(w: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = (x @ w).to(torch.float32)
        return y * w[0]

    with torch.enable_grad():
        gm = captured(block, X)
    assert any("submod" in str(n.target) for n in gm.graph.nodes if n.op == "get_attr"), "the block was inlined, so nothing is tested here"
    got = run(gm, X)
    w = gm.get_parameter("w").detach().double()
    assert float((got - (X.double() @ w) * w[0]).abs().max()) < 1e-14


def test_tensors_that_are_written_into_hold_float64() -> None:
    def fill(w: Tensor, x: Tensor) -> Tensor:
        out = torch.zeros(3, 8)
        out[:, 2:6] = x @ w
        return out.add_(x.sum())

    gm = captured(fill, X)
    assert any("copy_" in str(n.target) for n in gm.graph.nodes)
    w = gm.get_parameter("w").detach().double()
    expected = torch.zeros(3, 8, dtype=torch.float64)
    expected[:, 2:6] = X.double() @ w
    got = run(gm, X)
    assert got.dtype == torch.float64
    assert float((got - expected - X.double().sum()).abs().max()) < 1e-14


def test_parameters_can_be_given_and_differentiated() -> None:
    gm = decoder()
    leaf = gm.get_parameter("embedding.weight").detach().double().requires_grad_()
    with torch.enable_grad():
        (out,), _ = Float64Interpreter(gm, attributes={"embedding.weight": leaf}).run_leaves(example())
        (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad.dtype == torch.float64 and bool((grad != 0).any())


def test_values_of_nodes_can_be_kept() -> None:
    gm = decoder()
    nodes = [n for n in gm.graph.nodes if n.target is torch.ops.aten.softmax.int]
    with torch.no_grad():
        _, kept = GraphInterpreter(gm).run_leaves(example(), nodes)
    assert list(kept) == nodes or set(kept) == set(nodes)
    for n in nodes:
        assert float((kept[n].sum(-1) - 1).abs().max()) < 1e-6


class TestLowPrecision:
    def test_half_where_the_model_rounds(self) -> None:
        gm = captured(lambda w, x: torch.softmax(x @ w, -1, dtype=torch.float32).to(torch.float32) @ w, X)
        got = run(gm, X, kind=LowPrecisionInterpreter)
        assert got.dtype == torch.bfloat16
        w, x = gm.get_parameter("w").detach().bfloat16(), X.bfloat16()
        assert torch.equal(got, torch.softmax(x @ w, -1, dtype=torch.float32).bfloat16() @ w)

    def test_finite_values_stay_finite(self) -> None:
        lowest = torch.tensor([torch.finfo(torch.float32).min, -torch.inf, 0.5, torch.nan])
        for dtype in (torch.bfloat16, torch.float16):
            got = to_dtype(lowest, dtype)
            assert got[0] == torch.finfo(dtype).min
            assert got[1] == -torch.inf and got[2] == 0.5 and got[3].isnan()
        assert to_dtype(lowest, torch.float64)[0] == torch.finfo(torch.float32).min
