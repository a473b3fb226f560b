"""Running models in worker processes, each variant with a time limit; a worker that hangs or dies costs one row."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from zoo.case import Case

TESTS = Path(__file__).parent.parent
WORKER = (sys.executable, "-m", "zoo.worker")


def tasks(case: Case) -> list[str]:
    """All variants, then Inductor's counts for the spelled-out form: calls of fused attention it leaves as they are."""
    masks = ("unpadded", "padded") if case.padded else ("unpadded",)
    return [v.name for v in case.variants()] + [f"inductor-{form}-{mask}" for form in case.forms if form == "eager" for mask in masks]


def run_tasks(model: str, names: Sequence[str], seconds: float, worker: Sequence[str] = WORKER) -> Iterator[tuple[str, dict[str, Any]]]:
    """(task, result) for each of ``names``. A result that holds nothing but ``failed`` says why there is none.

    ``worker MODEL TASK...`` writes a line of JSON for each task, in order. When one takes longer than ``seconds``, or the process
    dies, another process goes on with the tasks after it.
    """
    waiting = list(names)
    while waiting:
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                [*worker, model, *waiting], cwd=TESTS, env=_environment(), stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
            try:
                for line in _lines(process, seconds):
                    if line is None:
                        yield waiting.pop(0), {"failed": f"no result within {seconds:g} s"}
                        break
                    if not line.startswith("start "):
                        yield waiting.pop(0), json.loads(line)
                else:
                    if waiting:
                        log.seek(0)
                        last = log.read().decode(errors="replace").strip().splitlines()[-1:]
                        yield waiting.pop(0), {"failed": f"the process ended with {process.wait()}: {' '.join(last)[:300]}"}
            finally:
                process.kill()
                process.wait()


def _lines(process: subprocess.Popen[str], seconds: float) -> Iterator[str | None]:
    """Lines of the process; None when the next result takes longer than ``seconds`` (loading the libraries comes on top)."""
    arrived: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            arrived.put(line.strip())
        arrived.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arrived.get(timeout=seconds)
        except queue.Empty:
            yield None
            return
        if line is None:
            return
        yield line


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def run_all(
    cases: list[Case], names: Callable[[Case], list[str]], jobs: int, seconds: float, tell: Callable[[Case, str, dict[str, Any]], None]
) -> dict[str, dict[str, dict[str, Any]]]:
    """All models, ``jobs`` side by side: {model: {task: result}}."""
    found: dict[str, dict[str, dict[str, Any]]] = {c.name: {} for c in cases}

    def one(case: Case) -> None:
        for task, result in run_tasks(case.name, names(case), seconds):
            found[case.name][task] = result
            tell(case, task, result)

    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(one, c) for c in cases]):
            done.result()
    return found
