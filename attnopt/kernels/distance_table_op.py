"""The operator ``attnopt::distance_table``, by which a table over distances stands in a graph, and the form in which it gets its program.

A relative-position bias is a function of the distance from query to key (and of the head). Generated kernels read it from a table (``materialise``), which is the
same for all attentions that read the same weights: a graph makes it once, and gives it to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.alone import alone, size_of
from attnopt.kernels.materialise import DISTANCE, Part, by_distance, part_tensor

_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define(
    "distance_table(Tensor like, Tensor[] loads, SymInt[] sizes, SymInt B, SymInt Hq, SymInt Sq, SymInt Skv, str spec, int margin) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def table_alone(spec: AttentionSpec, part: Part, slots: Mapping[int, int]) -> AttentionSpec | None:
    """A part of a spec's programs as the score of a spec of its own (``alone``), with load ``i`` renamed ``slots[i]``."""
    score = E.substitute(part.expr, {DISTANCE: E.sub(spec.dims.k, spec.dims.q)})
    return alone(spec, slots, score=score, mask=E.TRUE)


@lru_cache(maxsize=1024)
def _part(spec: str) -> Part:
    found = by_distance(AttentionSpec.from_json(spec).score)
    if found is None or not found.shareable:
        raise ValueError("a table over distances is a float that reads a tensor, the distance from query to key, and at most the head")
    return found


def _distance_table(
    like: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], B: int, Hq: int, Sq: int, Skv: int, spec: str, margin: int
) -> Tensor:
    """float32 [Hq, Sq + Skv - 1 + 2 * margin], without Hq where heads are alike: the score of ``spec`` at distances k - q from 1 - Sq - margin on.

    ``like`` is a tensor on the device that is to hold it. It has no gradient: an attention computes that of the tensors behind its tables itself.
    """
    part, parsed = _part(spec), AttentionSpec.from_json(spec)
    shape = {"b": B, "h": Hq, "q": Sq, "k": Skv}
    with torch.no_grad():
        x = part_tensor(part, shape, loads, size_of(parsed, sizes, B, Hq, Sq, Skv), like.device, margin)
    return x.as_strided((*x.shape[:-1], x.shape[-1] + 2 * margin), x.stride(), x.storage_offset() - margin) if margin else x.contiguous()


def _fake(
    like: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], B: int, Hq: int, Sq: int, Skv: int, spec: str, margin: int
) -> Tensor:
    heads = (Hq,) if "h" in _part(spec).axes else ()
    return like.new_empty((*heads, Sq + Skv - 1 + 2 * margin), dtype=torch.float32)


_LIBRARY.impl("distance_table", _distance_table, "CompositeExplicitAutograd")
_LIBRARY.impl("distance_table", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("attnopt::distance_table", _fake, lib=_LIBRARY)
