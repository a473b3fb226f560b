"""``benchmarks/decode.py`` runs, compares with float64 before it times, and counts bytes right. On a CPU the figures mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "benchmarks" / "decode.py")
SWEEP = str(ROOT / "benchmarks" / "decode_sweep.py")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of ``benchmarks/`` by name, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield lambda name: __import__(name)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--device=cpu", "--quick", "--seconds=0", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env={**os.environ, **environment})


def test_every_layout_and_variant(tmp_path: Path) -> None:
    done = run("--dtype=float32", f"--output={tmp_path / 'd.json'}")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    own = [r for r in rows if r["by"] == "attnopt"]
    assert {(r["cell"], r["layout"]) for r in own if r["variant"] == "plain"} == {
        (c, x) for c in ("b1 ctx128", "b3 ctx64") for x in ("contiguous", "pages of 16", "pages of 64")
    }
    assert {r["variant"] for r in own} == {"plain", "window 1024", "softcap 50", "ALiBi", "fp8", "int8"}
    assert all(r["us"] > 0 and r["gbs"] > 0 and r["of_copy"] > 0 and r["error"] < 1e-5 for r in own), own
    cudnn = [r for r in rows if r["backend"] == "cuDNN SDPA"]
    assert {(r["layout"], r["status"]) for r in cudnn} == {("contiguous", "ok"), ("pages of 16", "cannot"), ("pages of 64", "cannot")}
    assert "attnopt over each peer" in done.stdout and "a variant over that of plain attention" in done.stdout


def test_launch_settings_are_compared(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, SWEEP, "--device=cpu", "--quick", f"--output={tmp_path / 's.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert {"", "x2", "N32 x2", "N32 W8 x3", "plain"} <= {r["setting"] for r in rows}
    assert all(r["error"] < 5e-3 and not r["note"] for r in rows), rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cells=b2",), "--cells 'b2' names no cell; there are b1 ctx128, b3 ctx64."),
        (("--peers=vLLM",), "--peers has vLLM; there are cuDNN SDPA, "),
        (("--dtype=int8",), "--dtype is int8; supported are float32, float16, bfloat16."),
    ],
)
def test_what_it_cannot_do_is_said(options: tuple[str, ...], words: str) -> None:
    done = run(*options)
    assert done.returncode == 2 and words in done.stderr


def test_nothing_is_timed_where_a_result_is_wrong(benchmarks: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    decode, cells = benchmarks("decode"), benchmarks("decode_cells")
    options = SimpleNamespace(device="cpu", torch_dtype=torch.float32, dtype="float32", layouts=None, variants="", peers="", patience=60, seconds=0.0)
    assert len(decode.measure(cells.QUICK[1], options)) == 3
    right = decode.own

    def without_last_request(*args: Any, **kwargs: Any) -> Any:
        way = right(*args, **kwargs)

        def call(n: int) -> torch.Tensor:
            o = way.call(n)
            o[-1] *= 1.001
            return o

        return replace(way, call=call)

    monkeypatch.setattr(decode, "own", without_last_request)
    with pytest.raises(SystemExit, match="error 0.001 against float64; nothing is timed"):
        decode.measure(cells.QUICK[1], options)


def test_windows_lie_elsewhere_each_time(benchmarks: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 32 of 128 keys: eight calls on two pools read every key once, and what each reads is what its truth says."""
    cells, ways, variants = benchmarks("decode_cells"), benchmarks("decode_ways"), benchmarks("variants")
    for module in (cells, ways):
        monkeypatch.setattr(module, "WINDOW", 32)
    inputs = cells.Inputs(cells.QUICK[0], torch.device("cpu"), torch.float32, 2)
    layout = inputs.layouts["pages of 16"]
    assert variants.WINDOW == 1024
    way = ways.own(inputs, layout, keys=32, cache_bytes=1 << 20)
    assert way.turns == 8
    seen = [(n % 2, int(x)) for n in range(8) for x in way.seen(n, inputs).slots(0)[:32]]
    assert len(set(seen)) == len(seen) == 2 * 128
    for n in (0, 7):
        truth = inputs.truth(way.seen(n, inputs), "plain", n % 2, 32)
        assert cells.error(way.call(n), truth) < 1e-5
        assert cells.error(way.call((n + 2) % 8), truth) > 0.1


def test_bytes(benchmarks: Callable[[str], ModuleType]) -> None:
    shape = benchmarks("decode_cells").Shape(16, 8192)
    assert shape.bytes_read("plain", 2) == 16 * 8192 * 8 * (128 + 128) * 2
    assert shape.bytes_read("window 1024", 2) == 16 * 1024 * 8 * (128 + 128) * 2
    assert shape.bytes_read("fp8", 2) == 16 * 8192 * 8 * (128 + 128 + 8)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--quick", "--seconds=0.2", "--peers=cuDNN SDPA,flash SDPA", f"--output={tmp_path / 'd.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    own = [r for r in rows if r["by"] == "attnopt"]
    assert {r["mode"] for r in own} == {"eager", "graph"} and all(r["status"] == "ok" and r["us"] > 0 and r["error"] < 2e-2 for r in own), own
    assert any(r["by"] == "peer" and r["us"] for r in rows)
