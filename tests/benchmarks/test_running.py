"""``benchmarks/running.py``: a limit of time holds wherever the program is when it has passed."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "running", raising=False)
    return importlib.import_module("running")


class Slow:
    """Its destructor is where the limit passes."""

    def __del__(self) -> None:
        time.sleep(30)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_destructor_drops_is_raised_again(running: ModuleType) -> None:
    begun, dropped = time.monotonic(), False
    with pytest.raises(TimeoutError, match="not ready after 1 s"), running.patience(1):
        Slow()
        dropped = True
        time.sleep(30)
    assert dropped and time.monotonic() - begun < 20


def test_nothing_comes_after_the_block(running: ModuleType) -> None:
    with running.patience(1):
        pass
    time.sleep(1.1)
