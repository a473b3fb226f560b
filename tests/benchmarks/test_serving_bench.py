"""``benchmarks/serving.py`` runs and tells what it measured. On a CPU the figures mean nothing; the tokens do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMON = ("--device=cpu", "--size=tiny", "--dtype=float32", "--new=6")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), *COMMON, *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)


def test_every_way_says_the_same(tmp_path: Path) -> None:
    output = tmp_path / "s.json"
    output.write_text(json.dumps({"rows": [{"cell": "b16", "way": "dynamic", "kept": True}, {"cell": "heads", "way": "MQA", "kept": False}]}))
    done = run("--cells=b16,heads", "--ways=attnopt,dynamic", f"--output={output}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    batch = {r["way"]: r for r in rows if r["cell"] == "b16"}
    assert set(batch) == {"attnopt", "dynamic"} and not any("kept" in r for r in rows)
    for r in batch.values():
        assert r["status"] == "ok" and r["tokens_per_s"] > 0 and r["step_ms"] > 0, r
    assert batch["attnopt"]["same_tokens"] == 1.0 and batch["attnopt"]["logits_off"] < 1e-5
    heads = {r["way"]: r for r in rows if r["cell"] == "heads"}
    assert [heads[w]["cache_bytes_per_token"] for w in ("MHA", "GQA", "MQA")] == [1024, 512, 256]
    sizes = [r["parameters"] for r in heads.values()]
    assert max(sizes) < 1.1 * min(sizes)
    assert "over dynamic" in done.stdout and "KV heads at equal size" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"), [(("--cells=b2",), "--cells has b2; there are b1, b16, b64, heads."), (("--ways=vllm",), "--ways has vllm; there are attnopt,")]
)
def test_what_it_does_not_know_is_said(options: tuple[str, ...], words: str) -> None:
    done = run(*options)
    assert done.returncode == 2 and words in done.stderr
