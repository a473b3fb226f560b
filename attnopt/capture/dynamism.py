"""Whether a captured graph really holds for other sizes: run it there, beside the model.

Export can bake a size in without a word (a length read as a Python number, a mask built for the example). The check runs
model and graph on the examples cut or repeated to other sizes; small ones, since it is the sizes that matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from attnopt.capture.guards import Holds, SymbolicSizes, hint_of
from attnopt.capture.run import device_of, difference, flat_tensors, tensors_from
from attnopt.errors import first_line

Sizes = dict[tuple[int, int], int]
"""(leaf, dim) to size."""


def resize(leaves: list[Any], sizes: Sizes) -> list[Any]:
    """The leaves with some dimensions cut or repeated to other sizes, element i being element i modulo the old size."""
    out = list(leaves)
    for (leaf, dim), size in sizes.items():
        t = out[leaf]
        if t.shape[dim] != size:
            out[leaf] = t.index_select(dim, torch.arange(size, device=t.device) % t.shape[dim])
    return out


@dataclass
class Findings:
    """Per symbol: why it does not vary (absent: it does), and which were seen to work at size one."""

    fixed: dict[sympy.Symbol, str] = field(default_factory=dict)
    down_to_one: set[sympy.Symbol] = field(default_factory=set)


@dataclass
class Check:
    """Runs model and graph side by side on resized leaves."""

    model: nn.Module
    graph: fx.GraphModule
    holds: Holds
    sizes: SymbolicSizes
    leaves: list[Any]
    structure: pytree.TreeSpec

    def run(self) -> Findings:
        found = Findings()
        symbols = list(self.sizes.home)
        together = self._try_each({s: self._candidates(s) for s in symbols})
        if together != "":
            for s in symbols:
                why = self._try_each({s: self._candidates(s)})
                if why:
                    found.fixed[s] = why
        for s in symbols:
            if s not in found.fixed and self.sizes.bounds[s][0] == 2 and self._at({s: 1}, beyond_bounds=True) == "":
                found.down_to_one.add(s)
        # One at a time is not all at once: a graph may hold for one row, and for one column, and not for both.
        if len(found.down_to_one) > 1 and self._at(dict.fromkeys(found.down_to_one, 1), beyond_bounds=True) != "":
            found.down_to_one.clear()
        return found

    def _candidates(self, symbol: sympy.Symbol) -> list[int]:
        leaf, dim = self.sizes.home[symbol]
        hint = hint_of(self.sizes.values[leaf].shape[dim])
        near = [hint - 1, hint + 1, hint + 2, hint - 2, 2 * hint, hint // 2, hint - 4, hint + 4]
        first = [37, 29] if hint > 64 else [hint // 2 + 1 + (hint <= 3) * 2]
        lower, upper = self.sizes.bounds[symbol]
        return [n for n in dict.fromkeys(first + near) if n != hint and n >= max(lower, 2) and (upper is None or n <= upper)]

    def _try_each(self, candidates: dict[sympy.Symbol, list[int]]) -> str:
        """Move the symbols together to their first, second, ... candidates until one was really run; why it failed, or ''."""
        why = "no other size satisfies the conditions met while capturing"
        for i in range(max((len(c) for c in candidates.values()), default=0)):
            at = {s: c[min(i, len(c) - 1)] for s, c in candidates.items() if c}
            outcome = self._at(at)
            if outcome is not None:
                return outcome
        return why if candidates else ""

    def _at(self, at: dict[sympy.Symbol, int], beyond_bounds: bool = False) -> str | None:
        """What differs at these sizes; '' when nothing does; None when they cannot be tried."""
        leaves = resize(self.leaves, self.sizes.places(at))
        if not beyond_bounds and not self.holds(leaves):
            return None
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        try:
            expected = tensors_from(self.model, args, kwargs)
        except Exception:  # noqa: BLE001 - the model itself refuses these sizes, which says nothing about the graph
            return None
        try:
            got = flat_tensors(self.graph, args, kwargs, device_of(self.model))
        except Exception as error:  # noqa: BLE001 - whatever it raises, the graph does not hold here
            return f"the captured graph fails there: {first_line(error)}"
        return difference(expected, got)
