"""What is quoted of somebody else's error."""

from __future__ import annotations

import pytest

from attnopt.errors import first_line, named


@pytest.mark.parametrize(
    ("message", "line", "whole"),
    [
        ("no such size", "no such size", "ValueError: no such size"),
        ("\n\n  no such size \nin a long story", "no such size", "ValueError: no such size"),
        ("", "ValueError", "ValueError"),
        (" \n ", "ValueError", "ValueError"),
    ],
    ids=["one line", "several", "empty", "blank"],
)
def test_the_first_line_that_says_something(message: str, line: str, whole: str) -> None:
    error = ValueError(message)
    assert (first_line(error), named(error)) == (line, whole)
    assert first_line(error, 4) == line[:4]
    assert named(error, 4) == (f"ValueError: {line[:4]}" if message.strip() else "ValueError")
