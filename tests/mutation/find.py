"""``python -m mutation.find [words of a guard's name]``: which test fails without which guard. For whoever adds a guard.

First every given test file runs once and says which guards it takes; then each guard is removed in turn and the tests that take it
run, fewest guards first. Prints lines for ``registry.py``, and the guards that no test notices.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Generator, Iterable
from types import FrameType
from typing import Any

import pytest

from mutation.guards import ROOT, Guard, all_guards
from mutation.registry import NO_GUARDS, TESTS
from mutation.runner import run

WHERE = ("tests/mutation/test_masks.py", "tests/mutation/test_scores.py", "tests/mutation/test_reading.py", "tests/mutation/test_sites.py", "tests/mutation/test_operands.py", "tests/mutation/test_rotations.py")
WHERE = tuple(os.environ["ATTNOPT_TESTS"].split()) if "ATTNOPT_TESTS" in os.environ else WHERE
CANDIDATES = 150


class _Tracer:
    """A pytest plugin: guard -> the tests in which it was taken."""

    def __init__(self, guards: Iterable[Guard]) -> None:
        self.lines: dict[tuple[str, int], list[str]] = defaultdict(list)
        for g in guards:
            self.lines[str(ROOT / g.file), g.body].append(g.name)
        self.files = {f for f, _ in self.lines}
        self.hits: dict[str, list[str]] = defaultdict(list)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        taken: set[str] = set()

        def local(frame: FrameType, event: str, arg: object) -> Any:
            if event == "line":
                taken.update(self.lines.get((frame.f_code.co_filename, frame.f_lineno), ()))
            return local

        sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename in self.files else None)
        yield
        sys.settrace(None)
        for name in taken:
            self.hits[name].append(item.nodeid)


def hits(guards: list[Guard]) -> dict[str, list[str]]:
    read, write = os.pipe()
    if os.fork() == 0:
        tracer = _Tracer(guards)
        sys.path.insert(0, str(ROOT))
        os.chdir(ROOT)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *WHERE], plugins=[tracer])
        with os.fdopen(write, "w") as f:
            json.dump(tracer.hits, f)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        return json.loads(f.read())  # type: ignore[no-any-return]


def main(words: list[str]) -> None:
    guards = [g for g in all_guards() if g.name not in NO_GUARDS and g.name not in TESTS and all(w in g.name for w in words)]
    taken = hits(guards)
    load: dict[str, int] = defaultdict(int)
    for tests in taken.values():
        for t in tests:
            load[t] += 1
    for g in guards:
        candidates = sorted(taken.get(g.name, []), key=lambda t: ("mutation" not in t, load[t]))[:CANDIDATES]
        failed: list[str] = []
        if candidates:
            out = run(candidates, g)
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+?)(?: - |$)", out.output, re.MULTILINE)
            if not out.passed and not failed:
                failed = candidates[:1]
        print(f'    "{g.name}": "{failed[0]}",' if failed else f"    # unnoticed ({len(candidates)} tests take it): {g.name}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
