"""The inputs of a graph over packed tokens, in place of the ids [B, S] that it was captured with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.passes.edit import Editor, aten

NAMES = ("tokens", "positions", "rows", "slots", "block_table", "cu_seqlens_q", "seqlens_k")
"""int64 tokens [T], positions [T], rows [N] (whose logits are wanted) and slots [T]; int32 block_table [R, max_pages],
cu_seqlens_q [R + 1] and seqlens_k [R]."""


class PackedInputs:
    """New placeholders behind the old ones, which ``finish`` removes. Caches are added by ``cache``, in the order of the calls."""

    def __init__(self, graph: fx.Graph, ids: fx.Node) -> None:
        self.graph = graph
        self.ids = ids
        self.old = list(graph.find_nodes(op="placeholder"))
        self.last = self.old[-1]
        self.mode = N.value(ids).fake_mode
        self.device = N.value(ids).device
        T = N.value(ids).shape[1]
        R = self._size()
        shapes: dict[str, list[Any]] = {"rows": [self._size()], "block_table": [R, self._size()], "cu_seqlens_q": [R + 1], "seqlens_k": [R]}
        self.nodes = {n: self._add(n, shapes.get(n, [T]), torch.int32 if n in NAMES[4:] else torch.int64) for n in NAMES}
        self.tokens, self.positions, self.rows, self.slots, self.block_table, self.cu_seqlens_q, self.seqlens_k = (self.nodes[n] for n in NAMES)
        self.pages, self.page_size = self._size(), self._size()
        self.caches = 0

    def cache(self, x: fx.Node) -> fx.Node:
        """A cache [pages, page_size, Hkv, D] for values like ``x`` [T, Hkv, D]."""
        name = f"{'kv'[self.caches % 2]}_cache_{self.caches // 2}"
        self.caches += 1
        return self._add(name, [self.pages, self.page_size, *N.value(x).shape[1:]], N.value(x).dtype)

    def finish(self) -> None:
        """The ids are the packed tokens as a batch of one sequence."""
        edit = Editor(self.graph, self.last.next)
        ids = edit.call(aten.unsqueeze.default, self.tokens, 0)
        if N.value(self.ids).dtype is not torch.int64:
            ids = edit.call(aten.to.dtype, ids, N.value(self.ids).dtype)
        self.ids.replace_all_uses_with(ids)
        for node in self.old:
            for user in list(node.users):  # sizes, of the same symbols
                user.replace_input_with(node, ids)
            self.graph.erase_node(node)
        self.graph._codegen = fx.graph.CodeGen()  # arguments one by one, a plain result

    def _size(self) -> Any:
        """A size that is only known when the graph runs."""
        return self.mode.shape_env.create_unbacked_symint()

    def _add(self, name: str, shape: list[Any], dtype: torch.dtype) -> fx.Node:
        with self.graph.inserting_after(self.last):
            node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=self.device)
        self.last = node
        return node
