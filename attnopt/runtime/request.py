"""One request: its prompt, what it has generated, and where it stands."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from attnopt.errors import ServingError
from attnopt.runtime.sampling import SamplingParams

State = Literal["waiting", "running", "finished"]
FinishReason = Literal["stop", "length", "capacity", "cancelled", "error"]
"""``length``: max_new_tokens; ``capacity``: the cache, or the positions that the model has, can hold no more; ``stop``: a stop token."""


@dataclass(eq=False)
class Request:
    """``id`` counts the requests by arrival. Its first ``computed`` tokens have keys and values in the cache."""

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    most: int
    """How many tokens it may generate: what was asked, or what fits."""
    salt: bytes = b""
    context: tuple[Tensor, ...] = ()
    """What the other sequence that it reads is made of; dropped when it ends."""
    context_name: bytes = b""
    output: list[int] = field(default_factory=list)
    computed: int = 0
    state: State = "waiting"
    finish_reason: FinishReason | None = None
    error: ServingError | None = None
    preemptions: int = 0
    shared: int = 0
    """How many tokens were found in the cache when it was first admitted."""
    hashes: list[bytes] = field(default_factory=list)
    """Of the full pages of its tokens, kept while it waits."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one is known: 1 in the generation phase, more in the context phase."""
        return self.length - self.computed

    def slice(self, first: int, last: int) -> list[int]:
        """Tokens [first, last) without a copy of all."""
        n = len(self.prompt)
        return self.prompt[first:last] + self.output[max(0, first - n) : max(0, last - n)]


def checked_prompt(prompt: Sequence[int], vocabulary: int | None, longest: int, why: str) -> list[int]:
    """The prompt as a list. Raises ServingError where it is empty, longer than ``longest`` (because of ``why``), or has unknown ids."""
    try:
        tokens = [operator.index(t) for t in prompt]
    except TypeError as error:
        raise ServingError(f"The prompt is no sequence of token ids: {error}.") from error
    if not tokens:
        raise ServingError("The prompt is empty; it must have at least one token.")
    wrong = next((t for t in tokens if not 0 <= t < (vocabulary or 1 << 63)), None)
    if wrong is not None:
        known = f"from 0 to {vocabulary - 1}" if vocabulary else "non-negative numbers of 64 bits"
        raise ServingError(f"The prompt has the token id {wrong}; ids must be {known}.")
    if len(tokens) > longest:
        raise ServingError(f"The prompt has {len(tokens)} tokens, and {why} at most {longest}.")
    return tokens
