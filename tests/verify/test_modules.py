"""Two modules compared as black boxes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.verify import DynamicDim, DynamicShapes, modules, verify_modules
from tests.verify.pairs import Decoder, example

DYNAMIC = DynamicShapes({0: {0: DynamicDim("b"), 1: DynamicDim("s")}, 1: {0: DynamicDim("b"), 1: DynamicDim("s")}})


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    found = Decoder().eval()
    for p in found.parameters():
        p.data.mul_(3.0 if p.ndim > 1 else 1.0)
    return found


class Other(nn.Module):
    """The same function, computed by ``scaled_dot_product_attention`` with ``change`` made to the bias."""

    def __init__(self, model: Decoder, change: Any = lambda bias: bias, scale: float | None = None) -> None:
        super().__init__()
        self.__dict__["_model"] = model
        for name, child in model.named_children():
            self.add_module(name, child)
        self.change, self.scale = change, scale

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        S = ids.shape[1]
        position = torch.arange(S)
        visible = (position[None, :] <= position[:, None]) & mask[:, None, None, :].bool()
        x = self.embedding(ids)
        bias = torch.zeros(visible.shape, dtype=x.dtype).masked_fill(~visible, torch.finfo(x.dtype).min)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = norm(x)
            q, k, v = (t.view(*ids.shape, 4, -1).transpose(1, 2) for t in layer.qkv(y).chunk(3, dim=-1))
            o = nn.functional.scaled_dot_product_attention(q, k, v, self.change(bias), scale=self.scale)
            x = x + layer.out(o.transpose(1, 2).reshape(x.shape))
        return x


def test_the_same_function(model: Decoder) -> None:
    verdict = verify_modules(model, Other(model), example(), None, DYNAMIC)
    assert verdict.passed, verdict.checks
    names = {c.name for c in verdict.checks}
    assert {
        f"whole model: {v}" for v in ("example", "other values", "shorter", "longer", "right padding", "left padding", "a padded row", "gradients")
    } <= names


def test_inputs_by_name(model: Decoder) -> None:
    ids, mask = example()
    assert verify_modules(model, Other(model), (ids,), {"mask": mask}).passed


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        pytest.param(lambda b: b.roll(1, -1), "example", id="mask off by one"),
        pytest.param(lambda b: b.mT, "example", id="reverse causal"),
        pytest.param(lambda b: b[:1], "right padding", id="padding of another row"),
        pytest.param(lambda b: b if b.shape[-1] == 24 else b.mT, "longer", id="length baked in"),
        pytest.param(lambda b: b.masked_fill((b < -1).all(-1, keepdim=True), -torch.inf), "a padded row", id="empty rows"),
    ],
)
def test_another_function(model: Decoder, change: Any, failed: str) -> None:
    verdict = verify_modules(model, Other(model, change), example(), None, DYNAMIC)
    assert verdict.passed is False
    assert f"whole model: {failed}" in {c.name for c in verdict.checks if not c.passed}
    if failed != "example":
        assert "whole model: example" in {c.name for c in verdict.checks if c.passed}


def test_a_scale_that_is_one_percent_off(model: Decoder) -> None:
    assert verify_modules(model, Other(model, scale=8**-0.5 * 1.01), example()).passed is False


def test_wrong_gradients(model: Decoder) -> None:
    verdict = verify_modules(model, Other(model, lambda b: b), example())
    assert verdict.passed

    class Detached(Other):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            out = super().forward(ids, mask)
            return out * 1.01 - (out * 0.01).detach()

    failed = [c.name for c in verify_modules(model, Detached(model), example()).checks if not c.passed]
    assert failed == ["whole model: gradients"]


def test_bfloat16(model: Decoder) -> None:
    model = model.to(torch.bfloat16)
    assert verify_modules(model, Other(model), example()).passed
    assert verify_modules(model, Other(model, lambda b: b.mT), example()).passed is False


def test_float16_where_a_finite_mask_loses_the_scores_only_in_the_original(model: Decoder) -> None:
    """-65504 + s is -65504 in float16, and not in the float32 of a fused kernel: another function, on rows without a key."""
    model = model.half()
    failed = {c.name for c in verify_modules(model, Other(model), example()).checks if not c.passed}
    assert failed == {"whole model: left padding", "whole model: a padded row"}
    assert "whole model: example" in {c.name for c in verify_modules(model, Other(model, lambda b: b.mT), example()).checks if not c.passed}


def test_functions_and_large_models_are_compared_with_each_other(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = verify_modules(lambda *a: model(*a), Other(model), example())
    assert verdict.passed and all("the original is no module" in c.detail for c in verdict.checks)
    monkeypatch.setattr(modules, "SMALL", 0)
    verdict = verify_modules(model, Other(model), example())
    assert verdict.passed and all("float64 copy" in c.detail for c in verdict.checks)
    assert verify_modules(model, Other(model, scale=8**-0.5 * 1.01), example()).passed is False


def test_a_model_that_does_not_run_in_float64() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x.float() @ self.w

    model = Picky().eval()
    verdict = verify_modules(model, model, (torch.randn(3, 4),))
    assert verdict.passed and "does not run in float64" in verdict.checks[0].detail


def test_modes_buffers_and_random_state_stay(model: Decoder) -> None:
    model.train()
    model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state, rng = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    assert verify_modules(model, Other(model), example()).passed, "compared in evaluation mode, without dropout"
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())
    assert torch.equal(rng, torch.random.get_rng_state()) and all(p.grad is None for p in model.parameters())


def test_errors(model: Decoder) -> None:
    def raises(*args: Tensor) -> Tensor:
        raise ValueError("no")

    verdict = verify_modules(model, raises, example())
    assert verdict.passed is False and "raises ValueError: no" in verdict.checks[0].detail
    with pytest.raises(ValueError, match="no"):
        verify_modules(raises, model, example())


def test_an_error_without_words(model: Decoder) -> None:
    """Backward passes that raise nothing but a type: the check fails and says the type."""

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError

    class Quiet(Other):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return Silent.apply(super().forward(ids, mask))  # type: ignore[no-any-return, no-untyped-call]

    last = verify_modules(model, Quiet(model), example()).checks[-1]
    assert not last.passed and last.detail == "the optimized model raises RuntimeError"
    last = verify_modules(Quiet(model), model, example()).checks[-1]
    assert last.detail == "not compared: the original has no gradient (RuntimeError)"


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Decoder().eval()
    assert verify_modules(model, model, example()).passed is None
