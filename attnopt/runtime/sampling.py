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


def sample(logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], counters: Sequence[int]) -> list[int | None]:
    """The next token of each row of logits [N, V]; None where a row has a NaN, or no finite logit and no +inf to choose.

    ``counters`` is how many tokens each row's request has generated so far.
    """
    if logits.dim() != 2 or len(logits) != len(params):
        raise ServingError(f"The model gave logits {tuple(logits.shape)} where {len(params)} rows [N, vocabulary] were wanted.")
    # a row with a NaN has its greatest there, and one of -inf alone has -inf: one pass over the logits, and one wait for the device
    best = logits.argmax(-1, keepdim=True)
    most = logits.gather(-1, best)
    chosen, greatest = torch.cat([best.double(), most.double()], 1).T.tolist()
    bad = [x != x or x == -math.inf for x in greatest]
    rows = [i for i, p in enumerate(params) if p.temperature > 0 and p.top_k != 1 and not bad[i]]
    if rows:
        drawn = _drawn(logits[rows].double(), [params[i] for i in rows], [uniform(seeds[i], counters[i]) for i in rows])
        for i, token in zip(rows, drawn, strict=True):
            chosen[i] = token
    return [None if b else int(token) for b, token in zip(bad, chosen, strict=True)]


def _drawn(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> list[int]:
    """One token a row by the inverse of its cumulative probabilities, most likely first: x float64 [N, V]."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(-1)

    V = logits.shape[1]
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    # shifted first: a tiny temperature must not make inf - inf out of finite logits; rows with +inf choose among those alone
    shifted = torch.where(ordered == ordered[:, :1], 0.0, ordered - ordered[:, :1])
    p = (shifted / column([x.temperature for x in params])).softmax(-1)
    rank = torch.arange(V, device=logits.device)
    p = p.masked_fill(rank >= column([x.top_k or V for x in params]), 0.0)
    p = p / p.sum(-1, keepdim=True)
    before = p.cumsum(-1) - p
    p = p.masked_fill((before >= column([x.top_p for x in params])) & (rank > 0), 0.0)
    total = p.cumsum(-1)
    place = torch.searchsorted(total, column(draws) * total[:, -1:], right=True)
    # rounding may put the draw past the last token that has a probability
    last = (p > 0).sum(-1, keepdim=True) - 1
    out: list[int] = ids.gather(-1, torch.minimum(place, last)).squeeze(-1).tolist()
    return out
