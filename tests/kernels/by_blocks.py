"""A backend that reads its map literally: keys of listed blocks only, and the mask only in partial ones. For tests, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import ops, registry
from attnopt.kernels.block_map import BlockMap
from attnopt.kernels.evaluate import Env, as_tensor, evaluate
from attnopt.kernels.registry import Backend, Setting
from attnopt.kernels.tiling import bind_sizes

BLOCK_M, BLOCK_N = 4, 2


def visible_by(blocks: BlockMap, mask: Tensor) -> Tensor:
    """A dense mask [B, H, Sq, Skv] as a kernel that walks over ``blocks`` sees it."""
    B, H = mask.shape[:2]
    counts, indices = (x.expand(B, H, -1, -1) for x in (blocks.counts, blocks.indices))
    out = torch.zeros_like(mask)
    for b in range(B):
        for h in range(H):
            for i in range(counts.shape[2]):
                rows = slice(i * blocks.BLOCK_M, (i + 1) * blocks.BLOCK_M)
                partial, full = counts[b, h, i, :2].tolist()
                for n, j in enumerate(indices[b, h, i, : partial + full].tolist()):
                    keys = slice(j * blocks.BLOCK_N, (j + 1) * blocks.BLOCK_N)
                    out[b, h, rows, keys] = mask[b, h, rows, keys] if n < partial else True
    return out


@dataclass
class ByBlocks:
    """``calls`` holds the map of each call that came with one."""

    calls: list[BlockMap] = field(default_factory=list)

    def backend(self) -> Backend:
        return Backend(
            "by-blocks",
            available=lambda: None,
            accepts=lambda spec, setting: None,
            why=lambda spec, setting: "reads its map literally",
            run=lambda q, k, v, loads, sizes, spec: self.attend(q, k, v, loads, sizes, spec, None)[0],
            block_sizes=self.block_sizes,
            shared=lambda q, k, v, loads, sizes, spec, seed, blocks, tables: self.attend(q, k, v, loads, sizes, spec, blocks),
        )

    @staticmethod
    def block_sizes(spec: AttentionSpec, setting: Setting) -> tuple[int, int] | None:
        return None if spec.mask.is_const else (BLOCK_M, BLOCK_N)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, blocks: BlockMap | None
    ) -> tuple[Tensor, Tensor]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        shape = (*q.shape[:3], k.shape[2])
        env = Env(dict(zip("bhqk", ((0, n) for n in shape), strict=True)), loads, bind_sizes(spec, sizes, q, k, v), q.dtype, q.device, q @ k.mT)
        (score, mask), _ = evaluate((spec.score, spec.mask), env)
        visible = as_tensor(mask, "bool", env).expand(shape)
        if blocks is not None:
            self.calls.append(blocks)
            visible = visible_by(blocks, visible)
        weights = as_tensor(score, "float", env).expand(shape).masked_fill(~visible, -torch.inf)
        p = torch.softmax(weights, -1)
        if spec.empty_rows in ("uniform", "zero"):
            p = torch.where(visible.any(-1, keepdim=True), p, 1.0 / shape[3] if spec.empty_rows == "uniform" else 0.0)
        return (p @ v).transpose(1, 2).contiguous().transpose(1, 2), torch.logsumexp(weights, -1).float()


def install(monkeypatch: pytest.MonkeyPatch) -> ByBlocks:
    """Registers the backend until the test ends."""
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    for cached in (ops._prepare, ops._prepare_backward):  # they hold the backend of an earlier test
        cached.cache_clear()
    made = ByBlocks()
    registry.register(made.backend())
    return made
