"""The commands themselves: load, call the API, show what came back, and say with the exit code whether it is good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.markup import escape

from attnopt.cli import render
from attnopt.cli.decode import Decoding, decode_briefly
from attnopt.cli.measure import Comparison, compare
from attnopt.cli.onnx import show as show_export
from attnopt.cli.progress import Stages
from attnopt.cli.serving import cache_facts, show_cache, show_decode
from attnopt.cli.target import config_of, introduce, load_target
from attnopt.errors import AttnoptError
from attnopt.report import Report

if TYPE_CHECKING:
    from attnopt.capture.loader import Loaded
    from attnopt.cli.render import Terminal
    from attnopt.emit.onnx.report import OnnxReport
    from attnopt.serving import ServingModel

DONE, POLICY = 0, 1


def optimize_command(
    target: str, *, output: str | None, emit: str, verify: bool, require_all: bool, benchmark: bool, as_json: bool, train: bool, **options: Any
) -> int:
    from attnopt import api
    from attnopt.emit.onnx import check_request

    out, err = render.console(), render.console(stderr=True)
    config = config_of(options, verify=verify, train=train)
    if output is not None and config.kv_cache:
        raise AttnoptError("--output saves an optimized model, and --kv-cache makes a serving model, which is not saved yet.", "attnopt.optimize makes one in any process.")
    if emit == "onnx" and output is None:
        raise AttnoptError("--emit onnx needs --output: the file to write.")
    if output is not None and not Path(output).parent.is_dir():
        raise AttnoptError(f"--output {output}: the folder {Path(output).parent} does not exist.")
    with Stages(err) as stages:
        loaded = load_target(target, stages, train=train, **options)
        if not as_json:
            introduce(out, loaded)
        if output is not None and emit == "onnx":
            check_request(loaded.model, output)
        optimized = api.optimize(loaded.model, loaded.args, kwargs=loaded.kwargs, config=config, progress=stages)
        comparison: Comparison | Decoding | None = None
        exported: OnnxReport | None = None

        def measuring(done: int, total: int) -> None:
            stages("measure", done, total)

        if benchmark and not any(p.is_meta for p in loaded.model.parameters()):
            if config.kv_cache:
                comparison = decode_briefly(loaded.model, cast("ServingModel", optimized), measuring)
            else:
                comparison = compare(loaded.model, optimized, loaded.args, loaded.kwargs, train=train, progress=measuring)
        if output is not None:
            stages("save")
            exported = _saved(optimized, output, emit)
    report = cast("Report", optimized.attnopt_report)
    code = _exit_code(report, require_all)
    if as_json:
        extra: dict[str, Any] = {"benchmark": None if comparison is None else comparison.to_dict(), "output": output}
        if config.kv_cache:
            extra["cache"] = cache_facts(cast("ServingModel", optimized))
        if exported is not None:
            extra["onnx"] = exported.to_dict()
        _print_json(loaded, report, code, **extra)
        return code
    render.show_report(out, report)
    if config.kv_cache:
        show_cache(out, cast("ServingModel", optimized))
    if isinstance(comparison, Comparison):
        render.show_comparison(out, comparison)
    elif comparison is not None:
        show_decode(out, comparison)
    if exported is not None:
        show_export(out, exported)
    out.say(_seconds(report), style="dim")
    _next_steps(out, target, report, output, emit, code, require_all, served=config.kv_cache is not None)
    out.say(_summary(report, comparison, code))
    return code


def _saved(optimized: Any, output: str, emit: str) -> OnnxReport | None:
    if emit == "onnx":
        return cast("OnnxReport", optimized.export_onnx(output))
    from attnopt.emit.pt2 import save_pt2

    save_pt2(optimized, output)
    return None


def inspect_command(target: str, *, as_json: bool, train: bool, **options: Any) -> int:
    from attnopt import api

    out, err = render.console(), render.console(stderr=True)
    config = config_of(options, verify=False, train=train)
    with Stages(err) as stages:
        loaded = load_target(target, stages, train=train, **options)
        report = api.inspect(loaded.model, loaded.args, kwargs=loaded.kwargs, config=config)
    if as_json:
        _print_json(loaded, report, DONE)
        return DONE
    introduce(out, loaded)
    render.show_report(out, report)
    out.say(f"{_counts(report, 'can be replaced')}. Nothing was changed; `attnopt optimize {target}{f' --kv-cache {config.kv_cache}' if config.kv_cache else ''}` does it, and compares with the original.")
    return DONE


def verify_command(target: str, *, against: str | None, as_json: bool, train: bool, **options: Any) -> int:
    from attnopt import api

    out, err = render.console(), render.console(stderr=True)
    config = config_of(options, verify=True, train=train)
    with Stages(err) as stages:
        loaded = load_target(target, stages, train=train, **options)
        if against is None:
            optimized = api.optimize(loaded.model, loaded.args, kwargs=loaded.kwargs, config=config, progress=stages)
            report = cast("Report", optimized.attnopt_report)
        else:
            other = _other(against, loaded)
            report = Report(verdict=api.verify(loaded.model, other, loaded.args, kwargs=loaded.kwargs))
    code = _exit_code(report, require_all=False)
    if as_json:
        _print_json(loaded, report, code, against=against)
        return code
    introduce(out, loaded)
    if against is None:
        render.show_report(out, report)
    render.show_checks(out, report.verdict)
    out.say(render.verdict_text(report.verdict))
    return code


def _other(against: str, loaded: Loaded) -> Any:
    """The model to compare with: a saved .pt2, or a model of its own that runs on the same inputs."""
    if against.endswith(".pt2"):
        from attnopt.emit.pt2 import load_pt2

        return load_pt2(against)
    from attnopt.capture.loader import load_model

    other = load_model(against)
    like = next(iter(loaded.model.parameters()), None)
    return other.train(loaded.model.training) if like is None else other.train(loaded.model.training).to(device=like.device, dtype=like.dtype)


def _exit_code(report: Report, require_all: bool) -> int:
    failed = report.verdict.passed is False
    return POLICY if failed or (require_all and report.missed) else DONE


def _print_json(loaded: Loaded, report: Report, code: int, **extra: Any) -> None:
    facts = {"model": loaded.name, "inputs": loaded.inputs, "notes": list(loaded.notes), **report.to_dict(), **extra, "exit_code": code}
    click.echo(json.dumps(facts, indent=2))


def _seconds(report: Report) -> str:
    return "Took " + ", ".join(f"{stage} {s:.1f} s" for stage, s in report.seconds.items()) if report.seconds else ""


def _next_steps(out: Terminal, target: str, report: Report, output: str | None, emit: str, code: int, require_all: bool, served: bool) -> None:
    steps = []
    codes = list(dict.fromkeys(r.code for s in report.sites if s.status != "replaced" for r in s.remarks))
    if codes:
        steps.append(f"attnopt explain {target}: on which line and why something was not replaced, and what to change ({', '.join(codes)})")
    if report.verdict.passed is False:
        steps.append(f"attnopt verify {target}: every comparison with the original")
    if served:
        steps.append(f"attnopt generate {target} --prompt ...: continue texts with it; or serving.generate(prompts) in Python")
        steps.append(f"attnopt bench {target} --decode --batch 1,16,64: tokens per second of more and longer prompts")
    elif code == DONE and output is None and report.replaced:
        steps.append(f"attnopt optimize {target} --output model.pt2: save it; or attnopt.optimize(model, inputs) in Python")
    if output is not None and emit == "pt2":
        steps.append(f"import attnopt, torch; torch.export.load({output!r}).module(): load it in any process")
    if steps:
        out.say("Next", style="bold")
        for step in steps:
            out.say(f"  {escape(step)}")
    if require_all and report.missed:
        out.say(f"--require-all: {len(report.missed)} of {len(report.attentions)} were not replaced: {', '.join(s.name for s in report.missed)}", style="red")


def _counts(report: Report, verb: str) -> str:
    n = len(report.attentions)
    return f"{len(report.replaced)} of {n} {'attention' if n == 1 else 'attentions'} {verb}"


def _summary(report: Report, comparison: Comparison | Decoding | None, code: int) -> str:
    words = [_counts(report, "replaced"), render.verdict_text(report.verdict)]
    if isinstance(comparison, Comparison):
        words.append(render.comparison_words(comparison))
    elif comparison is not None:
        words.append(str(comparison))
    return f"[bold {'green' if code == DONE else 'red'}]{'Done' if code == DONE else 'Not done'}:[/] {', '.join(words)}"
