"""Attentions with the same mask over the same tensors read one map of blocks, worked out once for all of them.

Only for kernels that walk over such a map; alone, a kernel makes its own when it is called.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import registry
from attnopt.kernels.block_map_op import mask_alone
from attnopt.passes.attention_nodes import attentions, size_nodes, spec_of, tensors_read
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.edit import Editor
from attnopt.passes.select_kernel import KERNEL


@dataclass(frozen=True)
class _Wanted:
    """A map that an attention would read: equal for all that can share it."""

    mask: AttentionSpec
    loads: tuple[fx.Node, ...]
    block_sizes: tuple[int, int]
    device: torch.device


@dataclass(frozen=True)
class ShareBlockMaps:
    name: str = "share-block-maps"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        graph = module.graph
        place = {n: i for i, n in enumerate(graph.nodes)}
        groups: dict[_Wanted, list[fx.Node]] = {}
        for node in attentions(graph):
            wanted = _wanted(node, place)
            if wanted is not None:
                groups.setdefault(wanted, []).append(node)
        shared = {wanted: nodes for wanted, nodes in groups.items() if len(nodes) > 1}
        for wanted, nodes in shared.items():
            counts, indices = _insert(graph, wanted, nodes[0])
            for node in nodes:
                node.kwargs = {**node.kwargs, "counts": counts, "indices": indices, "block_sizes": list(wanted.block_sizes)}
        return PassResult(bool(shared))


def _wanted(node: fx.Node, place: Mapping[fx.Node, int]) -> _Wanted | None:
    """The map that the kernel chosen for ``node`` takes; None where it takes none."""
    spec = spec_of(node)
    q: Any = node.args[0]
    value = N.value(q)
    block_sizes = registry.block_sizes(node.meta[KERNEL][0], spec, device=value.device, dtype=value.dtype) if KERNEL in node.meta else None
    if block_sizes is None:
        return None
    tensors, slots = tensors_read(node, spec.mask, place)
    mask = mask_alone(spec, slots)
    return None if mask is None else _Wanted(mask, tensors, block_sizes, value.device)


def _insert(graph: fx.Graph, wanted: _Wanted, first: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The map's two tensors, computed before the first attention that reads it."""
    edit = Editor(graph, first)
    size_of = size_nodes(first)
    d = wanted.mask.dims
    like = wanted.loads[0] if wanted.loads else first.args[0]
    found = edit.call(
        torch.ops.attnopt.block_map.default,
        like,
        list(wanted.loads),
        [size_of[name] for name in wanted.mask.sizes],
        *(edit.size(x) for x in (d.B, d.Hq, d.Sq, d.Skv)),
        wanted.mask.to_json(),
        *wanted.block_sizes,
    )
    return edit.call(operator.getitem, found, 0), edit.call(operator.getitem, found, 1)
