"""``attnopt optimize model.onnx``: the file with its attentions fused, and what became of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from attnopt.cli import render
from attnopt.cli.onnx import show_file
from attnopt.cli.progress import Stages
from attnopt.errors import AttnoptError
from attnopt.report.source import shown_path

if TYPE_CHECKING:
    from attnopt.emit.onnx.files import FileReport
    from attnopt.emit.onnx.plan import Target

DONE, POLICY = 0, 1
OPTIONS = {"target", "inputs", "output", "opset", "form", "require_all", "as_json", "traceback"}
"""What the command line may say of an ONNX file; the rest is about PyTorch models."""


def is_onnx(target: str) -> bool:
    return Path(target).suffix.lower() == ".onnx"


def optimize_file_command(target: str, *, output: str | None, inputs: Sequence[str], opset: int, form: Target, require_all: bool, as_json: bool) -> int:
    from attnopt.onnx_files import optimize_onnx

    if output is not None and Path(output).suffix == ".pt2":
        raise AttnoptError(
            f"--output {output}: an ONNX file is written as ONNX, and a .pt2 file holds a PyTorch model; expected a name such as optimized.onnx."
        )
    out, err = render.console(), render.console(stderr=True)
    with Stages(err) as stages:
        report = optimize_onnx(target, output, example_inputs=_given(target, inputs), opset=opset, target=form, progress=stages)
    code = POLICY if not report.replaced or (require_all and report.missed) else DONE
    if as_json:
        click.echo(json.dumps({**report.to_dict(), "exit_code": code}, indent=2))
        return code
    show_file(out, report)
    if report.conditions:
        out.say(f"[bold]Holds where[/] {escape(', '.join(report.conditions))}")
    render.show_remarks(out, [*report.analysis.remarks, *(r for s in report.analysis.sites for r in s.remarks)])
    out.say(_summary(report, output, code))
    return code


def _summary(report: FileReport, output: str | None, code: int) -> str:
    n = len(report.layers)
    counts = f"{len(report.fused)} of {n} attentions are fused nodes"
    if not report.replaced:
        already = n and len(report.fused) == n
        return f"[bold red]Not done:[/] {counts if n else 'no attention was found'}{' already' if already else ''}, so nothing was written"
    where = f"{escape(shown_path(output))}, opset {report.opset}" if output else "nothing was written, since no --output was given"
    return f"[bold {'green' if code == DONE else 'red'}]{'Done' if code == DONE else 'Not done'}:[/] {where}, {counts}, {render.verdict_text(report.verdict)} in ONNX Runtime"


def _given(target: str, texts: Sequence[str]) -> dict[str, Any]:
    """Inputs as the command line describes them, filled as those are that nobody describes."""
    if not texts:
        return {}
    from attnopt.capture.example_inputs import parse_input
    from attnopt.capture.onnx.examples import described
    from attnopt.capture.onnx.read import read_model

    descriptions = [parse_input(text) for text in texts]
    nameless = next((text for text, d in zip(texts, descriptions, strict=True) if d.name is None), None)
    if nameless is not None:
        raise AttnoptError(f"--input {nameless!r} has no name; inputs of an ONNX file are given as NAME=DTYPE[SIZES].")
    return described(read_model(target), descriptions)
