"""The process in which generated kernels are interpreted, for the tests of a module."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., bool]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Sends a request to the interpreter's own process; whether it ran with NaN in hidden keys too."""
    log = tmp_path_factory.mktemp("interpreter") / "stderr.txt"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.interpreter"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        requests, replies = process.stdin, process.stdout

        def run(*request: str) -> bool:
            requests.write(json.dumps(request) + "\n")
            requests.flush()
            line = replies.readline()
            assert line, f"the interpreter's process died: {log.read_text()[-2000:]}"
            reply = json.loads(line)
            assert reply["ok"], reply["error"]
            return bool(reply.get("poisoned", False))

        yield run
        requests.close()
