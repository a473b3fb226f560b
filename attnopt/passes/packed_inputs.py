"""The inputs of a graph over packed tokens, in place of the ids [B, S] that it was captured with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.passes.cleanup import drop_unread
from attnopt.passes.edit import Editor, aten

CROSS = ("cross_block_table", "cross_seqlens_k")
"""int32 [R, max_pages] and [R], as the two of those names, for the keys of other sequences; where the graph has any."""
NAMES = ("tokens", "positions", "rows", "slots", "block_table", "cu_seqlens_q", "seqlens_k")
"""int64 tokens [T], positions [T], rows [N] (whose logits are wanted) and slots [T]; int32 block_table [R, max_pages],
cu_seqlens_q [R + 1] and seqlens_k [R]."""


def sizes_from(node: fx.Node, others: Sequence[fx.Node]) -> None:
    """What reads a size of ``node`` reads it from one of ``others`` that has it."""
    for user in [u for u in node.users if N.op_name(u) == "aten::sym_size"]:
        wanted = N.shape(node)[user.args[1]]  # type: ignore[index]
        place = next(((x, d) for x in others for d, n in enumerate(N.shape(x)) if n is wanted), None)
        if place is not None:
            user.args = place


class PackedInputs:
    """New placeholders behind the old ones, which ``finish`` removes. Caches are added by ``cache``, in the order of the calls."""

    def __init__(self, graph: fx.Graph, ids: fx.Node, crosses: bool) -> None:
        self.graph = graph
        self.ids = ids
        self.old = list(graph.find_nodes(op="placeholder"))
        self.last = self.old[-1]
        self.mode = N.value(ids).fake_mode
        self.device = N.value(ids).device
        T = N.value(ids).shape[1]
        R = self._size()
        names = (*NAMES, *(CROSS if crosses else ()))
        shapes: dict[str, list[Any]] = {"rows": [self._size()], "block_table": [R, self._size()], "cu_seqlens_q": [R + 1], "seqlens_k": [R], CROSS[0]: [R, self._size()], CROSS[1]: [R]}
        nodes = {n: self._add(n, shapes.get(n, [T]), torch.int32 if n in (*NAMES[4:], *CROSS) else torch.int64) for n in names}
        self.tokens, self.positions, self.rows, self.slots, self.block_table, self.cu_seqlens_q, self.seqlens_k = (nodes[n] for n in NAMES)
        self.cross = tuple(nodes[n] for n in CROSS if crosses)
        """The block table and lengths of the other sequences."""
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
        drop_unread(self.graph)
        for node in self.old:
            if node.users:
                sizes_from(node, [ids])
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
