"""Least and greatest elements of parts of a tensor: of each block along an axis, and of boxes given by index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import product

import torch
from torch import Tensor


def _smaller(a: Tensor, b: Tensor) -> Tensor:
    return a & b if a.dtype == torch.bool else torch.minimum(a, b)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return a | b if a.dtype == torch.bool else torch.maximum(a, b)


def by_block(x: Tensor, dim: int, block: int, least: bool) -> Tensor:
    """Least or greatest of each ``block`` entries along ``dim``; the last block may be short."""
    n = x.shape[dim]
    whole = n // block * block
    parts = [] if not whole else [x.narrow(dim, 0, whole).unflatten(dim, (whole // block, block))]
    parts += [] if whole == n else [x.narrow(dim, whole, n - whole).unsqueeze(dim)]
    done = [p.amin(dim + 1) if least else p.amax(dim + 1) for p in parts]
    return done[0] if len(done) == 1 else torch.cat(done, dim)


def within(x: Tensor, starts: Sequence[Tensor], ends: Sequence[Tensor | None], least: bool) -> Tensor:
    """Least or greatest of ``x`` over the box of indices [starts, ends], both inclusive; an end None means one index.

    Level j of a sparse table holds the extremum over 2^j entries, and two of these cover any range (Bender and Farach-Colton,
    LATIN 2000).
    """
    best = _smaller if least else _larger
    choices: list[tuple[Tensor, ...]] = []
    levels: list[Tensor] = []
    for d, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if end is None:
            choices.append((start,))
            continue
        n = x.shape[d]
        table = [x]
        while 2 << (len(table) - 1) <= n:
            last, step = table[-1], 1 << (len(table) - 1)
            # entries whose 2 * step neighbours do not exist are never read
            table.append(torch.cat([best(last.narrow(d, 0, n - step), last.narrow(d, step, n - step)), last.narrow(d, n - step, step)], d))
        x = torch.stack(table, -1)  # levels stand behind all entries' axes
        level = torch.log2((end - start + 1).clamp(min=1).double()).floor().long()
        choices.append((start, end - (torch.ones_like(level) << level) + 1))
        levels.append(level)
    return reduce(best, (x[(*entries, *levels)] for entries in product(*choices)))
