"""``attnopt export``: a verified ONNX file, and what became of each attention."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import click
from rich.markup import escape
from rich.table import Table

from attnopt.cli import render
from attnopt.cli.progress import Stages
from attnopt.cli.target import introduce, load_target
from attnopt.config import OptimizeConfig
from attnopt.report.source import shown_path

if TYPE_CHECKING:
    from attnopt.cli.render import Terminal
    from attnopt.emit.module import OptimizedModule
    from attnopt.emit.onnx import WithPastForm
    from attnopt.emit.onnx.report import OnnxReport


def export_command(target: str, *, output: str, form: str, opset: int, with_past: bool, max_length: int | None, strip_metadata: bool, as_json: bool, train: bool, **options: Any) -> int:
    from attnopt import api
    from attnopt.emit.onnx import check_past, check_request

    out, err = render.console(), render.console(stderr=True)
    past: WithPastForm = with_past if max_length is None else "static"
    check_past(past, max_length, opset, form)
    with Stages(err) as stages:
        loaded = load_target(target, stages, train=train, **options)
        if not as_json:
            introduce(out, loaded)
        check_request(loaded.model, output, opset, form)
        config = OptimizeConfig(backend="reference", verify=False, capture="export")  # the file is what is compared
        optimized = api.optimize(loaded.model, loaded.args, kwargs=loaded.kwargs, config=config, progress=stages)
        stages("write")
        report = cast("OptimizedModule", optimized).export_onnx(output, opset=opset, target=form, with_past=past, max_length=max_length, strip_metadata=strip_metadata)
    if as_json:
        click.echo(json.dumps({"model": loaded.name, **report.to_dict(), "exit_code": 0}, indent=2))
        return 0
    show(out, report)
    return 0


def show(out: Terminal, report: OnnxReport) -> None:
    """What is in the file and how it compares, and one line that says what was done."""
    show_file(out, report)
    counts = f"{len(report.fused)} of {len(report.layers)} attentions are fused nodes"
    out.say(f"[bold green]Done:[/] {escape(shown_path(report.path))}, opset {report.opset}, {counts}, {render.verdict_text(report.verdict)} in ONNX Runtime")


def show_file(out: Terminal, report: OnnxReport) -> None:
    """The attentions as a table, inputs and outputs, and the comparisons."""
    if report.layers:
        table = Table(header_style="bold")
        for name in ("attention", "computes", "lowered to", "why", "error"):
            table.add_column(name, overflow="fold")
        for layer in report.layers:
            error = "-" if layer.error is None else f"{layer.error:.1e}"
            style = "green" if layer in report.fused else "yellow"
            table.add_row(escape(layer.name), escape(layer.words), f"[{style}]{layer.lowered_to}[/]", escape(layer.why), error)
        out.print(table)
    else:
        out.say("No attention was found in this model.", style="yellow")
    for title, values in (("Inputs", report.inputs), ("Outputs", report.outputs)):
        out.say(f"[bold]{title}[/] " + escape(", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in values.items())))
    render.show_checks(out, report.verdict)
