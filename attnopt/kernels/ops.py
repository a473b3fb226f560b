"""The operator ``attnopt::attention``, by which an attention stands in a graph. Importing this module registers it.

It needs neither Triton nor a GPU. Two more operators serve its gradient: ``attention_for_training`` also returns the seed
of its dropout, and ``attention_backward`` computes the probabilities again, tile by tile, so memory stays linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import linear as _linear  # registers attnopt::merged_linear
from attnopt.kernels import reference
from attnopt.kernels.registry import Backend, resolve
from attnopt.kernels.tiling import empty_output

assert _linear is not None

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor[] loads, SymInt[] sizes, str spec, str backend"
_LIBRARY = torch.library.Library("attnopt", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded)

_LIBRARY.define(f'attention({_ARGUMENTS}="reference") -> Tensor', tags=_TAGS)
_LIBRARY.define(f"attention_for_training({_ARGUMENTS}) -> (Tensor o, Tensor seed)", tags=_TAGS)
_LIBRARY.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] loads, SymInt[] sizes, str spec, Tensor seed, bool[] needs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@lru_cache(maxsize=4096)
def _prepare(spec: str, kernel: str, device: str, dtype: torch.dtype) -> tuple[AttentionSpec, Backend]:
    """The spec, and who runs it: what a call would otherwise work out each time."""
    parsed = AttentionSpec.from_json(spec)
    return parsed, resolve(kernel, parsed, device, dtype)


def _run(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: str, kernel: str) -> tuple[Tensor, Tensor]:
    parsed, backend = _prepare(spec, kernel, q.device.type, q.dtype)
    if parsed.dropout:
        # From the default CPU generator, which torch.manual_seed sets and activation checkpointing restores; no device waits.
        seed = torch.randint(1 << 62, (), dtype=torch.int64)
        return reference.attention(q, k, v, loads, sizes, parsed, int(seed))[0], seed
    return backend.run(q, k, v, loads, sizes, parsed), torch.zeros((), dtype=torch.int64)


def _attention(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: str, kernel: str = "reference") -> Tensor:
    with torch.no_grad():
        return _run(q, k, v, loads, sizes, spec, kernel)[0]


def _attention_for_training(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: str, kernel: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return _run(q, k, v, loads, sizes, spec, kernel)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: str, seed: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    with torch.no_grad():
        return reference.gradients(grad, q, k, v, loads, sizes, AttentionSpec.from_json(spec), int(seed), needs)


_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_for_training", _attention_for_training, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")


# ------------------------------------------------------------------------------------------------ shapes only


def _fake(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: str, kernel: str = "reference") -> Tensor:
    torch._check(q.dim() == 4 and k.dim() == 4 and v.dim() == 4, lambda: "q, k and v must have 4 axes [B, H, S, D]")
    return empty_output(q, v)


def _fake_for_training(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: str, kernel: str) -> tuple[Tensor, Tensor]:
    return _fake(q, k, v, loads, sizes, spec, kernel), torch.empty((), dtype=torch.int64)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: str, seed: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, need in zip((q, k, v, *loads), needs, strict=True) if need]


for _name, _shapes in (("attention", _fake), ("attention_for_training", _fake_for_training), ("attention_backward", _fake_backward)):
    torch.library.register_fake(f"attnopt::{_name}", _shapes, lib=_LIBRARY)


# ------------------------------------------------------------------------------------------------ gradients


class _Training(torch.autograd.Function):
    """``attention_for_training`` with its gradient. Written by hand: ``torch.library.register_autograd`` takes no symbolic sizes in a list."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, sizes: Sequence[int], spec: str, kernel: str, q: Tensor, k: Tensor, v: Tensor, *loads: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            below = keyset & torch._C._after_autograd_keyset
            o, seed = torch.ops.attnopt.attention_for_training.default.redispatch(below, q, k, v, list(loads), sizes, spec, kernel)
        ctx.sizes, ctx.spec = sizes, spec
        ctx.save_for_backward(q, k, v, seed, *loads)
        ctx.mark_non_differentiable(seed)
        return o, seed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, seed, *loads = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[4:])
        found = iter(torch.ops.attnopt.attention_backward(grads[0], q, k, v, loads, ctx.sizes, ctx.spec, seed, needs))
        return None, None, None, None, *(next(found) if need else None for need in needs)


def _autograd_for_training(
    keyset: Any, q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: str, kernel: str
) -> tuple[Tensor, Tensor]:
    return _Training.apply(keyset, sizes, spec, kernel, q, k, v, *loads)  # type: ignore[no-any-return]


def _autograd(keyset: Any, q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: str, kernel: str = "reference") -> Tensor:
    """With gradients to compute the training operator takes over; without, the graph keeps ``attention`` itself."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *loads)):
        return torch.ops.attnopt.attention_for_training.default(q, k, v, loads, sizes, spec, kernel)[0]  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.attnopt.attention.default.redispatch(keyset & torch._C._after_autograd_keyset, q, k, v, loads, sizes, spec, kernel)  # type: ignore[no-any-return]


_LIBRARY.impl("attention", _autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("attention_for_training", _autograd_for_training, "Autograd", with_keyset=True)
