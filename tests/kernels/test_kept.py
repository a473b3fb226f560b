"""What is kept by the form of a call stays bounded."""

from __future__ import annotations

from attnopt.kernels.kept import Kept


def test_it_is_emptied_before_it_holds_too_much() -> None:
    kept: Kept[int, str] = Kept(2)
    for i in range(2):
        kept[i] = str(i)
    assert kept == {0: "0", 1: "1"} and kept.get(1) == "1"
    kept[2] = "2"
    assert kept == {2: "2"} and kept.get(0) is None
