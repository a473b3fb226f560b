"""How specs are said to the FlashAttention packages, on stand-ins that keep the packages' conventions and compute in float64."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference, registry
from attnopt.kernels.external import flash_attn, flash_packages
from attnopt.kernels.registry import Setting
from tests.kernels.cases import BY_NAME, CASES, Case, bottom_right, dims, window
from tests.kernels.external.stand_ins import Recorder, package_2, package_3, package_4

CUDA = Setting("cuda", torch.bfloat16)
MAKE: dict[str, tuple[int, Callable[[], tuple[ModuleType, Recorder]]]] = {
    "2": (2, package_2),
    "3": (3, package_3),
    "3-early": (3, lambda: package_3(early=True)),
    "4": (4, package_4),
}


def install(monkeypatch: pytest.MonkeyPatch, *names: str, arch: tuple[int, int] = (9, 0)) -> dict[str, Recorder]:
    """The named stand-ins, and no other package, on a device of capability ``arch``."""
    made = {name: MAKE[name][1]() for name in names}
    modules = {next(p.module for p in flash_packages.PACKAGES if p.generation == MAKE[n][0]): m for n, (m, _) in made.items()}
    monkeypatch.setattr(flash_packages, "load", lambda module, distribution: modules.get(module, f"the package {distribution} is not installed"))
    monkeypatch.setattr(flash_attn, "capability", lambda: arch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flash_attn.package.cache_clear()
    return {n: seen for n, (_, seen) in made.items()}


@pytest.fixture(autouse=True)
def fresh() -> None:
    flash_attn.package.cache_clear()


def case(name: str) -> Case:
    return BY_NAME.get(name) or MORE[name]


MORE = {
    c.name: c
    for c in [
        Case(
            "window-bottom-right",
            shape=(1, 4, 2, 21, 60, 16, 16),
            mask=lambda d: E.all_of(bottom_right(d), E.ge(d.k, E.add(d.q, E.sub(d.Skv, d.Sq), E.const(-7)))),
            naive_mask=lambda i, j, L: (j <= i + 39) & (j >= i + 39 - 7),
        ),
        Case(
            "window-right-only",
            mask=lambda d: E.le(E.sub(d.k, d.q), E.const(5)),
            naive_mask=lambda i, j, L: j - i <= 5,
        ),
        Case("window-left-only", mask=lambda d: window(d, 6, None), naive_mask=lambda i, j, L: i - j <= 6),
        Case(
            "alibi-both-sides",
            score=lambda d, s: E.add(
                E.mul(E.const(0.25), s), E.mul(E.const(-1.0), E.load(0, (d.b, d.h), "float"), E.as_float(E.absolute(E.sub(d.k, d.q))))
            ),
            naive_score=lambda s, i, j, L: 0.25 * s - L[0][:, :, None, None] * (j - i).abs(),
            loads=lambda sh: [torch.rand(sh[0], sh[1])],
        ),
        Case(
            "constant-shift",
            score=lambda d, s: E.add(E.mul(E.const(0.25), s), E.const(3.0)),
            naive_score=lambda s, i, j, L: 0.25 * s + 3.0,
        ),
        Case(
            "softcap-negated",
            score=lambda d, s: E.mul(E.const(-5.0), E.function("tanh", E.mul(E.const(-0.25 / 5.0), s))),
            naive_score=lambda s, i, j, L: 5 * torch.tanh(0.25 * s / 5),
        ),
    ]
}

EVERY = ["full", "causal-GQA", "full-MQA-cross", "causal-bottom-right-Sq-less", "causal-bottom-right-empty-rows-zero", "causal-bottom-right-empty-rows-nan",
         "causal-bottom-right-one-query", "window-causal", "window-both-sides", "reverse-causal", "softcap-causal", "sinks-causal-GQA", *(n for n in MORE if n != "alibi-both-sides")]  # fmt: skip
ALIBI = ["alibi-causal", "alibi-both-sides"]


@pytest.mark.parametrize("package", MAKE)
@pytest.mark.parametrize("name", EVERY)
def test_forward(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (seen,) = install(monkeypatch, package).values()
    c = case(name)
    check_forward(c)
    (call,) = seen.calls
    assert call["shape"] == (c.shape[0], c.shape[3], c.shape[1], c.shape[5])


def check_forward(c: Case) -> None:
    spec = c.spec()
    assert flash_attn.refusal(spec, CUDA) is None
    q, k, v, loads = c.tensors(torch.float32)
    want, want_lse = c.naive(q, k, v, loads)
    with torch.no_grad():
        o, lse = flash_attn.forward(q, k, v, loads, list(c.sizes.values()), spec)
    assert o.dtype == q.dtype and o.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    torch.testing.assert_close(o.double(), want, atol=3e-6, rtol=3e-6, equal_nan=True)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALIBI)
def test_alibi(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2", "4")
    check_forward(case(name))
    assert flash_attn.generation(case(name).spec()) == 2
    assert "no gradient of the slopes load0" in (flash_attn.refusal(case(name).spec(), CUDA, backward=True) or "")


@pytest.mark.parametrize("package", MAKE)
@pytest.mark.parametrize("name", [n for n in EVERY if not n.endswith("nan")])
def test_backward(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, package)
    c = case(name)
    spec = c.spec()
    assert flash_attn.refusal(spec, CUDA, backward=True) is None
    q, k, v, loads = c.tensors(torch.float32)
    check_backward(c, spec, q, k, v, loads)


def check_backward(c: Case, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, loads: list[Tensor]) -> None:
    """The gradients that follow o and lse of the reference, as of any other forward."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    floats = [x.double().requires_grad_() if x.is_floating_point() else x for x in loads]
    out, _ = c.naive(*leaves, floats)
    grad = torch.randn(out.shape)
    wanted = [*leaves, *(x for x in floats if x.is_floating_point())]
    want = torch.autograd.grad(out, wanted, grad.double())
    needs = [True, True, True, *(x.is_floating_point() for x in loads)]
    with torch.no_grad():
        o, lse = reference.attention(q, k, v, loads, [], spec)
        kept = [x.clone() for x in (grad, q, k, v, o, lse)]
        got = flash_attn.backward(grad, q, k, v, o, lse.float(), loads, list(c.sizes.values()), spec, 0, needs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)
    assert all(torch.equal(a, b) for a, b in zip(kept, (grad, q, k, v, o, lse), strict=True)), "an operand was changed"


def test_only_what_is_asked_for_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "4")
    c = BY_NAME["sinks-causal-GQA"]
    q, k, v, loads = c.tensors(torch.float32)
    with torch.no_grad():
        o, lse = flash_attn.forward(q, k, v, loads, [], c.spec())
        got = flash_attn.backward(torch.ones_like(o), q, k, v, o, lse, loads, [], c.spec(), 0, [False, True, False, True])
    assert [x.shape for x in got] == [k.shape, loads[0].shape]


@pytest.mark.parametrize("layout", ["transposed", "stride-2"])
def test_any_strides(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "3")
    c = BY_NAME["causal-GQA"]
    q, k, v, loads = c.tensors(torch.float32)
    want, _ = c.naive(q, k, v, loads)
    if layout == "transposed":
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    else:
        q, k, v = (torch.stack([x, x], -1)[..., 0] for x in (q, k, v))
    torch.testing.assert_close(flash_attn.run(q, k, v, loads, [], c.spec()).double(), want, atol=3e-6, rtol=3e-6)


def test_windows_in_the_packages_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, none in (("2", -1), ("4", None)):
        (seen,) = install(monkeypatch, package).values()
        for name in ("full", "causal-GQA", "causal-bottom-right-Sq-less", "window-causal", "window-both-sides"):
            c = BY_NAME[name]
            flash_attn.run(*c.tensors(torch.float32)[:3], [], [], c.spec())
        words = [(x["causal"], x["window"]) for x in seen.calls]
        assert words == [(False, (none, none)), (True, (none, 0)), (True, (none, 0)), (False, (20, 0)), (False, (9, 6))]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("causal-top-left-Sq-less", "aligned bottom-right .* ends at key q \\+ 0 of s2, with s1 queries"),
        ("padding-zero", "causal and windows, and this one also hides keys unless"),
        ("documents-causal", "also hides keys unless"),
        ("dense-bias", "no bias but ALiBi's"),
        ("relative-buckets", "no bias but ALiBi's"),
        ("per-head-scale", "it computes scale \\* s"),
        ("causal-bottom-right-empty-rows-uniform", "rows without a visible key are uniform here, and it knows nan and zero"),
    ],
)
def test_it_refuses_what_it_cannot_say(name: str, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "4")
    with pytest.raises(registry.BackendRefusal, match=want):
        registry.choose(BY_NAME[name].spec(), device="cuda", dtype=torch.bfloat16, backend="flash_attn")


def test_every_case_is_computed_right_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2")
    taken = [c for c in CASES if flash_attn.refusal(c.spec(), CUDA) is None]
    assert len(taken) >= 12
    for c in taken:
        check_forward(c)


def test_it_refuses_dtypes_devices_sizes_and_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2", "3", "4")
    full = BY_NAME["full"].spec()
    assert "the query is float32" in (flash_attn.refusal(full, Setting("cuda", torch.float32)) or "")
    assert "the tensors are on cpu" in (flash_attn.refusal(full, Setting("cpu", torch.float16)) or "")
    assert "dropout 0.1" in (flash_attn.refusal(full.replace(dropout=0.1), CUDA) or "")
    odd = AttentionSpec(dims((1, 2, 2, 9, 9, 20, 20)), full.score)
    assert "FlashAttention-4: it has head sizes that are multiples of 8 up to 256, and D is 20" in (flash_attn.refusal(odd, CUDA) or "")
    two = AttentionSpec(dims((1, 2, 2, 9, 9, 192, 128)), full.score)
    assert flash_attn.package(two, (9, 0)) is flash_packages.PACKAGES[0]
    assert "FlashAttention-2: it has one head size for keys and values, and D is 192 and Dv is 128" in str(flash_attn.package(two, (8, 0)))


@pytest.mark.parametrize(("arch", "want"), [((9, 0), 4), ((10, 0), 4), ((8, 0), 2), ((12, 0), 4)])
def test_the_generation_for_a_device(arch: tuple[int, int], want: int, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2", "3", "4", arch=arch)
    chosen = flash_attn.package(BY_NAME["full"].spec(), arch)
    assert isinstance(chosen, flash_packages.Package) and chosen.generation == want


def test_a_generation_that_cannot_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "3", arch=(8, 0))
    assert "FlashAttention-3: it runs on sm_90, and this device is sm_80" in (flash_attn.refusal(BY_NAME["full"].spec(), CUDA) or "")
    install(monkeypatch, "4", arch=(8, 0))
    assert flash_attn.refusal(BY_NAME["full"].spec(), CUDA) is None
    assert "its backward does not run on sm_80" in (flash_attn.refusal(BY_NAME["full"].spec(), CUDA, backward=True) or "")


# ------------------------------------------------------------------------------------------------ installs


def write_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [m for m in sys.modules if m.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
        monkeypatch.delitem(sys.modules, name)
    flash_packages.load.cache_clear()


def test_a_broken_install_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "raise ImportError('libcudart.so.11.0: cannot open shared object file\\nand more')\n"
    write_package(tmp_path, monkeypatch, {"flash_attn/__init__.py": broken, "flash_attn_interface.py": "1 / 0\n"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = flash_attn.available()
    assert reason is not None
    assert "flash_attn.cute.interface is installed and does not import: ImportError: libcudart.so.11.0: cannot open shared object file;" in reason
    assert "flash_attn_interface is installed and does not import: ZeroDivisionError: division by zero" in reason
    assert "and more" not in reason


def test_a_package_without_the_newer_part_is_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, monkeypatch, {"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": "import torch\n"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert flash_attn.available() is None
    assert flash_packages.PACKAGES[0].load() == "the package flash-attn-4 is not installed"


def test_a_dependency_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, monkeypatch, {"flash_attn/cute/interface.py": "import a_dependency_that_is_not_there\n"})
    assert "does not import: ModuleNotFoundError: No module named 'a_dependency_that_is_not_there'" in str(flash_packages.PACKAGES[0].load())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, so the packages are looked for")
def test_without_a_gpu_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, monkeypatch, {"flash_attn/__init__.py": "raise SystemExit\n"})
    with pytest.raises(AttnoptError, match="FlashAttention needs a CUDA GPU, and there is none"):
        registry.choose(BY_NAME["full"].spec(), device="cpu", dtype=torch.float16, backend="flash_attn")


def test_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "4")
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 0, 16), torch.randn(2, 2, 0, 16)
    with torch.no_grad():
        o, lse = flash_attn.forward(q, k, v, [], [], BY_NAME["full-MQA-cross"].spec())
    assert bool((o == 0).all()) and bool((lse == -math.inf).all())
