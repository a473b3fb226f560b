"""Which tokens of which requests the next step computes: continuous batching in order of arrival.

Requests in their context phase (a prompt, in chunks) and in their generation phase (one token) run in one step. The oldest request always gets ahead: it has a
token in every step, and when pages run out the youngest gives its own back and computes its tokens again later. So each request ends, whatever arrives.
"""

from __future__ import annotations

import bisect
import secrets
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.errors import ServingError
from attnopt.runtime.block_manager import BlockManager
from attnopt.runtime.contexts import ContextCache
from attnopt.runtime.request import FinishReason, Request, checked_prompt
from attnopt.runtime.sampling import SamplingParams
from attnopt.runtime.step import Step, make_next_step, make_step


class Scheduler:
    """``token_budget`` tokens a step at most; ``chunk``: of one request's prompt at most (None: the budget); ``max_requests`` running at once.

    ``vocabulary`` and ``max_positions`` are the model's; None where unknown and unlimited. ``contiguous``: a request has one page and never a second.
    ``contexts`` holds the other sequences, for a model that reads such.
    ``prefix``: so many first tokens of a request see each other, later ones too, so one step computes them all.
    """

    def __init__(
        self,
        manager: BlockManager,
        token_budget: int = 2048,
        chunk: int | None = None,
        max_requests: int = 256,
        vocabulary: int | None = None,
        max_positions: int | None = None,
        device: torch.device | str = "cpu",
        contiguous: bool = False,
        contexts: ContextCache | None = None,
        prefix: int = 0,
    ) -> None:
        chunk = token_budget if chunk is None else chunk
        for name, value in (("token_budget", token_budget), ("chunk", chunk), ("max_requests", max_requests)):
            if value < 1:
                raise ServingError(f"{name} is {value}; it must be at least 1.")
        self.manager, self.token_budget, self.chunk, self.max_requests = manager, token_budget, min(chunk, token_budget), max_requests
        self.vocabulary, self.max_positions, self.device = vocabulary, max_positions, device
        self.contiguous = contiguous
        self.contexts, self.prefix = contexts, prefix
        if self.chunk < prefix:
            text = f"The first {prefix} tokens of a request see each other, so that one step computes them all, and steps take {self.chunk} of one request (chunk, token_budget)"
            raise ServingError(f"{text}; supported are {prefix} or more.")
        self.waiting: list[Request] = []
        """By arrival; preempted ones are put back where they came."""
        self.running: list[Request] = []
        """By arrival."""
        self.preemptions = 0
        self.shared_tokens = 0
        """Prompt tokens that were found in the cache, of ``admitted_tokens``; recomputed ones after a preemption are not counted."""
        self.admitted_tokens = 0
        self._arrivals = 0
        self._in_flight: list[Step] = []
        """Oldest first: one, or the one behind it too (``schedule_next``)."""
        self._longest = self._capacity()

    def _capacity(self) -> int:
        """How many tokens a request may have keys and values of."""
        pages, size = self.manager.pages, self.manager.page_size
        unlimited = self.manager.window is not None and self.manager.pages_for(1 << 40, self.chunk) <= pages
        held = None if unlimited else size if self.contiguous else pages * size
        return min(x for x in (held, self.max_positions, 1 << 40) if x is not None)

    # -------------------------------------------------------------------------------------------- requests

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None, salt: bytes = b"", context: Sequence[Tensor] = ()) -> Request:
        """Put a request at the end of the queue. Raises ServingError for a prompt that can never run; nothing else is touched then."""
        params = params or SamplingParams()
        by_model = self.max_positions is not None and self._longest == self.max_positions
        cache = f"the page of {self.manager.page_size} that each request has" if self.contiguous else f"the cache of {self.manager.pages} pages of {self.manager.page_size}"
        why = "the model has positions for" if by_model else f"{cache} can hold"
        tokens = checked_prompt(prompt, self.vocabulary, self._longest, why)
        if len(tokens) < self.prefix:
            text = f"The prompt has {len(tokens)} tokens, and the first {self.prefix} of the model see each other: what is generated among them would change what came before"
            raise ServingError(f"{text}; supported are prompts of {self.prefix} tokens or more.")
        # what is kept of a page depends on its tokens, those before them, and on all of the prefix
        salt += array("q", tokens[: self.prefix]).tobytes()
        if bool(context) != (self.contexts is not None):
            what = "reads no other sequence, and one was given" if context else "reads another sequence, and none was given"
            raise ServingError(f"The model {what}.")
        name = b"" if self.contexts is None else self.contexts.name(context)
        return self._queued(Request(self._arrivals, tokens, params, self._seed(params), self._most(len(tokens), params), salt + name, tuple(context), name))

    def fork(self, request: Request, params: SamplingParams | None = None) -> Request:
        """A request that goes on from where ``request`` is, under rules of its own; it holds the same pages until either of them writes to one."""
        self._not_in_flight("fork")
        if request.state == "finished":
            raise ServingError(f"Request {request.id} is finished; only one that waits or runs can be forked.")
        params = params or request.params
        most = self._most(request.length, params)
        child = Request(self._arrivals, request.tokens, params, self._seed(params), most, request.salt, request.context, request.context_name)
        if request.state != "running" or len(self.running) >= self.max_requests:
            return self._queued(child)
        self._arrivals += 1
        self.manager.fork(request.id, child.id)
        if self.contexts is not None:
            self.contexts.share(request, child)
        child.computed = child.shared = request.computed
        child.state = "running"
        self.running.append(child)
        return child

    def cancel(self, request: Request) -> None:
        """End a request now; what it has generated stays in it. One that is finished stays as it is."""
        if request.state != "finished":
            self._finish(request, "cancelled")

    def fail(self, request: Request, error: ServingError) -> None:
        """End a request with an error that is its own."""
        if request.state != "finished":
            request.error = error
            self._finish(request, "error")

    def _queued(self, request: Request) -> Request:
        self._arrivals += 1
        self.waiting.append(request)
        return request

    def _seed(self, params: SamplingParams) -> int:
        return secrets.randbits(64) if params.seed is None else params.seed

    def _most(self, prompt: int, params: SamplingParams) -> int:
        # the last token is returned and never computed, so it needs no slot
        return min(params.max_new_tokens, self._longest - prompt + 1)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.state == "running":
            # after an error nobody knows whether its keys and values are sound: a retry must not begin with them
            self.manager.free(request.id, trusted=reason != "error")
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        if self.contexts is not None:
            self.contexts.free(request)
        request.state, request.finish_reason, request.context = "finished", reason, ()

    # -------------------------------------------------------------------------------------------- a step

    def schedule(self) -> Step | None:
        """The next step; None where there is nothing to do. Each step goes back to ``complete`` before the next is made."""
        self._not_in_flight("schedule")
        chosen: dict[Request, int] = {}
        copies: dict[int, int] = {}
        preempted = self._grow_running(chosen, copies)
        if not preempted:
            self._admit(chosen)
        if not chosen:
            assert not self.busy, "requests wait and none could run"
            return None
        pairs = [(source, target) for target, source in copies.items()]
        step = make_step(list(chosen), list(chosen.values()), self.manager, pairs, self.device, self.contexts)
        self._in_flight.append(step)
        return step

    def schedule_next(self, step: Step, tokens: Tensor) -> Step | None:
        """The step behind one that still runs: of a token more of each request that goes on, whatever ``tokens`` int64 [N], those that ``step`` samples, turn out to be.

        None where the next step may be another: requests wait or have more to compute, pages run out, or all end. It goes back to ``complete`` after ``step``, where the
        tokens of requests that have ended since are left out, or to ``retract``.
        """
        kept = [i for i, r in enumerate(step.sampled) if len(r.output) + 1 < r.most]
        alike = not self.waiting and len(self.running) == len(step.sampled) and all(r.state == "running" for r in step.sampled)
        if self._in_flight != [step] or not alike or not 0 < len(kept) <= self.token_budget:
            return None
        if not self.manager.append_one_each([step.sampled[i].id for i in kept]):
            return None
        following = make_next_step(step, kept, tokens, self.manager, self.device, self.contexts)
        self._in_flight.append(following)
        return following

    def retract(self, step: Step) -> None:
        """Take back a step of ``schedule_next`` as if it had not been made: its tokens are computed again."""
        if self._in_flight[-1:] != [step]:
            raise ServingError("This step is not the one that was scheduled last.")
        self._in_flight.pop()
        for request in step.requests:
            if request.state == "running":
                self.manager.retract(request.id)

    def complete(self, step: Step, tokens: Sequence[int | None]) -> None:
        """Take back a step with the token sampled for each of ``step.sampled``; None, and ids outside of the vocabulary, end that request with an error."""
        if self._in_flight[:1] != [step]:
            raise ServingError("This step is not the oldest that schedule() gave.")
        if len(tokens) != len(step.sampled):
            raise ServingError(f"The step samples {len(step.sampled)} tokens and was given {len(tokens)}.")
        self._in_flight.pop(0)
        for request, n in zip(step.requests, step.counts, strict=True):
            if request.state == "running":
                self.manager.commit(request.id, request.slice(request.computed, request.computed + n))
                request.computed += n
        for request, token in zip(step.sampled, tokens, strict=True):
            if request.state != "running":
                continue  # cancelled, or failed, while the step ran
            if token is None or not 0 <= token < (self.vocabulary or token + 1):
                what = "logits from which no token can be chosen (NaN, or all -inf)" if token is None else f"the token {token}, of {self.vocabulary}"
                self.fail(request, ServingError(f"The model gave request {request.id} {what} after {request.length} tokens."))
                continue
            request.output.append(token)
            if token in request.params.stop_tokens:
                self._finish(request, "stop")
            elif len(request.output) == request.params.max_new_tokens:
                self._finish(request, "length")
            elif len(request.output) == request.most:
                self._finish(request, "capacity")

    def abandon(self, step: Step) -> None:
        """The step did not run to its end and nothing is known of what it wrote, nor of the one behind it: its requests compute all their tokens again."""
        if self._in_flight[:1] == [step]:
            self._in_flight.clear()
            for request in step.requests:
                if request.state == "running":
                    self._preempt(request)

    def _not_in_flight(self, what: str) -> None:
        if self._in_flight:
            raise ServingError(f"{what} was called while a step runs; give that step to complete() first.")

    def _grow_running(self, chosen: dict[Request, int], copies: dict[int, int]) -> bool:
        """Slots for the running requests, oldest first. Returns whether one was preempted."""
        wanted = self._shares()
        preempted = False
        for request in list(self.running):
            n = wanted.get(request, 0)
            while n and request.state == "running":
                fits = min(n, self.manager.room(request.id))
                if fits:
                    copy = self.manager.append(request.id, fits)
                    if copy is not None:
                        copies[copy[1]] = copy[0]
                    chosen[request] = fits
                    break
                # the youngest gives way, perhaps to itself: all that have slots in this step are older
                self._preempt(self.running[-1])
                preempted = True
        return preempted

    def _shares(self) -> dict[Request, int]:
        """Tokens of the budget for each running request: one for the oldest, one for each that generates, then prompts by arrival."""
        left, shares = self.token_budget, {}
        for request in self.running:
            if left and (request is self.running[0] or request.remaining == 1):
                shares[request] = 1
                left -= 1
        for request in self.running:
            more = min(left, min(request.remaining, self.chunk) - shares.get(request, 0))
            if more > 0:
                shares[request] = shares.get(request, 0) + more
                left -= more
        return shares

    def _preempt(self, request: Request) -> None:
        """Its pages go; it waits where it came and computes its tokens again. What it generated stays, and so does its other sequence."""
        self.manager.free(request.id)
        self.running.remove(request)
        request.state, request.computed = "waiting", 0
        request.preemptions += 1
        self.preemptions += 1
        bisect.insort(self.waiting, request, key=lambda r: r.id)

    def _admit(self, chosen: dict[Request, int]) -> None:
        """Waiting requests, oldest first, while budget, places and pages last."""
        left = self.token_budget - sum(chosen.values())
        pending = self._pending()
        # pages that those who run will need for the rest of what they have to compute
        promised = sum(max(0, self.manager.pages_for(r.length, self.chunk) - self.manager.held(r.id)) for r in self.running)
        crowded = False
        for request in list(self.waiting):
            if left < max(1, min(self.prefix, request.length)) or len(self.running) >= self.max_requests:
                break
            hashes = self._hashes(request)
            stored, reusable = self.manager.match(hashes)
            if stored < len(hashes) and hashes[stored] in pending:
                continue  # another computes just this page now: wait for it instead of computing it twice
            needed = max(0, self.manager.pages_for(request.length, self.chunk) - stored) + reusable
            if needed + promised > self.manager.available and self.running:
                break  # those behind it do not overtake
            if self.contexts is not None and not self.contexts.holds(request):
                # those behind it that hold theirs from before a preemption go on, or nobody would ever give pages back; others do not overtake
                crowded = crowded or not self.contexts.hold(request)
                if crowded:
                    continue
            n, needed_now = self._start(request, left)
            chosen[request] = n
            left -= n
            promised += max(0, needed - reusable - needed_now)
            pending.update(hashes[stored:])

    def _start(self, request: Request, left: int) -> tuple[int, int]:
        """Admit one request. Returns how many of its tokens this step computes, and how many pages it took for that."""
        tokens = request.tokens
        request.computed = self.manager.allocate(request.id, tokens, request.salt)
        if not request.preemptions:
            request.shared = request.computed
            self.shared_tokens += request.computed
            self.admitted_tokens += len(tokens)
        before = self.manager.available
        n = min(left, self.chunk, request.remaining, self.manager.room(request.id))
        assert n >= max(1, self.prefix - request.computed), "a request that was admitted has no room"
        self.manager.append(request.id, n)
        request.state = "running"
        self.waiting.remove(request)
        bisect.insort(self.running, request, key=lambda r: r.id)
        return n, before - self.manager.available

    def _hashes(self, request: Request) -> list[bytes]:
        if not self.manager.prefix_sharing:
            return []
        if len(request.hashes) != (request.length - 1) // self.manager.page_size:
            request.hashes = self.manager.page_hashes(request.tokens[:-1], request.salt)
        return request.hashes

    def _pending(self) -> set[bytes]:
        """Full pages that running requests have yet to compute of tokens that are known."""
        found: set[bytes] = set()
        for request in self.running:
            if request.remaining > 1:
                found.update(self._hashes(request)[request.computed // self.manager.page_size :])
        return found
