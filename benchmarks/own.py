"""attnopt's backends, called as a graph that it optimized calls them: chosen and lowered by its own passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cells import Inputs
from peers import Cannot, Ready
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from attnopt.errors import AttnoptError
from attnopt.kernels import ops, registry
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
        if training and name != "auto" and getattr(registry.backends()[name], "backward", None) is not None:
            node.meta[BACKWARD] = name
            why = f"{why.split(', backward by ')[0]}, backward by {name}"
        Lower().run(module)
        module.recompile()
        loads = inputs.loads
        return Ready(lambda q, k, v: module(q, k, v, *loads), note=f"{chosen}: {why}" if name == "auto" else why)

    return prepare


def graph_of(inputs: Inputs, symbolic: bool) -> fx.GraphModule:
    """q, k, v and the loads -> one raised attention, with the shapes of the inputs."""
    fake = FakeTensorMode()
    graph = fx.Graph()
    operands = []
    for label, x in zip(["q", "k", "v", *(f"load{i}" for i in range(len(inputs.loads)))], [*inputs.sets[0][:3], *inputs.loads], strict=True):
        operands.append(graph.placeholder(label))
        operands[-1].meta["val"] = fake.from_tensor(x.detach())
    spec = inputs.cell.spec(symbolic).to_json()
    node = graph.call_function(torch.ops.attnopt.attention.default, (*operands[:3], operands[3:], [], spec))
    q, v = operands[0].meta["val"], operands[2].meta["val"]
    node.meta["val"] = q.new_empty((*q.shape[:3], v.shape[3]))
    graph.output(node)
    return fx.GraphModule({}, graph)
