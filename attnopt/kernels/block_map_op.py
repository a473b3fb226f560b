"""The operator ``attnopt::block_map``, by which a map of blocks stands in a graph, and the form in which it gets its mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.alone import alone, size_of
from attnopt.kernels.block_map import axes, block_map

_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "block_map(Tensor like, Tensor[] loads, SymInt[] sizes, SymInt B, SymInt Hq, SymInt Sq, SymInt Skv, str spec, int block_m, int block_n, "
    "bool transposed=False) -> (Tensor counts, Tensor indices)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def mask_alone(spec: AttentionSpec, slots: Mapping[int, int]) -> AttentionSpec | None:
    """The mask of a spec as one of its own (``alone``), with load ``i`` renamed ``slots[i]``: equal for all attentions with the same mask."""
    return alone(spec, slots, score=E.score(), mask=spec.mask)


def _block_map(
    like: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    B: int,
    Hq: int,
    Sq: int,
    Skv: int,
    spec: str,
    block_m: int,
    block_n: int,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """The map of the spec's mask over its ``loads`` and ``sizes``; ``like`` is a tensor on the device that is to hold it."""
    parsed = AttentionSpec.from_json(spec)
    bound = size_of(parsed, sizes, B, Hq, Sq, Skv)
    with torch.no_grad():
        found = block_map(parsed.mask, loads, bound, (B, Hq, Sq, Skv), block_m, block_n, like.device, transposed)
    return found.counts, found.indices


def _fake(
    like: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    B: int,
    Hq: int,
    Sq: int,
    Skv: int,
    spec: str,
    block_m: int,
    block_n: int,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    by_batch, by_head = axes(AttentionSpec.from_json(spec).mask)
    rows, listed = (Sq + block_m - 1) // block_m, (Skv + block_n - 1) // block_n
    if transposed:
        rows, listed = listed, rows
    places = (B if by_batch else 1, Hq if by_head else 1, rows)
    return like.new_empty((*places, 3), dtype=torch.int32), like.new_empty((*places, listed), dtype=torch.int32)


_LIBRARY.impl("block_map", _block_map, "CompositeExplicitAutograd")
_LIBRARY.impl("block_map", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("attnopt::block_map", _fake, lib=_LIBRARY)
