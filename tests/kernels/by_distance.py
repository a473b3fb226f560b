"""A backend that computes a spec as generated kernels do: its rewritten programs over loads and parts, and tables where it is given some. For tests, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log

import pytest
import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import ops, reference, registry
from attnopt.kernels.block_map import BlockMap
from attnopt.kernels.evaluate import Env, as_tensor, evaluate
from attnopt.kernels.materialise import load_tensors
from attnopt.kernels.programs import programs_of
from attnopt.kernels.registry import Backend
from attnopt.kernels.tiling import bind_sizes

MARGIN = 3


@dataclass
class ByDistance:
    """``given`` holds the tables of each call, ``margin`` is what the kernel reads beyond the distances."""

    margin: int = MARGIN
    given: list[list[Tensor]] = field(default_factory=list)

    def backend(self) -> Backend:
        return Backend(
            "by-distance",
            available=lambda: None,
            accepts=lambda spec, setting: None,
            why=lambda spec, setting: "reads its tables literally",
            run=lambda q, k, v, loads, sizes, spec: self.attend(q, k, v, loads, sizes, spec)[0],
            forward=lambda q, k, v, loads, sizes, spec, seed: self.attend(q, k, v, loads, sizes, spec),
            backward=lambda grad, q, k, v, o, lse, loads, sizes, spec, seed, needs: reference.gradients(grad, q, k, v, loads, sizes, spec, seed, needs),
            recomputes=True,
            table_margin=lambda spec, setting: self.margin,
            shared=lambda q, k, v, loads, sizes, spec, seed, blocks, tables: self.attend(q, k, v, loads, sizes, spec, blocks, tables),
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        loads: Sequence[Tensor],
        sizes: Sequence[int],
        spec: AttentionSpec,
        blocks: BlockMap | None = None,
        tables: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor]:
        self.given.append(list(tables))
        groups, shape = q.shape[1] // k.shape[1], (*q.shape[:3], k.shape[2])
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        p, values = programs_of(spec), bind_sizes(spec, sizes, q, k, v) | {"@Sq": q.shape[2]}
        read = load_tensors(p.parts, dict(zip("bhqk", shape, strict=True)), loads, values, q.device, self.margin, tables)
        env = Env(dict(zip("bhqk", ((0, n) for n in shape), strict=True)), read, values, q.dtype, q.device, q @ k.mT)
        (score, mask), _ = evaluate((p.score, p.mask), env)
        weights = as_tensor(score, "float", env).expand(shape).masked_fill(~as_tensor(mask, "bool", env).expand(shape), -torch.inf)
        weights = weights * log(2.0) if p.folded else weights
        return (torch.softmax(weights, -1) @ v).transpose(1, 2).contiguous().transpose(1, 2), torch.logsumexp(weights, -1).float()


def install(monkeypatch: pytest.MonkeyPatch) -> ByDistance:
    """Registers the backend until the test ends."""
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    for cached in (ops._prepare, ops._prepare_backward):  # they hold the backend of an earlier test
        cached.cache_clear()
    made = ByDistance()
    registry.register(made.backend())
    return made
