"""Drives a model function with a scheduler and a paged cache: ``Engine(run, cache).generate(prompts)``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from attnopt.errors import ServingError
from attnopt.runtime.block_manager import BlockManager
from attnopt.runtime.contexts import ContextCache
from attnopt.runtime.paged_cache import PagedCache
from attnopt.runtime.request import FinishReason, Request
from attnopt.runtime.sampling import Chosen, SamplingParams, sample
from attnopt.runtime.scheduler import Scheduler
from attnopt.runtime.statistics import Statistics, Sums
from attnopt.runtime.step import Step


class StepFunction(Protocol):
    """The model over packed tokens of R requests: logits [N, vocabulary] of the tokens whose places in the batch ``rows`` int64 [N] names.

    It writes keys and values of each token to ``slots`` int64 [T] of every layer of the cache, before any query of that layer reads them, and reads the first
    ``seqlens_k[r]`` keys of a request from the pages ``block_table[r]``. See ``Step`` for shapes.
    """

    def __call__(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, rows: Tensor, /
    ) -> Tensor: ...


class CrossStepFunction(Protocol):
    """The same for a model that reads another sequence: its keys and values are the first ``cross_seqlens_k[r]`` in the pages ``cross_block_table[r]`` of a ``ContextCache``."""

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        block_table: Tensor,
        cu_seqlens_q: Tensor,
        seqlens_k: Tensor,
        rows: Tensor,
        cross_block_table: Tensor,
        cross_seqlens_k: Tensor,
        /,
    ) -> Tensor: ...


@dataclass(frozen=True)
class _Flight:
    """A step that runs, and the tokens that it will have chosen."""

    step: Step
    chosen: Chosen


@dataclass(frozen=True)
class Event:
    """One token of one request, or its end (``token`` is None where it ended without one: an error, or cancelled)."""

    index: int
    """Of the prompt, in the order given."""
    token: int | None
    finish_reason: FinishReason | None = None
    error: ServingError | None = None


@dataclass(frozen=True)
class Result:
    """What became of one prompt. With ``error`` the tokens are those generated before it."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason
    error: ServingError | None = None
    seed: int | None = None
    """With it the same tokens are drawn again; None where the prompt was refused."""
    shared: int = 0
    """Prompt tokens that stood in the cache already."""
    preemptions: int = 0


class Engine:
    """Many requests through one model function. Not for use by several threads at once.

    ``window``: see ``BlockManager``. With ``run_ahead`` a step of one token a request is launched before the tokens of the step before it are read, so that the device
    need not wait for the host; what it computes of a request that ends meanwhile is dropped. By default that is so on CUDA. The other options are ``Scheduler``'s. The same ``cache`` must not be given to two engines, nor the same ``contexts``,
    which come with a function that reads another sequence.
    """

    def __init__(
        self,
        run: StepFunction | CrossStepFunction,
        cache: PagedCache,
        *,
        vocabulary: int | None = None,
        max_positions: int | None = None,
        window: int | None = None,
        prefix_sharing: bool = True,
        token_budget: int = 2048,
        chunk: int | None = None,
        max_requests: int = 256,
        contexts: ContextCache | None = None,
        prefix: int = 0,
        contiguous: bool = False,
        run_ahead: bool | None = None,
    ) -> None:
        self.run, self.cache, self.contexts = run, cache, contexts
        self.run_ahead = cache.device.type == "cuda" if run_ahead is None else run_ahead
        self._flight: _Flight | None = None
        """The step behind the last one, launched already."""
        self.manager = BlockManager(cache.pages, cache.page_size, prefix_sharing, window)
        self.scheduler = Scheduler(self.manager, token_budget, chunk, max_requests, vocabulary, max_positions, cache.device, contiguous, contexts, prefix)
        self._sums = Sums()

    # -------------------------------------------------------------------------------------------- requests

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None, salt: bytes = b"", context: Sequence[Tensor] = ()) -> Request:
        """Queue a request; ``step`` computes. ``context`` is what the other sequence that it reads is made of. Raises ServingError where it can never run."""
        return self.scheduler.add(prompt, params, salt, context)

    def fork(self, request: Request, params: SamplingParams | None = None) -> Request:
        """See ``Scheduler.fork``."""
        self._call_back()
        return self.scheduler.fork(request, params)

    def cancel(self, request: Request) -> None:
        """See ``Scheduler.cancel``."""
        self.scheduler.cancel(request)

    def step(self) -> list[Request] | None:
        """Compute one step. Returns the requests that got a token or ended by it; None where nothing is queued.

        A model function that raises is called again for each request of the step alone, and those for which it raises again end with an error; the others go on.
        """
        begin = time.perf_counter()
        if self._flight is not None and not any(r.state == "running" for r in self._flight.step.requests):
            self._call_back()
        flight, self._flight = self._flight, None
        step = self.scheduler.schedule() if flight is None else flight.step
        if step is None:
            return None
        self._measure()
        # those of a step that was launched ahead may have ended since, and were told of then
        alive = {r: len(r.output) for r in step.requests if r.state == "running"}
        try:
            tokens = self._tokens(step, flight)
        except BaseException:
            # an interrupt: the next call finds the requests as if they had been preempted
            self.scheduler.abandon(step)
            self._flight = None
            raise
        self.scheduler.complete(step, tokens)
        sampled = set(step.sampled)
        changed = [r for r in alive if r in sampled or r.state == "finished"]
        self._sums.generated += sum(len(r.output) - n for r, n in alive.items())
        self._sums.computed += sum(step.counts)
        self._sums.finished += sum(r.state == "finished" for r in alive)
        self._sums.seconds += time.perf_counter() - begin
        return changed

    def _tokens(self, step: Step, flight: _Flight | None) -> list[int | None]:
        """What the step samples. It is launched here where it is not in ``flight`` yet, and the one behind it where that can be."""
        if flight is None:
            self.cache.copy(step.copies)
            failed = self._without_context(step)
        else:
            failed = set()
        try:
            if not failed:
                chosen = self._chosen(step) if flight is None else flight.chosen
                self._launch_next(step, chosen)
                return chosen.read()
        except Exception as error:  # noqa: BLE001 - the model is the caller's and may raise anything; each request is told, none is lost
            self._call_back()
            if len(step.requests) == 1:
                self._fail(step.requests[0], error)
                return [None] * len(step.sampled)
        found: dict[Request, int | None] = {}
        for r, request in enumerate(step.requests):
            if request in failed:
                continue
            part = step.only(r)
            try:
                found.update(zip(part.sampled, self._chosen(part).read(), strict=True))
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(request, error)
        return [found.get(r) for r in step.sampled]

    def _without_context(self, step: Step) -> Set[Request]:
        """Compute the other sequences that are new in this step; the requests whose sequence the model fails on, which are told."""
        failed = set()
        for request in step.requests if self.contexts is not None else ():
            try:
                with torch.no_grad():
                    self.contexts.compute(request)  # type: ignore[union-attr]
            except Exception as error:  # noqa: BLE001 - as in _tokens
                self._fail(request, error)
                failed.add(request)
        return failed

    def _fail(self, request: Request, error: Exception) -> None:
        told = ServingError(f"The model failed on request {request.id} ({request.length} tokens): {type(error).__name__}: {error}")
        told.__cause__ = error
        self.scheduler.fail(request, told)

    def _chosen(self, step: Step) -> Chosen:
        with torch.no_grad():
            logits = self.run(*step.inputs)
        return sample(logits, [r.params for r in step.sampled], [r.seed for r in step.sampled], step.generated)

    def _launch_next(self, step: Step, chosen: Chosen) -> None:
        following = self.scheduler.schedule_next(step, chosen.tokens) if self.run_ahead else None
        if following is None:
            return
        try:
            self._flight = _Flight(following, self._chosen(following))
        except Exception:  # noqa: BLE001 - the step is made again when its tokens are known, and if the model raises then, the request is told
            self.scheduler.retract(following)

    def _call_back(self) -> None:
        """The step that was launched ahead counts no more."""
        if self._flight is not None:
            self.scheduler.retract(self._flight.step)
            self._flight = None

    # -------------------------------------------------------------------------------------------- whole prompts

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        contexts: Sequence[Sequence[Tensor]] | None = None,
    ) -> Iterator[Event]:
        """Tokens as they come, those of all prompts mixed; ``contexts`` as in ``generate``. A prompt that cannot run gives one event with its error. Closing the iterator cancels the rest."""
        requests: dict[Request, int] = {}
        try:
            yield from self._added(prompts, params, contexts, requests)
            untold = dict(requests)
            while untold:
                changed = self.step() or ()
                # the caller may cancel requests between events: all of a step are made before the first is told, and a cancelled one is told of after the next
                events = [(r, self._event(r, index)) for r, index in untold.items() if r in changed or r.state == "finished"]
                for r, event in events:
                    if event.finish_reason:
                        del untold[r]
                    yield event
        finally:
            for r in requests:
                self.cancel(r)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
        contexts: Sequence[Sequence[Tensor]] | None = None,
    ) -> list[Result]:
        """Continue each prompt (token ids), by the same rules or by rules of its own; results in the order of the prompts, each with its own error if it has one.

        ``contexts``: for a model that reads another sequence, what that of each prompt is made of, each tensor a batch of one.
        ``progress`` shows a bar with live statistics on standard error.
        """
        requests: dict[Request, int] = {}
        results: dict[int, Result] = {}
        try:
            for event in self._added(prompts, params, contexts, requests):
                results[event.index] = Result((), "error", event.error)
            if progress:
                from attnopt.runtime.progress import ProgressBar

                with ProgressBar(sum(r.most for r in requests)) as bar:
                    while any(r.state != "finished" for r in requests):
                        self.step()
                        bar.update(sum(r.most if r.state == "finished" else len(r.output) for r in requests), self.statistics())
            while any(r.state != "finished" for r in requests):
                self.step()
        finally:
            for r in requests:
                self.cancel(r)
        for r, index in requests.items():
            assert r.finish_reason is not None
            results[index] = Result(tuple(r.output), r.finish_reason, r.error, r.seed, r.shared, r.preemptions)
        return [results[i] for i in range(len(prompts))]

    def _added(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        contexts: Sequence[Sequence[Tensor]] | None,
        requests: dict[Request, int],
    ) -> Iterator[Event]:
        """Fill ``requests``; an event for each prompt that is refused."""
        rules = [params or SamplingParams()] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(rules) != len(prompts):
            raise ServingError(f"There are {len(prompts)} prompts and {len(rules)} sampling parameters; give one for all, or one for each.")
        others = [()] * len(prompts) if contexts is None else contexts
        if len(others) != len(prompts):
            raise ServingError(f"There are {len(prompts)} prompts and {len(others)} contexts; give one for each.")
        for i, (prompt, p, context) in enumerate(zip(prompts, rules, others, strict=True)):
            try:
                requests[self.add(prompt, p, context=context)] = i
            except ServingError as error:
                yield Event(i, None, "error", error)

    def _event(self, request: Request, index: int) -> Event:
        token = request.output[-1] if request.output and request.finish_reason not in ("error", "cancelled") else None
        return Event(index, token, request.finish_reason, request.error)

    # -------------------------------------------------------------------------------------------- statistics

    def _measure(self) -> None:
        running = self.scheduler.running
        self._sums.add(self.manager.usage(), [self.manager.length(r.id) for r in running], [len(r.prompt) + r.most for r in running])

    def statistics(self) -> Statistics:
        s, scheduler = self._sums, self.scheduler
        return Statistics(
            seconds=s.seconds,
            steps=s.steps,
            generated=s.generated,
            computed=s.computed,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            finished=s.finished,
            preemptions=scheduler.preemptions,
            prefix_hits=scheduler.shared_tokens / scheduler.admitted_tokens if scheduler.admitted_tokens else 0.0,
            usage=self.manager.usage(),
            peak_pages=s.peak_pages,
            mean_waste=Sums.waste(s.filled, s.allocated),
            mean_padded_waste=Sums.waste(s.tokens, s.padded),
            mean_reserved_waste=Sums.waste(s.tokens, s.reserved),
        )
