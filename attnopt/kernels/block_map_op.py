"""The operator ``attnopt::block_map``, by which a map of blocks stands in a graph, and the form in which it gets its mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec, Dims, Load
from attnopt.kernels.block_map import axes, block_map

_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "block_map(Tensor like, Tensor[] loads, SymInt[] sizes, SymInt B, SymInt Hq, SymInt Sq, SymInt Skv, str spec, int block_m, int block_n, "
    "bool transposed=False) -> (Tensor counts, Tensor indices)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def mask_alone(spec: AttentionSpec, slots: Mapping[int, int]) -> AttentionSpec | None:
    """The mask of a spec as one of its own, with load ``i`` renamed ``slots[i]``: equal for all attentions with the same mask.

    It reads the sizes that the spec's own ``sizes`` and B, Hq, Sq and Skv give; None where it needs another.
    """
    d = spec.dims
    mask = _renamed(spec.mask, slots)
    kinds = {slots[i]: x.kind for i, x in enumerate(spec.loads) if i in slots}
    given = {x.value[0] for x in (d.B, d.Hq, d.Sq, d.Skv) if x.op == "sym"}
    sizes = {s.value[0] for e in E.postorder(mask) for s in e.leaves if s.op == "sym"} - given
    if not sizes <= set(spec.sizes):
        return None
    return AttentionSpec(
        dims=Dims(d.B, d.Hq, E.ONE, d.Sq, d.Skv, E.ONE, E.ONE),
        score=E.score(),
        mask=mask,
        loads=tuple(Load(f"load{i}", kinds[i]) for i in sorted(kinds)),
        sizes=tuple(n for n in spec.sizes if n in sizes),
    )


def _renamed(root: Expr, slots: Mapping[int, int]) -> Expr:
    memo: dict[Expr, Expr] = {}
    for e in E.postorder(root):
        args = tuple(memo[a] for a in e.args)
        memo[e] = E.load(slots[e.value], args, e.kind) if e.op == "load" else E.rebuild(e, args) if args else e
    return memo[root]


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
    d = parsed.dims
    bound = {x.value[0]: n for x, n in zip((d.B, d.Hq, d.Sq, d.Skv), (B, Hq, Sq, Skv), strict=True) if x.op == "sym"}
    bound |= dict(zip(parsed.sizes, sizes, strict=True))
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
