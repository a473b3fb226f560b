"""Choosing by measuring, on the CPU with the backends that run there."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.errors import AttnoptError
from attnopt.kernels import autotune, choice, registry
from attnopt.kernels.autotune import Example, TensorForm
from attnopt.kernels.registry import Setting
from tests.kernels.cases import BY_NAME, Case

CPU = Setting("cpu", torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "SECONDS", 0.002)
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    return tmp_path / "autotune"


def example(case: Case, dtype: torch.dtype = torch.float32) -> Example:
    q, k, v, loads = case.tensors(dtype)
    forms = [TensorForm.of(x.shape, x.stride(), x.dtype) for x in (q, k, v, *loads)]
    return Example(forms[0], forms[1], forms[2], tuple(forms[3:]), tuple(case.sizes.values()))


def slower(name: str, seconds: float) -> list[str]:
    """Makes a backend wait before it runs, and lists its runs."""
    one, runs = registry.backends()[name], []

    def run(*call: Any) -> Tensor:
        runs.append(name)
        time.sleep(seconds)
        return one.run(*call)

    registry.register(replace(one, run=run))
    return runs


def choose(name: str, setting: Setting = CPU) -> tuple[str, str | None, str]:
    return autotune.choose(BY_NAME[name].spec(), setting, example(BY_NAME[name]))


@pytest.mark.parametrize(("slow", "fast"), [("sdpa", "reference"), ("reference", "sdpa")])
def test_the_faster_is_taken(slow: str, fast: str) -> None:
    slower(slow, 0.03)
    name, backward, why = choose("padding-zero")
    assert (name, backward) == (fast, None)
    words = registry.backends()[fast].why(BY_NAME["padding-zero"].spec(), CPU)
    assert why.startswith(f"{words}, measured here: ") and " ms, " in why and why.endswith(f"x over {slow}")


def test_times_are_kept(cache: Path) -> None:
    runs = slower("sdpa", 0.0)
    first = choose("padding-zero")
    count = len(runs)
    assert count >= 2 and choose("padding-zero") == first and len(runs) == count
    (file,) = cache.iterdir()
    data = json.loads(file.read_text())
    assert set(data["times"]["forward"]) == {"sdpa", "reference"} and data["of"]["versions"]["torch"] == torch.__version__

    # another spec, another dtype, another class of sizes and another set of backends are measured anew
    choose("causal-GQA")
    autotune.choose(BY_NAME["padding-zero"].spec(), replace(CPU, dtype=torch.float64), example(BY_NAME["padding-zero"], torch.float64))
    longer = replace(BY_NAME["padding-zero"], shape=(2, 4, 2, 65, 65, 16, 16))
    autotune.choose(longer.spec(), CPU, example(longer))
    assert len(list(cache.iterdir())) == 4
    near = replace(BY_NAME["padding-zero"], shape=(2, 4, 2, 64, 64, 16, 16))
    autotune.choose(near.spec(), CPU, example(near))
    assert len(list(cache.iterdir())) == 4, "37 and 64 are of one class"


def test_a_file_that_is_damaged_or_another_is_not_believed(cache: Path) -> None:
    slower("sdpa", 0.03)  # who wins must not depend on what else the machine does
    first = choose("padding-zero")
    (file,) = cache.iterdir()
    file.write_text(file.read_text()[:40])
    assert choose("padding-zero")[0] == first[0]
    data = json.loads(file.read_text())
    data["of"]["dtype"] = "torch.float16"
    data["times"]["forward"] = {"sdpa": 1.0, "reference": 1e-9}
    file.write_text(json.dumps(data))
    assert "1e-09 ms" not in choose("padding-zero")[2]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ATTNOPT_CACHE_DIR", str(blocked))
    assert f"the file of these times: {blocked}/autotune cannot be written" in choose("padding-zero")[2]


def test_one_that_raises_is_left_out_and_said() -> None:
    def run(*call: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nand more")

    registry.register(replace(registry.backends()["sdpa"], run=run))
    name, _, why = choose("padding-zero")
    assert name == "reference" and why.endswith("(not measured: sdpa: it raised OutOfMemoryError: CUDA out of memory.)")
    registry.register(replace(registry.backends()["reference"], run=run))
    with pytest.raises(AttnoptError, match="No backend could be measured: sdpa: it raised OutOfMemoryError"):
        choose("full")


def test_what_is_switched_off_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = slower("sdpa", 0.0)
    monkeypatch.setenv("ATTNOPT_DISABLE", "sdpa")
    name, _, why = choose("padding-zero")
    assert name == "reference" and not runs and "over" not in why
    monkeypatch.setenv("ATTNOPT_DISABLE", "sdpa,reference")
    with pytest.raises(AttnoptError, match="No backend can compute this attention on cpu"):
        choose("padding-zero")


def test_the_hopeless_run_once() -> None:
    one, runs = registry.backends()["reference"], []

    def run(*call: Any) -> Tensor:
        runs.append(1)
        time.sleep(0.3)
        return one.run(*call)

    registry.register(replace(one, run=run))
    assert choose("full")[0] == "sdpa" and len(runs) == 2


def test_training_takes_the_fastest_pair_that_goes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """sdpa's forward is the faster, but gives no lse, and the backward that can follow it is slow; ``mine`` has a fast one that reads lse."""
    reference = registry.backends()["reference"]
    assert reference.forward is not None and reference.backward is not None

    def after(seconds: float, call: Any) -> Any:
        return lambda *operands: (time.sleep(seconds), call(*operands))[1]

    mine = replace(reference, name="mine", why=lambda spec, setting: "mine", forward=after(0.02, reference.forward), recomputes=False)
    registry.register(mine)
    registry.register(replace(reference, forward=after(0.03, reference.forward), backward=after(0.08, reference.backward)))
    order = choice.forward_order
    monkeypatch.setattr(choice, "forward_order", lambda spec, setting: (*order(spec, setting), "mine"))
    name, backward, why = choose("padding-zero", replace(CPU, training=True))
    assert (name, backward) == ("mine", "mine")
    assert why.startswith("mine, backward by mine, measured here: ") and why.endswith("x over reference/mine")


def test_random_tensors_have_the_layout_of_the_example() -> None:
    x = torch.randn(2, 5, 4, 3).transpose(1, 2)
    made = TensorForm.of(x.shape, x.stride(), x.dtype).random(torch.device("cpu"))
    assert made.shape == x.shape and made.stride() == x.stride()
    assert bool(TensorForm((3,), (0,), torch.bool).random(torch.device("cpu")).all())
    assert not TensorForm((3,), (0,), torch.int64).random(torch.device("cpu")).any()


# ------------------------------------------------------------------------------------------------ in a model


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


def test_a_model_is_measured_at_its_examples_sizes(cache: Path) -> None:
    slower("reference", 0.03)
    operands = tuple(torch.randn(2, 3, 40, 16) for _ in range(3))
    state = torch.random.get_rng_state()
    optimized = attnopt.optimize(Attention(), operands, config=attnopt.OptimizeConfig(autotune=True, verify=False))
    (site,) = optimized.attnopt_report.sites
    assert site.kernel == "sdpa" and site.why.startswith("CPU flash, no mask tensor, measured here: ") and "over reference" in site.why
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["of"]["shape"][:5] == [2, 3, 3, 64, 64]
    assert torch.equal(state, torch.random.get_rng_state()), "measuring draws no random numbers of the caller's"
    torch.testing.assert_close(optimized(*operands), Attention()(*operands))


def test_a_function_that_is_compiled_is_measured_too() -> None:
    """The compiler runs with fake tensors about; what is measured are real ones."""
    slower("reference", 0.03)
    operands = tuple(torch.randn(2, 3, 41, 16) for _ in range(3))
    compiled = torch.compile(Attention(), backend="attnopt", options={"autotune": True, "inductor": False})
    torch.testing.assert_close(compiled(*operands), Attention()(*operands))
    (site,) = attnopt.compile_report(clear=True).sites
    assert "measured here: " in site.why and "over reference" in site.why


def test_on_the_meta_device_it_says_that_nothing_was_measured() -> None:
    operands = tuple(torch.empty(2, 3, 40, 16, device="meta") for _ in range(3))
    report = attnopt.inspect(Attention(), operands, config=attnopt.OptimizeConfig(autotune=True))
    assert report.sites[0].why.endswith("(not measured: the tensors are on meta)")


def test_a_named_backend_is_not_measured() -> None:
    with pytest.raises(AttnoptError, match="autotune chooses the backend, and backend is 'sdpa'; supported beside autotune is 'auto'"):
        attnopt.OptimizeConfig(backend="sdpa", autotune=True)


def test_the_pair_stands_in_the_graph() -> None:
    operands = tuple(torch.randn(2, 3, 40, 16) for _ in range(3))
    model = Attention().train()
    optimized = attnopt.optimize(model, operands, config=attnopt.OptimizeConfig(backend="reference", verify=False))
    (site,) = optimized.attnopt_report.sites
    assert site.kernel == "reference" and site.why == "interpreted tile by tile, backward by reference"
    leaves = [x.clone().requires_grad_() for x in operands]
    optimized.train()(*leaves).sum().backward()
    want = [x.clone().requires_grad_() for x in operands]
    model(*want).sum().backward()
    for a, b in zip(leaves, want, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
