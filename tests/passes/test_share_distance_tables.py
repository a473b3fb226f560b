"""One table over distances for all layers with the same bias by distance, and none where there is nothing to share."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

import attnopt
from attnopt import OptimizeConfig
from attnopt.ir.check import check
from attnopt.kernels import distance_table_op
from attnopt.passes.pipeline import run_pipeline
from tests.kernels.by_distance import MARGIN, ByDistance, install
from tests.kernels.cases import naive_bucket

B, S, H, D = 2, 11, 2, 8


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ByDistance:
    return install(monkeypatch)


class Layer(nn.Module):
    """Attention of one layer; ``scale`` differs from layer to layer, so that no two specs are alike."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)
        self.scale = D**-0.5 / (n + 1)

    def forward(self, x: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, H, D).permute(2, 0, 3, 1, 4)
        w = (q @ k.mT * self.scale + bias).masked_fill(~keep[:, None, None, :], -torch.inf)
        return x + self.out((w.softmax(-1) @ v).transpose(1, 2).reshape(b, s, H * D))


class Encoder(nn.Module):
    """``kinds``: the weights of each layer's bias, by letter."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kinds = kinds
        self.layers = nn.ModuleList(Layer(n) for n in range(len(kinds)))
        self.biases = nn.ModuleDict({x: nn.Embedding(8, H) for x in sorted(set(kinds))})

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        i = torch.arange(x.shape[1])
        bias = {name: table(naive_bucket(i[None, :] - i[:, None])).permute(2, 0, 1)[None] for name, table in self.biases.items()}
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            x = layer(x, bias[kind], keep)
        return x


def inputs(b: int = B, s: int = S) -> tuple[Tensor, Tensor]:
    return torch.randn(b, s, H * D), torch.arange(s)[None] < torch.tensor([s, s // 2 + 1])[:b, None]


@cache
def captured(kinds: str) -> tuple[nn.Module, fx.GraphModule]:
    model = Encoder(kinds).eval()
    dynamic = ({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO})
    return model, torch.export.export(model, inputs(), dynamic_shapes=dynamic, strict=False).module(check_guards=False)


def optimized(kinds: str, backend: str = "by-distance", disable: tuple[str, ...] = ()) -> tuple[nn.Module, fx.GraphModule]:
    model, gm = captured(kinds)
    return model, run_pipeline(gm, OptimizeConfig(backend=backend, disable_passes=disable)).graph_module


def tables(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=torch.ops.attnopt.distance_table.default)


def read_by(gm: fx.GraphModule) -> str:
    """The attentions of a graph in order, each by the number of the table that it reads, or - for none."""
    numbers = {n: str(i) for i, n in enumerate(tables(gm))}
    read = [n.kwargs.get("tables") for n in gm.graph.find_nodes(op="call_function", target=torch.ops.attnopt.attention.default)]
    return "".join("-" if x is None else numbers[x[0]] for x in read)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one where a table of the graph, or one of a kernel's own, is evaluated over tensors."""
    from attnopt.kernels.materialise import Part

    done: list[str] = []
    real = Part.tensor

    def counted(self: Part, *args: object, **kwargs: object) -> Tensor:
        done.extend([self.axes] * self.shareable)
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Part, "tensor", counted)
    return done


@pytest.mark.parametrize(
    ("kinds", "want"),
    [("xxxxx", "00000"), ("xyxy", "0101"), ("xyx", "0-0"), ("xy", "--"), ("x", "-")],
    ids=["one", "two in turn", "one of its own", "all different", "alone"],
)
def test_layers_with_the_same_bias_evaluate_it_once(kinds: str, want: str, kernel: ByDistance, evaluations: list[str]) -> None:
    model, gm = optimized(kinds)
    assert read_by(gm) == want
    for b, s in ((B, S), (2, 17), (1, 3)):
        args = inputs(b, s)
        evaluations.clear()
        kernel.given.clear()
        torch.testing.assert_close(gm(*args), model(*args))
        assert len(evaluations) == len(set(want) - {"-"}) + want.count("-")
        assert [bool(x) for x in kernel.given] == [c != "-" for c in want]


def test_the_result_is_the_same_number_for_number(kernel: ByDistance, evaluations: list[str]) -> None:
    (_, shared), (_, alone) = optimized("xxx"), optimized("xxx", disable=("share-distance-tables",))
    assert not tables(alone)
    args = inputs()
    want = alone(*args)
    assert len(evaluations) == 3
    assert torch.equal(shared(*args), want)
    assert len(evaluations) == 4


def test_the_graph(kernel: ByDistance) -> None:
    _, gm = optimized("xx")
    (node,) = tables(gm)
    assert [n.target for n in node.args[1]] == ["biases.x.weight"] and node.args[-1] == MARGIN
    s = gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1]
    assert [str(n) for n in node.meta["val"].shape] == [str(H), str(2 * s - 1 + 2 * MARGIN)]
    order = [str(n.target) for n in gm.graph.nodes if n is node or "attnopt.attention" in str(n.target)]
    assert order == ["attnopt.distance_table.default", *["attnopt.attention.default"] * 2]


def test_tables_are_read(kernel: ByDistance) -> None:
    """With another table the result is another."""
    model, gm = optimized("xx")
    args = inputs()
    (node,) = tables(gm)
    real = torch.ops.attnopt.distance_table.default
    node.target = lambda *a: real(*a).flip(-1)
    gm.recompile()
    assert not torch.allclose(gm(*args), model(*args), atol=1e-3)


@pytest.mark.parametrize("wrapped", [False, True], ids=["eager", "compiled"])
def test_gradients_arrive_at_the_bias(wrapped: bool, kernel: ByDistance, evaluations: list[str]) -> None:
    model, gm = optimized("xyx")
    weights = [*model.biases.parameters(), model.layers[0].qkv.weight]
    run = torch.compile(gm, fullgraph=True, backend="aot_eager", dynamic=True) if wrapped else gm
    for s in (S, 17):
        args = inputs(2, s)
        want = torch.autograd.grad(model(*args).square().sum(), weights)
        evaluations.clear()
        got = torch.autograd.grad(run(*args).square().sum(), weights)
        assert len(evaluations) == 2
        for a, b in zip(got, want, strict=True):
            assert b.abs().max() > 1e-3
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_through_optimize_and_torch_compile(kernel: ByDistance, evaluations: list[str]) -> None:
    """Verified against the original, and compiled as one graph of changing lengths."""
    model = Encoder("xxx").eval()
    got = attnopt.optimize(model, inputs(), config=OptimizeConfig(backend="by-distance"), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},) * 2)
    assert got.attnopt_report.verdict.passed
    compiled = torch.compile(got, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for s in (S, 17, 23):
            args = inputs(2, s)
            evaluations.clear()
            torch.testing.assert_close(compiled(*args), model(*args))
            assert len(evaluations) == 1


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_kernels_that_take_no_table_get_none(backend: str) -> None:
    _, gm = optimized("xx", backend)
    assert not tables(gm) and read_by(gm) == "--"


def test_a_graph_with_another_tensor_for_a_table_is_invalid(kernel: ByDistance) -> None:
    _, gm = optimized("xx")
    assert check(gm) == []
    node = gm.graph.find_nodes(op="call_function", target=torch.ops.attnopt.attention.default)[0]
    node.kwargs = {**node.kwargs, "tables": [node.args[0]]}
    assert any("table over distances" in x for x in check(gm))


assert distance_table_op.__doc__  # attnopt::distance_table is registered
