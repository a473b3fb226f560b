"""A decoder over caches of a fixed length in another runtime: ragged rows in prompts, tokens and chunks, each beside the original on that row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attnopt.report import Check, Verdict
from attnopt.verify.budget import judge
from attnopt.verify.end_to_end import Progress
from attnopt.verify.modules import double, float64_copy, in_float64
from attnopt.verify.packed import LONG, Alone, Call, computed_alone

PROMPT = 7
BATCHES = (1, 3)
STEPS = 3
"""Tokens one by one after each prompt."""
GARBAGE = 9.0
"""What caches hold where nothing was written."""

Run = Callable[[Tensor, Tensor, Sequence[Tensor]], Sequence[Tensor]]
"""``run(input_ids, write_indices, caches) -> [logits, *caches]``."""


def verify_static(
    original: nn.Module, run: Run, caches: Callable[[int, float], list[Tensor]], max_length: int, window: int, tokens: Tensor, alone: Alone, logits: Callable[[object], Tensor],
    progress: Progress | None = None,
) -> Verdict:
    """Each row is a sequence of its own length, drawn from ``tokens``; padding stands behind its tokens, and is not compared.

    ``caches`` makes those of a batch with a given fill, of ``max_length`` slots. The schedule is a prompt (beyond ``window``, the longest of the model, 0 where there is none), tokens one by one, a
    chunk and, where a cache is not long, as many as fill it. ``alone`` and ``logits`` as in ``verify_packed``. Slots that a call does not write have to stay as they were.
    """
    exact, why = float64_copy(original)
    checks: list[Check] = []
    drawn = torch.Generator().manual_seed(23)
    seen = tokens.flatten()
    schedules = [(batch, schedule(batch, max_length, window)) for batch in BATCHES]
    for i, (batch, calls) in enumerate(schedules):
        if progress is not None:
            progress(f"comparing a static cache, {batch} rows", i, len(schedules))
        ids = seen[torch.randint(len(seen), (batch, max_length), generator=drawn)]
        state, done = caches(batch, GARBAGE), [0] * batch
        for name, counts in calls:
            width = max(counts)
            given = seen[:1].repeat(batch, width)
            for b, n in enumerate(counts):
                given[b, :n] = ids[b, done[b] : done[b] + n]
            starts = torch.tensor(done)
            out = run(given, starts, state)
            done = [d + n for d, n in zip(done, counts, strict=True)]
            with torch.no_grad():
                rows = [alone(ids[b : b + 1, :d], 0) for b, d in enumerate(done)]
                expected = _of_rows(original, rows, counts, logits)
                truth: list[Tensor] | None = None
                if exact is not None:
                    truth, why = in_float64(_of_rows, exact, double(rows), counts, logits)
                    exact = None if why else exact
            detail = "" if truth is not None else f"against the original at its own dtype ({why})"
            got = [out[0][b, n - len(e) : n] for b, (e, n) in enumerate(zip(expected, counts, strict=True))]
            label = f"static cache of {max_length}, rows at {', '.join(map(str, done))}: {name}"
            checks += [judge(label, got, expected, truth, expected[0].dtype, detail=detail), _kept(label, state, out[1:], starts, width)]
            state = list(out[1:])
    return Verdict(all(c.passed for c in checks), checks)


def _of_rows(model: nn.Module, rows: Sequence[Call], counts: Sequence[int], logits: Callable[[object], Tensor]) -> list[Tensor]:
    """Logits of the last tokens of each row by itself."""
    return [computed_alone(model, call, logits)[-n:] for call, n in zip(rows, counts, strict=True)]


def schedule(batch: int, max_length: int, window: int) -> list[tuple[str, list[int]]]:
    """Calls by name, with the number of tokens of each row. No call writes beyond ``max_length``, its padding included."""
    first = min(max(PROMPT, window + 2 if window <= LONG else 0), max(1, max_length - STEPS))
    calls = [("prompt", [max(1, first - 3 * b) for b in range(batch)])]
    most = first
    filled = [None] if max_length <= LONG + window else []
    for n, name in (*[(1, f"token {i + 1}") for i in range(STEPS)], (3, "chunk"), *[(n, "full") for n in filled]):
        n = max_length - most if n is None else n
        if 0 < n <= max_length - most:
            calls.append((name, [max(1, n - b) for b in range(batch)]))
            most += n
    return calls


def _kept(name: str, before: Sequence[Tensor], after: Sequence[Tensor], starts: Tensor, width: int) -> Check:
    """Whether caches have their size still, and other slots than those written what they had."""
    wrong = 0
    for old, new in zip(before, after, strict=True):
        place = torch.arange(old.shape[2])
        other = (place < starts[:, None]) | (place >= starts[:, None] + width)
        wrong += int(old.shape != new.shape) or int((old != new).any(-1).transpose(1, 2)[other].any())
    return Check(f"{name}: other slots", float(wrong), 0.0, wrong == 0, f"{wrong} of {len(before)} caches changed" if wrong else "")
