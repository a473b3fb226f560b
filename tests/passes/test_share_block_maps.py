"""One map of blocks for all layers with the same mask, and none where there is nothing to share."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from attnopt.config import OptimizeConfig
from attnopt.passes.pipeline import run_pipeline
from tests.kernels.by_blocks import BLOCK_M, BLOCK_N, ByBlocks, install

B, S, H, D = 3, 11, 2, 8


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> ByBlocks:
    return install(monkeypatch)


class Layer(nn.Module):
    """Attention of one layer; ``scale`` differs from layer to layer, so that no two specs are alike."""

    def __init__(self, n: int, bias: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)
        self.scale = D**-0.5 / (n + 1)
        self.bias = nn.Parameter(torch.randn(H)) if bias else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, s, c = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, H, D).permute(2, 0, 3, 1, 4)
        w = q @ k.mT * self.scale
        if self.bias is not None:
            i = torch.arange(s)
            w = w + self.bias[:, None, None] * (i[None, :] - i[:, None])
        p = w.masked_fill(~mask, torch.finfo(w.dtype).min).softmax(-1)
        return x + self.out((p @ v).transpose(1, 2).reshape(b, s, c))


class Encoder(nn.Module):
    """``kinds``: the mask that each layer reads, padding alone, with a causal one, or documents."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kinds = kinds
        self.layers = nn.ModuleList(Layer(n, bias=n % 2 == 1) for n in range(len(kinds)))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        s = x.shape[1]
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            if kind == "d":
                mask = keep[:, None, :, None] == keep[:, None, None, :]
            else:
                mask = (keep != 0)[:, None, None, :]
                if kind == "c":
                    mask = mask & torch.ones(s, s, dtype=torch.bool).tril()
            x = layer(x, mask)
        return x


def inputs(b: int = B, s: int = S) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([s, max(s // 3, 1), 0])[:b]
    ids = torch.arange(s)[None] // 4 + 1
    return torch.randn(b, s, H * D), torch.where(torch.arange(s)[None] < lengths[:, None], ids, 0)


@cache
def captured(kinds: str) -> tuple[nn.Module, fx.GraphModule]:
    model = Encoder(kinds).eval()
    dynamic = ({0: Dim.AUTO, 1: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO})
    return model, torch.export.export(model, inputs(), dynamic_shapes=dynamic, strict=False).module(check_guards=False)


def optimized(kinds: str, backend: str = "by-blocks", disable: tuple[str, ...] = ()) -> tuple[nn.Module, fx.GraphModule]:
    model, gm = captured(kinds)
    return model, run_pipeline(gm, OptimizeConfig(backend=backend, disable_passes=disable)).graph_module


def maps(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=torch.ops.attnopt.block_map.default)


def shape_of(gm: fx.GraphModule) -> str:
    """The attentions of a graph in order, each by the number of the map that it reads, or - for none."""
    numbers = {n: str(i) for i, n in enumerate(maps(gm))}
    read = [n.kwargs.get("counts") for n in gm.graph.find_nodes(op="call_function", target=torch.ops.attnopt.attention.default)]
    return "".join("-" if c is None else numbers[c.args[0]] for c in read)


@pytest.mark.parametrize(
    ("kinds", "want"),
    [("pcpc", "0101"), ("pdc", "---"), ("pp", "00")],
    ids=["two masks in turn", "all different", "one mask"],
)
def test_layers_with_the_same_mask_share_a_map(kinds: str, want: str, kernel: ByBlocks) -> None:
    model, gm = optimized(kinds)
    assert shape_of(gm) == want
    for b, s in ((B, S), (2, 17), (1, 3)):
        args = inputs(b, s)
        kernel.calls.clear()
        torch.testing.assert_close(gm(*args), model(*args))
        assert len(kernel.calls) == sum(c != "-" for c in want)


def test_the_graph(kernel: ByBlocks) -> None:
    _, gm = optimized("pp")
    (node,) = maps(gm)
    loads, sizes = node.args[1:3]
    assert [n.name for n in loads] == ["keep"] and sizes == []
    assert node.args[0] is loads[0]
    assert node.args[-2:] == (BLOCK_M, BLOCK_N)
    b, s = loads[0].meta["val"].shape
    rows, listed = (str((s + n - 1) // n) for n in (BLOCK_M, BLOCK_N))
    assert [[str(n) for n in x.shape] for x in node.meta["val"]] == [[str(b), "1", rows, "3"], [str(b), "1", rows, listed]]
    order = [str(n.target) for n in gm.graph.nodes if n is node or n in node.users or "attnopt.attention" in str(n.target)]
    assert order == ["attnopt.block_map.default", *["<built-in function getitem>"] * 2, *["attnopt.attention.default"] * 2]


def test_maps_are_right(kernel: ByBlocks) -> None:
    """With a map that hides one block too many the result is another: the backend of these tests does read it."""
    model, gm = optimized("pp")
    args = inputs()
    want = model(*args)
    (node,) = maps(gm)
    real = torch.ops.attnopt.block_map.default

    def wrong(*a: object) -> tuple[Tensor, Tensor]:
        counts, indices = real(*a)
        return torch.cat([counts[..., :2] - (counts[..., :2] > 0).to(torch.int32), counts[..., 2:]], -1), indices

    node.target = wrong
    gm.recompile()
    assert not torch.allclose(gm(*args), want, atol=1e-3)


def test_gradients_with_a_shared_map(kernel: ByBlocks) -> None:
    model, gm = optimized("pp")
    x, keep = inputs(2)
    grads = []
    for f in (model, gm):
        y = x.clone().requires_grad_()
        f(y, keep).square().sum().backward()
        grads.append(y.grad)
    assert len(kernel.calls) == 2
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_kernels_that_take_no_map_get_none(backend: str) -> None:
    _, gm = optimized("pp", backend)
    assert not maps(gm) and shape_of(gm) == "--"


def test_the_pass_can_be_disabled(kernel: ByBlocks) -> None:
    model, gm = optimized("pp", disable=("share-block-maps",))
    assert not maps(gm)
    args = inputs()
    torch.testing.assert_close(gm(*args), model(*args))
    assert not kernel.calls
