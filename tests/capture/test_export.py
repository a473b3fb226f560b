"""Capture by export: what is left open, what is said about the rest, and that nothing else is touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import LENGTH, TinyGPT, hf_inputs, hf_model, ids, tiny_gpt
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import attnopt
from attnopt.capture.captured import Captured, ModelError
from attnopt.capture.export import capture
from attnopt.errors import CaptureError


def open_dims(captured: Captured) -> dict[tuple[str, int], tuple[int, int | None]]:
    return {(d.name, d.dim): (d.lower, d.upper) for d in captured.example.dynamic}


def run(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return captured.graph_module(*args, **kwargs)


def test_batch_and_sequence_are_open_down_to_one() -> None:
    model = tiny_gpt()
    captured = capture(model, (ids(),))
    assert open_dims(captured) == {("ids", 0): (1, None), ("ids", 1): (1, LENGTH)}
    assert captured.remarks == []
    for batch, length in ((1, 12), (5, 12), (2, 33), (1, 1)):
        x = ids(batch, length)
        assert captured.example.holds([x])
        torch.testing.assert_close(run(captured, ids=x), model(x), rtol=0, atol=0)
    assert not captured.example.holds([ids(2, 12).new_zeros(2, LENGTH + 1)])


def test_an_example_with_a_batch_of_one_leaves_the_batch_open() -> None:
    captured = capture(tiny_gpt(), (ids(1, 12),))
    assert open_dims(captured)["ids", 0] == (1, None)
    assert captured.example.args == () and captured.example.kwargs["ids"].shape == (2, 12)


def test_no_grad_regions_are_inlined_and_still_stop_gradients() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            with torch.no_grad():
                z = self.b(y) * 2
            return y * z

    model = Stopped()
    captured = capture(model, (torch.randn(3, 4),))
    targets = [str(n.target) for n in captured.graph_module.graph.nodes]
    assert not any("wrap" in t or "set_grad" in t for t in targets)
    x = torch.randn(5, 4)
    for run_model in (model, lambda x: captured.graph_module(x=x)):
        model.zero_grad()
        run_model(x).sum().backward()
        assert model.b.weight.grad is None
        if run_model is model:
            expected = model.a.weight.grad
    torch.testing.assert_close(model.a.weight.grad, expected)


class ReadsTheSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 8:
            raise ValueError("eight or nothing")
        return x.float() * 2


def test_a_fixed_size_is_named_with_the_line_that_fixed_it() -> None:
    captured = capture(ReadsTheSize(), (torch.ones(3, 8, dtype=torch.long),))
    (remark,) = captured.remarks
    assert remark.code == "AO301"
    assert remark.message == "Dimension 1 of x was fixed to 8 while capturing."
    assert remark.source.startswith(__file__)
    assert open_dims(captured) == {("x", 0): (1, None)}


def test_feature_sizes_need_no_remark() -> None:
    captured = capture(nn.Sequential(nn.Linear(8, 4)), (torch.randn(2, 6, 8),))
    assert captured.remarks == []
    assert set(open_dims(captured)) == {("input", 0), ("input", 1)}


class Bakes(nn.Module):
    """Divides by a length that stays the example's, although the graph keeps a symbol."""

    def forward(self, x: Tensor) -> Tensor:
        n: Any = x.shape[1]
        return x.sum(1) / (n.node.hint if isinstance(n, torch.SymInt) else n)


def test_a_length_that_was_baked_in_is_found_by_running_elsewhere() -> None:
    model = Bakes()
    captured = capture(model, (torch.randn(3, 10),))
    assert ("x", 1) not in open_dims(captured)
    assert [r.message for r in captured.remarks if r.code == "AO301"] == [
        "Dimension 1 of x holds for size 10 only: result 0 differs by 4.0e-01 (norm-relative)."
    ]
    assert captured.example.holds([torch.randn(5, 10)]) and not captured.example.holds([torch.randn(5, 11)])


def test_without_the_check_the_lie_goes_unseen() -> None:
    assert ("x", 1) in open_dims(capture(Bakes(), (torch.randn(3, 10),), check=False))


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1] // 2, 2).sum(-1)


def test_a_condition_on_sizes_is_part_of_what_holds() -> None:
    captured = capture(Pairs(), (torch.randn(3, 10),))
    assert captured.example.holds([torch.randn(4, 8)])
    assert not captured.example.holds([torch.randn(4, 7)])


def test_inputs_of_one_batch_have_to_agree() -> None:
    captured = capture(hf_model("llama"), (), hf_inputs("llama"))
    inputs = pytree.tree_leaves((captured.example.args, captured.example.kwargs))
    assert captured.example.holds(inputs)
    assert not captured.example.holds([inputs[0], inputs[1][:1], *inputs[2:]])
    assert not captured.example.holds([inputs[0], inputs[1][:, :-1], *inputs[2:]])


# ---- what is not touched


class Restless(nn.Module):
    """Everything that a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.dropout(self.norm(x))


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = Restless().train()
    model.dropout.eval()
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("root"))
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    attributes = set(vars(model))
    capture(model, (torch.randn(4, 8, generator=torch.Generator()),))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert (model.training, model.norm.training, model.dropout.training) == (True, True, False)
    assert set(vars(model)) == attributes and model.calls == 0 and seen == []
    assert not [n for n, p in model.named_parameters() if p.grad is not None]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_capture_works_inside_modes_without_gradients(mode: Any) -> None:
    model = tiny_gpt()
    with mode():
        captured = capture(model, (ids(),))
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    captured.graph_module(ids=ids()).sum().backward()
    assert model.tokens.weight.grad is not None


# ---- failures


class Refuses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if x.sum() > 0:
                return x * 2
        return x


def test_a_model_that_cannot_be_exported_gives_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError) as error:
        capture(Refuses(), (torch.ones(3, 4),))
    assert not isinstance(error.value, ModelError)
    assert error.value.message.startswith("torch.export cannot capture Refuses: ") and "\n" not in error.value.message
    assert torch.is_grad_enabled()
    assert capfd.readouterr().err == ""


def test_a_model_that_fails_by_itself_is_told_apart() -> None:
    with pytest.raises(ModelError, match=r"ReadsTheSize itself fails with these inputs: ValueError: eight or nothing") as error:
        capture(ReadsTheSize(), (torch.ones(3, 9),))
    assert isinstance(error.value.original, ValueError)


@pytest.mark.parametrize(("args", "kwargs"), [((ids(), None, 3), {}), ((ids(),), {"ids": ids()}), ((), {"idz": ids()}), ((), {})])
def test_arguments_that_do_not_fit_are_the_models_own_error(args: Any, kwargs: Any) -> None:
    with pytest.raises(ModelError, match="TinyGPT") as error:
        capture(tiny_gpt(), args, kwargs)
    assert isinstance(error.value.original, TypeError)


# ---- forms of input


class Nested(nn.Module):
    def forward(self, pair: dict[str, Any], *rest: Tensor, scale: float = 1.0, **extra: Tensor) -> dict[str, Tensor]:
        return {"sum": pair["a"] + pair["b"][0] + sum(rest) + extra["c"] * scale}


def test_nested_starred_and_extra_arguments() -> None:
    def inputs(b: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a = torch.randn(b, 4)
        return ({"a": a, "b": [a + 1]}, a + 2, a + 3), {"scale": 2.0, "c": a + 4}

    model = Nested()
    args, kwargs = inputs(3)
    captured = capture(model, args, kwargs)
    assert {d.name for d in captured.example.dynamic} == {"args[0]['a']", "args[0]['b'][0]", "args[1]", "args[2]", "c"}
    args, kwargs = inputs(7)
    torch.testing.assert_close(run(captured, *args, **kwargs), model(*args, **kwargs))


def test_containers_of_a_library() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    model, inputs = hf_model("bart"), hf_inputs("bart")
    inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=torch.randn(2, 24, 64))
    del inputs["input_ids"]
    captured = capture(model, (), inputs)
    assert {("encoder_outputs['last_hidden_state']", 1), ("attention_mask", 1), ("decoder_input_ids", 1)} <= set(open_dims(captured))


def test_models_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = TinyGPT()
    captured = capture(model, (ids().to("meta"),))
    assert set(open_dims(captured)) == {("ids", 0), ("ids", 1)}


def test_dynamic_shapes_of_the_user() -> None:
    captured = capture(tiny_gpt(), (ids(),), None, {"ids": {1: Dim("length", min=2, max=32)}})
    assert open_dims(captured) == {("ids", 1): (1, 32)}
    assert open_dims(capture(tiny_gpt(), (ids(),), None, "static")) == {}
    with pytest.raises(CaptureError, match="dynamic_shapes names idz, which TinyGPT does not take; it takes ids, weights"):
        capture(tiny_gpt(), (ids(),), None, {"idz": {0: Dim.AUTO}})


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "bart", "whisper"])
def test_transformers_models_hold_at_other_sizes(kind: str) -> None:
    model = hf_model(kind)
    captured = capture(model, (), hf_inputs(kind))
    for batch, length in ((3, 17), (1, 40)):
        inputs = hf_inputs(kind, batch, length)
        got = captured.graph_module(**{k: inputs[k] for k in captured.example.kwargs})
        with torch.no_grad():
            expected = model(**inputs)
        assert type(got) is type(expected)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)


def test_a_slice_of_something_larger_leaves_the_sizes_open() -> None:
    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False).eval()
    captured = capture(model, (torch.randn(3, 20, 16)[:2, :9],))
    assert not captured.remarks
    assert {(d.leaf, d.dim) for d in captured.example.dynamic} == {(0, 0), (0, 1)}


class Caches(nn.Module):
    """Makes a buffer when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        if self.bias is None or self.bias.shape[-1] < n:
            i = torch.arange(n)
            self.bias = -(i[None] - i[:, None]).abs().float()
        return (x @ x.mT + self.bias[..., -n:, -n:]).softmax(-1) @ x


def test_a_buffer_that_is_made_in_forward_is_not_exported() -> None:
    """torch.export would write its values into the input."""
    model = Caches()
    with pytest.raises(CaptureError, match="makes its buffer 'bias' while it runs"):
        capture(model, (torch.randn(2, 9, 16),))
    assert model.bias is None
    optimized = attnopt.optimize(model, (torch.randn(2, 9, 16),))
    for n in (9, 5, 20, 7):
        x = torch.randn(3, n, 16)
        torch.testing.assert_close(optimized(x), Caches()(x))
