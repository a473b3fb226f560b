"""Says which dimensions were turned into constants, and where in the user's code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnopt.capture.guards import SymbolicSizes
from attnopt.remarks import Remark


def fixed_remark(name: str, dim: int, size: int, why: str) -> Remark:
    """AO301 for a dimension that export left open and that a run at another size showed to be fixed."""
    return Remark("AO301", f"Dimension {dim} of {name} holds for size {size} only: {why}.")


def specialised_remarks(names: Sequence[str], leaves: Sequence[Any], sizes: SymbolicSizes, asked: Sequence[tuple[int, int]]) -> list[Remark]:
    """AO301 for every batch or sequence dimension among ``asked`` that came out as a constant."""
    env = sizes.env or _environment(sizes.values)
    fixed: dict[int, list[int]] = {}
    for leaf, dim in asked:
        val = sizes.values[leaf]
        if isinstance(val.shape[dim], int) and _is_batch_or_sequence(leaves[leaf], val, dim):
            fixed.setdefault(leaf, []).append(dim)
    remarks = []
    for leaf, dims in fixed.items():
        shape = sizes.values[leaf].shape
        source = next(filter(None, (_source_of(env, names[leaf], d) for d in reversed(dims))), "")
        if len(dims) == 1:
            text = f"Dimension {dims[0]} of {names[leaf]} was fixed to {shape[dims[0]]} while capturing."
        else:
            text = f"Dimensions {', '.join(map(str, dims))} of {names[leaf]} were fixed to {', '.join(str(shape[d]) for d in dims)} while capturing."
        remarks.append(Remark("AO301", text, source=source))
    return remarks


def conditions_remarks(names: Sequence[str], sizes: SymbolicSizes) -> list[Remark]:
    """AO301 for conditions that leave a symbol fewer sizes than its bounds say, such as ``n % 16 == 0``."""
    said = {s: f"{names[leaf]}.shape[{dim}]" for s, (leaf, dim) in sizes.home.items()}
    remarks = []
    for condition in sizes.conditions:
        # Inequalities exclude single sizes, and relations between inputs hold for every call that the model itself takes.
        if len(condition.free_symbols) == 1 and isinstance(condition, sympy.Eq):
            text = str(condition.xreplace({s: sympy.Symbol(n) for s, n in said.items()}))
            remarks.append(Remark("AO301", f"The captured graph holds only for sizes with {text}."))
    return remarks


def _is_batch_or_sequence(leaf: torch.Tensor, val: torch.Tensor, dim: int) -> bool:
    """Dimension 0, any dimension of indices and masks, and the others of a tensor in which only dimension 0 varies.

    Which of [batch, sequence, feature] and [batch, feature, time] a float tensor is, its sizes do not tell.
    """
    if dim == 0 or not leaf.is_floating_point():
        return True
    return leaf.dim() >= 3 and all(isinstance(n, int) for n in val.shape[1:])


def _environment(values: Sequence[Any]) -> ShapeEnv | None:
    for v in values:
        mode = getattr(v, "fake_mode", None)
        if mode is not None:
            env: ShapeEnv | None = mode.shape_env
            return env
    return None


def _source_of(env: ShapeEnv | None, name: str, dim: int) -> str:
    """file:line of the code on which the symbol of this dimension became a number, when the shape environment knows it."""
    if env is None:
        return ""
    key = name.split(".")[0]
    for symbol, sources in getattr(env, "var_to_sources", {}).items():
        for source in sources:
            text = source.name if isinstance(source.name, str) else source.name()
            if text.endswith(f".size()[{dim}]") and re.search(rf"\['{re.escape(key)}'\]", text):
                where = getattr(env, "replacements_slocs", {}).get(symbol)
                lines = re.findall(r'File "([^"]+)", line (\d+)', str(where)) or re.findall(r"# (\S+):(\d+) in", str(where))
                if lines:
                    return ":".join(lines[-1])
    return ""
