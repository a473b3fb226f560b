"""The page shows what was measured, and what was measured is what the zoo holds."""

from __future__ import annotations

import json

from zoo.models import CASES
from zoo.page import PAGE, RESULTS, render
from zoo.scoreboard import totals

BOARD = json.loads(RESULTS.read_text())


def test_the_page_is_made_from_the_results() -> None:
    assert PAGE.read_text() == render(BOARD), "run `make zoo-page`"


def test_the_totals_are_the_sums_of_the_rows() -> None:
    assert BOARD["totals"] == totals(BOARD["rows"])


def test_the_results_cover_the_zoo() -> None:
    measured = {(r["model"], r["variant"]): r["expected"] for r in BOARD["rows"]}
    assert measured == {(c.name, v.name): c.sites for c in CASES.values() for v in c.variants()}, "run `make zoo`"


def test_few_attentions_are_expected_to_be_left_alone() -> None:
    refused, expected = (sum(r[key] for r in BOARD["rows"]) for key in ("refused", "expected"))
    assert refused < 0.03 * expected
