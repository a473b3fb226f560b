"""PyTorch's own functions in place of operators that are called by their overload.

Both end in the same operator of the dispatcher, but an overload is found by name and its arguments are matched to a schema at run time, which takes about 1.5 microseconds more of each
call. In a small model, or on a fast device, that is a good part of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from attnopt.kernels import eager

aten = torch.ops.aten
DIRECT: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.cos.default: torch.cos,
    aten.embedding.default: torch.embedding,
    aten.exp.default: torch.exp,
    aten.gelu.default: torch._C._nn.gelu,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: torch._C._nn.linear,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.select.int: torch.select,
    aten.sigmoid.default: torch.sigmoid,
    aten.silu.default: torch._C._nn.silu,
    aten.sin.default: torch.sin,
    aten.sub.Tensor: torch.sub,
    aten.tanh.default: torch.tanh,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    torch.ops.attnopt.attention.default: eager.attention,
    torch.ops.attnopt.paged_attention.default: eager.paged_attention,
}
"""Functions that take what the overload takes, in the same order and by the same names (tests/emit/test_direct.py)."""


def call_directly(graph: fx.Graph) -> None:
    """Put the functions of ``DIRECT`` in place of their overloads. For a graph that is only run from now on: no analysis knows them."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in DIRECT:
            node.target = DIRECT[node.target]
