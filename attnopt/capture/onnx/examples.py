"""Inputs to run an ONNX file on, made from what the file says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from attnopt.capture.example_inputs import InputDescription
from attnopt.capture.onnx.translate import torch_dtype
from attnopt.errors import AttnoptError

BATCH, LENGTH = 2, 16
"""Sizes of named dimensions: the first axis of an input, and any other."""
_PASSED_ON = {"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"}


def inputs_of(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller gives."""
    constants = {id(v) for v in model.graph.initializers.values()}
    return [v for v in model.graph.inputs if id(v) not in constants]


def examples(model: ir.Model, given: Mapping[str, Any] | None = None) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, int]]]:
    """Input tensors by name, with the sizes of the named dimensions; the most likely first. ``given`` replaces what would be made.

    Integers lie within the table that they pick rows of, inputs whose name contains ``mask`` show everything but the end of the first row,
    positions count up. A dimension may be the sum of two others, as that of a mask over past and new tokens: its name may say so, and
    otherwise each is tried. Raises AttnoptError for a name that the file does not have, or a shape that does not fit.
    """
    given = dict(given or {})
    wanted = inputs_of(model)
    unknown = sorted(set(given) - {str(v.name) for v in wanted})
    if unknown:
        raise AttnoptError(f"The file has no input {unknown[0]!r}; its inputs are {', '.join(str(v.name) for v in wanted)}.")
    known: dict[str, int] = {}
    tensors = {name: torch.as_tensor(x) for name, x in given.items()}
    for value in wanted:
        if str(value.name) in tensors:
            _take_sizes(value, tensors[str(value.name)], known)
    free: dict[str, int] = {}
    for value in wanted:
        for axis, dim in enumerate(value.shape or ()):
            word = dimension(dim, str(value.name), axis)
            if word is not None and word not in known:
                free.setdefault(word, BATCH if axis == 0 else LENGTH)
    said = {word: n for word in free if (n := _sum_of(word, {**free, **known})) is not None}
    lengths = [word for word, n in free.items() if n == LENGTH and word not in said]
    for longer in (None, *(reversed(lengths) if len(lengths) > 1 else ())):
        sizes = {**free, **known, **said, **({} if longer is None else {longer: 2 * LENGTH})}
        generator = torch.Generator().manual_seed(0)
        made = {}
        for value in wanted:
            name = str(value.name)
            words = [dimension(dim, name, axis) for axis, dim in enumerate(value.shape or ())]
            shape = [int(dim) if word is None else sizes[word] for dim, word in zip(value.shape or (), words, strict=True)]
            made[name] = tensors[name] if name in tensors else _made(value, shape, generator)
        yield made, sizes


def _sum_of(word: str, sizes: Mapping[str, int]) -> int | None:
    """The value of a name that is a sum of other names and numbers, as in ``past_sequence_length + 1``."""
    parts = [part.strip() for part in word.split("+")]
    if len(parts) < 2 or not all(part.isdigit() or part in sizes for part in parts):
        return None
    return sum(int(part) if part.isdigit() else sizes[part] for part in parts)


def described(model: ir.Model, descriptions: Sequence[InputDescription]) -> dict[str, torch.Tensor]:
    """Inputs of the described shapes, filled as ``examples`` fills what is not given. Raises AttnoptError for a name that the file does not have."""
    values = {str(v.name): v for v in inputs_of(model)}
    generator = torch.Generator().manual_seed(0)
    out: dict[str, torch.Tensor] = {}
    for d in descriptions:
        if d.name not in values:
            raise AttnoptError(f"The file has no input {d.name!r}; its inputs are {', '.join(values)}.")
        out[d.name] = _made(values[d.name], list(d.sizes), generator).to(getattr(torch, d.dtype))
    return out


def dimension(dim: Any, name: str, axis: int) -> str | None:
    """The name of a dimension, or one made for it; None for a constant size."""
    return None if isinstance(dim, int) else dim.value or f"{name}_{axis}"


def _take_sizes(value: ir.Value, tensor: torch.Tensor, sizes: dict[str, int]) -> None:
    name, shape = str(value.name), value.shape
    dtype = torch_dtype(value.dtype, name) if value.dtype is not None else tensor.dtype
    said = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    expected = f"{str(dtype).removeprefix('torch.')}[{', '.join(str(d) for d in shape or ())}]"
    if shape is None or len(shape) != tensor.dim() or tensor.dtype is not dtype:
        raise AttnoptError(f"The input {name} is {said}; the file takes {expected}.")
    for axis, (dim, n) in enumerate(zip(shape, tensor.shape, strict=True)):
        word = dimension(dim, name, axis)
        if n != (dim if word is None else sizes.setdefault(word, n)):
            raise AttnoptError(f"The input {name} is {said}; the file takes {expected}, with equal sizes where names are equal.")


def _made(value: ir.Value, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    name = str(value.name)
    assert value.dtype is not None
    dtype = torch_dtype(value.dtype, name)
    if "mask" in name or dtype is torch.bool:
        made = torch.zeros(shape, dtype=dtype) if dtype.is_floating_point and len(shape) > 2 else torch.ones(shape, dtype=dtype)
        if made.dim() >= 2 and made.numel():
            n = made.shape[-1]
            made[0, ..., n - n // 4 :] = torch.finfo(dtype).min if dtype.is_floating_point and len(shape) > 2 else 0
        return made
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if "position" in name and shape:
        return torch.arange(shape[-1]).to(dtype).expand(shape).contiguous()
    rows = _rows(value)
    return torch.randint(0, 2 if rows is None else rows, shape, generator=generator).to(dtype)


def _rows(value: ir.Value, depth: int = 4) -> int | None:
    """The fewest rows of a table that the values pick from; None where they pick from none."""
    found: list[int] = []
    for use in value.uses():
        node = use.node
        if node.op_type == "Gather" and use.idx == 1 and node.attributes.get_int("axis", 0) == 0:
            table = node.inputs[0]
            if table is not None and table.shape is not None and isinstance(table.shape[0], int):
                found.append(table.shape[0])
        elif node.op_type in _PASSED_ON and use.idx == 0 and depth:
            inner = _rows(node.outputs[0], depth - 1)
            found += [] if inner is None else [inner]
    return min(found, default=None)
