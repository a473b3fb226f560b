"""What an engine has done and how it stands."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.runtime.block_manager import Usage


@dataclass(frozen=True)
class Statistics:
    """A snapshot. Shares of the cache are of pages; waste is of slots in held pages. Means are over all steps so far, each as large as its cache was."""

    seconds: float
    """That steps took, from scheduling to sampling."""
    steps: int
    generated: int
    """Tokens sampled."""
    computed: int
    """Tokens run through the model: prompts, generated tokens, and those computed again."""
    running: int
    waiting: int
    finished: int
    preemptions: int
    prefix_hits: float
    """Share of the tokens of admitted prompts that stood in the cache."""
    usage: Usage
    """As the last step left it."""
    peak_pages: int
    mean_waste: float
    mean_padded_waste: float
    """Of a contiguous cache padded to the longest running request."""
    mean_reserved_waste: float
    """Of a contiguous cache that has room for each running request's prompt and all the tokens it may generate, padded to the largest."""

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.seconds if self.seconds else 0.0

    @property
    def cache_use(self) -> float:
        return self.usage.held / self.usage.pages

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:.0f} tokens/s, {self.running} running, {self.waiting} waiting, cache {self.cache_use:.0%} used, "
            f"{self.mean_waste:.1%} waste, {self.prefix_hits:.0%} prefix hits, {self.preemptions} preempted"
        )


@dataclass
class Sums:
    """What is added up step by step."""

    seconds: float = 0.0
    steps: int = 0
    generated: int = 0
    computed: int = 0
    finished: int = 0
    peak_pages: int = 0
    allocated: int = 0
    filled: int = 0
    tokens: int = 0
    """Of running requests, shared ones counted for each."""
    padded: int = 0
    reserved: int = 0

    def add(self, usage: Usage, lengths: list[int], ends: list[int]) -> None:
        """One step: how many tokens each running request has in the cache, and how many it may come to."""
        self.steps += 1
        self.peak_pages = max(self.peak_pages, usage.held)
        self.allocated += usage.slots_allocated
        self.filled += usage.slots_filled
        self.tokens += sum(lengths)
        self.padded += len(lengths) * max(lengths, default=0)
        self.reserved += len(ends) * max(ends, default=0)

    @staticmethod
    def waste(used: int, allocated: int) -> float:
        return 1 - used / allocated if allocated else 0.0
