"""attnopt's backends, called as a graph that it optimized calls them: chosen and lowered by its own passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cells import Inputs
from peers import Cannot, Ready, now
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from attnopt.emit.direct import call_directly
from attnopt.errors import AttnoptError
from attnopt.kernels import ops, registry
from attnopt.kernels.block_map import block_map
from attnopt.passes.attention_nodes import attentions
from attnopt.passes.lower import Lower
from attnopt.passes.select_kernel import KERNEL, SelectKernel

assert ops.__doc__  # the operator is registered
BACKWARD = "attnopt_backward"
"""Key in an attention node's meta: who computes the gradients."""


def own(name: str, symbolic: bool) -> Callable[[Inputs], Ready]:
    """A backend by its name in the registry, or ``auto``. In training a backend that has a backward of its own uses that one."""

    def prepare(inputs: Inputs) -> Ready:
        training = inputs.cell.direction != "forward"
        module = graph_of(inputs, symbolic).train(training)
        node = next(attentions(module.graph))
        try:
            SelectKernel(backend=name).run(module)
        except AttnoptError as e:
            raise Cannot(e.message.replace(" (site )", "")) from e
        chosen, why = node.meta[KERNEL]
        blocks, mask_ms = map_of(node, chosen, inputs)
        if training and name != "auto" and getattr(registry.backends()[name], "backward", None) is not None:
            node.meta[BACKWARD] = name
            why = f"{why.split(', backward by ')[0]}, backward by {name}"
        Lower().run(module)
        call_directly(module.graph)
        module.recompile()
        loads = [*inputs.loads, *blocks]
        return Ready(lambda q, k, v: module(q, k, v, *loads), mask_ms=mask_ms, note=f"{chosen}: {why}" if name == "auto" else why)

    return prepare


def map_of(node: fx.Node, chosen: str, inputs: Inputs) -> tuple[tuple[Tensor, ...], float | None]:
    """The map of blocks that the chosen backend takes, given to the attention as a graph does that shares one among its layers: made once
    per batch, and so outside of the timing, as FlexAttention's. The map's tensors, and the milliseconds that making them took, the second time."""
    spec, q = inputs.cell.spec(), inputs.sets[0][0]
    block_sizes = registry.block_sizes(chosen, spec, device=q.device, dtype=q.dtype)
    if block_sizes is None:
        return (), None
    B, Hq, S, _ = q.shape
    sizes = {x.value[0]: n for x, n in ((spec.dims.B, B), (spec.dims.Sq, S)) if x.op == "sym"}
    for _ in range(2):
        start = now(q.device)
        blocks = block_map(spec.mask, inputs.loads, sizes, (B, Hq, S, S), *block_sizes, q.device)
        took = (now(q.device) - start) * 1e3
    last = [n for n in node.graph.nodes if n.op == "placeholder"][-1]
    with node.graph.inserting_after(last):
        indices = node.graph.placeholder("indices")
        counts = node.graph.placeholder("counts")
    indices.prepend(counts)
    node.kwargs = {**node.kwargs, "counts": counts, "indices": indices, "block_sizes": list(block_sizes)}
    return (blocks.counts, blocks.indices), took


def graph_of(inputs: Inputs, symbolic: bool, layers: int = 1) -> fx.GraphModule:
    """q, k, v and the loads -> raised attentions over them, with the shapes of the inputs."""
    fake = FakeTensorMode()
    graph = fx.Graph()
    operands = []
    for label, x in zip(["q", "k", "v", *(f"load{i}" for i in range(len(inputs.loads)))], [*inputs.sets[0][:3], *inputs.loads], strict=True):
        operands.append(graph.placeholder(label))
        operands[-1].meta["val"] = fake.from_tensor(x.detach())
    spec = inputs.cell.spec(symbolic).to_json()
    q, v = operands[0].meta["val"], operands[2].meta["val"]
    nodes = [graph.call_function(torch.ops.attnopt.attention.default, (*operands[:3], operands[3:], [], spec)) for _ in range(layers)]
    for node in nodes:
        node.meta["val"] = q.new_empty((*q.shape[:3], v.shape[3]))
    graph.output(nodes[0] if layers == 1 else tuple(nodes))
    return fx.GraphModule({}, graph)
