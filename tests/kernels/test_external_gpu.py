"""cuDNN, the FlashAttention packages and FlexAttention on a real GPU, against attention written out in float64.

A backend that cannot be used is skipped with its own reason, so that a run tells which packages it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.kernels import autotune, device, ops, registry
from attnopt.kernels.autotune import Example, TensorForm
from attnopt.kernels.external import cudnn, flash_attn, flex
from attnopt.kernels.registry import Backend, Setting
from tests.kernels.cases import BY_NAME, CASES, Case, Shape
from tests.kernels.external.test_flash_attn import MORE
from tests.kernels.operations import OPERATION_CASES

assert ops.__doc__  # the operator is registered
pytestmark = pytest.mark.gpu

# Rounding of the output, and of the probabilities before the product with V in half precision.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Of gradients, as norm of the difference over norm: the probabilities and their gradients are rounded once more.
RELATIVE = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
EXTERNAL = pytest.mark.parametrize("name", ["cudnn", "flash_attn", "flex"])
ALL = {**BY_NAME, **MORE}


@pytest.fixture(autouse=True)
def compilers() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def usable(name: str) -> Backend:
    reason = registry.backends()[name].available()
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return registry.find(name)


def of_shape(case: Case, shape: Shape) -> Case:
    return replace(case, shape=shape)


def tensors(case: Case, dtype: torch.dtype, loads_too: bool = False) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """q, k, v and loads on the CPU; with ``loads_too``, float loads in ``dtype`` as well."""
    q, k, v, loads = case.tensors(dtype)
    return q, k, v, [x.to(dtype) if loads_too and x.is_floating_point() else x for x in loads]


def setting(dtype: torch.dtype, loads: list[Tensor], training: bool = False) -> Setting:
    return Setting("cuda", dtype, training, tuple(x.dtype for x in loads))


def check_forward(one: Backend, case: Case, dtype: torch.dtype, loads_too: bool = False) -> bool:
    """False where the backend refuses the case, with a phrase."""
    q, k, v, loads = tensors(case, dtype, loads_too)
    spec, sizes = case.spec(), list(case.sizes.values())
    reason = one.accepts(spec, setting(dtype, loads))
    if reason is not None:
        assert len(reason) > 10 and not reason.endswith(".")
        return False
    want, want_lse = case.naive(q, k, v, loads)
    assert one.forward is not None
    with torch.no_grad():
        on_gpu = (q.cuda(), k.cuda(), v.cuda(), [x.cuda() for x in loads], sizes, spec)
        o, lse = one.forward(*on_gpu, 0)
        again = one.run(*on_gpu)
    assert o.dtype == dtype and o.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    torch.testing.assert_close(o.double().cpu(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)
    torch.testing.assert_close(lse.double().cpu(), want_lse, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(again, o, atol=0, rtol=0, equal_nan=True)
    return True


def check_backward(one: Backend, forward: Backend, case: Case, dtype: torch.dtype) -> bool:
    """Gradients after ``forward``. False where either refuses the case."""
    q, k, v, loads = tensors(case, dtype)
    spec, sizes = case.spec(), list(case.sizes.values())
    where = setting(dtype, loads, training=True)
    refused = forward.accepts(spec, where) or registry.backward_refusal(one.name, forward.name, spec, where)
    if refused is not None:
        assert len(refused) > 10
        return False
    floats = [x for x in loads if x.is_floating_point()]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    double = [x.double().requires_grad_() if x.is_floating_point() else x for x in loads]
    out, _ = case.naive(*leaves, double)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = torch.autograd.grad(out, [*leaves, *(x for x in double if x.requires_grad)], grad.double())
    needs = [True, True, True, *(x.is_floating_point() for x in loads)]
    with torch.no_grad():
        operands = (q.cuda(), k.cuda(), v.cuda())
        given = [x.cuda() for x in loads]
        assert forward.forward is not None and one.backward is not None
        o, lse = forward.forward(*operands, given, sizes, spec, 0)
        got = one.backward(grad.cuda(), *operands, o, lse, given, sizes, spec, 0, needs)
    assert [g.dtype for g in got] == [dtype] * 3 + [x.dtype for x in floats]
    for name, a, b in zip(["q", "k", "v", *("load" for _ in floats)], got, want, strict=True):
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < RELATIVE[dtype], f"gradient of {name}: {error:.2e}"
    return True


# ------------------------------------------------------------------------------------------------ forward


@HALF
@EXTERNAL
def test_every_case_is_computed_right_or_refused(name: str, dtype: torch.dtype) -> None:
    one = usable(name)
    done = [case.name for case in [*CASES, *MORE.values()] if check_forward(one, case, dtype)]
    print(f"{name} computes {len(done)}: {', '.join(done)}")
    assert len(done) >= {"cudnn": 6, "flash_attn": 10, "flex": 40}[name], done


@pytest.mark.parametrize("case", OPERATION_CASES.values(), ids=lambda c: c.name)
def test_operations_of_flex(case: Case) -> None:
    assert check_forward(usable("flex"), case, torch.float32)


@HALF
@EXTERNAL
@pytest.mark.parametrize("D", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("case", ["full", "causal-GQA", "window-causal", "softcap-causal", "sinks-causal-GQA"])
def test_head_sizes(case: str, D: int, name: str, dtype: torch.dtype) -> None:
    # lengths that no block size divides
    one = usable(name)
    if not check_forward(one, of_shape(ALL[case], (2, 4, 2, 333, 333, D, D)), dtype):
        reason = one.accepts(of_shape(ALL[case], (2, 4, 2, 333, 333, D, D)).spec(), Setting("cuda", dtype, loads=(torch.float32,)))
        pytest.skip(f"{name} refuses: {reason}")


@EXTERNAL
@pytest.mark.parametrize(("Sq", "Skv"), [(1, 1000), (17, 513), (513, 17), (128, 128), (129, 1023), (1, 1), (2, 1)])
@pytest.mark.parametrize("case", ["full", "causal-GQA"])
def test_lengths(case: str, Sq: int, Skv: int, name: str) -> None:
    check_forward(usable(name), of_shape(ALL[case], (1, 4, 4, Sq, Skv, 64, 64)), torch.bfloat16)


@EXTERNAL
@pytest.mark.parametrize("layout", ["BSHD", "packed", "transposed", "stride-2"])
def test_any_strides(layout: str, name: str) -> None:
    one = usable(name)
    case = of_shape(BY_NAME["causal-GQA"], (2, 4, 2, 150, 150, 64, 64))
    q, k, v, _ = case.tensors(torch.float16)
    want, _ = case.naive(q, k, v, [])
    q, k, v = q.cuda(), k.cuda(), v.cuda()
    if layout == "BSHD":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "packed":
        q, k, v = torch.cat([q, k, v], 1).transpose(1, 2).contiguous().transpose(1, 2).split([4, 2, 2], 1)
    elif layout == "transposed":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    else:
        q, k, v = (torch.stack([x, x], -1)[..., 0] for x in (q, k, v))
    with torch.no_grad():
        o = one.run(q, k, v, [], [], case.spec())
    torch.testing.assert_close(o.double().cpu(), want, atol=3e-3, rtol=3e-3)


def least(dtype: torch.dtype) -> Callable[[Shape], list[Tensor]]:
    """An additive mask of the dtype's least number above the diagonal and in all of row 2."""

    def tensors(shape: Shape) -> list[Tensor]:
        hidden = torch.arange(shape[4])[None] > torch.arange(shape[3])[:, None]
        hidden[2] = True
        return [torch.where(hidden, torch.finfo(dtype).min, 0.0).expand(shape[0], 1, -1, -1)]

    return tensors


@HALF
@pytest.mark.parametrize("name", ["cudnn", "flex"])
@pytest.mark.parametrize("case", ["dense-bias", "dense-bias-minus-infinity-zero", "least"])
def test_dense_bias_in_the_querys_dtype(case: str, name: str, dtype: torch.dtype) -> None:
    """A row whose every key has the least number is the average of all values: it must not become NaN in a kernel's own base of logarithms."""
    hidden = Case(
        "least",
        score=lambda d, s: E.add(E.mul(E.const(0.25), s), E.load(0, (d.b, E.ZERO, d.q, d.k), "float")),
        naive_score=lambda s, i, j, L: 0.25 * s + L[0],
        loads=least(dtype),
    )
    chosen = hidden if case == "least" else BY_NAME[case]
    one = usable(name)
    q, k, v, loads = tensors(chosen, dtype, loads_too=True)
    assert one.accepts(chosen.spec(), setting(dtype, loads)) is None
    want, _ = chosen.naive(q, k, v, loads)
    with torch.no_grad():
        o = one.run(q.cuda(), k.cuda(), v.cuda(), [x.cuda() for x in loads], [], chosen.spec())
    torch.testing.assert_close(o.double().cpu(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@HALF
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("D", "Dv"), [(8, 8), (40, 40), (64, 64), (100, 100), (128, 128), (136, 136), (192, 128), (192, 192), (256, 256), (264, 264)])
def test_what_torch_says_of_cudnn_is_true(D: int, Dv: int, training: bool, dtype: torch.dtype) -> None:
    one = usable("cudnn")
    case = of_shape(BY_NAME["causal-GQA"], (1, 4, 2, 200, 200, D, Dv))
    refuse = cudnn.backward_refusal if training else cudnn.refusal
    reason = refuse(case.spec(), setting(dtype, [], training))
    print(f"cuDNN, D {D}, Dv {Dv}, {'backward' if training else 'forward'}: {reason or 'taken'}")
    if reason is not None:
        pytest.skip(reason)
    assert check_backward(one, registry.backends()["reference"], case, dtype) if training else check_forward(one, case, dtype)


# ------------------------------------------------------------------------------------------------ backward


@HALF
@EXTERNAL
@pytest.mark.parametrize("case", ["full", "causal-GQA", "full-MQA-cross", "causal-bottom-right-Sq-less", "causal-bottom-right-empty-rows-zero",
                                  "window-causal", "window-bottom-right", "softcap-causal", "sinks-causal-GQA", "constant-shift"])  # fmt: skip
def test_gradients_after_its_own_forward_and_others(case: str, name: str, dtype: torch.dtype) -> None:
    one = usable(name)
    c = of_shape(ALL[case], (*(n for n in ALL[case].shape[:5]), 64, 64))  # type: ignore[arg-type]
    followed = [f.name for f in (one, registry.backends()["reference"]) if check_backward(one, f, c, dtype)]
    if not followed:
        pytest.skip(f"{name} refuses {case}")


@HALF
@pytest.mark.parametrize("backward", ["cudnn", "flash_attn"])
@pytest.mark.parametrize("forward", ["gluon", "triton", "flash_attn", "cudnn"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("case", ["full", "causal-GQA"])
def test_pairs(case: str, D: int, forward: str, backward: str, dtype: torch.dtype) -> None:
    """The forward of one and the backward of another, at a length of several blocks."""
    if forward not in registry.backends():
        pytest.skip(f"{forward} is not registered")
    one, first = usable(backward), usable(forward)
    if first.forward is None:
        pytest.skip(f"{forward} gives no lse")
    if not check_backward(one, first, of_shape(BY_NAME[case], (2, 4, 2, 1000, 1000, D, D)), dtype):
        pytest.skip(f"{forward}/{backward} is refused")


def test_gradients_of_loads_by_flex() -> None:
    """Bias, table and slopes: what a score program reads is differentiated too."""
    one = usable("flex")
    for name in ("dense-bias", "relative-buckets", "alibi-causal"):
        assert check_backward(one, one, BY_NAME[name], torch.float32), name


@EXTERNAL
def test_gradients_through_the_operator(name: str) -> None:
    usable(name)
    case = of_shape(BY_NAME["causal-GQA"], (2, 4, 2, 200, 200, 64, 64))
    q, k, v, _ = case.tensors(torch.bfloat16)
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    text = case.spec().to_json()
    assert registry.choose_backward(name, case.spec(), Setting("cuda", torch.bfloat16, True, ())) != "reference"
    o = torch.ops.attnopt.attention(*leaves, [], [], text, f"{name}/{name}")
    grad = torch.randn_like(o)
    got = torch.autograd.grad(o, leaves, grad)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(case.naive(*exact, [])[0], exact, grad.double().cpu())
    for a, b in zip(got, want, strict=True):
        assert (a.double().cpu() - b).norm() / b.norm() < RELATIVE[torch.bfloat16]


# ------------------------------------------------------------------------------------------------ all together


@pytest.mark.parametrize("name", ["cudnn", "flash_attn"])
def test_no_wait_for_the_device(name: str) -> None:
    one = usable(name)
    case = of_shape(BY_NAME["sinks-causal-GQA"], (2, 4, 2, 200, 200, 64, 64))
    q, k, v, loads = (x.cuda() if isinstance(x, Tensor) else [y.cuda() for y in x] for x in case.tensors(torch.bfloat16))
    assert one.forward is not None and one.backward is not None
    call = (q, k, v, loads, [], case.spec())
    with torch.no_grad():
        o, lse = one.forward(*call, 0)  # type: ignore[arg-type]
        torch.cuda.set_sync_debug_mode("error")
        try:
            one.forward(*call, 0)  # type: ignore[arg-type]
            one.backward(o, q, k, v, o, lse, loads, [], case.spec(), 0, [True, True, True, True])  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_flex_compiles_once_for_many_lengths_and_many_programs() -> None:
    """More programs and lengths than torch.compile would recompile one function for."""
    one = usable("flex")
    for n in (100, 130, 200, 257, 300, 400, 500, 513, 640, 700):
        assert check_forward(one, of_shape(BY_NAME["window-causal"], (1, 2, 1, n, n, 64, 64)), torch.bfloat16)
    case = of_shape(BY_NAME["window-causal"], (1, 2, 1, 500, 500, 64, 64))
    q, k, v, _ = tensors(case, torch.bfloat16)
    compiled = flex.functions(case.spec(), torch.bfloat16, False, flex.form_of(q, k, v)).attention.__code__
    seen = torch._dynamo.eval_frame._debug_get_cache_entry_list(compiled)
    assert 1 <= len(seen) <= 3, f"{len(seen)} compilations"


def test_autotune(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_CACHE_DIR", str(tmp_path))
    spec = of_shape(BY_NAME["causal-GQA"], (1, 16, 16, 2048, 2048, 128, 128)).spec()
    form = TensorForm((1, 16, 2048, 128), (0, 2, 1, 3), torch.bfloat16)
    for training in (False, True):
        where = Setting("cuda", torch.bfloat16, training, (), (2048, 2048))
        name, backward, why = autotune.choose(spec, where, Example(form, form, form, (), ()))
        print(f"{name}, {backward}: {why}")
        assert "measured here" in why and (backward is None or training) and name != "reference"
        assert autotune.choose(spec, where, Example(form, form, form, (), ()))[:2] == (name, backward)


def test_auto_takes_what_can_be_used() -> None:
    for case in CASES:
        _, _, _, loads = case.tensors(torch.bfloat16)
        for training in (False, True):
            name, why = registry.choose(
                case.spec(), device="cuda", dtype=torch.bfloat16, training=training, loads=tuple(x.dtype for x in loads), lengths=(4096, 4096)
            )
            print(f"{case.name}{' in training' if training else ''}: {name}, {why}")
            assert name in registry.backends() and name != "flex"


def test_what_is_here() -> None:
    print(f"{device.device_name('cuda')}, {device.arch()}, {device.versions()}, FlashAttention {flash_attn.newest() or 'none'}")
    assert device.arch().startswith("sm_") and math.isfinite(device.capability()[0])
