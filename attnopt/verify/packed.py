"""A packed graph beside the original: random ragged requests, each computed alone by the original, and together by the packed graph, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnopt.kernels.paged_reference import GREATEST
from attnopt.passes.insert_kv_cache import PackedPlan
from attnopt.report import Check, Verdict
from attnopt.verify.budget import computing_dtype, judge
from attnopt.verify.choices import Choices, PackedChoices, Unlike, finite, same_choices, scores_by_token
from attnopt.verify.end_to_end import Progress
from attnopt.verify.modules import double, float64_copy, in_float64

PAGE_SIZE = 16
CHUNKS = (1, 7, 1 << 20)
"""Tokens of a request in one call: one by one, in part, all at once."""
LENGTHS = (5, 23, 1, 17)
LONG = 64
"""A request is made longer than the longest window up to this, and no longer."""

Run = Callable[..., Tensor]
"""``run(tokens, positions, rows, slots, block_table, cu_seqlens_q, seqlens_k, [cross_block_table, cross_seqlens_k,] *caches) -> logits``."""
Call = tuple[tuple[object, ...], dict[str, object]]
Alone = Callable[[Tensor, int], Call]
"""The call of the original for the ids [1, n] of a request, by its number."""
Encode = Callable[[int], Sequence[tuple[Tensor, Tensor]]]
"""Keys and values of a request's other sequence, for each layer that reads one."""


Forced = list[tuple[Tensor, Choices]]
"""Of each request, what a model gives that chooses as another did, and its scores."""


@dataclass(frozen=True)
class Stated:
    """A model with the error that an approximate one is stated to have: that one may be as far from the truth, where an exact one may be as far as the original."""

    run: Run
    plan: PackedPlan
    detail: str


@dataclass
class Requests:
    """Packed tokens of some requests over pages in random order, whose unused entries hold NaN."""

    plan: PackedPlan
    ids: Sequence[Tensor]
    device: torch.device
    contexts: Sequence[Sequence[tuple[Tensor, Tensor]]] = ()
    """Of each request, keys and values of its other sequence for each layer that reads one."""

    def __post_init__(self) -> None:
        self.at: tuple[Tensor, Tensor]
        """Request and position of each token of the current call."""
        self.block_table = self._table([len(x) for x in self.ids], 17)
        lengths = [len(x[0][0]) for x in self.contexts]
        self.cross = [self._table(lengths, 19), torch.tensor(lengths, dtype=torch.int32, device=self.device)] if lengths else []
        self.caches: list[Tensor] = []
        crossing = 0
        for layer in self.plan.layers:
            table = self.cross[0] if layer.cross else self.block_table
            for which, d in enumerate((layer.D, layer.Dv)):
                # what 8 bits cannot say, their scales do
                cache = torch.zeros((table.numel(), PAGE_SIZE, layer.Hkv, d), dtype=layer.dtype, device=self.device)
                cache = cache if layer.dtype in GREATEST else cache.fill_(torch.nan)
                for r, context in enumerate(self.contexts if layer.cross else ()):
                    x = context[crossing][which]
                    place = torch.arange(len(x), device=self.device)
                    cache[table[r, place // PAGE_SIZE].long(), place % PAGE_SIZE] = x
                self.caches.append(cache)
            if layer.dtype in GREATEST:
                # by head in each page, as where it is served
                self.caches += [torch.full((table.numel(), layer.Hkv, PAGE_SIZE), torch.nan, device=self.device).transpose(1, 2) for _ in range(2)]
            crossing += layer.cross

    def _table(self, lengths: Sequence[int], seed: int) -> Tensor:
        """Pages for each request, in random order."""
        width = max(-(-n // PAGE_SIZE) for n in lengths)
        pages = torch.randperm(len(lengths) * width, generator=torch.Generator().manual_seed(seed))
        return pages.view(len(lengths), width).to(self.device, torch.int32)

    def logits(self, run: Run, chunk: int) -> list[Tensor]:
        """Logits [n, V] of all tokens of each request, ``chunk`` tokens of each in a call."""
        found: list[list[Tensor]] = [[] for _ in self.ids]
        done = [0] * len(self.ids)
        while left := [r for r, x in enumerate(self.ids) if done[r] < len(x)]:
            counts = [min(chunk if done[r] else max(chunk, self.plan.prefix), len(self.ids[r]) - done[r]) for r in left]
            tokens = torch.cat([self.ids[r][done[r] : done[r] + n] for r, n in zip(left, counts, strict=True)])
            positions = torch.cat([torch.arange(done[r], done[r] + n, device=self.device) for r, n in zip(left, counts, strict=True)])
            requests = torch.repeat_interleave(torch.tensor(left, device=self.device), torch.tensor(counts, device=self.device))
            slots = self.block_table[requests, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
            for r, n in zip(left, counts, strict=True):
                done[r] += n
            ends = torch.tensor([0, *counts]).cumsum(0).to(self.device, torch.int32)
            lengths = torch.tensor([done[r] for r in left], device=self.device, dtype=torch.int32)
            rows = torch.arange(len(tokens), device=self.device)
            self.at = requests, positions
            out = run(tokens, positions, rows, slots, self.block_table[left], ends, lengths, *(x[left] for x in self.cross), *self.caches)
            for r, part in zip(left, out.split(counts), strict=True):
                found[r].append(part)
        return [torch.cat(x) for x in found]


def verify_packed(
    original: nn.Module, run: Run, plan: PackedPlan, example: Tensor, alone: Alone, logits: Callable[[object], Tensor], encode: Encode | None = None, progress: Progress | None = None,
    stated: Stated | None = None,
) -> Verdict:
    """Compare on ragged requests whose ids are drawn from those of ``example`` [B, S].

    ``alone`` makes the original's call for one request, ``encode`` what it keeps of another sequence, and ``logits`` takes [1, n, V], or [1, 1, V] of the last token, out of its result. The truth is a
    float64 copy of a small original. With ``stated`` the budget is that model's error, instead of the original's.
    """
    seen = example.flatten()
    if seen.is_meta:
        return Verdict()
    windows = [layer.window or 0 for layer in plan.layers]
    before = max(0, plan.prefix - 1)
    longest = min(before + LONG, plan.max_positions or before + LONG)
    lengths = [min(before + n, longest) for n in (*LENGTHS, min(max(windows) + PAGE_SIZE, LONG) if any(windows) else LENGTHS[0])]
    generator = torch.Generator().manual_seed(13)
    ids = [seen[torch.randint(len(seen), (n,), generator=generator).to(seen.device)] for n in lengths]
    exact, why = float64_copy(original)
    with torch.no_grad():
        expected, chosen = [], []
        for r, x in enumerate(ids):
            with Choices() as choices:
                expected.append(computed_alone(original, alone(x[None], r), logits))
            chosen.append(choices)
        truth: list[Tensor] | None = None
        forced: Forced | None = None
        if exact is not None:
            doubled = [double(alone(x[None], r)) for r, x in enumerate(ids)]
            truth, why = in_float64(lambda: [computed_alone(exact, call, logits) for call in doubled])
            if truth is not None and chosen[0].taken:
                forced = _forced(exact, doubled, chosen, logits)
        detail = "" if truth is not None else f"against the original at its own dtype ({why})"
        checks: list[Check] = []
        for i, chunk in enumerate(CHUNKS):
            if progress is not None:
                progress("comparing packed requests", i, len(CHUNKS))
            contexts = [] if encode is None else [encode(r) for r in range(len(ids))]
            packed = [(run, plan)] if stated is None else [(run, plan), (stated.run, stated.plan)]
            got, *others = [[x[-len(e) :] for x, e in zip(Requests(p, ids, seen.device, contexts).logits(f, chunk), expected, strict=True)] for f, p in packed]
            name = f"packed requests of {', '.join(map(str, lengths))} tokens, {'whole' if chunk > max(lengths) else f'chunks of {chunk}'}"
            if stated is not None:
                said = "; ".join(x for x in (stated.detail, detail) if x)
                checks.append(judge(name, got, others[0], expected if truth is None else truth, expected[0].dtype, stated=True, detail=said))
                continue
            check = judge(name, got, expected, truth, expected[0].dtype, detail=detail)
            if chosen[0].taken and (truth is None or forced is not None):
                check = _given_choices(check, Requests(plan, ids, seen.device, contexts), run, chunk, expected, chosen, forced) or check
            checks.append(check)
    return Verdict(all(c.passed for c in checks), checks)


def computed_alone(model: nn.Module, call: Call, logits: Callable[[object], Tensor]) -> Tensor:
    args, kwargs = call
    return logits(model(*args, **kwargs))[0]


def _forced(exact: nn.Module, calls: Sequence[Call], chosen: Sequence[Choices], logits: Callable[[object], Tensor]) -> Forced | None:
    """The float64 truth of each request, and its scores, where it chooses as the original did; None where its choices are not the same in kind."""
    found = []
    for call, choices in zip(calls, chosen, strict=True):
        try:
            with Choices(same_choices(choices)) as mode:
                found.append((computed_alone(exact, call, logits), mode))
        except Unlike:
            return None
    return found if all(mode.kinds == c.kinds for (_, mode), c in zip(found, chosen, strict=True)) else None


def _given_choices(
    check: Check,
    requests: Requests,
    run: Run,
    chunk: int,
    expected: Sequence[Tensor],
    chosen: Sequence[Choices],
    truth: Forced | None,
) -> Check | None:
    """The same comparison given the original's choices, with the scores by which others would have been made (``verify/choices``); None where all choose alike.

    ``truth`` is under these choices too; where there is none both are compared with each other, as ever. It counts as well where the truth alone chooses otherwise: the
    original is far from it then, and would allow as much.
    """
    lengths = [len(x) for x in requests.ids]
    try:
        packed = PackedChoices(chosen, lengths)
        got = [x[-len(e) :] for x, e in zip(requests.logits(lambda *inputs: packed.run(lambda: run(*inputs), *requests.at), chunk), expected, strict=True)]
        if not packed.differ and not any(c.differ for _, c in truth or ()):
            return None
        runs = [packed.scores, scores_by_token(chosen, lengths)]
        if truth is not None:
            runs.append(scores_by_token([c for _, c in truth], lengths))
    except Unlike:
        return None
    parts = [judge(check.name, got, expected, None if truth is None else [x for x, _ in truth], expected[0].dtype)]
    for which in range(packed.count):
        mine, own, *exact = finite(*(torch.cat([x[which].flatten(0, 1) for x in requests_]) for requests_ in runs))
        # often float32, of what was computed in the model's dtype
        parts.append(judge(check.name, [mine], [own], exact or None, computing_dtype([own, expected[0]])))
    worst = max(parts, key=lambda c: (not c.passed, c.error / c.budget if c.budget else math.inf))
    how = f"given the original's choices: {packed.differ} of {packed.rows} would be others, by scores that are compared too"
    return Check(check.name, worst.error, worst.budget, worst.passed, "; ".join(x for x in (check.detail, how) if x))
