"""NaN where a kernel must not look: in keys that no query sees, and in values of whole blocks of such keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.kernels.evaluate import Env, as_tensor, evaluate
from attnopt.kernels.tiling import bind_sizes
from tests.kernels.cases import Case


def poisoned(case: Case, q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], BLOCK_N: int) -> tuple[Tensor, Tensor] | None:
    """k and v with NaN; None where no key is hidden from all queries, or rows without a key read all values.

    A value in a block of keys that is partly visible stays: its weight is zero, and zero times NaN is NaN, in the original too.
    """
    spec = case.spec()
    if spec.empty_rows in ("uniform", "program"):
        return None
    B, Hkv, Skv = k.shape[:3]
    shape = (*q.shape[:3], Skv)
    env = Env(dict(zip("bhqk", ((0, n) for n in shape), strict=True)), loads, bind_sizes(spec, list(case.sizes.values()), q, k, v), torch.float32, q.device)
    (mask,), _ = evaluate((spec.mask,), env)
    seen = as_tensor(mask, "bool", env).expand(shape).any(2).view(B, Hkv, -1, Skv).any(2)
    if bool(seen.all()):
        return None
    blocks = torch.nn.functional.pad(seen, (0, -Skv % BLOCK_N)).unflatten(-1, (-1, BLOCK_N)).any(-1)
    used = blocks.repeat_interleave(BLOCK_N, -1)[..., :Skv]
    return k.masked_fill(~seen[..., None], torch.nan), v.masked_fill(~used[..., None], torch.nan)
