"""The captured graph in a plainer form, node for node the same function.

Guards and metadata assertions go (the module that runs the graph checks its inputs itself), regions that only switch
gradients off are inlined, slices of whole axes go, in-place operators on fresh values become functional, writes that nothing reads go, what is filled slice by slice becomes a
concatenation, ``view`` becomes ``reshape`` (a rewrite may change strides), and sizes are read from the inputs, so that no size keeps an intermediate value alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.alias import is_view
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.edit import Editor
from attnopt.passes.filled import filled

aten = torch.ops.aten
_FRESH = {f"aten::{n}" for n in ("empty", "new_empty", "empty_like", "zeros", "new_zeros", "zeros_like", "full", "new_full", "full_like")}
_ASSERTIONS = {"aten::_assert_tensor_metadata"}


@dataclass(frozen=True)
class Canonicalize:
    name: str = "canonicalize"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        changed = _inline_regions(module)
        changed |= _drop_guards(module)
        changed |= _whole_slices(module.graph)
        changed |= _functional(module.graph)
        changed |= _drop_unread(module.graph)
        changed |= filled(module.graph)
        changed |= _views(module.graph)
        changed |= _sizes(module.graph)
        changed |= module.graph.eliminate_dead_code()
        return PassResult(changed)


def _drop_guards(module: fx.GraphModule) -> bool:
    gone = [n for n in module.graph.nodes if N.op_name(n) in _ASSERTIONS or (n.op == "call_module" and n.target == "_guards_fn")]
    for n in gone:
        module.graph.erase_node(n)
    if hasattr(module, "_guards_fn"):
        delattr(module, "_guards_fn")
    return bool(gone)


def _whole_slices(graph: fx.Graph) -> bool:
    """A slice of the whole axis is the tensor itself (``x[:, :, a:b]`` is traced as three slices)."""
    whole = [n for n in graph.nodes if N.op_name(n) == "aten::slice" and N.is_tensor(n.args[0]) and _takes_all(n)]
    for n in whole:
        n.replace_all_uses_with(n.args[0])
        graph.erase_node(n)
    return bool(whole)


def _takes_all(node: fx.Node) -> bool:
    args = N.arguments(node)
    return args["start"] in (None, 0) and args["step"] == 1 and N.shape(node) == N.shape(args["self"])


def _inline_regions(module: fx.GraphModule) -> bool:
    """Regions under set_grad_enabled, and under an autocast that is switched off, become part of the graph."""
    changed = False
    while True:
        found = next((n for n in module.graph.nodes if _region_body(n) is not None), None)
        if found is None:
            return changed
        body, gradients = _region_body(found)  # type: ignore[misc]
        submodule = module.get_submodule(str(body.target))
        assert isinstance(submodule, fx.GraphModule)
        _inline(module, found, submodule, found.args[found.args.index(body) + 1 :], gradients)
        changed = True


def _region_body(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """The get_attr node of an inlinable region's body, and whether gradients flow out of it."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    name = node.target.name()
    bodies = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    if not bodies:
        return None
    if name == "wrap_with_set_grad_enabled":
        return bodies[0], bool(node.args[0])
    if name == "wrap_with_autocast" and node.args[2] is False:
        return bodies[0], True
    return None


def _inline(module: fx.GraphModule, call: fx.Node, body: fx.GraphModule, args: tuple[object, ...], gradients: bool) -> None:
    table: dict[fx.Node, fx.Node] = {}
    inputs = iter(args)
    graph = module.graph
    result: Any = None
    for n in body.graph.nodes:
        if n.op == "placeholder":
            table[n] = next(inputs)  # type: ignore[assignment]
        elif n.op == "output":
            result = fx.map_arg(n.args[0], lambda x: table[x])
        else:
            with graph.inserting_before(call):
                new = graph.node_copy(n, lambda x: table[x])
            if n.op == "get_attr":
                new.target = _adopt(module, body, str(n.target))
            table[n] = new
    outs: list[fx.Node] = list(result) if isinstance(result, (tuple, list)) else [result]
    if not gradients:
        outs = [_detached(graph, call, o) for o in outs]
    for user in list(call.users):
        which = user.args[1]
        assert N.op_name(user) == "getitem" and isinstance(which, int)
        user.replace_all_uses_with(outs[which])
        graph.erase_node(user)
    graph.erase_node(call)


def _detached(graph: fx.Graph, before: fx.Node, x: fx.Node) -> fx.Node:
    """``x`` without its gradient, which a region without gradients does not give out."""
    if not N.is_tensor(x) or N.kind(x) != "float":
        return x
    with graph.inserting_before(before):
        out: fx.Node = graph.call_function(aten.detach.default, (x,))
    out.meta = dict(x.meta)
    return out


def _adopt(module: fx.GraphModule, body: fx.GraphModule, target: str) -> str:
    """An attribute of a region's body, moved to the outer module under a free name."""
    value = body.get_submodule(target) if target in dict(body.named_modules()) else getattr(body, target)
    name = f"region_{target.replace('.', '_')}"
    while hasattr(module, name) and getattr(module, name) is not value:
        name += "_"
    if isinstance(value, torch.nn.Module):
        module.add_submodule(name, value)
    else:
        setattr(module, name, value)
    return name


def _functional(graph: fx.Graph) -> bool:
    """``x.add_(y)`` on a fresh value of its own becomes ``add``, and every later reader reads the result."""
    changed = False
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        name = N.op_name(node)
        if not name.endswith("_") or name.endswith("__"):
            continue
        functional = getattr(aten, name.removeprefix("aten::").removesuffix("_"), None)
        target = node.args[0] if node.args else None
        if functional is None or not isinstance(target, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if target.op in ("placeholder", "get_attr") or (is_view(target) and not _is_last_view(target, node, order)):
            continue
        later = [u for u in target.users if order[u] > order[node]]
        if any(is_view(u) and order[u] < order[node] and any(order[w] > order[node] for w in u.users) for u in target.users):
            continue  # a view of the old value is read after the write
        overload = getattr(functional, node.target._overloadname, None)
        if overload is None:
            continue
        node.target = overload
        for u in later:
            u.replace_input_with(target, node)
        changed = True
    return changed


def _is_last_view(view: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether the memory behind ``view`` is a fresh value's, which is read through ``view`` alone from ``write`` on."""
    x = view
    while is_view(x):
        sources = [a for a in x.all_input_nodes if N.is_tensor(a)]
        if len(sources) != 1:
            return False
        (parent,) = sources
        if any(u is not x and (order[u] > order[write] or is_view(u)) for u in parent.users):
            return False
        x = parent
    return x.op == "call_function"


def _only_writes(node: fx.Node, into: fx.Node) -> bool:
    """An operator that writes into ``into``, reads nothing of it elsewhere, and whose result nobody takes."""
    target = node.target
    writes = node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return writes and not node.users and node.args[0] is into and fx.map_arg(node.args[1:], lambda x: None if x is into else x) == node.args[1:] and not node.kwargs


def _drop_unread(graph: fx.Graph) -> bool:
    """Writes into fresh tensors that nothing ever reads."""
    changed = False
    for root in [n for n in graph.nodes if N.op_name(n) in _FRESH]:
        views, writes = [root], []
        for n in views:
            for u in n.users:
                if _only_writes(u, n):
                    writes.append(u)
                else:
                    views.append(u)
                    if not is_view(u):
                        break
            else:
                continue
            break
        else:
            for n in [*writes, *reversed(views[1:])]:
                graph.erase_node(n)
            changed |= bool(writes)
    return changed


def _views(graph: fx.Graph) -> bool:
    changed = False
    for n in graph.nodes:
        if n.target in (aten.view.default, aten._unsafe_view.default):
            n.target = aten.reshape.default
            changed = True
    return changed


def _sizes(graph: fx.Graph) -> bool:
    """``size(x, d)`` of an intermediate value, computed from the inputs' sizes: to know a value's size is no use of the value."""
    known: dict[str, tuple[fx.Node, int]] = {}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    for p in placeholders:
        if N.is_tensor(p):
            for d, n in enumerate(N.shape(p)):
                if n.op == "sym":
                    known.setdefault(n.value[0], (p, d))
    changed = False
    for node in list(graph.nodes):
        if N.op_name(node) != "aten::sym_size" or node.args[0].op == "placeholder":
            continue
        size = N.scalar(node)
        if size is None or any(x.op == "sym" and x.value[0] not in known for x in size.leaves):
            continue
        if size.op == "sym":
            node.args = known[size.value[0]]
        else:
            node.replace_all_uses_with(Editor(graph, node).size(size))
            graph.erase_node(node)
        changed = True
    return changed
