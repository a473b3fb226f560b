"""``benchmarks/serving_cpu.py`` runs, keeps the rows of other cells, and both ways give the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / "serving_cpu.py"), *options], capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)


def test_both_ways_say_the_same(tmp_path: Path) -> None:
    output = tmp_path / "s.json"
    others = [{"model": "gpt2", "size": "mid", "batch": 1, "kept": True}, {"model": "gpt2", "size": "tiny", "batch": 3, "kept": False}]
    output.write_text(json.dumps({"rows": others}))
    done = run("--models=gpt2", "--sizes=tiny", "--batches=1,3", "--prompt=6", "--new=6", "--pairs=1", f"--output={output}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert [r["kept"] for r in rows if "kept" in r] == [True]
    found = [r for r in rows if r["size"] == "tiny"]
    assert [r["batch"] for r in found] == [1, 3]
    for r in found:
        assert r["same_tokens"] == 1.0 and r["faster"] > 0 and r["attnopt_step_ms"] > 0, r


def test_what_is_not_there_is_named() -> None:
    done = run("--models=gpt3")
    assert done.returncode == 2 and "--models has gpt3; there are gpt2, llama." in done.stderr
