"""The operator ``attnopt::merged_linear``: several projections of one input, as one matrix product where their weights lie back to back.

Weights stay parameters of their own. At each call the operator looks where they are: when they lie one behind another in
one storage, and nothing asks for a gradient, one product over that stretch of memory gives all results; in any other case
it is exactly the linear layers it stands for. So moving, replacing, sharding or training the parameters can make it
slower, never wrong. It is made of PyTorch's own operators (a composite one), which export and compilers see instead of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LIBRARY = torch.library.Library("attnopt", "FRAGMENT")
_LIBRARY.define("merged_linear(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))


def merged_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """x [..., K], weights [N_i, K], biases [N_i] or None -> x @ weight.T + bias, [..., N_i] each.

    Taken together, the results are views of one tensor: rows are then not contiguous.
    """
    if not _together(x, weights, biases):
        return [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    first = weights[0]
    sizes = [w.shape[0] for w in weights]
    whole = first.detach().as_strided((sum(sizes), first.shape[1]), (first.shape[1], 1))
    if all(b is not None for b in biases) and adjacent(biases):  # type: ignore[arg-type]
        bias = biases[0]
        assert bias is not None
        return list(F.linear(x, whole, bias.detach().as_strided((sum(sizes),), (1,))).split(sizes, -1))
    parts = F.linear(x, whole).split(sizes, -1)
    return [p if b is None else p + b for p, b in zip(parts, biases, strict=True)]


_LIBRARY.impl("merged_linear", merged_linear, "CompositeImplicitAutograd")


def _together(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    tensors = [x, *weights, *(b for b in biases if b is not None)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False  # gradients go to each parameter on its own, as they did
    if any(type(t) is not Tensor and type(t) is not nn.Parameter for t in tensors):
        return False  # fake, quantized, sharded: what their class makes of a linear layer is theirs
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.is_autocast_enabled(x.device.type):
        return False
    return adjacent(weights)


def adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors, alike but for their first axis, lie one behind another in one storage."""
    first = tensors[0]
    if first.device.type == "meta" or first.layout is not torch.strided:
        return False
    place, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for t in tensors:
        if t.data_ptr() != place or t.dtype is not first.dtype or t.shape[1:] != first.shape[1:] or t.device != first.device:
            return False
        if not t.is_contiguous() or t.untyped_storage().data_ptr() != storage:
            return False
        place += t.numel() * t.element_size()
    return True


def pack(tensors: Sequence[Tensor]) -> bool:
    """Move tensors behind one another into one new storage. Each stays the same object with the same value; False where that cannot be done.

    Whoever else holds the old memory (a view, another process) no longer shares it, so only their owner may pack
    them. Only tensors that fill their storage alone are moved: of others, the rest of the storage would stay alive.
    """
    first = tensors[0]
    if first.device.type == "meta" or first.layout is not torch.strided or len({id(t) for t in tensors}) < len(tensors):
        return False
    alike = all(type(t) in (Tensor, nn.Parameter) and (t.dtype, t.device, t.shape[1:]) == (first.dtype, first.device, first.shape[1:]) for t in tensors)
    if not alike or any(t.is_inference() or not t.is_contiguous() or t.untyped_storage().nbytes() != t.numel() * t.element_size() for t in tensors):
        return False
    if len({t.untyped_storage().data_ptr() for t in tensors}) < len(tensors) or (first.device.type == "cpu" and any(t.is_shared() for t in tensors)):
        return False
    with torch.no_grad():
        whole = torch.cat([t.detach() for t in tensors])
        for t, part in zip(tensors, whole.split([t.shape[0] for t in tensors]), strict=True):
            t.data = part
    return True
