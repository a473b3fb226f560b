"""Who computes what, and what is said when nobody or the wrong one would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.errors import BackendError
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import registry
from attnopt.kernels.registry import BackendRefusal, Setting, choose, choose_backward
from tests.kernels.cases import BY_NAME, SMALL, dims


def spec(name: str) -> AttentionSpec:
    return BY_NAME[name].spec()


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("full", ("sdpa", "CPU flash, no mask tensor")),
        ("causal-GQA", ("sdpa", "CPU flash, causal without a mask tensor")),
        ("padding-uniform", ("sdpa", "CPU flash, mask built tile by tile")),
        ("softcap-causal", ("reference", "interpreted tile by tile (not sdpa: it has no softcap, and the score has softcap 5)")),
    ],
)
def test_auto_on_a_cpu(name: str, want: tuple[str, str]) -> None:
    assert choose(spec(name), device="cpu", dtype=torch.float32) == want


def usable_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = registry.backends()["triton"]
    monkeypatch.setitem(registry._BACKENDS, "triton", replace(triton, available=lambda: None))


@pytest.mark.parametrize(
    ("name", "want"), [("full", "sdpa"), ("causal-GQA", "sdpa"), ("window-causal", "triton"), ("alibi-causal", "triton"), ("padding-uniform", "triton")]
)
def test_auto_on_a_gpu(name: str, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usable_triton(monkeypatch)
    assert choose(spec(name), device="cuda", dtype=torch.bfloat16)[0] == want


def test_auto_on_a_gpu_in_float64_and_with_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    usable_triton(monkeypatch)
    assert choose(spec("window-causal"), device="cuda", dtype=torch.float64)[0] == "sdpa"
    assert choose(spec("full").replace(dropout=0.1), device="cuda", dtype=torch.bfloat16)[0] == "triton"


def test_an_unknown_backend_is_answered_with_the_known() -> None:
    with pytest.raises(BackendError, match=r"no backend 'sdpaa'; the backends are cudnn, flash_attn, flex, gluon, reference, sdpa, triton, and 'auto'"):
        choose(spec("full"), device="cpu", dtype=torch.float32, backend="sdpaa")


def test_a_named_backend_is_not_replaced() -> None:
    with pytest.raises(BackendRefusal, match="softcap 5") as e:
        choose(spec("softcap-causal"), device="cpu", dtype=torch.float32, backend="sdpa")
    assert e.value.backend == "sdpa"
    with pytest.raises(BackendRefusal, match=r"dropout 0\.1"):
        choose(spec("full").replace(dropout=0.1), device="cpu", dtype=torch.float32, backend="sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, so Triton can be used")
def test_triton_without_a_gpu_says_so() -> None:
    with pytest.raises(BackendError, match="'triton' cannot be used here: Triton needs a CUDA GPU"):
        choose(spec("full"), device="cpu", dtype=torch.float32, backend="triton")


def test_triton_refuses_with_values(monkeypatch: pytest.MonkeyPatch) -> None:
    usable_triton(monkeypatch)

    def refusal(s: AttentionSpec, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> str:
        with pytest.raises(BackendRefusal) as e:
            choose(s, device=device, dtype=dtype, backend="triton")
        return e.value.reason

    assert "the query is float64" in refusal(spec("full"), torch.float64)
    assert "the tensors are on the CPU" in refusal(spec("full"), device="cpu")
    wide = AttentionSpec(dims((*SMALL[:5], 320, 320)), spec("full").score)
    assert "D is 320" in refusal(wide)
    power = spec("full").replace(score=E.power(E.absolute(E.score()), E.const(1.5)))
    assert "no pow of the score" in refusal(power)


def test_backends_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_DISABLE", "sdpa,triton")
    name, why = choose(spec("full"), device="cpu", dtype=torch.float32)
    assert name == "reference" and "not sdpa: switched off by ATTNOPT_DISABLE" in why
    with pytest.raises(BackendError, match="switched off"):
        choose(spec("full"), device="cpu", dtype=torch.float32, backend="sdpa")
    monkeypatch.setenv("ATTNOPT_DISABLE", "sdpa,reference")
    with pytest.raises(BackendError, match="No backend can compute this attention on cpu"):
        choose(spec("full"), device="cpu", dtype=torch.float32)


def test_a_backend_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    mine = registry.backends()["reference"]
    registry.register(registry.Backend("mine", lambda: None, lambda s, setting: "it refuses all", mine.why, mine.run))
    with pytest.raises(BackendRefusal, match="'mine' cannot compute this attention: it refuses all"):
        choose(spec("full"), device="cpu", dtype=torch.float32, backend="mine")


# ------------------------------------------------------------------------------------------------ training

TRAINING = Setting("cpu", torch.float32, training=True)


def test_the_report_says_who_computes_the_gradients() -> None:
    assert choose(spec("full"), device="cpu", dtype=torch.float32, training=True) == ("sdpa", "CPU flash, no mask tensor, backward by reference")
    assert choose(spec("full"), device="cpu", dtype=torch.float32, backend="reference", training=True)[1].endswith("backward by reference")


def test_a_forward_without_lse_is_followed_by_a_backward_that_reads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = registry.backends()["reference"].backward
    monkeypatch.setitem(registry._BACKENDS, "sdpa", replace(registry.backends()["sdpa"], forward=None, backward=gradients))
    assert choose_backward("sdpa", spec("full"), TRAINING) == "reference"
    monkeypatch.setitem(registry._BACKENDS, "sdpa", replace(registry.backends()["sdpa"], recomputes=True))
    assert choose_backward("sdpa", spec("full"), TRAINING) == "sdpa"


def test_a_backward_that_refuses_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(registry.backends()["reference"], name="mine")
    monkeypatch.setitem(registry._BACKENDS, "mine", mine)
    assert choose_backward("mine", spec("full"), TRAINING) == "mine"
    monkeypatch.setitem(registry._BACKENDS, "mine", replace(mine, accepts_backward=lambda s, setting: "it is too wide"))
    assert choose_backward("mine", spec("full"), TRAINING) == "reference"


def test_dropout_is_replayed_by_the_same_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(registry.backends()["reference"], name="mine", backward=None)
    monkeypatch.setitem(registry._BACKENDS, "mine", mine)
    dropping = spec("full").replace(dropout=0.1)
    assert choose_backward("mine", dropping, TRAINING) == "reference"
    monkeypatch.setitem(registry._BACKENDS, "mine", replace(mine, generator="another"))
    assert choose_backward("mine", spec("full"), TRAINING) == "reference"
    with pytest.raises(BackendError, match="mine: it has no backward; reference: its dropout goes by other random numbers than that of mine"):
        choose_backward("mine", dropping, TRAINING)


def test_a_backward_that_is_switched_off_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_DISABLE", "reference")
    with pytest.raises(BackendError, match="No backend can compute the gradients .* reference: switched off by ATTNOPT_DISABLE"):
        choose_backward("sdpa", spec("full"), TRAINING)
    assert "without a backward (No backend can compute" in choose(spec("full"), device="cpu", dtype=torch.float32, training=True)[1]
