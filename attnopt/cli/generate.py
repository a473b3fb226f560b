"""``attnopt generate``: prompts through a serving model, with tokens as they come, live statistics and a summary."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.markup import escape

from attnopt.cli import render
from attnopt.cli.progress import Stages
from attnopt.cli.prompts import Prompt, Reader, given_lines, tokenizing
from attnopt.cli.serving import cache_facts
from attnopt.cli.sources import tensors
from attnopt.cli.target import config_of, introduce, load_target
from attnopt.cli.text import Written
from attnopt.errors import AttnoptError, LoadError, ServingError
from attnopt.runtime import SamplingParams
from attnopt.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from torch import Tensor

    from attnopt.capture.tokenizer import Tokenizer
    from attnopt.cli.render import Terminal
    from attnopt.runtime import Engine, Request, Statistics
    from attnopt.serving import ServingModel

DONE, FAILED = 0, 1


def generate_command(
    target: str,
    *,
    prompts: Sequence[str],
    prompts_file: str | None,
    ids: bool,
    sources: Sequence[str],
    source_files: Sequence[str],
    stop: tuple[str, ...],
    ignore_end: bool,
    batch: int | None,
    chunk: int | None,
    page_size: int | None,
    cache_size: int | None,
    verify: bool,
    as_json: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int | None,
    **options: Any,
) -> int:
    from attnopt import api

    out, err = render.console(), render.console(stderr=True)
    params = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed)
    config = config_of(options, verify=verify)
    lines = given_lines(prompts, prompts_file)
    if sources and source_files:
        raise LoadError("Sources are given by --source and by --source-file; supported is one of the two.")
    given_sources = (*({"source": x} for x in sources), *({"source_file": x} for x in source_files))
    folder = Path() if prompts_file in (None, "-") else Path(prompts_file or "").parent
    with Stages(err) as stages:
        loaded = load_target(target, stages, train=False, **options)
        tokenizer = loaded.tokenizer()
        reader = Reader(tokenizer, params, stop, () if ignore_end else loaded.stop_tokens, ids, given_sources, folder)
        wanted = reader.all(prompts, lines)
        serving = cast("ServingModel", api.optimize(loaded.model, loaded.args, kwargs=loaded.kwargs, config=config, progress=stages))
    given: dict[str, Any] = {"max_requests": batch, "chunk": chunk, "page_size": page_size, "size_bytes": cache_size}
    wanted, contexts = _with_sources(serving, wanted)
    good = [i for i, p in enumerate(wanted) if not p.error]
    used = {k: v for k, v in given.items() if v is not None}
    others = [contexts[i] for i in good] if serving.plan.context else None
    engine = serving.engine_for([wanted[i].ids for i in good], [wanted[i].params for i in good], contexts=others, **used)
    if not as_json:
        introduce(out, loaded)
    run = _Run(engine, tokenizer, out, err, quiet=as_json)
    done = run.all(wanted, contexts)
    numbers = engine.statistics()
    code = FAILED if any(x.error for x in done) else DONE
    if as_json:
        facts = {
            "model": loaded.name,
            "notes": list(loaded.notes),
            "cache": cache_facts(serving) | {"pages": engine.cache.pages, "page_size": engine.cache.page_size},
        }
        verdict = serving.attnopt_report.verdict.to_dict()
        click.echo(
            json.dumps({**facts, "verdict": verdict, "results": [x.to_dict() for x in done], "statistics": _numbers(numbers), "exit_code": code}, indent=2)
        )
        return code
    out.say(_cache_words(engine, numbers), style="dim")
    out.say(_summary(done, numbers, code))
    return code


def _with_sources(serving: ServingModel, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[tuple[Tensor, ...]]]:
    """The inputs of each prompt's other sequence, none where there is none; a prompt whose source does not fit the model gets an error."""
    found: list[Prompt] = []
    contexts: list[tuple[Tensor, ...]] = []
    for prompt in prompts:
        inputs: tuple[Tensor, ...] = ()
        if not prompt.error:
            try:
                inputs = tensors(serving, prompt.source)
            except AttnoptError as error:
                prompt = replace(prompt, error=error.message)
        found.append(prompt)
        contexts.append(inputs)
    return found, contexts


@dataclass
class _Outcome:
    """What became of one prompt. Times are in seconds from the start of all of them."""

    index: int
    prompt: Prompt
    request: Request | None = None
    written: Written | None = None
    """What its tokens say; None without a tokenizer."""
    stopped: bool = False
    """By a text."""
    error: str = ""
    shown: int = field(default=0, repr=False)
    first_token_seconds: float | None = None
    seconds: float | None = None

    @property
    def tokens(self) -> list[int]:
        return [] if self.request is None else self.request.output

    @property
    def finish_reason(self) -> str:
        if self.error or self.request is None:
            return "error"
        return "stop" if self.stopped else str(self.request.finish_reason)

    @property
    def spoken(self) -> list[int]:
        """The tokens that are text: all but a stop token at the end."""
        ends = self.finish_reason == "stop" and not self.stopped and self.tokens[-1:] and self.tokens[-1] in self.prompt.params.stop_tokens
        return self.tokens[:-1] if ends else self.tokens

    def to_dict(self) -> dict[str, Any]:
        r = self.request
        return {
            "index": self.index,
            "name": self.prompt.name,
            "prompt": self.prompt.given,
            "prompt_tokens": len(self.prompt.ids),
            "tokens": self.tokens,
            "text": None if self.written is None else self.written.text,
            "finish_reason": self.finish_reason,
            "error": self.error or None,
            "seed": None if r is None else r.seed,
            "shared": 0 if r is None else r.shared,
            "preemptions": 0 if r is None else r.preemptions,
            "first_token_seconds": self.first_token_seconds,
            "seconds": self.seconds,
        }


class _Run:
    """Prompts through one engine. A single one is written as its tokens come; of several, each when it ends, under a bar with statistics."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, out: Terminal, err: Terminal, *, quiet: bool) -> None:
        self.engine, self.tokenizer, self.out, self.err, self.quiet = engine, tokenizer, out, err, quiet

    def all(self, prompts: Sequence[Prompt], contexts: Sequence[tuple[Tensor, ...]]) -> list[_Outcome]:
        start = time.perf_counter()
        streams = len(prompts) == 1 and not self.quiet
        outcomes = [self._added(i, p, c) for i, (p, c) in enumerate(zip(prompts, contexts, strict=True))]
        running = {x.request: x for x in outcomes if x.request is not None}
        total = sum(r.most for r in running)
        with contextlib.ExitStack() as stack:
            shows = self.err.is_terminal and not streams and bool(running)
            bar = stack.enter_context(ProgressBar(total, self.err, transient=True)) if shows else None
            for x in outcomes:
                if x.error:
                    self._tell(x)
            ended = 0
            while running:
                for request in self.engine.step() or ():
                    x = running[request]
                    now = time.perf_counter() - start
                    if x.first_token_seconds is None and request.output:
                        x.first_token_seconds = now
                    self._read(x)
                    if request.state == "finished":
                        x.seconds = now
                        del running[request]
                        ended += request.most
                    if streams:
                        self._stream(x)
                    elif x.seconds is not None:
                        self._tell(x)
                if bar is not None:
                    bar.update(ended + sum(len(r.output) for r in running), self.engine.statistics())
        return outcomes

    def _added(self, index: int, prompt: Prompt, context: tuple[Tensor, ...]) -> _Outcome:
        x = _Outcome(index, prompt, error=prompt.error, written=None if self.tokenizer is None else Written(self.tokenizer, prompt.stop_texts))
        if not x.error:
            try:
                x.request = self.engine.add(prompt.ids, prompt.params, context=context)
            except ServingError as error:
                x.error = error.message
        return x

    def _read(self, x: _Outcome) -> None:
        """Make text of the new tokens; a text that ends the request cancels it, a tokenizer that fails ends it with an error."""
        assert x.request is not None
        if x.request.error is not None:
            x.error = x.request.error.message
        if x.written is None:
            return
        try:
            with tokenizing():
                x.written.add(x.spoken, last=x.request.state == "finished")
        except AttnoptError as error:
            x.error, x.written = error.message, None
            self.engine.cancel(x.request)
            return
        if x.written.stopped:
            x.stopped = True
            self.engine.cancel(x.request)

    def _stream(self, x: _Outcome) -> None:
        """What is new of a single prompt's text; its ids where there is no text."""
        whole = " ".join(map(str, x.tokens)) if x.written is None else x.written.text
        self.out.out(whole[x.shown :], end="", highlight=False)
        self.out.file.flush()
        x.shown = len(whole)
        if x.seconds is not None:
            self.out.out("")
            if x.error:
                self._tell(x)

    def _tell(self, x: _Outcome) -> None:
        """The end of one of several prompts; an error in one sentence, on standard error."""
        if x.error:
            self.err.say(f"[bold red]error:[/] {escape(x.prompt.name)}: {escape(x.error)}")
        elif not self.quiet:
            self.out.say(f"[bold]{escape(x.prompt.name)}[/] [dim]{len(x.prompt.ids)} tokens, then {len(x.tokens)} ({x.finish_reason})[/]")
            self.out.out(" ".join(map(str, x.tokens)) if x.written is None else x.written.text, highlight=False)


def _numbers(s: Statistics) -> dict[str, Any]:
    return {**asdict(s), "tokens_per_second": s.tokens_per_second, "cache_use": s.cache_use}


def _cache_words(engine: Engine, s: Statistics) -> str:
    cache = engine.cache
    words = (
        f"cache of {cache.pages} pages of {cache.page_size} tokens ({cache.size_bytes / 2**20:.1f} MiB), {s.peak_pages} used at most, {s.mean_waste:.1%} waste"
    )
    return f"{s.steps} steps; {words}; {s.prefix_hits:.0%} of the prompts stood in it; {s.preemptions} preempted"


def _summary(done: list[_Outcome], s: Statistics, code: int) -> str:
    good = sum(not x.error for x in done)
    firsts = [x.first_token_seconds for x in done if x.first_token_seconds is not None]
    words = f"{good} of {len(done)} {'prompt' if len(done) == 1 else 'prompts'}, {s.generated} tokens in {s.seconds:.1f} s: {s.tokens_per_second:.1f} tokens/s"
    if firsts:
        words += f", the first {'after' if len(firsts) == 1 else 'after a median of'} {statistics.median(firsts):.2f} s"
    return f"[bold {'green' if code == DONE else 'red'}]{'Done' if code == DONE else 'Not done'}:[/] {words}"
