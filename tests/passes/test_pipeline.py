"""The pipeline: what each pass leaves behind, options, and a broken pass that is named."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from attnopt.config import OptimizeConfig
from attnopt.errors import AttnoptError, BackendError, PassError
from attnopt.ir.check import check
from attnopt.passes import pipeline
from attnopt.passes.attention_nodes import attentions, spec_of
from attnopt.passes.base import PassResult
from attnopt.passes.pipeline import NAMES, run_pipeline

B, S, H, D = 2, 6, 4, 8


class Block(nn.Module):
    """Grouped heads, a causal mask, and gradients switched off around the mask, as rotary code does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv = nn.Linear(H * D, H * D), nn.Linear(H * D, H * D)

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        q = self.q(x).view(b, s, H, D).transpose(1, 2)
        k, v = self.kv(x).view(b, s, 2, H // 2, D).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        with torch.no_grad():
            ahead = torch.ones(s, s, dtype=torch.bool).triu(1)
        w = (q @ k.transpose(2, 3) * D**-0.5).masked_fill(ahead, float("-inf"))
        return (w.softmax(-1) @ v).transpose(1, 2).reshape(b, s, c)


def captured(model: nn.Module | None = None) -> fx.GraphModule:
    x = torch.randn(B, S, H * D)
    ep = torch.export.export((model or Block()).eval(), (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},), strict=False)
    return ep.module(check_guards=False)


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def test_the_input_graph_is_not_changed() -> None:
    gm = captured()
    before = str(gm.graph)
    run_pipeline(gm, OptimizeConfig())
    assert str(gm.graph) == before


def test_attention_replaces_its_whole_region() -> None:
    result = run_pipeline(captured(), OptimizeConfig())
    kinds = targets(result.graph_module)
    assert not [t for t in kinds if any(x in t for x in ("softmax", "matmul", "masked_fill", "triu", "repeat_interleave"))]
    assert len([t for t in kinds if "attention" in t]) == 1
    assert any("softmax" in t for t in targets(result.reference))


def test_grouped_heads_are_read_once() -> None:
    gm = captured()
    raised = run_pipeline(gm, OptimizeConfig(disable_passes=("group-heads", "select-kernel", "lower", "cleanup")))
    grouped = run_pipeline(gm, OptimizeConfig(disable_passes=("select-kernel", "lower", "cleanup")))
    (before,), (after,) = (list(attentions(r.graph_module.graph)) for r in (raised, grouped))
    assert (spec_of(before).groups, spec_of(after).groups) == (1, 2)
    assert before.args[1].meta["val"].shape[1] == H
    assert after.args[1].meta["val"].shape[1] == H // 2
    assert [r.code for r in grouped.sites[0].remarks] == ["AO101", "AO102"]


@pytest.mark.parametrize("stop", range(1, len(NAMES) + 1), ids=NAMES)
def test_the_graph_runs_and_is_right_after_every_pass(stop: int) -> None:
    model = Block().eval()
    result = run_pipeline(captured(model), OptimizeConfig(disable_passes=tuple(n for n in NAMES[stop:])))
    assert not check(result.graph_module)
    for b, s in ((B, S), (3, 11)):
        x = torch.randn(b, s, H * D)
        torch.testing.assert_close(result.graph_module(x), model(x))


def test_nodes_that_were_not_touched_keep_their_names() -> None:
    result = run_pipeline(captured(), OptimizeConfig())
    shared = {n.name for n in result.reference.graph.nodes} & {n.name for n in result.graph_module.graph.nodes}
    assert {"x", "linear", "linear_1", "output"} <= shared
    ((original, optimized),) = result.outputs.values()
    assert original in {n.name for n in result.reference.graph.nodes}
    assert optimized in {n.name for n in result.graph_module.graph.nodes}


def test_a_skipped_site_stays_in_its_original_form() -> None:
    first = run_pipeline(captured(), OptimizeConfig())
    (site,) = first.sites
    result = run_pipeline(captured(), OptimizeConfig(), skip_sites=frozenset({site.name}))
    assert [s.status for s in result.sites] == ["reverted"]
    assert any("softmax" in t for t in targets(result.graph_module))


def test_unknown_passes_and_backends_are_refused() -> None:
    with pytest.raises(AttnoptError, match=r"no pass 'fuse-everything'.*canonicalize, join-products, raise-attention"):
        run_pipeline(captured(), OptimizeConfig(disable_passes=("fuse-everything",)))
    with pytest.raises(AttnoptError, match="cannot be disabled"):
        run_pipeline(captured(), OptimizeConfig(disable_passes=("canonicalize",)))
    with pytest.raises(BackendError, match="warp9"):
        run_pipeline(captured(), OptimizeConfig(backend="warp9"))


def test_the_graph_is_printed_after_a_named_pass(capsys: pytest.CaptureFixture[str]) -> None:
    run_pipeline(captured(), OptimizeConfig(print_ir_after=("raise-attention",)))
    err = capsys.readouterr().err
    assert err.startswith("--- after raise-attention")
    assert "attnopt.attention.default" in err
    assert err.count("--- after") == 1


@dataclass(frozen=True)
class _Raises:
    name: str = "broken"
    tier: str = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        raise ZeroDivisionError("oops")


@dataclass(frozen=True)
class _Breaks:
    """Leaves an attention whose spec reads a tensor that is not there."""

    name: str = "breaks"
    tier: str = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        from attnopt.ir import expr as E

        for node in attentions(module.graph):
            spec = spec_of(node)
            spec = spec.replace(mask=E.as_bool(E.load(0, [spec.dims.k], "int")))
            node.args = (*node.args[:5], spec.to_json(), *node.args[6:])
        return PassResult(True)


@pytest.mark.parametrize(("broken", "message"), [(_Raises(), "pass broken raised ZeroDivisionError: oops .before it ran: canonicalize, join-products, raise-attention"), (_Breaks(), "pass breaks left an invalid graph")])
def test_a_broken_pass_is_named(broken: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.passes
    monkeypatch.setattr(pipeline, "passes", lambda *a: [*real(*a)[:3], broken])
    with pytest.raises(PassError, match=message):
        run_pipeline(captured(), OptimizeConfig())


class InPlace(nn.Module):
    """A mask that is written into, once before it is read and once between two readers."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        s = x.shape[1]
        bias = torch.zeros(s, s)
        bias[:, 0] = 1.0
        first = (x @ x.mT + bias).softmax(-1) @ x
        if self.between:
            bias[:, 1] = 5.0
        return first + (x @ x.mT - bias).softmax(-1) @ x


@pytest.mark.parametrize("between", [False, True], ids=["written before", "written between readers"])
def test_a_mask_written_in_place_keeps_its_meaning(between: bool) -> None:
    model = InPlace(between)
    result = run_pipeline(captured(model), OptimizeConfig())
    x = torch.randn(3, 9, H * D)
    torch.testing.assert_close(result.graph_module(x), model(x))
    if between:
        assert {r.code for s in result.sites for r in s.remarks} == {"AO207"}
    else:
        assert {s.status for s in result.sites} == {"replaced"}


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            p = torch.arange(x.shape[1]).float()
            angle = p[:, None] * x.mean()
        y = x * angle.cos()
        return (y @ y.mT).softmax(-1) @ y


def test_regions_without_gradients_are_inlined_and_stay_without() -> None:
    model = Wide()
    result = run_pipeline(captured(model), OptimizeConfig())
    assert not [n for n in result.graph_module.graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
    x = torch.randn(2, 5, H * D, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    result.graph_module(y).square().sum().backward()
    assert (x.grad - y.grad).norm() <= 1e-5 * x.grad.norm()


class Capped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x @ x.mT / 30.0) * 30.0).softmax(-1) @ x


def test_a_backend_that_refuses_a_site_is_an_error_that_names_both() -> None:
    with pytest.raises(AttnoptError, match=r"'sdpa' cannot compute this attention: .*softcap.* \(site model\)"):
        run_pipeline(captured(Capped()), OptimizeConfig(backend="sdpa"))


def test_a_causal_call_on_transposed_keys_of_open_length_is_one_call() -> None:
    """PyTorch computes it from parts, among them a triangle of symbolic size that is made of no other tensor."""

    class Model(nn.Module):
        def forward(self, q: Tensor, kt: Tensor, v: Tensor) -> Tensor:
            k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for x in (kt.mT, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = torch.randn(B, H, S, D), torch.randn(B, H // 2, D, S + 3), torch.randn(B, H // 2, S + 3, D)
    shapes = ({2: Dim.AUTO}, {3: Dim.AUTO}, {2: Dim.AUTO})
    result = run_pipeline(torch.export.export(Model(), inputs, dynamic_shapes=shapes, strict=False).module(check_guards=False), OptimizeConfig(backend="sdpa"))
    (call,) = result.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert call.kwargs["enable_gqa"] and call.meta["val"].shape[2] == result.graph_module.graph.find_nodes(op="placeholder")[0].meta["val"].shape[2]
    torch.testing.assert_close(result.graph_module(*inputs), Model()(*inputs))
