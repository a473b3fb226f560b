"""How a Hopper kernel cuts its work: blocks, stages and registers for each head size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnopt.kernels.triton.launch import power_of_two

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that a block of threads may have on sm_90."""


@dataclass(frozen=True)
class Config:
    """``consumers`` warpgroups of 64 queries each, rings of ``stages`` blocks of BLOCK_N keys and values."""

    consumers: int
    BLOCK_N: int
    stages: int
    q_buffers: int
    """Tiles of queries in shared memory: with two the next tile's are there before this one's are done with."""
    o_chunks: int = 1
    """Pieces, 1 or 2, in which the output passes through shared memory."""
    q_registers: bool = False
    """Whether the queries are held in registers while a tile is worked on."""

    @property
    def registers(self) -> int:
        """Per thread of a consumer."""
        return 240 if self.consumers < 3 else 160

    @property
    def producer_registers(self) -> int:
        return 24 if self.consumers < 3 else 32

    @property
    def BLOCK_M(self) -> int:
        return self.consumers * 64

    @property
    def registers_at_launch(self) -> int:
        """Registers per thread before the warps redistribute them: all warps, the producer's counted as four, share 64 Ki."""
        return 65536 // ((self.consumers + 1) * 128) // 8 * 8


def parts_of(n: int) -> tuple[int, ...]:
    """Widths, powers of two from 16 on, that cover a head size: 96 = 64 + 32, 80 = 64 + 16, 40 within 32 + 16."""
    whole = power_of_two(n)
    first = whole // 2
    second = power_of_two(n - first) if n > first else 0
    return (first, second) if first >= 16 and second > 0 and first + second < whole else (whole,)


def bytes_of(config: Config, D: int, Dv: int) -> int:
    """Shared memory of one block of threads, in bytes, for 16-bit tensors. A consumer spreads numbers of up to 64 bits per key by way of it."""
    d, dv = sum(parts_of(D)), sum(parts_of(Dv))
    rows = config.BLOCK_M * (d * config.q_buffers + dv // config.o_chunks)
    return 2 * (rows + config.stages * config.BLOCK_N * (d + dv)) + 8 * config.consumers * config.BLOCK_N + 1024


Reads = Literal["nothing", "keys", "pairs"]
"""What programs hold in registers beside the tile of scores: one number per key, or one per query and key."""


def config(D: int, Dv: int, *, reads: Reads = "nothing", even: bool = False, Skv: int = 0) -> Config:
    """Measured on an H100 (``benchmarks/forward_probe.py``), with nothing spilled in loops. ``even`` where all queries see the same keys, Skv of them (0: not known).

    Two consumers and no turns between them were never slower than turns as in FlashAttention-3. Queries in registers pay at heads of 64 only, and
    three consumers only where few tiles end.
    """
    width = max(sum(parts_of(D)), sum(parts_of(Dv)))
    if width <= 64:
        if reads == "nothing":
            return Config(3, 128, 2, 2) if even and Skv > 4096 else Config(2, 128, 3, 2, q_registers=True)
        return Config(2, 128, 3, 2) if reads == "keys" else Config(2, 64, 4, 2)
    blocks = (128, 64, 32) if reads == "nothing" and width <= 128 else (64, 32) if reads == "nothing" or width <= 128 else (32,)
    for BLOCK_N in blocks:
        for stages, q_buffers, o_chunks in ((256 // BLOCK_N, 2, 1), (256 // BLOCK_N, 1, 1), (128 // BLOCK_N, 2, 1), (128 // BLOCK_N, 1, 1), (128 // BLOCK_N, 1, 2)):
            c = Config(2, BLOCK_N, stages, q_buffers, o_chunks)
            if stages > 1 and bytes_of(c, D, Dv) <= SHARED_MEMORY:
                return c
    raise ValueError(f"heads of {D} and {Dv} do not fit into {SHARED_MEMORY} bytes of shared memory")
