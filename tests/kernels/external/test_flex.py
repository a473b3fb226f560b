"""FlexAttention from specs, eager on the CPU, against attention written out in float64. The compiled kernels: ``test_external_gpu.py``."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from attnopt.kernels import ops, registry
from attnopt.kernels.external import flex
from attnopt.kernels.external.flex_source import generate
from attnopt.kernels.registry import Setting
from tests.kernels.cases import BY_NAME, CASES, Case
from tests.kernels.external.test_flash_attn import MORE
from tests.kernels.operations import OPERATION_CASES

assert ops.__doc__  # the operator is registered
CPU = Setting("cpu", torch.float32)


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without Dynamo, which takes half a second a program; its forward only."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_compiled_attention", lambda f, device: f.attention)


def check(case: Case, q: Tensor, k: Tensor, v: Tensor, loads: list[Tensor]) -> None:
    want, want_lse = case.naive(q, k, v, loads)
    with torch.no_grad():
        o, lse = flex.forward(q, k, v, loads, list(case.sizes.values()), case.spec())
    assert o.dtype == q.dtype and o.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    torch.testing.assert_close(o.double(), want, atol=5e-6, rtol=5e-6, equal_nan=True)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("case", [c for c in [*CASES, *MORE.values(), *OPERATION_CASES.values()] if c.empty_rows != "program"], ids=lambda c: c.name)
def test_forward(case: Case) -> None:
    assert flex.refusal(case.spec(), CPU) is None
    check(case, *case.tensors(torch.float32))


@pytest.mark.parametrize("name", ["sinks-padding"])
def test_forward_as_dynamo_traces_it(name: str) -> None:
    check(BY_NAME[name], *BY_NAME[name].tensors(torch.float32))


@pytest.fixture
def backward_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch lets FlexAttention's dense backward run on the CPU for its own tests only; what reaches it is the same as on a GPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda q, k, v: None)
    flexible = registry.backends()["flex"]
    monkeypatch.setitem(registry._BACKENDS, "flex", replace(flexible, accepts_backward=flex.refusal))
    ops._prepare_backward.cache_clear()


@pytest.mark.usefixtures("backward_on_the_cpu")
@pytest.mark.parametrize("name", ["padding-uniform", "sinks-causal-GQA", "relative-buckets"])
def test_gradients_through_the_operator(name: str) -> None:
    case = BY_NAME[name]
    q, k, v, loads = case.tensors(torch.float64)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in (q, k, v, *loads)]
    wanted = [x for x in leaves if x.requires_grad]
    out, _ = case.naive(leaves[0], leaves[1], leaves[2], leaves[3:])
    grad = torch.randn_like(out)
    want = torch.autograd.grad(out, wanted, grad)
    assert registry.choose_backward("flex", case.spec(), Setting("cpu", torch.float64, training=True)) == "flex"
    o = torch.ops.attnopt.attention(leaves[0], leaves[1], leaves[2], leaves[3:], [], case.spec().to_json(), "flex")
    for a, b in zip(torch.autograd.grad(o, wanted, grad), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("backward_on_the_cpu")
def test_gradients_only_of_what_needs_them() -> None:
    case = BY_NAME["dense-bias"]
    q, k, v, loads = case.tensors(torch.float64)
    spec = case.spec()
    with torch.no_grad():
        o, lse = flex.forward(q, k, v, loads, [], spec)
        got = flex.backward(torch.ones_like(o), q, k, v, o, lse, loads, [], spec, 0, [False, True, False, True])
    assert [x.shape for x in got] == [k.shape, loads[0].shape]
    assert not q.requires_grad and not loads[0].requires_grad


@pytest.mark.usefixtures("untraced")
def test_block_masks_are_kept_while_what_they_read_is_the_same() -> None:
    case = BY_NAME["padding-zero"]
    q, k, v, loads = case.tensors(torch.float32)
    spec = case.spec()
    values = {"s0": 2, "s1": 37}
    first = flex.block_mask(spec, q, k, loads, values, torch.float32)
    assert flex.block_mask(spec, q, k, loads, values, torch.float32) is first
    assert flex.block_mask(spec, q, k, [loads[0].clone()], values, torch.float32) is not first
    loads[0][:, 3] = False
    assert flex.block_mask(spec, q, k, loads, values, torch.float32) is not first
    check(case, q, k, v, loads)

    index_only = BY_NAME["window-causal"]
    q, k, v, _ = index_only.tensors(torch.float32)
    kept = flex.block_mask(index_only.spec(), q, k, [], {"s0": 1, "s1": 150}, torch.float32)
    assert flex.block_mask(index_only.spec(), q.clone(), k.clone(), [], {"s0": 1, "s1": 150}, torch.float32) is kept
    shorter = flex.block_mask(index_only.spec(), q[:, :, :40], k[:, :, :40], [], {"s0": 1, "s1": 40}, torch.float32)
    assert shorter is not kept and shorter.shape == (1, 1, 40, 40)
    assert flex.block_mask(BY_NAME["full"].spec(), q, k, [], {}, torch.float32) is None


@pytest.mark.usefixtures("untraced")
def test_a_call_keeps_the_mask_for_the_next_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["padding-zero"]
    q, k, v, loads = case.tensors(torch.float32)
    made = []
    whole = flex._Kept.of
    monkeypatch.setattr(flex._Kept, "of", staticmethod(lambda mask, tensors: made.append(mask) or whole(mask, tensors)))
    for _ in range(3):
        torch.ops.attnopt.attention(q, k, v, loads, [], case.spec().to_json(), "flex")
    assert len(made) == 1


@pytest.mark.usefixtures("untraced")
def test_in_inference_mode() -> None:
    """Tensors made there have no version by which a change would be seen."""
    case = BY_NAME["padding-zero"]
    with torch.inference_mode():
        q, k, v, loads = case.tensors(torch.float32)
        first = torch.ops.attnopt.attention(q, k, v, loads, [], case.spec().to_json(), "flex")
        torch.testing.assert_close(first.double(), case.naive(q, k, v, loads)[0], atol=5e-6, rtol=5e-6)
        loads[0][:, 3] = False
        again = torch.ops.attnopt.attention(q, k, v, loads, [], case.spec().to_json(), "flex")
        torch.testing.assert_close(again.double(), case.naive(q, k, v, loads)[0], atol=5e-6, rtol=5e-6)


@pytest.mark.usefixtures("untraced")
def test_kept_masks_are_few() -> None:
    spec = BY_NAME["window-causal"].spec()
    for n in range(20, 20 + 2 * flex.KEPT_MASKS):
        flex.block_mask(spec, torch.empty(1, 2, n, 16), torch.empty(1, 1, n, 16), [], {"s0": 1, "s1": n}, torch.float32)
    assert len(flex._masks) == flex.KEPT_MASKS


def test_the_source_of_a_program() -> None:
    source = generate(BY_NAME["alibi-causal"].spec())
    assert "scale=0.25" in source.text and "L0[h].to(DTYPE)" in source.text and not source.batched and not source.per_head
    assert "score_mod=None" in generate(BY_NAME["causal-GQA"].spec()).text
    padded = generate(BY_NAME["padding-zero"].spec())
    assert padded.batched and not padded.per_head
    # a bucket is decided by torch's own rounding, and reaches the kernel as a table over distances
    assert [p.axes for p in generate(BY_NAME["relative-buckets"].spec()).parts] == ["hd"]


def test_python_finds_the_source_of_a_program() -> None:
    """torch.compile would count the compilations of all programs as those of one function otherwise, and stop at eight."""
    for name in ("causal-GQA", "window-causal"):
        made = flex.functions(BY_NAME[name].spec(), torch.float32)
        assert inspect.getsource(made.attention) in made.source.text


def test_what_it_refuses() -> None:
    full = BY_NAME["full"].spec()
    assert flex.refusal(BY_NAME["padding-program"].spec(), CPU) == "rows without a visible key have a score program of their own"
    assert "dropout 0.1" in (flex.refusal(full.replace(dropout=0.1), CPU) or "")
    assert "the tensors are on meta" in (flex.refusal(full, Setting("meta", torch.float32)) or "")
    assert "the query is float64" in (flex.refusal(full, Setting("cuda", torch.float64)) or "")
    assert flex.refusal(full, Setting("cuda", torch.bfloat16)) is None
    biased = Case("", score=BY_NAME["dense-bias"].score, mask=lambda d: BY_NAME["padding-zero"].mask(d), loads=BY_NAME["dense-bias"].loads, empty_rows="uniform")  # type: ignore[misc]
    assert "it cannot tell rows that see no key" in (flex.refusal(biased.spec(), CPU) or "")


def test_operands_that_require_gradients() -> None:
    """The operator hands on what it was given, and FlexAttention looks at the flags; the gradients are then the reference's."""
    case = BY_NAME["causal-GQA"]
    q, k, v, _ = case.tensors(torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.randn(q.shape, dtype=torch.float64)
    got = torch.autograd.grad(torch.ops.attnopt.attention(*leaves, [], [], case.spec().to_json(), "flex"), leaves, grad)
    for a, b in zip(got, torch.autograd.grad(case.naive(*leaves, [])[0], leaves, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_its_backward_runs_on_a_gpu() -> None:
    full = BY_NAME["full"].spec()
    assert flex.backward_refusal(full, CPU) == "its backward runs on cuda, and the tensors are on cpu"
    assert flex.backward_refusal(full, Setting("cuda", torch.bfloat16)) is None
    assert registry.choose_backward("flex", full, Setting("cpu", torch.float32, training=True)) == "reference"


def test_no_keys() -> None:
    with torch.no_grad():
        o, lse = flex.forward(torch.randn(2, 4, 3, 16), torch.randn(2, 2, 0, 16), torch.randn(2, 2, 0, 16), [], [], BY_NAME["causal-GQA"].spec())
    assert bool((o == 0).all()) and bool((lse == -math.inf).all())
