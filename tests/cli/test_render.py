"""Reports in words: what is alike is said once, and nothing is lost in doing so."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from attnopt.cli import render
from attnopt.cli.measure import Comparison, Measured
from attnopt.remarks import Remark
from attnopt.report import Check, Site, Verdict


def site(name: str, kernel: str = "sdpa", **more: object) -> Site:
    return Site(name, "/elsewhere/model.py:3", "replaced", None, kernel, **more)  # type: ignore[arg-type]


def printed(show: object, *args: object) -> str:
    out = render.Terminal(width=120, record=True, file=io.StringIO())
    show(out, *args)  # type: ignore[operator]
    return out.export_text()


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a.0.x", "a.1.x", "a.2.x"], ["a.0-2.x (3)"]),
        (["a.0.x", "a.2.x"], ["a.0.x and 1 more"]),
        (["a.0.b.0", "a.0.b.1"], ["a.0.b.0-1 (2)"]),
        (["a.0.b.0", "a.1.b.1"], ["a.0.b.0 and 1 more"]),
        (["encoder.0", "decoder.0"], ["encoder.0", "decoder.0"]),
        (["a"], ["a"]),
    ],
    ids=["run", "gap", "inner-number", "two-numbers", "other-names", "one"],
)
def test_layers_of_one_stack_share_a_row(names: list[str], shown: list[str]) -> None:
    assert [render.shown_names(g) for g in render.grouped(map(site, names))] == shown


def test_another_kernel_is_another_row() -> None:
    assert len(render.grouped([site("a.0"), site("a.1", kernel="reference")])) == 2


def test_remarks_are_said_once_with_their_count() -> None:
    remarks = [Remark("AO203", "returned", f"a.{i}", "m.py:1") for i in range(3)] + [Remark("AO101", "replaced", "b")]
    text = printed(render.show_remarks, remarks)
    assert text.count("AO203") == 1 and "a.0 and 2 more" in text and "AO101" not in text


def test_markup_in_names_is_text() -> None:
    text = printed(render.show_sites, [site("blocks[0]", why="score [bold]x[/]")])
    assert "blocks[0]" in text and "[bold]x[/]" in text


def test_failed_checks_come_first_and_long_lists_say_what_is_left() -> None:
    checks = [Check(f"c{i}", 1e-8 * i, 1e-6, True) for i in range(20)] + [Check("bad", 1e-3, 1e-6, False)]
    text = printed(render.show_checks, Verdict(False, checks))
    assert text.index("bad") < text.index("c19") and "and 9 more" in text and "c1 " not in text


def test_paths_are_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert render.shown_path(f"{tmp_path}/sub/m.py:7") == "sub/m.py:7"
    assert render.shown_path("/x/lib/site-packages/pkg/m.py:7") == "pkg/m.py:7"
    assert render.shown_path("/elsewhere/m.py:7") == "/elsewhere/m.py:7"


def test_slower_is_called_slower() -> None:
    words = render.comparison_words(Comparison("forward", 3, Measured(0.1, 100), Measured(0.2, 400)))
    assert words == "2.00x slower, 4.00x more peak memory"
