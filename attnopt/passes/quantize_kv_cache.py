"""Keys and values of a packed graph are kept in 8 bits, each token and head with a scale of its own. Opt-in: the cache is half as large, and its numbers are rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from attnopt.analysis import nodes as N
from attnopt.kernels.paged_reference import GREATEST, quantized
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.insert_kv_cache import PLAN, PackedPlan
from attnopt.remarks import Remark

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
STATED = {
    "int8": "each number is off by at most half of 1/127 of the largest of its token and head",
    "fp8": "each number is off by at most 1/16 of itself, or 1/1024 of 1/448 of the largest of its token and head",
}
"""What rounding does to a number of the cache."""


@dataclass(frozen=True)
class QuantizeKVCache:
    """``dtype``: ``int8`` or ``fp8`` (e4m3). Runs behind insert-kv-cache; caches of another sequence, which are filled from outside, stay as they are."""

    dtype: str
    name: str = "quantize-kv-cache"
    tier: Tier = "approximate"

    def run(self, module: fx.GraphModule) -> PassResult:
        """Scales k_scale and v_scale [pages, page_size, Hkv] become inputs behind each layer's caches. A graph without a plan stays as it is."""
        plan: PackedPlan | None = module.meta.get(PLAN)
        if plan is None:
            return PassResult(False)
        for write in _writes(module.graph):
            _scaled(module.graph, write, DTYPES[self.dtype])
        layers = tuple(x if x.cross else replace(x, dtype=DTYPES[self.dtype]) for x in plan.layers)
        module.meta[PLAN] = replace(plan, layers=layers)
        text = f"keys and values are kept in {self.dtype} with a scale for each token and head: {STATED[self.dtype]}."
        return PassResult(True, [Remark("AO108", text)])


def rounded_writes(module: fx.GraphModule, dtype: str) -> None:
    """Round what a packed graph writes to its caches, which stay in their own dtype, as a cache of ``dtype`` does: what its numbers are stated to do to a model, in place."""
    for write in _writes(module.graph):
        with module.graph.inserting_before(write):
            for i in (0, 1):
                x = write.args[i]
                assert isinstance(x, fx.Node)
                node = module.graph.call_function(rounded, (x, DTYPES[dtype]))
                node.meta["val"] = x.meta["val"]
                write.update_arg(i, node)
    module.recompile()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, Hkv, D] as a cache of ``dtype`` gives it back."""
    if x.shape[-1] == 0:
        return x
    small, scale = quantized(x, dtype)
    return (small.float() * scale.unsqueeze(-1)).to(x.dtype)


def _writes(graph: fx.Graph) -> Iterator[fx.Node]:
    return iter([n for n in graph.nodes if n.op == "call_function" and n.target is torch.ops.attnopt.cache_write.default])


def _scaled(graph: fx.Graph, write: fx.Node, dtype: torch.dtype) -> None:
    """Scales for the caches that ``write`` fills, and for whoever reads them."""
    assert dtype in GREATEST
    k_cache, v_cache = write.args[2:4]
    assert isinstance(k_cache, fx.Node) and isinstance(v_cache, fx.Node)
    fake = N.value(k_cache).fake_mode
    after, scales = v_cache, []
    for cache, name in ((k_cache, "k_scale"), (v_cache, "v_scale")):
        shape, place = N.value(cache).shape, N.value(cache).device
        with graph.inserting_after(after):
            after = graph.placeholder(f"{name}_{str(cache.target).rpartition('_')[2]}")
        with fake:
            after.meta["val"] = torch.empty(shape[:3], dtype=torch.float32, device=place)
            cache.meta["val"] = torch.empty(shape, dtype=dtype, device=place)
        scales.append(after)
    write.args = (*write.args[:5], *scales)
    views = {n for n in k_cache.users if N.op_name(n) == "aten::slice"}
    """Values that are the first features of the keys."""
    for view in views:
        with fake:
            view.meta["val"] = view.target(N.value(k_cache), *view.args[1:])  # type: ignore[operator]
    for reader in [n for n in graph.nodes if n.op == "call_function" and n.target is torch.ops.attnopt.paged_attention.default and n.args[1] is k_cache]:
        values = scales[0] if reader.args[2] in views else scales[1]
        reader.args = (*reader.args[:10], scales[0], values)
