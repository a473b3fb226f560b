"""Score modifications for flash-attn-4, in its own language (CuTe): what its users write where it has no argument of its own.

Each function makes one for a cell. It receives scaled scores and indices as small vectors; with tensors to read they hold one element.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cells import Cell
from cutlass import cute


def alibi(cell: Cell) -> Any:
    """slope(h) * (k - q), the slopes computed as 2 ** (-8 * (h + 1) / Hq), which spares a load."""
    step = -8.0 / cell.Hq

    @cute.jit
    def score_mod(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        head = (h_idx + cute.full_like(h_idx, 1)).to(cutlass.Float32)
        slope = cute.math.exp2(head * cute.full_like(score, step))
        return score + slope * (kv_idx - q_idx).to(cutlass.Float32)

    return score_mod


def by_distance(cell: Cell) -> Any:
    """A table [Hq, 2 * S - 1] read by head and by k - q + S - 1."""
    shift = cell.S - 1

    @cute.jit
    def score_mod(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        table = aux_tensors[0]
        value = cute.make_rmem_tensor(1, table.element_type)
        value[0] = table[h_idx[0], kv_idx[0] - q_idx[0] + shift]
        return score + value.load().to(cutlass.Float32)

    return score_mod


def dense(cell: Cell) -> Any:
    """A bias [Hq, S, S] read by head, query and key."""

    @cute.jit
    def score_mod(score, b_idx, h_idx, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        bias = aux_tensors[0]
        value = cute.make_rmem_tensor(1, bias.element_type)
        value[0] = bias[h_idx[0], q_idx[0], kv_idx[0]]
        return score + value.load().to(cutlass.Float32)

    return score_mod
