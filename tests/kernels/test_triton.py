"""The generated Triton kernel under Triton's interpreter, against attention written out in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernels.cases import CASES
from tests.kernels.mask_cases import MASKS
from tests.kernels.operations import OPERATION_CASES

POISONED = ("padding-long", "padding-by-lengths", "documents-causal-padded-window", "packed")
"""Masks with keys that no query sees, where rows without a key do not read all values."""
ROOT = Path(__file__).parents[2]
Run = Callable[[str, str], bool]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a case by name and dtype in the interpreter's own process; whether it ran with NaN in hidden keys too."""
    log = tmp_path_factory.mktemp("interpreter") / "stderr.txt"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.interpreter"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        requests, replies = process.stdin, process.stdout

        def run(name: str, dtype: str) -> bool:
            requests.write(json.dumps([name, dtype]) + "\n")
            requests.flush()
            line = replies.readline()
            assert line, f"the interpreter's process died: {log.read_text()[-2000:]}"
            reply = json.loads(line)
            assert reply["ok"], reply["error"]
            return bool(reply["poisoned"])

        yield run
        requests.close()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_case(interpreted: Run, name: str, dtype: str) -> None:
    interpreted(name, dtype)


@pytest.mark.parametrize("name", list(MASKS))
def test_mask(interpreted: Run, name: str) -> None:
    assert interpreted(name, "float32") == (name in POISONED)


@pytest.mark.parametrize("name", ["documents-causal-padded-window", "block-table", "dense-mask"])
def test_mask_in_half_precision(interpreted: Run, name: str) -> None:
    interpreted(name, "bfloat16")


@pytest.mark.parametrize("name", list(OPERATION_CASES))
def test_operation(interpreted: Run, name: str) -> None:
    interpreted(name, "float32")
