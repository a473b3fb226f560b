"""Which blocks of keys a block of queries has to look at: the mask of a spec, worked out for whole tiles.

The mask is enclosed in intervals over every tile (``enclosure``). A tile in which it is surely false is invisible: no kernel
loads it. One in which it is surely true is full: no kernel evaluates the mask there. The others are partial. Lists have the
form that FlexAttention gave them (Dong et al., arXiv:2412.05496). Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.ir.expr import Expr
from attnopt.kernels.enclosure import Constants, Tiling, enclose
from attnopt.kernels.materialise import Part, materialise


@dataclass(frozen=True)
class BlockMap:
    """For each block of queries (BLOCK_M of them) the blocks of keys (BLOCK_N) that any of its queries sees.

    B' is B where the mask depends on the batch and otherwise 1, H' likewise; M and N are the numbers of blocks. Of a transposed
    map the rows are blocks of keys, and the lists name blocks of queries: read M for N and N for M below.
    """

    counts: Tensor
    """int32 [B', H', M, 3]: how many partial and how many full blocks there are, and which row, counted as in ``places``, has the most, the next
    most and so on: in that order work is shared out evenly."""
    indices: Tensor
    """int32 [B', H', M, N]: the numbers of the partial blocks, ascending, then of the full ones, ascending; then the invisible."""
    BLOCK_M: int
    BLOCK_N: int

    @property
    def places(self) -> tuple[int, int, int]:
        """Rows from one batch to the next and from one head to the next, 0 where they share a row, and the length of a row.

        The row of batch b, head h and block m is b * places[0] + h * places[1] + m.
        """
        B, H, rows, listed = self.indices.shape
        return (H * rows if B > 1 else 0), (rows if H > 1 else 0), listed


def axes(mask: Expr) -> tuple[bool, bool]:
    """Whether a mask depends on the batch, and on the head."""
    names = {v.value for v in mask.variables}
    return "b" in names, "h" in names


def block_map(
    mask: Expr,
    loads: Sequence[Tensor],
    sizes: Mapping[str, int],
    shape: Sequence[int],
    BLOCK_M: int,
    BLOCK_N: int,
    device: torch.device,
    transposed: bool = False,
) -> BlockMap:
    """The map of ``mask`` for ``shape`` (B, Hq, Sq, Skv). ``sizes`` are those of ``tiling.bind_sizes``.

    In a full tile every pair of a real query and a real key is visible, and its listed block is whole: a last block of keys (of
    queries in a transposed map) that is cut by the end counts as partial at best. Invisible tiles have no visible pair.
    """
    B, Hq, Sq, Skv = shape
    tiling = Tiling(B, Hq, Sq, Skv, BLOCK_M, BLOCK_N, tuple(sorted(sizes.items())), device)
    (program,), parts = _materialised(mask, len(loads))
    extents = {"b": B, "h": Hq, "q": Sq, "k": Skv}
    by_batch, by_head = axes(mask)
    full_shape = (B if by_batch else 1, Hq if by_head else 1, tiling.M, tiling.N)
    if 0 in (*shape, tiling.M, tiling.N):
        rows, listed = (tiling.N, tiling.M) if transposed else (tiling.M, tiling.N)
        empty = torch.zeros((*full_shape[:2], rows, 3 + listed), dtype=torch.int32, device=device)
        return BlockMap(empty[..., :3].contiguous(), empty[..., 3:].contiguous(), BLOCK_M, BLOCK_N)
    read = [*loads, *(p.tensor(extents, loads, tiling.size_of, device) for p in parts)]
    kept = _kept(tiling)
    visible = enclose(program, tiling, read, kept.constants)
    possible, certain = (x.expand(full_shape) for x in (visible.high, visible.low))
    if transposed:
        possible, certain = possible.transpose(2, 3), certain.transpose(2, 3)
    number, whole = kept.queries if transposed else kept.keys
    # 0 partial, 1 full, 2 invisible, in the order of the lists
    rank = torch.add((certain & whole).view(torch.uint8), (~possible).view(torch.uint8), alpha=2)
    indices = torch.add(number, rank, alpha=len(number)).contiguous().sort(-1).values % len(number)
    found = (rank.unsqueeze(-1) == kept.ranks).sum(-2, dtype=torch.int32)
    order = found.sum(-1).flatten().argsort(descending=True, stable=True).view(*found.shape[:3], 1)
    return BlockMap(torch.cat([found, order.to(torch.int32)], -1), indices, BLOCK_M, BLOCK_N)


@lru_cache(maxsize=1024)
def _materialised(mask: Expr, first_slot: int) -> tuple[tuple[Expr, ...], tuple[Part, ...]]:
    """Decisions on rounded floats are the tensors that a kernel reads too."""
    return materialise((mask,), first_slot)


class _Kept:
    """What is the same for all masks and tensors of one tiling."""

    def __init__(self, tiling: Tiling) -> None:
        self.constants: Constants = {}
        self.ranks = torch.arange(2, dtype=torch.uint8, device=tiling.device)
        self.queries, self.keys = (
            (torch.arange(n, dtype=torch.int32, device=tiling.device), torch.arange(n, device=tiling.device) < extent // block)
            for n, extent, block in ((tiling.M, tiling.Sq, tiling.BLOCK_M), (tiling.N, tiling.Skv, tiling.BLOCK_N))
        )


_kept_for_stream = lru_cache(maxsize=16)(lambda tiling, stream: _Kept(tiling))


def _kept(tiling: Tiling) -> _Kept:
    """What was computed for this tiling before; inside of a CUDA graph's capture nothing is, since nothing runs there yet."""
    if tiling.device.type != "cuda":
        return _kept_for_stream(tiling, 0)
    if torch.cuda.is_current_stream_capturing():
        return _Kept(tiling)
    return _kept_for_stream(tiling, torch.cuda.current_stream(tiling.device).cuda_stream)
