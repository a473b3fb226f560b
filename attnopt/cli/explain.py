"""``attnopt explain``: the page of a code, or what was found in a model, site by site."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from attnopt.cli import render
from attnopt.cli.progress import Stages
from attnopt.cli.target import config_of, introduce, load_target
from attnopt.errors import AttnoptError
from attnopt.remarks import PAGES
from attnopt.report.explain import explain, no_site_left, whole_model

DONE = 0


def is_code(what: str) -> bool:
    """Whether an argument is a remark's code, as AO203, or meant as one; everything else names a model."""
    return re.fullmatch(r"AO\d+", what, re.IGNORECASE) is not None and (len(what) == 5 or not Path(what).exists())


def explain_codes(code: str | None, as_json: bool) -> int:
    """One page, or the list of all codes."""
    out = render.console()
    if code is None:
        if as_json:
            click.echo(json.dumps({c: asdict(p) for c, p in PAGES.items()}, indent=2))
        else:
            render.show_pages(out)
        return DONE
    known = code.upper()
    if known not in PAGES:
        near = ", ".join(difflib.get_close_matches(known, PAGES, n=3))
        raise AttnoptError(f"There is no remark {code!r}{f'; near it are {near}' if near else ''}.", "`attnopt explain` lists all.")
    if as_json:
        click.echo(json.dumps({"code": known, **asdict(PAGES[known])}, indent=2))
    else:
        render.show_page(out, known)
    return DONE


def explain_model(target: str, *, site: str | None, as_json: bool, train: bool, **options: Any) -> int:
    """Capture and analyse, change and compare nothing, and tell of one site or of all that need telling."""
    from attnopt import api

    out, err = render.console(), render.console(stderr=True)
    config = config_of(options, verify=False, train=train)
    with Stages(err) as stages:
        loaded = load_target(target, stages, train=train, **options)
        stages("capture")
        report = api.inspect(loaded.model, loaded.args, kwargs=loaded.kwargs, config=config)
    found = explain(report, site)
    if as_json:
        facts = {"model": loaded.name, "inputs": loaded.inputs, "notes": list(loaded.notes), "sites": [e.to_dict() for e in found]}
        click.echo(
            json.dumps({**facts, "known_sites": [s.name for s in report.sites], "remarks": [r.to_dict() for r in report.remarks], "exit_code": DONE}, indent=2)
        )
        return DONE
    introduce(out, loaded)
    for one in found:
        render.show_explanation(out, one)
    if site is None:
        if not found:
            out.say(f"{escape(no_site_left(report))}\n")
        model = whole_model(report)
        if model is not None:
            render.show_explanation(out, model)
        out.say(escape(_summary(len(report.replaced), len(report.attentions), sum(s.is_weak for s in report.sites))))
    return DONE


def _summary(replaced: int, all_of_them: int, weak: int) -> str:
    words = f"{replaced} of {all_of_them} {'attention' if all_of_them == 1 else 'attentions'} can be replaced"
    return f"{words}{f', {weak} of them slower than it could be' if weak else ''}. Nothing was changed or compared."
