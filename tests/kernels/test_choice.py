"""In which order backends are tried, what the report says of it, and how the table is made of benchmark results."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from attnopt.config import BACKENDS
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Traits
from attnopt.kernels import choice, device, registry
from attnopt.kernels.external import flash_attn
from attnopt.kernels.registry import Setting
from tests.kernels.cases import BY_NAME, alibi, causal, dense, dims, padding, window

ROOT = Path(__file__).parents[2]


def spec(name: str = "causal-GQA", D: int = 128) -> AttentionSpec:
    s = BY_NAME[name].spec()
    return s.replace(dims=replace(s.dims, D=E.const(D), Dv=E.const(D)))


def row(program: str, S: int, tflops: dict[str, float], D: int = 128, direction: str = "forward") -> dict[str, Any]:
    return {"direction": direction, "program": program, "D": D, "Dv": D, "S": S, "tflops": tflops}


TABLE = {
    "format": 1,
    "tables": {
        "sm_90": {
            "device": "NVIDIA H200",
            "rows": [
                row("causal", 2048, {"cudnn": 480.0, "sdpa": 470.0, "triton": 385.0}),
                row("causal", 8192, {"triton": 607.0, "cudnn": 500.0}),
                row("window", 8192, {"triton": 300.0, "flash_attn_4": 450.0}),
                row("causal", 8192, {"cudnn": 450.0, "triton": 300.0}, direction="backward"),
            ],
        }
    },
}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table above, on a device of capability 9.0 whose backends all are there and take everything, but for flash_attn."""
    rows = choice.parse(TABLE)
    monkeypatch.setattr(choice, "table", lambda: rows)
    monkeypatch.setattr(device, "arch", lambda: "sm_90")
    monkeypatch.setattr(device, "capability", lambda: (9, 0))
    monkeypatch.setattr(flash_attn, "newest", lambda: 0)
    monkeypatch.setattr(flash_attn, "generation", lambda spec, backward=False: 0)
    monkeypatch.setattr(registry, "_BACKENDS", {n: b for n, b in registry._BACKENDS.items() if n != "gluon"})
    for name in ("cudnn", "triton"):
        one = registry._BACKENDS[name]
        ready = replace(one, available=lambda: None, accepts=lambda s, setting: None, accepts_backward=lambda s, setting: None)
        registry._BACKENDS[name] = replace(ready, forward=ready.forward or registry._BACKENDS["reference"].forward, backward=registry._BACKENDS["reference"].backward)
    registry._BACKENDS["flash_attn"] = replace(registry._BACKENDS["flash_attn"], available=lambda: "it is not installed")
    choice.nearest.cache_clear()
    yield
    choice.nearest.cache_clear()


def chosen(s: AttentionSpec, lengths: tuple[int, int] | None, dtype: torch.dtype = torch.bfloat16, **more: Any) -> tuple[str, str]:
    return registry.choose(s, device="cuda", dtype=dtype, lengths=lengths, **more)


# ------------------------------------------------------------------------------------------------ by the table


def test_the_fastest_at_the_nearest_shape_is_taken() -> None:
    name, why = chosen(spec(), (8192, 8192))
    assert name == "triton" and why.endswith(", 1.21x over cudnn at this shape (H200 table)")
    name, why = chosen(spec(), (2048, 2048))
    assert name == "cudnn" and why.endswith(", 1.02x over sdpa at this shape (H200 table)")


def test_a_shape_between_goes_by_its_neighbour_and_says_so() -> None:
    assert chosen(spec(), (3000, 3000))[0] == "cudnn"
    assert chosen(spec(), (3000, 3000))[1].endswith("1.02x over sdpa at D 128, S 2048 (H200 table)")
    name, why = chosen(spec(D=96), (16384, 16384))
    assert name == "triton" and why.endswith("1.21x over cudnn at D 128, S 8192 (H200 table)")
    assert chosen(spec(), None)[1].endswith("1.02x over sdpa at D 128, S 2048 (H200 table)")


@pytest.mark.parametrize(
    ("s", "lengths", "dtype"),
    [
        (spec(D=32), (8192, 8192), torch.bfloat16),  # no head size near
        (spec(), (1, 8192), torch.bfloat16),  # one query
        (spec(), (128, 128), torch.bfloat16),  # shorter than anything measured
        (spec(), (8192, 8192), torch.float32),  # measured in half precision
        (spec("full"), (8192, 8192), torch.bfloat16),  # no such program
    ],
    ids=["head-size", "one-query", "short", "float32", "program"],
)
def test_without_a_row_experience_decides(s: AttentionSpec, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    name, why = chosen(s, lengths, dtype)
    assert name == "cudnn" and "table" not in why


def test_what_cannot_be_used_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_DISABLE", "triton")
    name, why = chosen(spec(), (8192, 8192))
    assert name == "cudnn" and why.endswith("(not triton: switched off by ATTNOPT_DISABLE)") and "over" not in why


def test_what_is_switched_off_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(*_: Any) -> int:
        raise AssertionError("FlashAttention was looked for")

    monkeypatch.setattr(flash_attn, "newest", imported)
    monkeypatch.setattr(flash_attn, "generation", imported)
    monkeypatch.setenv("ATTNOPT_DISABLE", "flash_attn")
    assert chosen(spec("full"), None)[0] == "cudnn"
    assert chosen(spec("window-causal"), (8192, 8192))[0] == "triton"


def test_backends_that_are_not_there_are_passed_over() -> None:
    assert "gluon" in choice.forward_order(spec(), Setting("cuda", torch.bfloat16)) and "gluon" not in registry.backends()
    assert chosen(spec("full"), None)[0] == "cudnn"
    registry.register(replace(registry.backends()["cudnn"], name="gluon", why=lambda s, setting: "Hopper forward"))
    assert chosen(spec("full"), None) == ("gluon", "Hopper forward")
    # one without a figure stands behind those that have one
    assert chosen(spec(), (8192, 8192))[0] == "triton"


def test_generations_of_flash_attention_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    registry._BACKENDS["flash_attn"] = replace(registry._BACKENDS["flash_attn"], available=lambda: None, accepts=lambda s, setting: None, why=lambda s, setting: "FA")
    windowed = spec("window-causal")
    assert chosen(windowed, (8192, 8192))[0] == "triton"
    monkeypatch.setattr(flash_attn, "generation", lambda spec, backward=False: 4)
    assert chosen(windowed, (8192, 8192)) == ("flash_attn", "FA, 1.50x over triton at this shape (H200 table)")


def test_training_says_who_computes_the_gradients_and_how_fast() -> None:
    name, why = chosen(spec(), (8192, 8192), training=True)
    assert name == "triton"
    assert why.endswith("1.21x over cudnn at this shape (H200 table), backward by cudnn, 1.50x over triton at this shape (H200 table)")
    setting = Setting("cuda", torch.bfloat16, True, None, (8192, 8192))
    assert registry.choose_backward("triton", spec(), setting) == "cudnn"
    assert registry.choose_backward("triton", spec("window-causal"), setting) == "triton"


def test_a_cpu_has_no_table() -> None:
    assert registry.choose(spec(), device="cpu", dtype=torch.bfloat16, lengths=(8192, 8192)) == ("sdpa", "CPU flash, causal without a mask tensor")


def test_a_call_of_the_graph_takes_the_pair_that_was_chosen() -> None:
    gradients = registry._BACKENDS["cudnn"].backward
    assert registry.resolve("triton/cudnn", spec(), "cuda", torch.bfloat16).name == "triton"
    assert registry.resolve_backward("triton/cudnn", spec(), "cuda", torch.bfloat16) is gradients
    registry._BACKENDS["cudnn"] = replace(registry._BACKENDS["cudnn"], accepts_backward=lambda s, setting: "it is too wide")
    with pytest.raises(registry.BackendRefusal, match="'cudnn' cannot compute this attention: after the forward of triton, it is too wide"):
        registry.resolve_backward("triton/cudnn", spec(), "cuda", torch.bfloat16)


# ------------------------------------------------------------------------------------------------ programs


def test_what_makes_the_speed_of_a_program() -> None:
    def of(**parts: Any) -> str:
        d = dims((2, 4, 2, 37, 37, 16, 16))
        score = parts.pop("score", lambda d, s: E.mul(E.const(0.25), s))(d, E.score())
        mask = parts.pop("mask", lambda d: E.TRUE)(d)
        return choice.program_class(AttentionSpec(d, score, mask, **parts))

    assert of() == "full" and of(mask=causal) == "causal"
    assert of(mask=lambda d: E.all_of(causal(d), window(d, 9, None))) == "window"
    assert of(mask=padding, traits=Traits(key_padding=True)) == "full+padding"
    assert of(mask=lambda d: E.all_of(causal(d), padding(d)), traits=Traits(document=True)) == "causal+documents"
    assert of(mask=padding) == "full+mask"
    assert of(score=alibi, mask=causal) == "causal+alibi"
    assert of(score=dense) == "full+bias"
    assert choice.program_class(BY_NAME["relative-buckets"].spec()) == "full+table"
    assert choice.program_class(BY_NAME["softcap-causal"].spec()) == "causal+softcap"
    assert choice.program_class(BY_NAME["per-head-scale"].spec()) == "full+score"
    assert choice.program_class(BY_NAME["sinks-causal-GQA"].spec()) == "causal+sinks"


def test_the_shipped_table_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    known = {*BACKENDS, *(f"flash_attn_{n}" for n in (2, 3, 4))}
    for rows in choice.table().values():
        assert rows and all(set(r.tflops) <= known and r.direction in ("forward", "backward") for r in rows)
    with pytest.raises(ValueError, match="the choice table has format 2; supported is 1"):
        choice.parse({"format": 2})


def test_every_backend_is_named_on_the_command_line() -> None:
    assert {*registry.backends(), "auto"} <= set(BACKENDS)


# ------------------------------------------------------------------------------------------------ the tool


def tool() -> ModuleType:
    found = importlib.util.spec_from_file_location("choice_table", ROOT / "tools" / "choice_table.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def result(backend: str, tflops: float | None, **more: Any) -> dict[str, Any]:
    same = {"kind": "forward", "direction": "forward", "D": 128, "Dv": 128, "S": 8192, "B": 2, "Hq": 16, "Hkv": 16, "causal": True, "variant": "plain",
            "dtype": "bfloat16", "status": "ok", "by": "attnopt", "l2": "cold", "note": ""}  # fmt: skip
    return {**same, "backend": backend, "tflops": tflops, **more}


def test_the_table_from_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {"kind": "backward", "direction": "forward+backward"}
    rows = [
        result("gluon", 607.04),
        result("gluon", 590.0, Hkv=4),
        result("cudnn", 500.0),
        result("cudnn", 900.0, l2="warm"),
        result("flash_attn", 617.0, note="FlashAttention-4, causal"),
        result("auto", 607.0),
        result("triton", None, status="failed"),
        result("flash-attn-4", 620.0, by="peer"),
        result("cudnn", 80.0, dtype="float32"),
        # 3.5 units of work in all, 1 of them forward: 2.5 backward
        result("gluon", 500.0, **both, note="Hopper forward, backward by cudnn"),
        result("gluon", 489.0, variant="window 1024"),
        result("triton", 300.0, variant="T5 table", causal=False, D=64, Dv=64),
    ]
    path, out = tmp_path / "kernels.json", tmp_path / "table.json"
    path.write_text(json.dumps({"device": "NVIDIA H200", "date": "2026-11-26", "rows": rows}))
    assert tool().main([str(path), "--arch", "sm_90", "--output", str(out)]) == 0
    assert "left out: {'not L2 cold': 1, \"not attnopt's own\": 2, 'not ok': 1, 'not half precision': 1}" in capsys.readouterr().out
    data = json.loads(out.read_text())
    assert data["tables"]["sm_90"]["device"] == "NVIDIA H200" and data["tables"]["sm_90"]["date"] == "2026-11-26"
    found = {(r.direction, r.program, r.D, r.S): dict(r.tflops) for r in choice.parse(data)["sm_90"]}
    backward = round(2.5 / (3.5 / 500.0 - 1 / 607.04), 1)
    assert found == {
        ("forward", "causal", 128, 8192): {"cudnn": 500.0, "flash_attn_4": 617.0, "gluon": 607.0},
        ("backward", "causal", 128, 8192): {"cudnn": backward},
        ("forward", "window", 128, 8192): {"gluon": 489.0},
        ("forward", "full+table", 64, 8192): {"triton": 300.0},
    }
    # another device is added beside it
    assert tool().main([str(path), "--arch", "sm_80", "--device", "NVIDIA A100", "--output", str(out)]) == 0
    assert list(json.loads(out.read_text())["tables"]) == ["sm_80", "sm_90"]


def test_the_tool_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="variant 'swirl' has none of the words plain, window"):
        tool().table([result("gluon", 1.0, variant="swirl")])
    with pytest.raises(ValueError, match="no generation"):
        tool().table([result("flash_attn", 1.0)])
