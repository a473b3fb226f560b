"""Says which dimensions were turned into constants, and where in the user's code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from traceback import FrameSummary
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from attnopt.capture.guards import SymbolicSizes, environment_of, expr_of, hint_of
from attnopt.remarks import Remark


def fixed_remark(name: str, dim: int, size: int, why: str) -> Remark:
    """AO301 for a dimension that export left open and that a run at another size showed to be fixed."""
    return Remark("AO301", f"Dimension {dim} of {name} holds for size {size} only: {why}.", hint="Another size captures the model again.")


def specialised_remarks(names: Sequence[str], leaves: Sequence[Any], sizes: SymbolicSizes, asked: Sequence[tuple[int, int]]) -> list[Remark]:
    """AO301 for every batch or sequence dimension among ``asked`` that came out as a constant."""
    env = sizes.env or environment_of(sizes.values)
    remarks = []
    for leaf in dict.fromkeys(leaf for leaf, _ in asked):
        shape = sizes.values[leaf].shape
        fixed = [d for i, d in asked if i == leaf and not expr_of(shape[d]).free_symbols and _is_batch_or_sequence(leaves[leaf], sizes.values[leaf], d)]
        where = {d: _source_of(env, names[leaf], d) for d in fixed}
        # Of a float tensor, a size that the model itself compares with a number is a length; one that a layer demands is a feature size.
        if leaves[leaf].is_floating_point() and 0 not in fixed and any(where.values()):
            fixed = [d for d in fixed if where[d]]
        if not fixed:
            continue
        sizes_text = ", ".join(str(hint_of(shape[d])) for d in fixed)
        which = f"Dimension {fixed[0]} of {names[leaf]} was" if len(fixed) == 1 else f"Dimensions {', '.join(map(str, fixed))} of {names[leaf]} were"
        source = next(filter(None, (where[d] for d in fixed)), "")
        hint = "" if source else "Another size captures the model again."
        remarks.append(Remark("AO301", f"{which} fixed to {sizes_text} while capturing.", source=source, hint=hint))
    return remarks


def conditions_remarks(names: Sequence[str], sizes: SymbolicSizes) -> list[Remark]:
    """AO301 for conditions that leave a symbol fewer sizes than its bounds say, such as ``n % 16 == 0``."""
    said = {s: f"{names[leaf]}.shape[{dim}]" for s, (leaf, dim) in sizes.home.items()}
    remarks = []
    for condition in sizes.conditions:
        # Inequalities exclude single sizes, and relations between inputs hold for every call that the model itself takes.
        if len(condition.free_symbols) == 1 and isinstance(condition, sympy.Eq):
            text = str(condition.xreplace({s: sympy.Symbol(n) for s, n in said.items()}))
            remarks.append(Remark("AO301", f"The captured graph holds only for sizes with {text}.", hint="Other sizes capture the model again."))
    return remarks


def _is_batch_or_sequence(leaf: torch.Tensor, val: torch.Tensor, dim: int) -> bool:
    """Dimension 0, any dimension of indices and masks, and the others of a tensor in which only dimension 0 varies.

    Which of [batch, sequence, feature] and [batch, feature, time] a float tensor is, its sizes do not tell.
    """
    if dim == 0 or not leaf.is_floating_point():
        return True
    return leaf.dim() >= 3 and not any(expr_of(n).free_symbols for n in val.shape[1:])


def _source_of(env: ShapeEnv | None, name: str, dim: int) -> str:
    """file:line of the code on which the symbol of this dimension became a number, when the shape environment knows it."""
    if env is None:
        return ""
    key = name.split(".")[0]
    for symbol, sources in getattr(env, "var_to_sources", {}).items():
        for source in sources:
            text = source.name if isinstance(source.name, str) else source.name()
            if text.endswith(f".size()[{dim}]") and re.search(rf"\['{re.escape(key)}'\]", text):
                return _user_code(getattr(env, "replacements_slocs", {}).get(symbol))
    return ""


def _user_code(where: Any) -> str:
    """file:line outside of torch in torch's record of where a guard was met."""
    frame = getattr(where, "framework_loc", None)
    if isinstance(frame, FrameSummary) and "/torch/" not in frame.filename:
        return f"{frame.filename}:{frame.lineno}"
    match = re.match(r"(\S+:\d+) in ", getattr(where, "maybe_user_loc", None) or "")
    return match[1] if match else ""
