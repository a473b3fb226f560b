"""How much error is allowed, relative to the truth.

An optimized value may be at most ``K`` times as far from the float64 truth as the original computation in the same dtype,
plus a band for the roundings in which two right computations differ::

    error <= K * original_error + BAND * eps

* ``K`` = 1.5 in half precision: fused kernels keep scores and sums in float32, so they are nearer to the truth than the
  original, and one that is half as bad again has lost something. 4 in float32 and float64, where both computations only differ in
  the order of their sums, and either may be the luckier one.
* ``BAND`` = 1/2 in half precision: one more rounding of each element of the output to nearest is at most eps / 2 of it (the
  original may have none: a row that sees one key copies its value). 4 in float32: eight such roundings, for sums that are split
  into blocks. 2**16 in float64 (1.5e-11), where the truth is a float64 computation itself and the original may be exactly that one, so that
  its error says nothing: a logit that a mask moved to -1e4 has lost as many eps, and of a gradient that cancels nothing but roundings is left.
  A step in float32 is off by thousands of times as much.
* The worst row of a tensor may be at ``2 * K`` instead, and so may a gradient of fewer than 16 elements: the largest of many errors scatters
  more than their mean does, and so does the mean of a few.

The original's own error is that of this very run. Where an output of fewer than 16 numbers is beyond its budget, that one draw is joined by others, and the budget is made of
the root mean square of all (``scatter.py``, docs/decisions/0033-outputs-of-few-numbers.md).

Where a float64 run of the whole model is out of reach, the two results are compared with each other: their distance may be at most
``APART * eps``, 8 in half precision and 256 in float32 (about 6%, 0.8% and 3e-5 for bfloat16, float16 and float32): what the
roundings of some dozens of layers come to. The exact checks of each site stand beside it.

These numbers hold for every model, kernel and dtype. They are never adjusted for one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.report import Check
from attnopt.verify.compare import Distance, distance
from attnopt.verify.scatter import ENOUGH, OwnErrors

_HALF = (torch.float16, torch.bfloat16)
ROW = 2.0
"""What K is multiplied by for the worst row of a tensor."""
STATED = 1.5
"""K where both computations round the same numbers to few bits: where those lie on an edge they may fall to different sides, which scatters the error, and no more."""
FEW = 16
"""Gradients of fewer elements are judged like a row."""


def factor(dtype: torch.dtype) -> float:
    """K: how many times the original's own error is allowed."""
    return 1.5 if dtype in _HALF else 4.0


def band(dtype: torch.dtype) -> float:
    """The part of the budget that does not depend on the original's error."""
    return {torch.float16: 0.5, torch.bfloat16: 0.5, torch.float64: 2.0**16}.get(dtype, 4.0) * torch.finfo(dtype).eps


def apart(dtype: torch.dtype) -> float:
    """How far original and optimized may be apart where there is no truth."""
    return (8.0 if dtype in _HALF else 256.0) * torch.finfo(dtype).eps


def computing_dtype(values: Sequence[Any]) -> torch.dtype:
    """The coarsest floating dtype among tensors; float32 when there is none."""
    found = [x.dtype for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    return max(found, key=lambda d: torch.finfo(d).eps, default=torch.float32)


def judge(
    name: str,
    optimized: Sequence[Any],
    original: Sequence[Any],
    truth: Sequence[Any] | None,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    stated: bool = False,
    own_errors: OwnErrors | None = None,
    detail: str = "",
) -> Check:
    """Compare the leaves of two outputs (in order), with the truth or, where ``truth`` is None, with each other.

    The check holds the leaf that used the largest part of its budget. ``gradient``: a gradient is measured against at least 1% of the
    root mean square of all gradients together (some are zero but for rounding: softmax does not see a shift of all keys), over whole
    tensors, and not where the truth is NaN, since nothing can be learnt there. ``stated``: ``original`` has the error that an approximate computation is stated
    to have, by the same many roundings, so K is ``STATED`` in every dtype. ``own_errors``: further draws of the original's error, for outputs of few numbers.
    """
    times = STATED if stated else factor(dtype)
    if len(optimized) != len(original):
        return Check(name, math.inf, band(dtype), False, f"{len(optimized)} outputs instead of {len(original)}")
    reference = original if truth is None else truth
    floor = 0.01 * _rms(reference) if gradient else 0.0
    worst, where, notes = (0.0, band(dtype) if truth is not None else apart(dtype)), "", [detail] if detail else []
    for i, (o, r, t) in enumerate(zip(optimized, original, reference, strict=True)):
        own = distance(r, t, floor=floor, ignore_nan_truth=gradient)
        if truth is None or _lost(t, r, gradient):
            got, own, base = distance(o, r, floor=floor, ignore_nan_truth=gradient), Distance(0.0, 0.0), apart(dtype)
            if truth is not None and _TRUTH_LOST not in notes:
                notes.append(_TRUTH_LOST)
        else:
            got, base = distance(o, t, floor=floor, ignore_nan_truth=gradient), band(dtype)
            over = got.norm > times * own.norm + base or got.row > ROW * times * own.row + base
            if over and own_errors is not None and _few(t):
                more, draws = own_errors.of(i, own, t.numel())
                own = Distance(max(own.norm, more.norm), max(own.row, more.row))
                notes.append(f"of output {i} the original's own error was measured {draws} times")
        scatter = ROW if gradient and isinstance(t, Tensor) and t.numel() < FEW else 1.0
        found = [(got.norm, scatter * times * own.norm + base)]
        if not gradient and base == band(dtype):
            found.append((got.row, ROW * times * own.row + base))
        for error, budget in found:
            if math.isinf(budget) and _ORIGINAL_LOST not in notes:
                notes.append(_ORIGINAL_LOST)
            if _part(error, budget) > _part(*worst):
                worst, where = (error, budget), f"output {i}" if len(optimized) > 1 else ""
        if isinstance(o, Tensor) and isinstance(r, Tensor) and o.dtype != r.dtype:
            return Check(name, math.inf, base, False, f"the result is {o.dtype} instead of {r.dtype}")
    error, budget = worst
    notes += [where] if where else []
    return Check(name, error, budget, error <= budget, "; ".join(notes))


_ORIGINAL_LOST = "the original itself is not finite where the truth is"
_TRUTH_LOST = "against the original at its own dtype, which is finite where its float64 run is not"


def _few(truth: Any) -> bool:
    return isinstance(truth, Tensor) and truth.is_floating_point() and 0 < truth.numel() < ENOUGH


def _lost(truth: Any, original: Any, gradient: bool) -> bool:
    """Whether the truth is worth less than the original: a float64 run of a model that casts to float32 by itself may overflow there."""
    if gradient or not (isinstance(truth, Tensor) and isinstance(original, Tensor) and truth.is_floating_point() and truth.shape == original.shape):
        return False
    return bool((original.isfinite() & ~truth.isfinite()).any())


def _part(error: float, budget: float) -> float:
    if math.isinf(budget):
        return 0.0  # nothing can be said of a result that the original has lost
    return error / budget if budget > 0 else math.inf if error > 0 else 0.0


def _rms(values: Sequence[Any]) -> float:
    total, count = 0.0, 0
    for x in values:
        if isinstance(x, Tensor) and x.is_floating_point():
            total += float(x.detach().double().nan_to_num(nan=0.0).square().sum())
            count += x.numel()
    return math.sqrt(total / count) if count else 0.0
