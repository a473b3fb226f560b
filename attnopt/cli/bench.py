"""``attnopt bench``: time and memory before and after, of a forward pass, or of generation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import click

from attnopt.cli import render
from attnopt.cli.decode import decode
from attnopt.cli.measure import compare
from attnopt.cli.progress import Stages
from attnopt.cli.serving import cache_facts, show_decode
from attnopt.cli.target import config_of, introduce, load_target
from attnopt.errors import AttnoptError

if TYPE_CHECKING:
    from attnopt.report import Report
    from attnopt.serving import ServingModel

DONE = 0


def bench_command(
    target: str,
    *,
    decoding: bool,
    batches: Sequence[int],
    lengths: Sequence[int],
    new_tokens: int,
    page_size: int | None,
    cache_size: int | None,
    chunk: int | None,
    kv_cache: str | None,
    verify: bool,
    as_json: bool,
    train: bool,
    **options: Any,
) -> int:
    from attnopt import api

    out, err = render.console(), render.console(stderr=True)
    options["kv_cache"] = (kv_cache or "paged") if decoding else None
    config = config_of(options, verify=verify, train=train)
    with Stages(err) as stages:
        loaded = load_target(target, stages, train=train, **options)
        if any(p.is_meta for p in loaded.model.parameters()):
            raise AttnoptError(f"{loaded.name} has its weights on the meta device, so there is nothing to measure.")
        optimized = api.optimize(loaded.model, loaded.args, kwargs=loaded.kwargs, config=config, progress=stages)

        def measuring(done: int, total: int) -> None:
            stages("measure", done, total)

        if not decoding:
            comparison = compare(loaded.model, optimized, loaded.args, loaded.kwargs, train=train, progress=measuring)
        else:
            given = {"page_size": page_size, "size_bytes": cache_size, "chunk": chunk}
            serving = cast("ServingModel", optimized)
            used = {k: v for k, v in given.items() if v is not None}
            found = decode(loaded.model, serving, batches, lengths, new_tokens, options=used, progress=measuring)
    verdict = cast("Report", optimized.attnopt_report).verdict
    if as_json:
        facts = {"model": loaded.name, "inputs": loaded.inputs, "notes": list(loaded.notes), "verdict": verdict.to_dict()}
        more = {"decode": found.to_dict(), "cache": cache_facts(serving)} if decoding else {"benchmark": comparison.to_dict()}
        click.echo(json.dumps({**facts, **more, "exit_code": DONE}, indent=2))
        return DONE
    introduce(out, loaded)
    if decoding:
        show_decode(out, found)
        words = str(found)
    else:
        render.show_comparison(out, comparison)
        words = render.comparison_words(comparison)
    out.say(f"[bold green]Done:[/] {words}, {render.verdict_text(verdict)}")
    return DONE
