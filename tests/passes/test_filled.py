"""What is filled slice by slice becomes a concatenation, and nothing that could differ from one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from attnopt.config import OptimizeConfig
from attnopt.passes.pipeline import NAMES, run_pipeline

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Filled(nn.Module):
    def __init__(self, fill: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fill(x, y) * 2


def canonical(fill: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, list[str]]:
    shapes = {"x": {0: Dim.AUTO, 1: Dim.AUTO}, "y": {0: Dim.AUTO, 1: Dim.AUTO}}
    gm = torch.export.export(Filled(fill), (X, -X[..., :4]), dynamic_shapes=shapes, strict=False).module(check_guards=False)
    result = run_pipeline(gm, OptimizeConfig(disable_passes=NAMES[1:])).graph_module
    return result, [str(n.target) for n in result.graph.nodes]


def _two(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:2], 12)
    out[..., :8] = x
    out[..., 8:] = y
    return out


def _behind_first(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty(*x.shape[:2], 12)
    out[..., 4:] = x
    out[..., :4] = y
    return out.transpose(1, 2)


def _broadcast(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], 12)
    out[..., :8] = x
    out[..., 8:] = y[:, :1]
    return out


def _cast(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:2], 12, dtype=torch.float64)
    out[..., :8] = x
    out[..., 8:] = y.half()
    return out


def _gap(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], 13)
    out[..., :8] = x
    out[..., 9:] = y
    return out


def _twice(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:2], 8)
    out[..., :8] = x
    out[..., 4:] = y
    return out


def _read_between(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], 12)
    out[..., :8] = x
    before = out.sum(-1, keepdim=True)
    out[..., 8:] = y
    return out + before


def _written_after(x: Tensor, y: Tensor) -> Tensor:
    out = _two(x, y)
    out[..., 2:4] = 0
    return out


def _source_written(x: Tensor, y: Tensor) -> Tensor:
    x = x + 1
    out = x.new_empty(*x.shape[:2], 12)
    out[..., :8] = x
    x[..., 2:4].zero_()
    out[..., 8:] = y
    return out + x[..., :1]


def _two_axes(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], 8)
    out[..., :4] = y
    out[:1] = x[:1]
    return out


def _strided(x: Tensor, y: Tensor) -> Tensor:
    out = x.new_empty(*x.shape[:2], 8)
    out[..., ::2] = y
    out[..., 1::2] = -y
    return out


@pytest.mark.parametrize("fill", [_two, _behind_first, _broadcast, _cast])
def test_is_joined(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    module, targets = canonical(fill)
    assert "aten.cat.default" in targets
    assert not [t for t in targets if "copy_" in t or "empty" in t or "new_zeros" in t]
    for x in (X, torch.randn(3, 7, 8)):
        got, want = module(x, -x[..., :4]), fill(x, -x[..., :4]) * 2
        assert got.dtype is want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("fill", [_gap, _twice, _read_between, _written_after, _source_written, _two_axes, _strided])
def test_is_left(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    module, targets = canonical(fill)
    assert "aten.cat.default" not in targets
    for x in (X, torch.randn(3, 7, 8)):
        assert torch.equal(module(x, -x[..., :4]), fill(x, -x[..., :4]) * 2)
