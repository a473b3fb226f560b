"""A fresh tensor that is filled slice by slice is the concatenation of what is written into it."""

from __future__ import annotations

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.alias import is_view, written
from attnopt.passes.edit import Editor, aten

_FRESH = {f"aten::{n}" for n in ("empty", "new_empty", "empty_like", "zeros", "new_zeros", "zeros_like")}
_Piece = tuple[int, int, fx.Node, fx.Node]
"""Where a piece starts and ends, its slice, and the write into it."""


def filled(graph: fx.Graph) -> bool:
    """Rewrite what is filled along one axis, wholly and each part once, before anything reads it. Nothing else is touched."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    changed = False
    for root in [n for n in graph.nodes if N.op_name(n) in _FRESH and N.is_tensor(n)]:
        pieces = [p for u in root.users if (p := _piece(root, u)) is not None]
        axis = {N.axis(N.arguments(s)["dim"], len(N.shape(root))) for _, _, s, _ in pieces}
        if len(axis) != 1 or any(w.args[1] in written(graph)[0] for _, _, _, w in pieces):
            continue
        (d,) = axis
        pieces.sort(key=lambda p: p[0])
        last = max((w for _, _, _, w in pieces), key=order.__getitem__)
        readers = [u for u in root.users if u not in {s for _, _, s, _ in pieces}]
        extent = N.value(root).shape[d]
        whole = [0, *(e for _, e, _, _ in pieces)] == [*(s for s, _, _, _ in pieces), extent]
        if not whole or any(order[u] < order[last] or _writes_through(u) for u in readers):
            continue
        edit = Editor(graph, last)
        parts = [_as_piece(edit, root, s, w) for _, _, s, w in pieces]
        joined = edit.call(aten.cat.default, parts, d)
        for u in readers:
            u.replace_input_with(root, joined)
        for _, _, s, w in pieces:
            graph.erase_node(w)
            graph.erase_node(s)
        graph.erase_node(root)
        changed = True
    return changed


def _piece(root: fx.Node, user: fx.Node) -> _Piece | None:
    """A slice of constant bounds that is only written, once, by a copy from the same device."""
    if N.op_name(user) != "aten::slice" or len(user.users) != 1:
        return None
    args = N.arguments(user)
    (write,) = user.users
    if N.op_name(write) != "aten::copy_" or write.args[0] is not user or write.users or args["step"] != 1:
        return None
    source = write.args[1]
    extent = N.value(root).shape[N.axis(args["dim"], len(N.shape(root)))]
    start, end = args["start"] or 0, extent if args["end"] is None else args["end"]
    if not all(type(x) is int for x in (start, end, extent)) or not isinstance(source, fx.Node) or N.value(source).device != N.value(root).device:
        return None
    start, end, _ = slice(start, end).indices(extent)
    return (start, end, user, write) if start < end else None


def _writes_through(node: fx.Node) -> bool:
    """Whether a reader, or a view of what it gives, writes in place."""
    target = node.target
    if node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        return True
    return is_view(node) and any(_writes_through(u) for u in node.users)


def _as_piece(edit: Editor, root: fx.Node, piece: fx.Node, write: fx.Node) -> fx.Node:
    """What a write leaves in its slice: copying broadcasts, and casts to the dtype of the target."""
    source = write.args[1]
    assert isinstance(source, fx.Node)
    if N.shape(source) != N.shape(piece):
        source = edit.call(aten.expand.default, source, [edit.size(n) for n in N.shape(piece)])
    dtype = N.value(root).dtype
    return source if N.value(source).dtype is dtype else edit.call(aten.to.dtype, source, dtype)
