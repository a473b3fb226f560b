"""``torch.compile(model, backend="attnopt")``: the same passes on what Dynamo captures, whatever it breaks the model into."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import Attention, hf_inputs, hf_model, ids, tiny_gpt
from torch import Tensor, fx, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import attnopt
from attnopt.capture.dynamo import Frames, compile_frame, retrace
from attnopt.report import Report

EAGER = {"inductor": False}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    attnopt.compile_report(clear=True)
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, options: dict[str, Any] | None = None, **more: Any) -> Any:
    return torch.compile(model, backend="attnopt", options=EAGER if options is None else options, **more)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_a_model_in_one_graph() -> None:
    model = tiny_gpt()
    close(compiled(model, fullgraph=True)(ids()), model(ids()))
    report = attnopt.compile_report()
    assert [(s.name, s.status) for s in report.sites] == [(f"blocks.{i}.attention", "replaced") for i in range(2)]
    assert [r.code for r in report.remarks] == ["AO304"]


def test_masks_are_recognised() -> None:
    model, inputs = hf_model("llama"), hf_inputs("llama")
    with torch.no_grad():
        close(compiled(model)(**inputs)[0], model(**inputs)[0])
    assert [str(s.spec) for s in attnopt.compile_report().sites] == ["causal, GQA 4/2, key padding, rotary"] * 2


class Interrupted(nn.Module):
    """A break between the layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
            torch._dynamo.graph_break()
        return x


def test_a_break_between_layers_loses_nothing() -> None:
    model, x = Interrupted(), torch.randn(2, 9, 32)
    close(compiled(model)(x), model(x))
    report = attnopt.compile_report()
    assert report.sites and all(s.status == "replaced" for s in report.sites)


class Cut(nn.Module):
    """A break between the product with the keys and the product with the values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        p = (q @ k.transpose(-2, -1) / math.sqrt(16)).softmax(-1)
        torch._dynamo.graph_break()
        return p @ v


class CutBeforeSoftmax(Cut):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(16)
        torch._dynamo.graph_break()
        return scores.softmax(-1) @ v


@pytest.mark.parametrize(("kind", "missing"), [(Cut, "values"), (CutBeforeSoftmax, "keys")])
def test_a_break_inside_an_attention_is_said(kind: type[nn.Module], missing: str) -> None:
    model, x = kind(), torch.randn(2, 9, 16)
    close(compiled(model)(x), model(x))
    (site,) = attnopt.compile_report().sites
    assert site.status == "missed"
    assert [r.code for r in site.remarks] == ["AO209"]
    assert f"the product with the {missing} stands in the other one" in site.why


def test_a_classifier_before_a_break_is_no_cut_attention() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            p = self.head(x).softmax(-1)
            torch._dynamo.graph_break()
            return p * 2

    compiled(Classifier())(torch.randn(2, 9, 16))
    assert "AO209" not in [r.code for s in attnopt.compile_report().sites for r in s.remarks]


@pytest.mark.parametrize("model", [tiny_gpt(), Interrupted()], ids=["one-graph", "broken"])
def test_training(model: nn.Module) -> None:
    x = ids() if not isinstance(model, Interrupted) else torch.randn(2, 9, 32)
    twin = copy.deepcopy(model).train()
    model.train()
    twin(x).square().mean().backward()
    result = compiled(model)(x)
    result.square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        close(a.grad, b.grad)
    assert all(s.status == "replaced" for s in attnopt.compile_report().sites)


def test_dynamic_shapes() -> None:
    model = tiny_gpt()
    run = compiled(model, dynamic=True, fullgraph=True)
    for batch, length in ((2, 12), (3, 20), (5, 7)):
        close(run(ids(batch, length)), model(ids(batch, length)))
    assert len(attnopt.compile_report().sites) == 2
    assert sum(len(r.sites) for r in attnopt.api._frames.reports) == 2  # compiled once


def test_no_grad_regions_inside() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.live = Attention(), Attention()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.frozen(x)
            return self.live(x + y)

    model, x = Frozen(), torch.randn(2, 9, 32)
    result = compiled(model)(x)
    close(result, model(x))
    result.sum().backward()
    assert model.frozen.out.weight.grad is None and model.live.out.weight.grad is not None
    assert torch.is_grad_enabled()


def test_inductor_runs_what_comes_out() -> None:
    model = tiny_gpt(layers=1)
    run = compiled(model, {})
    with torch.no_grad():
        close(run(ids()), model(ids()))
    assert [s.status for s in attnopt.compile_report().sites] == ["replaced"]


def test_a_model_that_export_refuses() -> None:
    model, inputs = hf_model("longformer"), hf_inputs("longformer", length=32)
    with torch.no_grad():
        close(compiled(model)(**inputs)[0], model(**inputs)[0])
    report = attnopt.compile_report()
    assert report.sites and all(s.status == "missed" and s.why for s in report.sites)  # local blocks: seen, and refused with a reason


def test_unknown_options_are_named() -> None:
    with pytest.raises(Exception, match="The backend attnopt has no option 'speed'; supported are autotune, backend, capture"):
        compiled(tiny_gpt(), {"speed": 11})(ids())


def test_a_function_that_cannot_be_retraced_is_left_and_said() -> None:
    graph = fx.symbolic_trace(nn.Linear(2, 2))  # without the metadata that Dynamo leaves on inputs
    frames = Frames()
    result = compile_frame(graph, [torch.randn(1, 2)], lambda g: (g, Report()), frames, inductor=False)
    assert result is graph
    assert [r.code for r in frames.merged().remarks] == ["AO306"]


def test_the_retraced_graph_is_training_ir_with_names_and_paths() -> None:
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        seen.append(retrace(gm))
        return gm

    torch.compile(tiny_gpt(layers=1), backend=backend)(ids())
    nodes = list(seen[0].graph.nodes)
    assert any("ids" in n.name for n in nodes if n.op == "placeholder")
    softmax = next(n for n in nodes if n.target is torch.ops.aten.softmax.int)
    assert tuple(softmax.meta["val"].shape) == (2, 4, 12, 12)
    assert "tiny_models.py" in softmax.meta["stack_trace"]
    assert any("attention" in str(path) for path, *_ in softmax.meta["nn_module_stack"].values())


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.attention, x, use_reentrant=False)
        return y * 2


@pytest.mark.parametrize("options", [EAGER, {}], ids=["eager", "inductor"])
def test_an_attention_in_an_activation_checkpoint(options: dict[str, Any]) -> None:
    model, twin, x = Checkpointed(), Checkpointed(), torch.randn(2, 9, 32)
    result = compiled(model, options)(x)
    close(result, twin(x))
    result.square().mean().backward()
    twin(x).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        close(a.grad, b.grad)
    report = attnopt.compile_report()
    assert [(s.name, s.status) for s in report.sites] == [("attention", "replaced")]
    assert [r.code for r in report.remarks] == ["AO304"]


def test_the_backward_still_computes_a_checkpoint_again() -> None:
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        seen.append(retrace(gm))
        return gm

    torch.compile(Checkpointed(), backend=backend)(torch.randn(2, 9, 32))
    inside = {n for n in seen[0].graph.nodes if "recompute" in n.meta}
    (softmax,) = (n for n in seen[0].graph.nodes if n.target is torch.ops.aten.softmax.int)
    (last,) = (n for n in seen[0].graph.nodes if n.target is torch.ops.aten.mul.Tensor and not n.users.keys() <= inside)
    assert softmax in inside and last not in inside
    assert len({n.meta["ac_graph_id"] for n in inside}) == 1


def test_a_selective_checkpoint_is_left_and_said() -> None:
    class Selective(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
            y: Tensor = checkpoint(self.attention, x, use_reentrant=False, context_fn=kept)
            return y

    model, x = Selective(), torch.randn(2, 9, 32)
    close(compiled(model)(x), model(x))
    (site,) = attnopt.compile_report().sites
    assert [r.code for r in site.remarks] == ["AO213"] and "in a function that tag_activation_checkpoint runs" in site.why


@pytest.mark.parametrize("capture", ["export", "dynamo"])
@pytest.mark.parametrize(
    ("operator", "run"),
    [
        ("cond", lambda q, k, v: torch.cond(q.sum() > 0, attend, lambda q, k, v: v * 2, (q, k, v))),
        ("while_loop", lambda q, k, v: while_loop(lambda i, q: i < 3, lambda i, q: (i + 1, attend(q, k, v)), (q.new_zeros((), dtype=torch.int64), q))[1]),
        ("scan", lambda q, k, v: scan(lambda c, x: (attend(c, k, v), x * 2), q, torch.stack([q, k]))[0]),
    ],
    ids=["cond", "while_loop", "scan"],
)
def test_an_attention_in_a_function_that_an_operator_runs_is_said(operator: str, run: Any, capture: str) -> None:
    class Runs(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y: Tensor = run(q, k, v)
            return y

    config = attnopt.OptimizeConfig(capture=capture)  # type: ignore[arg-type]
    report = attnopt.inspect(Runs(), tuple(torch.randn(2, 9, 16) for _ in range(3)), config=config)
    assert {(s.status, *(r.code for r in s.remarks)) for s in report.sites} == {("missed", "AO213")}
    assert len(report.sites) == len(report.attentions) == 1
    assert all(f"in a function that {operator} runs" in s.why and s.source.startswith(f"{__file__}:") for s in report.sites)


def test_what_is_no_attention_is_none_in_a_function_either() -> None:
    class Router(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.cond(x.sum() > 0, lambda x: x.softmax(-1), lambda x: x * 2, (x,))
            return y

    report = attnopt.inspect(Router(), torch.randn(2, 9))
    assert [s.remarks[0].code for s in report.sites] == ["AO201"] and not report.attentions


class Mapped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = torch.func.vmap(attend)(q, k, v)
        return y


def test_a_map_over_a_batch_is_left_and_said() -> None:
    """Its tensors have a hidden axis: they must not be read as those that the nodes show."""
    operands = tuple(torch.randn(2, 9, 16) for _ in range(3))
    fast: Any = attnopt.optimize(Mapped(), operands)
    close(fast(*operands), Mapped()(*operands))
    by_code = {r.code: r for r in fast.attnopt_report.remarks}
    assert set(by_code) == {"AO302", "AO306"}
    assert "_add_batch_dim" in by_code["AO306"].message and by_code["AO306"].source.startswith(f"{__file__}:")
