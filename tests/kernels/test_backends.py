"""Every backend that runs here against attention written out in float64."""

from __future__ import annotations

import pytest
import torch

from attnopt.kernels import reference, registry, sdpa
from tests.kernels.cases import BY_NAME, CASES, Case

# Rounding of each dtype's output and, for half precision, of the probabilities before the product with V.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def pairs(cases: list[Case]) -> pytest.MarkDecorator:
    """Each case in each dtype in which it has a meaning."""
    each = [(c, d) for c in cases for d in TOLERANCE if c.float64 or d != torch.float64]
    return pytest.mark.parametrize(("case", "dtype"), each, ids=[f"{c.name}-{str(d).removeprefix('torch.')}" for c, d in each])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that even these attentions take several of each kind."""
    monkeypatch.setattr(reference, "BUDGET", 2000)
    monkeypatch.setattr(sdpa, "BUDGET", 500)
    for module in (reference, sdpa):
        whole = module.tiles
        monkeypatch.setattr(
            module, "tiles", lambda B, row, Sq, Skv, limits, budget, at_least=0, whole=whole: whole(B, row, Sq, Skv, limits, budget, at_least=8)
        )


def check(o: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert o.dtype == dtype
    assert o.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(o.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@pairs(CASES)
def test_reference(case: Case, dtype: torch.dtype) -> None:
    q, k, v, loads = case.tensors(dtype)
    want, want_lse = case.naive(q, k, v, loads)
    with torch.no_grad():
        o, lse = reference.attention(q, k, v, loads, list(case.sizes.values()), case.spec())
    check(o, want, dtype)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pairs([c for c in CASES if c.sdpa])
def test_sdpa(case: Case, dtype: torch.dtype) -> None:
    q, k, v, loads = case.tensors(dtype)
    spec = case.spec()
    assert sdpa.refusal(spec, "cpu") is None
    check(sdpa.attention(q, k, v, loads, list(case.sizes.values()), spec), case.naive(q, k, v, loads)[0], dtype)


@pytest.mark.parametrize("case", [c for c in CASES if not c.sdpa], ids=lambda c: c.name)
def test_sdpa_refuses_with_a_reason(case: Case) -> None:
    word = "sinks" if case.sink else "score"
    assert word in (sdpa.refusal(case.spec(), "cpu") or "")
    with pytest.raises(registry.BackendRefusal, match=word):
        registry.choose(case.spec(), device="cpu", dtype=torch.float32, backend="sdpa")


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("layout", ["BSHD", "packed", "transposed", "stride-2"])
def test_any_strides(backend: str, layout: str) -> None:
    case = BY_NAME["causal-left-padding-uniform"]
    q, k, v, loads = case.tensors(torch.float32)
    want, _ = case.naive(q, k, v, loads)
    if layout == "BSHD":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "packed":
        packed = torch.cat([q, k, v], 1)
        q, k, v = packed.split([4, 2, 2], 1)
    elif layout == "transposed":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    else:
        q, k, v = (torch.stack([x, x], -1)[..., 0] for x in (q, k, v))
    assert q.dim() == 4
    run = registry.backends()[backend].run
    with torch.no_grad():
        check(run(q, k, v, loads, [], case.spec()), want, torch.float32)


@pytest.mark.parametrize("case", [c for c in CASES if c.float64 and not c.name.endswith("nan")], ids=lambda c: c.name)
def test_gradients(case: Case) -> None:
    q, k, v, loads = case.tensors(torch.float64)
    sizes = list(case.sizes.values())
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    floats = [x.clone().requires_grad_() if x.is_floating_point() else x for x in loads]
    want, _ = case.naive(*leaves, floats)
    grad = torch.randn_like(want)
    wanted = [*leaves, *(x for x in floats if x.requires_grad)]
    by_hand = torch.autograd.grad(want, wanted, grad)
    needs = [True, True, True, *(x.is_floating_point() for x in loads)]
    with torch.no_grad():
        got = reference.gradients(grad, q, k, v, loads, sizes, case.spec(), 0, needs)
    recorded = torch.autograd.grad(reference.attention(*leaves, floats, sizes, case.spec())[0], wanted, grad)
    for a, b, c in zip(got, recorded, by_hand, strict=True):
        torch.testing.assert_close(a, c, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(b, c, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_no_keys(backend: str) -> None:
    spec = BY_NAME["causal-GQA"].spec()
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 0, 16), torch.randn(2, 2, 0, 16)
    with torch.no_grad():
        o = registry.backends()[backend].run(q, k, v, [], [], spec)
    assert o.shape == (2, 4, 3, 16)
    assert bool((o == 0).all())
