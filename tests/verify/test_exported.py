"""Verdicts of several comparisons put together."""

from __future__ import annotations

import pytest

from attnopt.report import Check, Verdict
from attnopt.verify.exported import _joined


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [(True, True, True), (True, False, False), (False, True, False), (None, False, False), (False, None, False), (None, True, None), (True, None, None), (None, None, None)],
)
def test_what_fails_fails_the_whole_and_what_was_not_compared_leaves_it_open(first: bool | None, second: bool | None, both: bool | None) -> None:
    joined = _joined(Verdict(first, [Check("a", 0.0, 1.0, True)]), Verdict(second, [Check("b", 0.0, 1.0, True)]))
    assert joined.passed is both and [c.name for c in joined.checks] == ["a", "b"]
