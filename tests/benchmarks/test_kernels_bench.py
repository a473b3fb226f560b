"""The benchmark scripts run, tell what they measured, and judge it right. On a CPU the figures mean nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
KEYS = "kind direction D Dv S B Hq Hkv causal variant dtype backend ms tflops error l2 device versions commit".split()


def run(script: str, output: Path, *options: str) -> tuple[list[dict[str, Any]], str]:
    """The rows that a script wrote, and what it printed."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", f"--output={output}", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())["rows"], done.stdout


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of ``benchmarks/`` by name, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield lambda name: __import__(name)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


# ------------------------------------------------------------------------------------------------ kernels


def test_every_cell_is_computed_right(tmp_path: Path) -> None:
    rows, printed = run(
        "kernels.py",
        tmp_path / "k.json",
        "--device=cpu",
        "--dtype=float32",
        "--seconds=0.01",
        "--backends=auto",
        "--peers=cuDNN SDPA,FlexAttention,flash-attn-4",
    )
    assert all(key in row for row in rows for key in KEYS)
    assert len({r["cell"] + r["kind"] for r in rows}) >= 12
    assert {r["variant"] for r in rows} >= {"plain", "ALiBi", "T5 table", "dense bias", "ragged padding", "documents", "softcap 50", "window 1024"}
    for r in rows:
        if r["backend"] == "auto":
            assert r["status"] == "ok", r["note"]
        if r["status"] == "ok":
            assert r["ms"] > 0 and r["tflops"] > 0
            assert r["error"] < 1e-5, (r["cell"], r["backend"])
        else:
            assert r["ms"] is None and r["note"]
    flex = {r["variant"] for r in rows if r["backend"] == "FlexAttention" and r["status"] == "ok"}
    assert flex == {r["variant"] for r in rows}
    assert next(r for r in rows if r["backend"] == "flash-attn-4")["note"].startswith("not installed")
    assert "targets" in printed


def test_rows_of_other_cells_are_kept(tmp_path: Path) -> None:
    output = tmp_path / "k.json"
    common = ("--device=cpu", "--dtype=float32", "--seconds=0.01", "--peers=")
    first, _ = run("kernels.py", output, *common, "--cells=forward", "--only=full", "--backends=auto,sdpa")
    second, _ = run("kernels.py", output, *common, "--cells=variants", "--only=softcap", "--backends=auto,nonsense")
    assert second[: len(first)] == first and len(second) == len(first) + 1


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    rows, _ = run("kernels.py", tmp_path / "k.json", "--seconds=0.02", "--peers=cuDNN SDPA,flash SDPA,efficient SDPA,FlexAttention")
    own = [r for r in rows if r["backend"] == "auto"]
    assert own and all(r["status"] == "ok" and 0 < r["error"] < 0.02 for r in own), own
    assert all(r["l2"] == "cold" and r["host_us"] > 0 for r in own)


# ------------------------------------------------------------------------------------------------ conventions of flash-attn


def attend(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: tuple[int | None, int | None], softcap: float, keys: int | None
) -> Tensor:
    """By flash-attn's documentation, on [S, H, D]: keys i - left .. i + right after alignment at the bottom right, none beyond ``keys``."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    i, j = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0], torch.arange(k.shape[0])[None]
    left, right = window_size
    seen = torch.ones(s.shape[1:], dtype=torch.bool) if not causal else j <= i
    seen = seen & (i - j <= left if left is not None else True) & (j - i <= right if right is not None else True)
    seen = seen & (j < keys if keys is not None else True)
    return torch.einsum("hqk,khd->qhd", s.masked_fill(~seen, -torch.inf).softmax(-1), v)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, softcap: float, window_size: Any = (None, None)
) -> tuple[Tensor, None]:
    return torch.stack([attend(*x, softmax_scale, causal, window_size, softcap, None) for x in zip(q, k, v, strict=True)]), None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    softcap: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    window = (None, None)
    if cu_seqlens_q is not None:
        assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
        parts = [attend(q[a:b], k[a:b], v[a:b], softmax_scale, causal, window, softcap, None) for a, b in cu_seqlens_q.unfold(0, 2, 1).tolist()]
        return torch.cat(parts), None
    assert seqused_q is not None and seqused_q is seqused_k
    out = torch.full_like(q, torch.nan)
    for b, n in enumerate(seqused_q.tolist()):
        out[b, :n] = attend(q[b, :n], k[b], v[b], softmax_scale, causal, window, softcap, n)
    return out, None


@pytest.mark.parametrize("variant", ["plain", "window 1024", "softcap 50", "ragged padding", "documents"])
def test_flash_attn_is_asked_for_the_same_function(variant: str, benchmarks: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interface = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    cells, peers = benchmarks("cells"), benchmarks("peers")
    found = [c for c in cells.quick() if c.variant_name == variant and c.group != "backward"]
    assert found
    for cell in found:
        inputs = cells.Inputs.of(cell, torch.device("cpu"), torch.float64, 1)
        o = peers.PEERS["flash-attn-4"](inputs).function(*inputs.sets[0][:3])
        assert cells.Truth.of(inputs).error([o]) < 1e-12, cell.name


def test_visible_scores_are_counted(benchmarks: Callable[[str], ModuleType]) -> None:
    cells = benchmarks("cells")
    for cell in cells.quick():
        inputs = cells.Inputs.of(cell, torch.device("cpu"), torch.float32, 1)
        i, j = torch.arange(cell.S)[:, None], torch.arange(cell.S)[None]
        want = sum(int(cell.visible(b, i, j, inputs.loads).sum()) for b in range(cell.B)) * cell.Hq
        assert inputs.visible_scores == want
        if cell.variant_name == "plain":
            assert want == cell.B * cell.Hq * (cell.S * (cell.S + 1) // 2 if cell.causal else cell.S**2)


def test_a_wrong_result_is_noticed(benchmarks: Callable[[str], ModuleType]) -> None:
    cells = benchmarks("cells")
    for cell in cells.quick():
        inputs = cells.Inputs.of(cell, torch.device("cpu"), torch.float64, 1)
        truth = cells.Truth.of(inputs)
        q, k, v, _ = inputs.sets[0]
        zeros = [torch.zeros_like(q), *(torch.zeros_like(x) for x in (q, k, v))]
        assert truth.error(zeros) == pytest.approx(1.0)
        assert math.isnan(truth.error([torch.full_like(x, torch.nan) for x in zeros]))


# ------------------------------------------------------------------------------------------------ what the rows say


def row(
    backend: str, ms: float | None, *, by: str = "peer", kind: str = "forward", variant: str = "plain", error: float = 1e-3, tflops: float = 1.0
) -> dict[str, Any]:
    same = {"cell": f"cell {variant}", "dtype": "bfloat16", "l2": "cold", "D": 64, "S": 8, "B": 1, "Hq": 1, "Hkv": 1, "causal": True, "direction": "forward"}
    return {
        **same,
        "kind": kind,
        "variant": variant,
        "backend": backend,
        "by": by,
        "ms": ms,
        "error": error,
        "tflops": tflops,
        "status": "ok" if ms else "cannot",
        "note": "",
    }


def test_verdicts(benchmarks: Callable[[str], ModuleType]) -> None:
    verdicts = benchmarks("verdicts")
    rows = [
        row("gluon", 1.0, by="attnopt", error=1.2e-3),
        row("triton", 2.0, by="attnopt", error=1e-3),
        row("cuDNN SDPA", 1.1),
        row("flash SDPA", 3.0, error=1e-3),
        row("flash-attn-4", 0.9),
        row("FlexAttention", None),
        row("triton", 1.0, by="attnopt", kind="variants", tflops=100.0),
        row("triton", 1.0, by="attnopt", kind="variants", variant="ALiBi", tflops=85.0),
        row("auto", 1.0, by="attnopt", kind="variants", variant="ALiBi"),
        row("FlexAttention", 1.4, kind="variants", variant="ALiBi"),
        row("cuDNN SDPA", 9.0, kind="variants", variant="ALiBi"),
    ]
    rows[-1]["status"] = "wrong"
    found = {(x.target, x.ours): (None if x.ratio is None else round(x.ratio, 3), x.verdict) for x in verdicts.kernel_lines(rows)}
    assert found["forward: own over cuDNN", "gluon"] == (1.1, "PASS")
    assert found["forward: own over flash-attn-4", "gluon"] == (0.9, "below")
    assert found["forward: own over FlexAttention", "gluon"] == (None, "no figure")
    assert found["variant: auto over the best peer", "auto"] == (1.4, "below")
    assert found["variant: own per visible score over itself without", "triton"] == (0.85, "PASS")
    assert found["error over the peer's", "gluon"] == (1.2, "over")


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.slow
def test_models_are_run_in_every_way(tmp_path: Path) -> None:
    options = ("--device=cpu", "--seconds=0.05", "--compiler=eager", "--models=bloom,bert-large", "--variants=eager,sdpa,attnopt,attnopt+compile")
    rows, printed = run("models.py", tmp_path / "m.json", *options)
    assert len(rows) == 8
    for r in rows:
        if (r["model"], r["variant"]) == ("bloom", "sdpa"):
            assert r["status"] == "failed" and "does not support" in r["note"]
        else:
            assert r["status"] == "ok" and r["ms"] > 0 and r["error"] < 0.02, r
        if r["variant"].startswith("attnopt"):
            assert r["replaced"] == "2/2"
    assert "targets" in printed
