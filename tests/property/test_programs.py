"""Random attention programs: each is found and replaced, is right against float64, and is called nothing that it is not.

A hundred run with the other tests. ``make property`` runs two thousand (ATTNOPT_PROGRAMS sets another number) and prints how
many there were of each feature. A failure prints the program as source, and all failures of a run are told, not just the first.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import attnopt
from property.judge import NotCaptured, Wrong, check, may_stay_in_the_score
from property.program import Program
from property.strategies import programs

BATCH = 100
LONG = int(os.environ.get("ATTNOPT_PROGRAMS", "2000"))
OPTIMIZED = 25
"""Every so many programs also go through ``attnopt.optimize``, with its own verification and kernels."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch.export warns of each axis of size one."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def run(number: int, which: int, tally: Counter[str]) -> list[str]:
    """``number`` programs drawn from seed ``which``: the failures, in words."""
    failures: list[str] = []

    @seed(which)
    @settings(max_examples=number, phases=[Phase.generate], database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def one(program: Program) -> None:
        tally["programs"] += 1
        tally.update(set(program.features()))
        try:
            checked = check(program)
            tally["runs"] += checked.runs
            if tally["programs"] % OPTIMIZED == 0:
                optimized(program)
                tally["through optimize, verified"] += 1
        except NotCaptured:
            tally["not captured with open sizes"] += 1
        except Wrong as wrong:
            tally[wrong.kind] += 1
            failures.append(f"{wrong}\n{program}")
        except Exception as error:  # noqa: BLE001 - whatever a program makes attnopt raise is a finding, and the others are judged as well
            tally["crash"] += 1
            failures.append(f"crash: {type(error).__name__}: {error}\n{program}")

    one()
    return failures


def optimized(program: Program) -> None:
    """The whole way: captured, rewritten with the kernels that attnopt chooses, verified by attnopt, and run."""
    module, inputs = program.module(), program.make(program.sizes)
    with torch.no_grad():
        fast = attnopt.optimize(module, inputs, dynamic_shapes="auto" if program.dynamic else "static")
        report = fast.attnopt_report
        if [s.status for s in report.sites] == ["reverted"] and program.softmax == "exp over sum" and may_stay_in_the_score(program):
            return  # 0/0 in the original, which is a limit (docs/limits.md)
        if [s.status for s in report.sites] != ["replaced"] or not report.verdict.passed:
            raise Wrong("verification", str(report))
        want, got = module(*inputs), fast(*inputs)
    if not torch.equal(want.isnan(), got.isnan()):
        raise Wrong("verification", "NaN in other places than the original's")


@pytest.mark.timeout(900)  # about a minute of one core
def test_a_hundred_programs() -> None:
    tally: Counter[str] = Counter()
    failures = run(BATCH, 0, tally)
    assert not failures, "\n\n".join(failures)
    assert tally["programs"] == BATCH


@pytest.mark.slow  # about half an hour for 2,000 programs on one core: one export each
@pytest.mark.timeout(7200)
def test_many_programs(capsys: pytest.CaptureFixture[str]) -> None:
    tally: Counter[str] = Counter()
    failures: list[str] = []
    told = 0
    for batch in range(1, LONG // BATCH + 1):
        failures += run(BATCH, batch, tally)
        with capsys.disabled():
            print(f"{tally['programs']} programs, {len(failures)} failures", flush=True)
            for f in failures[told:]:
                print(f.partition("\n\n")[0], flush=True)
            told = len(failures)
    with capsys.disabled():
        print("\n".join(f"{n:6} {name}" for name, n in sorted(tally.items(), key=lambda t: (-t[1], t[0]))), flush=True)
    assert not failures, f"{len(failures)} failures\n\n" + "\n\n".join(failures)
