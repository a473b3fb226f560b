"""An FX graph as a plain function of (module, leaves): parameters are looked up on the module at each call."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from attnopt.emit.direct import call_directly
from attnopt.passes.merge_projections import merged

_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class GraphFunction:
    """``run(module, *leaves, *constants)`` gives the flat results, ``out_spec`` their structure.

    ``constants`` are the tensors (and bodies of control flow) that the graph holds and the module does not: they are
    no part of the module's state_dict, and belong to the device that the graph was captured on.
    """

    run: Callable[..., tuple[Any, ...]]
    constants: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    source: str
    together: tuple[tuple[str, ...], ...] = ()
    """Names of parameters that are read at once where they lie back to back in memory."""


def graph_function(gm: fx.GraphModule, module: nn.Module) -> GraphFunction:
    """Compile ``gm`` to a function whose get_attr names resolve on ``module``. Its results are those of pytree codegen, as export gives it, or plain."""
    info = getattr(gm.graph._codegen, "pytree_info", None)
    out_spec = pytree.tree_structure(tuple(range(len(gm.graph.output_node().args)))) if info is None else info.out_spec
    graph = fx.Graph()
    results = graph.graph_copy(gm.graph, {})
    graph.output(results if info is not None else (results,))
    constants: dict[str, tuple[fx.Node, Any]] = {}
    last = (graph.find_nodes(op="placeholder") or [None])[-1]
    for node in graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if is_state(module, target):
            continue
        if target not in constants:
            # Placeholders stand in the order of the calls's arguments: leaves first, then constants.
            with graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes))):
                last = graph.placeholder(f"constant_{len(constants)}")
            last.meta = dict(node.meta)
            constants[target] = (last, _get(gm, target))
        node.replace_all_uses_with(constants[target][0])
        graph.erase_node(node)
    call_directly(graph)
    code = graph.python_code("self")
    filename = f"<attnopt graph {next(_numbers)}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    space = dict(code.globals)
    exec(compile(code.src, filename, "exec"), space)
    return GraphFunction(space["forward"], tuple(value for _, value in constants.values()), out_spec, code.src, merged(gm.graph))


def is_state(module: nn.Module, target: str) -> bool:
    """Whether the dotted name is a parameter or buffer of the module."""
    *path, name = target.split(".")
    for part in path:
        child = module._modules.get(part)
        if child is None:
            return False
        module = child
    return name in module._parameters or name in module._buffers


def _get(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, torch.Tensor) else value
