"""How far two results are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Distance:
    """Relative distance of a result from the truth.

    ``norm``: |actual - truth| / |truth| in the 2-norm over the whole tensor.
    ``row``: the same for the worst row (last axis), relative to that row's norm or to the root mean square of all rows'
    norms, whichever is larger, so that a row that happens to cancel is not blown up. A single wrong row among a million
    is invisible in ``norm`` and plain in ``row``.
    """

    norm: float
    row: float


FAR = Distance(math.inf, math.inf)


def distance(actual: Any, truth: Any, *, floor: float = 0.0, ignore_nan_truth: bool = False) -> Distance:
    """Distance of ``actual`` from ``truth``, two leaves of an output.

    NaN and infinities are equal to themselves at the same place; anywhere else a value that is not finite is infinitely
    far, and so is another shape. Integers and booleans: the fraction of unequal elements. Leaves that are no tensors: 0 when equal.
    ``floor``: the norm per element below which the truth does not count as smaller (gradients that cancel to zero).
    ``ignore_nan_truth``: leave out elements whose truth is NaN.
    """
    if not isinstance(truth, Tensor) or not isinstance(actual, Tensor):
        return Distance(0.0, 0.0) if type(actual) is type(truth) and actual == truth else FAR
    if actual.shape != truth.shape:
        return FAR
    if truth.numel() == 0:
        return Distance(0.0, 0.0)
    if not (truth.is_floating_point() or truth.is_complex()):
        wrong = float((actual != truth).double().mean()) if actual.dtype == truth.dtype else math.inf
        return Distance(wrong, wrong)
    if truth.is_complex():
        truth, actual = torch.view_as_real(truth), torch.view_as_real(actual.to(truth.dtype))
    a, t = actual.detach().double(), truth.detach().double()
    if ignore_nan_truth:
        a = torch.where(t.isnan(), 0.0, a)
        t = t.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    difference = a - t
    if not math.isfinite(float(difference.norm()) + float(t.norm())):
        alike = (a == t) | (a.isnan() & t.isnan())
        usable = a.isfinite() & t.isfinite()
        if bool((~alike & ~usable).any()):
            return FAR
        difference = torch.where(usable, difference, 0.0)
        t = torch.where(usable, t, 0.0)
    size = max(float(t.norm()), floor * math.sqrt(t.numel()))
    norm = _ratio(float(difference.norm()), size)
    if t.ndim < 2:
        return Distance(norm, norm)
    rows = t.norm(dim=-1)
    typical = float(rows.square().mean().sqrt())
    apart = difference.norm(dim=-1) / rows.clamp_min(max(typical, torch.finfo(torch.float64).tiny))
    return Distance(norm, max(float(apart.max()), 0.0) if typical > 0 else norm)


def _ratio(difference: float, size: float) -> float:
    return 0.0 if difference == 0 else difference / size if size > 0 else math.inf


def leaves(output: Any) -> list[Any]:
    """The leaves of an output, in order."""
    return list(pytree.tree_leaves(output))
