"""Readable names: of dimensions (batch, sequence) and of outputs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree


def output_names(result: Any, taken: Collection[str] = ()) -> list[str]:
    """One name for each tensor of a model's result: its key in a mapping or a library's result class, else ``output``.

    Names in ``taken`` (the inputs') get ``_output`` at their end: ONNX has one space of names.
    """
    found = pytree.tree_flatten_with_path(result)[0]
    names = ["_".join(_word(p) for p in path) for path, x in found if isinstance(x, torch.Tensor)]
    names = [n if n and not n[0].isdigit() else f"output_{n}".rstrip("_") for n in names]
    names = [f"{n}_output" if n in taken else n for n in names]
    return [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]


def _word(part: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(part, field):
            return re.sub(r"[^\w.]", "_", str(getattr(part, field)))
    return re.sub(r"\W", "_", str(part)).strip("_")


def restore_input_names(model: ir.Model, names: Collection[str]) -> None:
    """Give inputs their names in the signature again: torch.onnx adds ``_orig`` to one that is also returned as it is.

    ``names`` are those of the signature; a value inside of the graph that took one is renamed.
    """
    renamed = {v: v.name.removesuffix("_orig") for v in model.graph.inputs if v.name and v.name not in names and v.name.removesuffix("_orig") in names}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in renamed.values():
                value.name = f"{value.name}_inner"
    for value, name in renamed.items():
        value.name = name


def dimension_names(inputs: list[ir.Value]) -> dict[str, str]:
    """Names for the symbols in the shapes of ``inputs``: ``batch`` the first axis, ``sequence`` the first other of the first tensor with one."""
    names: dict[str, str] = {}
    for value in inputs:
        for axis, dim in enumerate(value.shape or ()):
            symbol = getattr(dim, "value", None)
            if not isinstance(symbol, str) or not symbol.isidentifier() or symbol in names:
                continue
            wanted = "batch" if axis == 0 else "sequence"
            names[symbol] = wanted if wanted not in names.values() else f"{value.name}_{axis}"
    return names


def rename_dimensions(model: ir.Model, names: Mapping[str, str]) -> None:
    """Rename symbols in the shapes of all values, whole or inside of expressions."""
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in [*model.graph.inputs, *model.graph.outputs, *(x for node in model.graph.all_nodes() for x in node.outputs)]:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [pattern.sub(lambda m: names[m.group(0)], d.value) if isinstance(d, ir.SymbolicDim) and isinstance(d.value, str) else d for d in value.shape]
        )
