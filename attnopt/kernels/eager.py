"""The operators of attention as plain functions, for graphs that are run and for callers in Python.

The dispatcher takes an operator's arguments apart and puts them together again, twice where tensors may need gradients: 20 microseconds of a call whose kernel may take 10. Where nobody needs
it to, these functions call what the operator would end in; otherwise they call the operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.kernels import ops, paged_op

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(first: Tensor, *tensors: Tensor) -> bool:
    """Whether an operator on these tensors would end in its own kernel as they are: nobody traces or watches, none has a gradient to compute, none is of a class of its own, and
    the first, whose device the operator's is, has memory."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state() is not None or torch._C._autograd._profiler_enabled():
        return False
    recording = torch.is_grad_enabled()
    for x in (first, *tensors):
        if type(x) not in _PLAIN or (recording and x.requires_grad):
            return False
    return first.is_cuda or first.is_cpu


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    backend: str = "reference",
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    block_sizes: Sequence[int] = (),
    tables: Sequence[Tensor] | None = None,
) -> Tensor:
    """``attnopt::attention``."""
    if is_plain(q, k, v, *loads):
        return ops.run(q, k, v, loads, sizes, spec, backend, counts, indices, block_sizes, tables)
    return torch.ops.attnopt.attention.default(q, k, v, loads, sizes, spec, backend, counts, indices, block_sizes, tables)  # type: ignore[no-any-return]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    backend: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """``attnopt::paged_attention``."""
    if is_plain(q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, *loads):
        return paged_op.run(q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, loads, sizes, spec, backend, k_scale, v_scale)
    arguments = (q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, loads, sizes, spec, backend, k_scale, v_scale)
    return torch.ops.attnopt.paged_attention.default(*arguments)  # type: ignore[no-any-return]
