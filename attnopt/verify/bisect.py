"""Which sites to put back when an optimized model is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from attnopt.report import Check, Verdict
from attnopt.verify.end_to_end import Comparison, Progress, compare_graphs
from attnopt.verify.regions import Outputs


@dataclass(frozen=True)
class GraphPair:
    """A captured graph, its optimized form, and where the value of each replaced site stands in both."""

    reference: GraphModule
    optimized: GraphModule
    outputs: Outputs


Rebuild = Callable[[frozenset[str]], GraphPair]
"""Optimizes again, with the named sites left in their original form."""


@dataclass
class Repair:
    """What remained: the last pair, its verdict, the sites that were put back and the checks that they failed."""

    pair: GraphPair
    verdict: Verdict
    reverted: dict[str, list[Check]] = field(default_factory=dict)


def verify_and_repair(
    rebuild: Rebuild,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    root: nn.Module | None = None,
    training: bool = False,
    progress: Progress | None = None,
) -> Repair:
    """Compare, put back the sites that fail on their own, and compare again, until everything holds or nothing can be blamed.

    When every site passes by itself and the whole model does not, the first bad site is found by bisection over the
    sites; when the model fails even with all of them put back, the fault is in none of them, and the verdict says failed.
    """
    reverted: dict[str, list[Check]] = {}
    while True:
        skip = frozenset(reverted)
        pair = rebuild(skip)
        result = compare_graphs(pair.reference, pair.optimized, pair.outputs, args, kwargs, root=root, training=training, progress=progress)
        left = [s for s in pair.outputs if s not in skip]
        blamed = {s: checks for s, checks in result.failed.items() if s in left}
        if not blamed and result.whole_failed:

            def holds(without: frozenset[str], skip: frozenset[str] = skip) -> bool:
                p = rebuild(skip | without)
                return not compare_graphs(p.reference, p.optimized, p.outputs, args, kwargs, root=root, training=training, only_whole=True).whole_failed

            bad = first_bad_site(left, holds)
            blamed = {bad: _whole_failures(result)} if bad is not None else {}
        if not blamed:
            return Repair(pair, result.verdict, reverted)
        reverted |= blamed


def first_bad_site(sites: Sequence[str], holds: Callable[[frozenset[str]], bool]) -> str | None:
    """The first site without which the model is right, given that it is wrong with all of ``sites``.

    ``holds(without)`` tells whether the model is right when the sites in ``without`` are put back. About log2(len(sites))
    calls. None when the model is wrong with all of them put back.
    """
    if not holds(frozenset(sites)):
        return None
    right, wrong = 0, len(sites)  # with only the first n sites optimized, the model is right / wrong
    while wrong - right > 1:
        middle = (right + wrong) // 2
        if holds(frozenset(sites[middle:])):
            right = middle
        else:
            wrong = middle
    return sites[wrong - 1] if sites else None


def _whole_failures(result: Comparison) -> list[Check]:
    return [c for c in result.checks if not c.passed]
