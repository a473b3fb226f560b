"""Outputs of one number: right ones pass where the original was lucky, and wrong ones are found though nothing stands beside them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt import OptimizeConfig, optimize
from attnopt.verify import verify_modules
from attnopt.verify.compare import Distance
from attnopt.verify.scatter import OwnErrors, moved

WIDTH, LENGTH = 32, 24


class Tower(nn.Module):
    """Attention and a projection; ``fused``: by scaled_dot_product_attention, with the scale times ``scale``."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, fused: bool, scale: float) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        by = scale / math.sqrt(q.shape[-1])
        o = F.scaled_dot_product_attention(q, k, v, scale=by) if fused else torch.softmax(q @ k.transpose(-1, -2) * by, -1) @ v
        return F.normalize(self.out(o.transpose(1, 2).flatten(2)).mean(1), dim=-1)


class Similarity(nn.Module):
    """One number: the product of two unit vectors less a constant, with which it nearly cancels."""

    def __init__(self, fused: bool = False, scale: float = 1.0, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = Tower(), Tower()
        self.fused, self.scale, self.factor = fused, scale, factor
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        return self.factor * (self.one(x, self.fused, self.scale) @ self.two(y, self.fused, self.scale).T - shift)


def example(seed: int, rest: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """``rest``: what is left of the product by the constant."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(1, LENGTH, WIDTH, generator=g), torch.randn(1, LENGTH, WIDTH, generator=g)
    product = Similarity().double()(x.double(), y.double(), torch.zeros(1, 1).double())
    return x, y, ((1 - rest) * product).float()


EXAMPLES = [example(s) for s in range(40)]


def test_a_number_that_cancels_passes_also_where_the_original_was_lucky() -> None:
    measured = 0
    for given in EXAMPLES:
        verdict = verify_modules(Similarity(), Similarity(fused=True), given)
        assert verdict.passed, verdict.worst
        measured += any("error was measured 16 times" in c.detail for c in verdict.checks)
    assert measured, "in none of the examples the original was lucky: nothing was tested"


@pytest.mark.parametrize("wrong", [{"scale": 1.01}, {"factor": 1.01}], ids=["the scale of the attention", "the result"])
def test_one_percent_off_is_found_in_a_number_that_cancels(wrong: dict[str, Any]) -> None:
    for given in EXAMPLES[:6]:
        assert not verify_modules(Similarity(), Similarity(fused=True, **wrong), given).passed


def test_a_number_that_does_not_cancel_has_no_more_room_than_its_roundings() -> None:
    whole = example(0, rest=1.0)
    assert verify_modules(Similarity(), Similarity(fused=True), whole).passed
    assert not verify_modules(Similarity(), Similarity(fused=True, factor=1 + 1e-5), whole).passed


def test_graphs_are_judged_likewise() -> None:
    """The captured graph beside its optimized form, where weights are replaced by name."""
    for given in EXAMPLES[:3]:
        made = optimize(Similarity(), given, config=OptimizeConfig(backend="reference"))
        assert made.attnopt_report.verdict.passed, made.attnopt_report.verdict.worst


def test_weights_are_moved_by_little_and_by_several_roundings() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        w = torch.linspace(-2, 2, 401).to(dtype)
        a, b = (moved([w, torch.arange(3)], n) for n in (0, 1))
        assert torch.equal(a[1], torch.arange(3)) and a[0].dtype == dtype
        assert torch.equal(a[0], moved([w], 0)[0]) and not torch.equal(a[0], b[0])
        change = ((a[0] - w).double() / w.double().clamp(min=1e-9)).abs()[w > 0]
        assert 2 * torch.finfo(dtype).eps < float(change.max()) < max(2**-11, 6 * torch.finfo(dtype).eps)
    assert math.isinf(float(moved([torch.tensor([-math.inf])], 0)[0]))


def test_few_numbers_get_as_many_draws_as_bring_them_to_sixteen() -> None:
    asked: list[int] = []

    def draw(n: int) -> tuple[list[Tensor], list[Tensor]]:
        asked.append(n)
        return [torch.full((4,), 3.0)], [torch.full((4,), 2.0)]

    errors = OwnErrors(draw)
    found, count = errors.of(0, Distance(0.5, 0.5), 4)
    assert count == 4 and asked == [0, 1, 2] and found.norm == pytest.approx(0.5)
    errors.of(0, Distance(0.5, 0.5), 4)
    assert asked == [0, 1, 2]
