"""A file in another runtime side by side with the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.utils import _pytree as pytree

from attnopt.capture.call import Args, Kwargs
from attnopt.capture.captured import Example
from attnopt.report import Verdict
from attnopt.verify.dynamic import DynamicShapes
from attnopt.verify.end_to_end import Progress
from attnopt.verify.modules import verify_modules


def verify_exported(original: nn.Module, run: Callable[..., Any], example: Example, dynamic: DynamicShapes, progress: Progress | None = None) -> Verdict:
    """``verify_modules`` on the example and, where its first axis is open, again on a batch of one. ``run`` takes the original's arguments."""
    verdict = verify_modules(original, run, example.args, example.kwargs, dynamic, progress=progress)
    single = _one_sample(example)
    if single is None:
        return verdict
    more = verify_modules(original, run, *single)
    for check in more.checks:
        check.name = check.name.replace("whole model", "batch of one")
    return Verdict(None if verdict.passed is None else verdict.passed and bool(more.passed), [*verdict.checks, *more.checks])


def _one_sample(example: Example) -> tuple[Args, Kwargs] | None:
    """The example with a batch of one; None where the first axis is not open."""
    first = {d.leaf for d in example.dynamic if d.dim == 0 and d.lower <= 1}
    if not first:
        return None
    leaves, form = pytree.tree_flatten((example.args, example.kwargs))
    leaves = [x[:1] if i in first else x for i, x in enumerate(leaves)]
    return cast("tuple[Args, Kwargs]", pytree.tree_unflatten(leaves, form)) if example.holds(leaves) else None
