"""Every guard of the analysis has a test that fails without it. ``make mutation`` removes all of them; here a sample."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mutation.__main__ import gone, unlisted
from mutation.guards import ROOT, Guard, all_guards, without
from mutation.registry import NO_GUARDS, TESTS

SAMPLE = 12


def test_every_guard_is_listed() -> None:
    missing = unlisted(all_guards())
    text = "\n  ".join(missing)
    assert not missing, f"{len(missing)} new conditions without a test in mutation/registry.py (cd tests; python -m mutation.find '' proposes one for each):\n  {text}"


def test_no_listed_guard_is_gone() -> None:
    old = gone(all_guards())
    assert not old, "conditions in mutation/registry.py that the analysis does not have any more:\n  " + "\n  ".join(old)


def test_no_condition_is_in_both_lists() -> None:
    assert not set(TESTS) & set(NO_GUARDS)


def test_each_reason_is_a_sentence() -> None:
    assert all(len(reason.split()) > 3 for reason in NO_GUARDS.values())


def test_a_removed_guard_is_gone_from_the_source() -> None:
    for g in all_guards()[:20]:
        changed = ast.dump(ast.parse(without(g)))
        assert changed != ast.dump(ast.parse((ROOT / g.file).read_text()))


def _mutated(*arguments: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-m", "mutation", *arguments], cwd=here, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(here)}, check=False)


def test_a_sample_of_the_guards_is_noticed() -> None:
    done = _mutated(str(SAMPLE))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{SAMPLE} of {len(TESTS)} guards" in done.stdout


def test_an_unnoticed_guard_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import mutation.__main__ as main
    from mutation.runner import Outcome

    monkeypatch.setattr(main, "run", lambda tests, guard=None: Outcome(True, 0))
    assert main.main(2) == 1
    assert "still passes" in capsys.readouterr().out


@pytest.mark.slow  # one process for each of the guards: some minutes
@pytest.mark.timeout(3600)
def test_every_guard_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    done = _mutated()
    with capsys.disabled():
        print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_guard_is_named_by_its_words() -> None:
    names = [g.name for g in all_guards()]
    assert len(set(names)) == len(names) and isinstance(all_guards()[0], Guard)
