"""``benchmarks/host.py`` runs in both of its ways, and its stand-ins are launched as often as the kernels that they stand for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "benchmarks" / "host.py")


@pytest.mark.slow
def test_a_round_against_another_checkout(tmp_path: Path) -> None:
    output = tmp_path / "host.json"
    command = [sys.executable, SCRIPT, "--rounds=1", "--cells=graph/plain,paged", f"--against={ROOT}", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(output.read_text())
    assert set(found["commits"]) == {"before", "now"}
    assert [r["call"] for r in found["rows"]] == ["graph/plain", "graph/plain by cudnn", "paged/contiguous", "paged/pages of 16"]
    assert all(r["now_us"] > 0 and r["least"] <= r["times_faster"] <= r["most"] for r in found["rows"])


COUNTED = """
import host, host_stand_ins, torch
with torch.no_grad():
    for name, call in host.cells().items():
        call()
        before = host_stand_ins.launches
        call()
        print(name, host_stand_ins.launches - before, sep=": ")
"""


def test_every_call_launches() -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([sys.executable, "-c", COUNTED], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = dict(line.split(": ") for line in done.stdout.splitlines())
    # rows of padding alone take a second kernel, and a cache that is read by several programs a reduction
    two = {"graph/ragged padding", "kernel/ragged padding", "portable/ragged padding", "paged/contiguous", "paged/pages of 16"}
    assert {n: int(c) for n, c in counts.items()} == {n: 8 if n.startswith("layers") else 1 + (n in two) for n in counts}
    assert len(counts) > 15
