"""The operator ``attnopt::attention``, by which an attention stands in a graph. Importing this module registers it.

It needs neither Triton nor a GPU. Two more operators serve its gradient: ``attention_for_training`` also returns lse and the seed
of its dropout, and ``attention_backward`` computes the probabilities again from them, tile by tile, so memory stays linear.
A map of blocks (``attnopt::block_map``) may come with a call, so that one serves all attentions with the same mask, and tables over distances
(``attnopt::distance_table``), so that one serves all with the same bias; without them a kernel that wants one makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import block_map_op as _block_map_op  # registers attnopt::block_map
from attnopt.kernels import distance_table_op as _distance_table_op  # registers attnopt::distance_table
from attnopt.kernels import linear as _linear  # registers attnopt::merged_linear
from attnopt.kernels import paged_op as _paged_op  # registers attnopt::paged_attention and attnopt::cache_write
from attnopt.kernels.block_map import BlockMap
from attnopt.kernels.registry import Backend, Backward, resolve, resolve_backward
from attnopt.kernels.tiling import empty_output

assert _linear is not None and _block_map_op is not None and _distance_table_op is not None and _paged_op is not None

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor[] loads, SymInt[] sizes, str spec, str backend"
_SHARED = "Tensor? counts=None, Tensor? indices=None, int[] block_sizes=[], Tensor[]? tables=None"
"""What a graph works out for several attentions at once: a ``BlockMap`` as the results of ``attnopt::block_map`` and [BLOCK_M, BLOCK_N], and the results
of ``attnopt::distance_table`` for the ``shareable`` parts of the spec's programs, in order."""
_LIBRARY = torch.library.Library("attnopt", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded)

_LIBRARY.define(f'attention({_ARGUMENTS}="reference", {_SHARED}) -> Tensor', tags=_TAGS)
_LIBRARY.define(f"attention_for_training({_ARGUMENTS}, {_SHARED}) -> (Tensor o, Tensor lse, Tensor seed)", tags=_TAGS)
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor[] loads, SymInt[] sizes, str spec, str backend, "
    "Tensor seed, bool[] needs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@lru_cache(maxsize=4096)
def _prepare(spec: str, kernel: str, device: str, dtype: torch.dtype, loads: tuple[torch.dtype, ...]) -> tuple[AttentionSpec, Backend]:
    """The spec, and who runs it: what a call would otherwise work out each time."""
    parsed = AttentionSpec.from_json(spec)
    return parsed, resolve(kernel, parsed, device, dtype, loads)


@lru_cache(maxsize=4096)
def _prepare_backward(spec: str, kernel: str, device: str, dtype: torch.dtype, loads: tuple[torch.dtype, ...]) -> tuple[AttentionSpec, Backward]:
    parsed = AttentionSpec.from_json(spec)
    return parsed, resolve_backward(kernel, parsed, device, dtype, loads)


def _seed() -> Tensor:
    """From the default CPU generator, which torch.manual_seed sets and activation checkpointing restores; no device waits."""
    return torch.randint(1 << 62, (), dtype=torch.int64)


def _blocks(counts: Tensor | None, indices: Tensor | None, block_sizes: Sequence[int]) -> BlockMap | None:
    return None if counts is None or indices is None else BlockMap(counts, indices, block_sizes[0], block_sizes[1])


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    kernel: str = "reference",
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    block_sizes: Sequence[int] = (),
    tables: Sequence[Tensor] | None = None,
) -> Tensor:
    """What ``attnopt::attention`` computes where no gradient is asked for."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return run(q, k, v, loads, sizes, spec, kernel, counts, indices, block_sizes, tables)
    parsed, backend = _prepare(spec, kernel, q.device.type, q.dtype, tuple([x.dtype for x in loads]))
    blocks = _blocks(counts, indices, block_sizes)
    if (blocks is not None or tables) and backend.shared is not None:
        return backend.shared(q, k, v, loads, sizes, parsed, int(_seed()) if parsed.dropout else 0, blocks, tables or ())[0]
    if not parsed.dropout:
        return backend.run(q, k, v, loads, sizes, parsed)
    assert backend.forward is not None, f"{backend.name} took an attention with dropout, and has no forward that draws it"
    return backend.forward(q, k, v, loads, sizes, parsed, int(_seed()))[0]


def _attention_for_training(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    kernel: str,
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    block_sizes: Sequence[int] = (),
    tables: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        parsed, backend = _prepare(spec, kernel, q.device.type, q.dtype, tuple(x.dtype for x in loads))
        blocks = _blocks(counts, indices, block_sizes)
        seed = _seed() if parsed.dropout else torch.zeros((), dtype=torch.int64)
        if (blocks is not None or tables) and backend.shared is not None:
            return *backend.shared(q, k, v, loads, sizes, parsed, int(seed), blocks, tables or ()), seed
        if backend.forward is None:
            # its backward is one that reads no lse: see registry.choose_backward
            lse = torch.full(q.shape[:3], torch.nan, dtype=torch.float32, device=q.device)
            return backend.run(q, k, v, loads, sizes, parsed), lse, seed
        return *backend.forward(q, k, v, loads, sizes, parsed, int(seed)), seed


def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    kernel: str,
    seed: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    with torch.no_grad():
        parsed, backward = _prepare_backward(spec, kernel, q.device.type, q.dtype, tuple(x.dtype for x in loads))
        found = backward(grad, q, k, v, o, lse, loads, sizes, parsed, int(seed), needs)
        # laid out as the tensors that they belong to: compilers rely on it
        like = _fake_backward(grad, q, k, v, o, lse, loads, sizes, spec, kernel, seed, needs)
        return [g if g.stride() == x.stride() else x.copy_(g) for g, x in zip(found, like, strict=True)]


_LIBRARY.impl("attention", run, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_for_training", _attention_for_training, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")


# ------------------------------------------------------------------------------------------------ shapes only


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    kernel: str = "reference",
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    block_sizes: Sequence[int] = (),
    tables: Sequence[Tensor] | None = None,
) -> Tensor:
    torch._check(q.dim() == 4 and k.dim() == 4 and v.dim() == 4, lambda: "q, k and v must have 4 axes [B, H, S, D]")
    return empty_output(q, v)


def _fake_for_training(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    kernel: str,
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    block_sizes: Sequence[int] = (),
    tables: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return _fake(q, k, v, loads, sizes, spec), lse, torch.empty((), dtype=torch.int64)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    kernel: str,
    seed: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(x) for x, need in zip((q, k, v, *loads), needs, strict=True) if need]


for _name, _shapes in (("attention", _fake), ("attention_for_training", _fake_for_training), ("attention_backward", _fake_backward)):
    torch.library.register_fake(f"attnopt::{_name}", _shapes, lib=_LIBRARY)


# ------------------------------------------------------------------------------------------------ gradients


_Given = tuple[Tensor | None, Tensor | None, Sequence[int], Sequence[Tensor] | None]


class _Training(torch.autograd.Function):
    """``attention_for_training`` with its gradient. Written by hand: ``torch.library.register_autograd`` takes no symbolic sizes in a list."""

    @staticmethod
    def forward(
        ctx: Any, keyset: Any, sizes: Sequence[int], spec: str, kernel: str, shared: _Given, q: Tensor, k: Tensor, v: Tensor, *loads: Tensor
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            below = keyset & torch._C._after_autograd_keyset
            o, lse, seed = torch.ops.attnopt.attention_for_training.default.redispatch(below, q, k, v, list(loads), sizes, spec, kernel, *shared)
        ctx.sizes, ctx.spec, ctx.kernel = sizes, spec, kernel
        ctx.save_for_backward(q, k, v, o, lse, seed, *loads)
        ctx.mark_non_differentiable(lse, seed)
        return o, lse, seed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, seed, *loads = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[5:])
        found = iter(torch.ops.attnopt.attention_backward(grads[0], q, k, v, o, lse, loads, ctx.sizes, ctx.spec, ctx.kernel, seed, needs))
        return None, None, None, None, None, *(next(found) if need else None for need in needs)


def _autograd_for_training(
    keyset: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    kernel: str,
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    block_sizes: Sequence[int] = (),
    tables: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _Training.apply(keyset, sizes, spec, kernel, (counts, indices, block_sizes, tables), q, k, v, *loads)  # type: ignore[no-any-return]


def _autograd(
    keyset: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
    kernel: str = "reference",
    counts: Tensor | None = None,
    indices: Tensor | None = None,
    block_sizes: Sequence[int] = (),
    tables: Sequence[Tensor] | None = None,
) -> Tensor:
    """With gradients to compute the training operator takes over; without, the graph keeps ``attention`` itself."""
    arguments = (q, k, v, loads, sizes, spec, kernel, counts, indices, block_sizes, tables)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *loads)):
        return torch.ops.attnopt.attention_for_training.default(*arguments)[0]  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnopt.attention.default.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)  # type: ignore[no-any-return]


_LIBRARY.impl("attention", _autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("attention_for_training", _autograd_for_training, "Autograd", with_keyset=True)
