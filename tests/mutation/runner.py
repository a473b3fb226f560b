"""Running a test with one guard removed, or none: in a forked child, with the changed source loaded in place of the file's own.

The parent imports torch and pytest, and nothing of attnopt; each child imports attnopt anew, through a finder that answers for the one
module. Nothing is written to the tree.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import pytest_timeout  # noqa: F401  (imported once for all children)
import torch

from mutation.guards import ROOT, Guard, without

torch.export.export(torch.nn.Identity(), (torch.ones(1),), strict=False)  # imports what an export needs, once for all children

SECONDS = 120
"""A test that takes longer than this with a guard removed has failed."""


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source
        self.loaded = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        file = str(ROOT / (self.name.replace(".", "/") + ".py"))
        module.__file__ = file
        self.loaded = True
        exec(compile(self.source, file, "exec"), module.__dict__)


@dataclass(frozen=True)
class Outcome:
    """``passed``, ``failed``, or what else pytest ended with (an error in collection counts as failed)."""

    passed: bool
    code: int
    output: str = ""


def run(tests: Sequence[str], guard: Guard | None = None) -> Outcome:
    """Runs ``tests`` (pytest's ids) in a child, without ``guard`` where one is given. Stops at the first failure."""
    assert not any(m == "attnopt" or m.startswith("attnopt.") for m in sys.modules), "attnopt is imported already: a child could not import it anew"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(write, 1)
        os.dup2(write, 2)
        os._exit(_child(tests, guard))
    os.close(write)
    with os.fdopen(read, errors="replace") as f:
        output = f.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == pytest.ExitCode.USAGE_ERROR or code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise LookupError(f"pytest found no {', '.join(tests)}:\n{output[-2000:]}")
    return Outcome(code == 0, code, output)


def _child(tests: Sequence[str], guard: Guard | None) -> int:
    signal.alarm(SECONDS)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # loading them takes longer than a test
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT)]
    finder = None
    if guard is not None:
        finder = _Changed(guard.module, without(guard))
        sys.meta_path.insert(0, finder)
    code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--no-header", "--tb=line", *tests]))
    sys.stdout.flush()
    if finder is not None and not finder.loaded and code == 0:
        print(f"{finder.name} was never imported")
        return 99
    return code


def tests_in(path: str) -> str:
    """A test id as this list writes it, from the tests' folder, for pytest."""
    return str(Path("tests") / path)
