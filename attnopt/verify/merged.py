"""A model whose KV heads were merged: the kernels against the same model with merged heads, and how far that is from the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.passes.pipeline import PipelineResult
from attnopt.report import Verdict
from attnopt.verify.compare import leaves
from attnopt.verify.end_to_end import Progress, compare_graphs, seeded


def verify_merged(result: PipelineResult, args: Sequence[Any], kwargs: Mapping[str, Any], verdict: Verdict, progress: Progress | None = None) -> str:
    """Add to the verdict, which is of everything but the merge, how the optimized graph compares with ``result.merged``; gives ``change`` as a sentence.

    Sites are not compared one by one: that was done with all heads.
    """
    assert result.merged is not None
    if verdict.passed is None:
        return "how far the results change was not computed: nothing was verified."
    training = result.merged.training
    checks = compare_graphs(result.merged, result.graph_module, {}, args, kwargs, training=training, progress=progress, only_whole=True).checks
    for check in checks:
        check.name = check.name.replace("whole model", "whole model with merged heads")
    verdict.checks += checks
    verdict.passed = verdict.passed and all(c.passed for c in checks)
    return f"{change(result.reference, result.merged, args, kwargs)}."


def change(original: Callable[..., Any], merged: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """How far the floating-point results of two models are apart on one call: root mean square of the difference over that of the original's."""
    found = []
    for model in (original, merged):
        with torch.no_grad(), seeded():
            found.append(leaves(model(*args, **kwargs)))
    pairs = [(a.double(), b.double()) for a, b in zip(*found, strict=True) if isinstance(a, Tensor) and a.is_floating_point()]
    total, moved = sum(float(a.square().sum()) for a, _ in pairs), sum(float((b - a).square().sum()) for a, b in pairs)
    return f"on the example the results change by {(moved / total) ** 0.5 if total else 0.0:.3g} of their root mean square"
