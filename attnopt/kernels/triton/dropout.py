"""Dropout in generated kernels: each weight's fate is a function of the seed and its place (b, h, q, k) alone.

The generator is Philox-4x32 (Salmon et al., SC 2011) with 7 rounds, keyed by the seed. Its counter is the place itself, in 32-bit words, so
nothing overflows, and neither block sizes nor the order of blocks matter. One call gives the fates of four neighbouring keys.
"""

from __future__ import annotations

SEED = ("SEED_LOW", "SEED_HIGH")
"""Arguments: the seed's lower 31 bits, and the 31 above them."""

DROPOUT = """
@triton.jit
def kept_weights(low, high, head, offs_m, first_key, THRESHOLD: tl.constexpr, BLOCK_N: tl.constexpr):
    # [BLOCK_M, BLOCK_N // 4]
    keys = (first_key // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    zero = (keys + offs_m[:, None]) * 0
    c0 = (keys + zero).to(tl.uint32)
    c1 = (offs_m[:, None] + zero).to(tl.uint32)
    c2 = (head + zero).to(tl.uint32)
    c3 = zero.to(tl.uint32)
    r0, r1, r2, r3 = tl.philox_impl(c0, c1, c2, c3, low.to(tl.uint32) + zero.to(tl.uint32), high.to(tl.uint32) + zero.to(tl.uint32), 7)
    even = tl.interleave((r0 >= THRESHOLD).to(tl.int8), (r2 >= THRESHOLD).to(tl.int8))
    odd = tl.interleave((r1 >= THRESHOLD).to(tl.int8), (r3 >= THRESHOLD).to(tl.int8))
    return tl.interleave(even, odd) != 0
"""


def keep(rate: float, first_key: str, transposed: bool = False) -> str:
    """A line that says which weights of a tile are kept, as ``kept`` [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] where ``transposed``."""
    call = f"kept_weights(SEED_LOW, SEED_HIGH, head, offs_m, {first_key}, {round(rate * 2**32)}, BLOCK_N)"
    return f"kept = tl.trans({call})" if transposed else f"kept = {call}"


def scaled(x: str, rate: float) -> str:
    """``x`` where it is kept, scaled so that its mean stays."""
    return f"tl.where(kept, {x} * {1 / (1 - rate)!r}, 0.0)"


def seed_words(seed: int) -> dict[str, int]:
    """The values of ``SEED``, for a seed in [0, 2**62)."""
    return {"SEED_LOW": seed & 0x7FFFFFFF, "SEED_HIGH": seed >> 31}
