"""A file in another runtime side by side with the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.capture.captured import Example
from attnopt.report import Check, Verdict
from attnopt.verify.budget import computing_dtype, judge
from attnopt.verify.dynamic import DynamicDim, DynamicShapes
from attnopt.verify.end_to_end import Progress
from attnopt.verify.modules import verify_modules

FURTHEST = 2048
"""The largest size that is tried only to see what the original makes of it."""


def verify_exported(
    original: nn.Module, run: Callable[..., Any], example: Example, dynamic: DynamicShapes, progress: Progress | None = None, one_row: bool = False
) -> Verdict:
    """``verify_modules`` on the example and, where its first axis is open, again on a batch of one. ``run`` takes the original's arguments. ``one_row``: on a batch of one alone."""
    single = example.one_row()
    if one_row and single is not None:
        batch = {dims[0].symbol for dims in dynamic.dims.values() if 0 in dims}
        ones, admits = dict.fromkeys(batch, 1), dynamic.admits
        dims = {leaf: {d: x for d, x in found.items() if x.symbol not in batch} for leaf, found in dynamic.dims.items()}
        dynamic = DynamicShapes(dims, lambda sizes: admits({**ones, **sizes}))
        return _of_one(verify_modules(original, run, *single, dynamic, progress=progress))
    verdict = verify_modules(original, run, example.args, example.kwargs, dynamic, progress=progress)
    if single is None:
        return verdict
    return _joined(verdict, _of_one(verify_modules(original, run, *single)))


def verify_files(
    original: Callable[..., Any],
    result: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    names: Mapping[str, Sequence[str | None]],
    sums: Mapping[str, tuple[Mapping[str, int], int]] | None = None,
    beyond: Sequence[tuple[str, int]] = (),
    sites: Sequence[tuple[str, Tensor, Tensor]] = (),
    progress: Progress | None = None,
) -> Verdict:
    """``verify_modules`` of two files on the example and, where the first axes have names, again on a batch of one. Both take a tensor for each input by name.

    ``names``: for each input the names of its dimensions; equal names are equal sizes, None is a constant one. ``sums`` gives names that are
    sums of multiples of others and a constant: the parts of a sum are varied one at a time. ``beyond``: sizes of names at which the original may be another function, or none;
    those up to ``FURTHEST`` are tried. ``sites``: a name, what the
    original has and what the result has, for values inside that are to be equal too.
    """
    sums = sums or {}
    parts = list(dict.fromkeys(p for form, _ in sums.values() if len(form) > 1 for p in form))
    verdict = Verdict(True)
    for part in parts or [""]:
        found = verify_modules(original, result, (), inputs, _dynamic(inputs, names, sums, [p for p in parts if p != part]), progress=progress)
        for check in found.checks if part else ():
            check.name = check.name.replace("whole model", f"whole model by {part}")
        verdict = _joined(verdict, found)
    inside = [judge(f"{name}: example", [got], [expected], None, expected.dtype) for name, expected, got in sites]
    verdict = _joined(verdict, Verdict(all(c.passed for c in inside), inside))
    for name, n in beyond:
        if n <= FURTHEST:
            verdict = _joined(verdict, _at_size(original, result, inputs, names, sums, name, n))
    batch = {n[0] for n in names.values() if n and n[0] is not None}
    if not batch:
        return verdict
    single = {name: _first(x, [d for d, n in enumerate(names[name]) if n in batch]) for name, x in inputs.items()}
    try:
        original(**single)
    except Exception as error:  # noqa: BLE001 - a runtime raises what it likes
        note = f"batch of one: the original refuses it ({' '.join(str(error).split())[:160]})"
        verdict.checks[0].detail = "; ".join(x for x in (verdict.checks[0].detail, note) if x)
        return verdict
    return _joined(verdict, _of_one(verify_modules(original, result, (), single)))


def _dynamic(
    inputs: Mapping[str, Tensor], names: Mapping[str, Sequence[str | None]], sums: Mapping[str, tuple[Mapping[str, int], int]], fixed: Sequence[str]
) -> DynamicShapes:
    """Which sizes may change when those in ``fixed`` keep the example's: by themselves, or as a multiple of one other and a constant."""
    size = {n: x.shape[d] for name, x in inputs.items() for d, n in enumerate(names[name]) if n is not None}
    dims: dict[int, dict[int, DynamicDim]] = {}
    for i, name in enumerate(inputs):
        for d, n in enumerate(names[name]):
            if n is None or n in fixed:
                continue
            form, constant = sums.get(n, ({n: 1}, 0))
            moving = [p for p in form if p not in fixed]
            if len(moving) == 1:
                dims.setdefault(i, {})[d] = DynamicDim(
                    moving[0], 1, None, form[moving[0]], constant + sum(times * size[p] for p, times in form.items() if p in fixed)
                )
    return DynamicShapes(dims)


def _at_size(
    original: Callable[..., Any],
    result: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    names: Mapping[str, Sequence[str | None]],
    sums: Mapping[str, tuple[Mapping[str, int], int]],
    name: str,
    n: int,
) -> Verdict:
    """One comparison where the dimension ``name`` has size ``n``; none where the original takes no such input."""
    sizes = {word: x.shape[d] for key, x in inputs.items() for d, word in enumerate(names[key]) if word is not None} | {name: n}
    for word, (form, constant) in sums.items():
        sizes[word] = constant + sum(times * sizes[part] for part, times in form.items())
    resized = {key: _cycled(x, [n if word is None else sizes[word] for n, word in zip(x.shape, names[key], strict=True)]) for key, x in inputs.items()}
    try:
        expected = original(**resized)
    except Exception:  # noqa: BLE001 - a runtime raises what it likes; then there is nothing to be equal to
        return Verdict(True)
    what = f"whole model: {name} = {n}"
    try:
        got = result(**resized)
    except Exception as error:  # noqa: BLE001 - whatever the result raises is the finding
        return Verdict(False, [Check(what, math.inf, 0.0, False, f"the rewritten model raises {' '.join(str(error).split())[:200]}")])
    check = judge(what, got, expected, None, computing_dtype(expected))
    return Verdict(check.passed, [check])


def _cycled(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x`` cut or repeated to ``shape``."""
    for d, n in enumerate(shape):
        x = x.index_select(d, torch.arange(n) % x.shape[d])
    return x


def _first(x: Tensor, axes: Sequence[int]) -> Tensor:
    for d in axes:
        x = x.narrow(d, 0, 1)
    return x.contiguous()


def _of_one(verdict: Verdict) -> Verdict:
    for check in verdict.checks:
        check.name = check.name.replace("whole model", "batch of one")
    return verdict


def _joined(verdict: Verdict, more: Verdict) -> Verdict:
    both = (verdict.passed, more.passed)
    return Verdict(False if False in both else None if None in both else True, [*verdict.checks, *more.checks])
