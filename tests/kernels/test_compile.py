"""Generated kernels compiled for sm_80 and sm_90, without a GPU: nothing spills, and shared memory is within the limits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile with")

ROOT = Path(__file__).parents[2]
LIMIT = {80: 163 * 1024, 90: 227 * 1024}

# name, D, dtype, Sq: what a program adds to a kernel's registers, over head sizes and dtypes.
FEW = [
    ("causal-GQA", 128, "float16", 4096),
    ("causal-GQA", 192, "bfloat16", 4096),
    ("softcap-window", 256, "float16", 4096),
    ("causal-left-padding-uniform", 64, "float16", 4096),
    ("dense-bias", 256, "bfloat16", 4096),
    ("dense-bias", 64, "float32", 4096),
    ("alibi-causal", 80, "float16", 1),
]
MANY = [
    *(
        (name, D, "float16", 4096)
        for name in ("full", "causal-GQA", "softcap-window", "alibi-causal", "causal-left-padding-uniform", "dense-bias")
        for D in (64, 80, 128, 256)
    ),
    *((name, D, "float32", 4096) for name in ("causal-GQA", "dense-bias") for D in (64, 128, 256)),
    *((name, 192, "bfloat16", 4096) for name in ("causal-GQA", "relative-buckets", "padding-program", "documents-causal")),
    *(("causal-left-padding-uniform", D, "bfloat16", 1) for D in (64, 128, 256)),
]


BACKWARD_FEW = [
    ("causal-GQA", 128, "bfloat16", 4096),
    ("alibi-causal", 64, "float16", 4096),
    ("causal-GQA", 256, "bfloat16", 4096),
]
BACKWARD_MANY = [
    *((name, D, "bfloat16", 4096) for name in ("full", "softcap-window", "documents-causal", "dense-bias", "causal-GQA-dropout") for D in (64, 80, 128, 192, 256)),
    *((name, D, "bfloat16", 4096) for name in ("relative-buckets", "causal-left-padding-uniform", "sinks-causal-GQA", "per-head-scale") for D in (64, 128)),
    *((name, D, "float32", 4096) for name in ("causal-GQA", "dense-bias") for D in (64, 128, 256)),
    *(("causal-GQA", D, "bfloat16", 16) for D in (64, 128, 256)),
]
# name, D, dtype, queries of a request, heads of a group, page size, dtype of the cache
PAGED_FEW: dict[int, list[tuple[Any, ...]]] = {
    80: [("softcap-window", 128, "bfloat16", 1, 4, 64)],
    90: [("causal-GQA", 128, "bfloat16", 1, 4, 16, "fp8"), ("causal-GQA", 576, "bfloat16", 1, 128, 64), ("causal-GQA", 128, "bfloat16", 1, 4, 0, "", {"BLOCK_N": 128})],
}
PAGED_MANY: list[tuple[Any, ...]] = [
    *((name, D, "bfloat16", n, 4, page) for name in ("causal-GQA", "softcap-window") for D in (64, 80, 128, 192, 256) for n in (1, 512) for page in (16, 64)),
    *((name, 128, "float16", n, 1, 16) for name in ("relative-buckets", "sinks-causal-GQA", "alibi-causal", "documents-causal") for n in (1, 512)),
    *(("causal-GQA", D, "float32", n, 4, 16) for D in (64, 128, 256, 576) for n in (1, 64)),
    *(("causal-GQA", 128, "bfloat16", n, 8, page, cache) for cache in ("int8", "fp8") for n in (1, 512) for page in (16, 64, 0)),
    *((name, 128, "float16", 1, 4, 0, "", {"BLOCK_N": 128}) for name in ("causal-GQA", "softcap-window", "alibi-causal", "relative-buckets")),
    *(("causal-GQA", 576, "bfloat16", n, heads, 64) for n in (1, 64) for heads in (16, 128)),
]
# What the compiler puts aside for the time of a loop is in nobody's way; within one, every round pays.
OUTSIDE_OF_LOOPS = 512


# name, D, dtype, keys: of the Hopper kernels.
GLUON_FEW = [
    ("causal-GQA", 64, "bfloat16", 2048),
    ("alibi-causal", 128, "float16", 2048),
    ("full", 256, "bfloat16", 2048),
    ("documents-causal-padded-window", 128, "bfloat16", 2048),
]
GLUON_MANY = [
    (name, D, "bfloat16", 2048)
    for name in ("full", "causal-GQA", "softcap-causal", "window-causal", "sinks-causal-GQA", "relative-buckets", "dense-bias", "padding-zero", "documents")
    for D in (64, 80, 96, 128, 192, 256)
]
THREE = ("full", 64, "bfloat16", 8192)
"""Three consumers of 160 registers: what is put aside between tiles costs less than a third consumer brings."""
BETWEEN_TILES = 64
"""Bytes. A tile takes tens of thousands of cycles."""
OTHER_TRITON = ROOT / ".venv" / "triton-3.6"
"""The other version that the kernels are for. The Makefile puts it there."""


def compiled(arch: int, wanted: Sequence[tuple[Any, ...]], *options: str) -> list[dict[str, Any]]:
    # a process of its own: the kernels of this one may be interpreted, and a compiler's memory is not given back
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiler", str(arch), json.dumps(wanted), *options], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(done.stdout)
    for r in results:
        assert 0 <= r["shared"] <= LIMIT[arch], r
    return results


def gluon_compiled(version: str, wanted: list[tuple[str, int, str, int]]) -> list[dict[str, Any]]:
    if version == "3.6" and not OTHER_TRITON.is_dir():
        pytest.skip(f"Triton 3.6 is not in {OTHER_TRITON.relative_to(ROOT)}; make test puts it there")
    path = os.pathsep.join([str(ROOT), *([str(OTHER_TRITON)] if version == "3.6" else [])])
    command = [sys.executable, "-m", "tests.kernels.gluon_compiler", json.dumps(wanted)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(wanted)
    for r in results:
        assert r["triton"].startswith(version if version == "3.6" else triton.__version__), r
        assert 0 < r["shared"] <= r["counted"] <= LIMIT[90], r
    return results


def check_gluon(version: str, wanted: list[tuple[str, int, str, int]]) -> None:
    for r in gluon_compiled(version, wanted):
        stored = re.search(r"(\d+) bytes spill stores", r["spills"])
        assert stored is not None and int(stored[1]) <= BETWEEN_TILES and r["hot"] == 0, r


VERSIONS = pytest.mark.parametrize("version", ["pinned", "3.6"])


@VERSIONS
def test_hopper_kernels_compile_without_spills_in_loops(version: str) -> None:
    check_gluon(version, GLUON_FEW)


@VERSIONS
def test_three_consumers_spill_between_tiles(version: str) -> None:
    (r,) = gluon_compiled(version, [THREE])
    assert "consumers=3" in r["kernel"]
    assert r["hot"] <= 12, r  # of about 450 instructions


@pytest.mark.slow
@VERSIONS
@pytest.mark.parametrize("name", sorted({k[0] for k in GLUON_MANY}))
def test_hopper_kernels_compile_without_spills_in_loops_in_all_sizes(name: str, version: str) -> None:
    check_gluon(version, [k for k in GLUON_MANY if k[0] == name])


def check(arch: int, wanted: list[tuple[str, int, str, int]]) -> None:
    results = compiled(arch, wanted)
    assert len(results) == len(wanted)
    for r in results:
        assert re.fullmatch(r"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", r["spills"]), r


def check_backward(arch: int, wanted: list[tuple[str, int, str, int]]) -> None:
    results = compiled(arch, wanted, "backward")
    assert len(results) >= 3 * len(wanted)
    for r in results:
        stored = re.search(r"(\d+) bytes spill stores", r["spills"])
        assert stored is not None and int(stored[1]) <= OUTSIDE_OF_LOOPS, r
        assert r["hot"] == 0, r


def check_paged(arch: int, wanted: list[tuple[Any, ...]]) -> None:
    results = compiled(arch, wanted, "paged")
    assert len(results) == 3 * len(wanted)
    for r in results:
        stored = re.search(r"(\d+) bytes spill stores", r["spills"])
        assert stored is not None and int(stored[1]) <= OUTSIDE_OF_LOOPS, r
        assert r["hot"] == 0, r


@pytest.mark.parametrize("arch", [80, 90])
def test_paged_compiles_without_spills_in_loops(arch: int) -> None:
    check_paged(arch, PAGED_FEW[arch])


@pytest.mark.parametrize("arch", [80, 90])
def test_rows_without_a_key_compile_without_spills_in_loops(arch: int) -> None:
    for r in compiled(arch, [("padding-uniform", 64, "float32", 512), ("padding-uniform", 128, "bfloat16", 512)], "empty"):
        stored = re.search(r"(\d+) bytes spill stores", r["spills"])
        assert stored is not None and int(stored[1]) <= OUTSIDE_OF_LOOPS, r
        assert r["hot"] == 0, r


def test_writing_compiles_without_spills() -> None:
    for r in compiled(90, [(cache, 128, "bfloat16") for cache in ("", "int8", "fp8")], "write"):
        assert r["spills"].startswith("0 bytes stack frame, 0 bytes spill stores"), r


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", sorted({k[:4] for k in PAGED_MANY}), ids=lambda c: "-".join(map(str, c)))
def test_paged_compiles_without_spills_in_loops_in_all_sizes(case: tuple[str, int, str, int], arch: int) -> None:
    check_paged(arch, [k for k in PAGED_MANY if k[:4] == case])


@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_without_spills(arch: int) -> None:
    check(arch, FEW)


@pytest.mark.parametrize("arch", [80, 90])
def test_gradients_compile_without_spills_in_loops(arch: int) -> None:
    check_backward(arch, BACKWARD_FEW)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", sorted({k[0] for k in BACKWARD_MANY}))
def test_gradients_compile_without_spills_in_loops_in_all_sizes(name: str, arch: int) -> None:
    check_backward(arch, [k for k in BACKWARD_MANY if k[0] == name])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", sorted({k[0] for k in MANY}))
def test_compiles_without_spills_in_all_sizes(name: str, arch: int) -> None:
    check(arch, [k for k in MANY if k[0] == name])
