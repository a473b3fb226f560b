"""From logits to the next token, each row by its own rules.

Random numbers come from a counter: the number for a request's n-th token is a function of its seed and n alone, so a request's tokens do not depend on what
else ran in its batch, on chunks, or on a preemption (as far as its logits do not).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.errors import ServingError
from attnopt.runtime.transfer import on_device

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. Raises ServingError for values out of range."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """Logits are divided by it; 0 is greedy: the most likely token, of equal ones the lowest id."""
    top_k: int | None = None
    """Only the k most likely tokens; None for all."""
    top_p: float = 1.0
    """Only the most likely tokens whose probabilities first add up to p; at least one."""
    seed: int | None = None
    """None: one is drawn when the request is added, and stands in its result."""
    stop_tokens: tuple[int, ...] = ()
    """Generation ends with the first of these, which is the last token of the result."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ServingError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ServingError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if self.top_k is not None and self.top_k < 1:
            raise ServingError(f"top_k is {self.top_k}; it must be at least 1, or None for all tokens.")
        if not 0 < self.top_p <= 1:
            raise ServingError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if self.seed is not None and not 0 <= self.seed <= _MASK:
            raise ServingError(f"seed is {self.seed}; it must be from 0 to 2**64 - 1.")


def _mixed(x: int) -> int:
    """A bijection of 64 bits in which every bit of the input changes half of the output (the finalizer of SplitMix64: Steele, Lea, Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1) for the ``counter``-th draw of a seed: 53 bits."""
    return (_mixed((_mixed(seed) + (counter + 1) * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53


class Chosen:
    """The next token of each row: ``tokens`` int64 [N] on the device of the logits, where it may still be computed, and ``read`` for the host."""

    def __init__(self, tokens: Tensor, greatest: Tensor) -> None:
        self.tokens = tokens
        found = torch.stack([tokens.double(), greatest.double()])
        self._ready: torch.cuda.Event | None = None
        if found.is_cuda:
            # on its way before any later step is launched, behind which the host would wait otherwise
            self._found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._found = found

    def read(self) -> list[int | None]:
        """Waits for the device. None where a row has a NaN, or no finite logit and no +inf to choose."""
        if self._ready is not None:
            self._ready.synchronize()
        tokens, greatest = self._found.tolist()
        return [None if x != x or x == -math.inf else int(token) for token, x in zip(tokens, greatest, strict=True)]


def sample(logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], counters: Sequence[int]) -> Chosen:
    """The next token of each row of logits [N, V]. ``counters`` is how many tokens each row's request has generated so far."""
    if logits.dim() != 2 or len(logits) != len(params):
        raise ServingError(f"The model gave logits {tuple(logits.shape)} where {len(params)} rows [N, vocabulary] were wanted.")
    # a row with a NaN has its greatest there, and one of -inf alone has -inf
    best = logits.argmax(-1, keepdim=True)
    greatest, chosen = logits.gather(-1, best).squeeze(-1), best.squeeze(-1)
    rows = [i for i, p in enumerate(params) if p.temperature > 0 and p.top_k != 1]
    if rows:
        drawn = [params[i] for i in rows], [uniform(seeds[i], counters[i]) for i in rows]
        if len(rows) == len(params):
            chosen = _drawn(logits.double(), *drawn)
        else:
            (which,) = on_device((rows,), torch.int64, logits.device)
            chosen = chosen.index_copy(0, which, _drawn(logits[which].double(), *drawn))
    return Chosen(chosen, greatest)


def _drawn(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> Tensor:
    """One token a row by the inverse of its cumulative probabilities, most likely first: x float64 [N, V] -> int64 [N]. Any where a row has a NaN."""
    V = logits.shape[1]
    columns = on_device(
        ([x.temperature for x in params], [x.top_k or V for x in params], [x.top_p for x in params], draws), torch.float64, logits.device
    )
    temperature, top_k, top_p, draw = (x.unsqueeze(-1) for x in columns)
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    # shifted first: a tiny temperature must not make inf - inf out of finite logits; rows with +inf choose among those alone
    shifted = torch.where(ordered == ordered[:, :1], 0.0, ordered - ordered[:, :1])
    p = (shifted / temperature).softmax(-1)
    rank = torch.arange(V, device=logits.device)
    p = p.masked_fill(rank >= top_k, 0.0)
    p = p / p.sum(-1, keepdim=True)
    before = p.cumsum(-1) - p
    p = p.masked_fill((before >= top_p) & (rank > 0), 0.0)
    total = p.cumsum(-1)
    place = torch.searchsorted(total, draw * total[:, -1:], right=True)
    # rounding may put the draw past the last token that has a probability
    last = ((p > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    return ids.gather(-1, torch.minimum(place, last)).squeeze(-1)
