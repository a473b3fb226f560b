"""How many attentions PyTorch Inductor's own matcher fuses in a model.

The counter is Inductor's: its patterns add to ``fuse_attention`` when they replace a match. The whole of Inductor runs up to where it
would write code, which is left out: the matcher works on the joint graph, before that. Sizes are static, since its patterns ask for a
scale that is a plain number, and gradients are off. On the CPU all of its patterns are on; some are off for CUDA
(``torch/_inductor/fx_passes/fuse_attention.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn


def _without_code(gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """In the place of Inductor's code generation: run the graph as it is after all graph passes."""
    return gm.forward


def count_fused(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """Attentions that ``torch.compile(model)`` would hand to a fused operator, in one call with ``kwargs``."""
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.fx_passes.joint_graph import lazy_init

    lazy_init()  # registering the patterns may count
    torch.compiler.reset()
    before = counters["inductor"]["fuse_attention"]
    compiled = torch.compile(model, backend=lambda gm, inputs: compile_fx(gm, inputs, inner_compile=_without_code), dynamic=False)
    with torch.no_grad():
        compiled(**kwargs)
    found: int = counters["inductor"]["fuse_attention"] - before
    torch.compiler.reset()
    return found
