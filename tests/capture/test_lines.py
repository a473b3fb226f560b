"""The line that a site or a remark names: the model's own, in whatever function it stands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
from tiny_models import hf_inputs, hf_model
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor

import attnopt
from attnopt.errors import CaptureError
from attnopt.report import Report


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    return scores.softmax(-1) @ v  # <- attend


class Helped(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


class Library(nn.Module):
    """What stands in the way is made by a library: the line that calls it is the one to change."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT * 0.25).softmax(-1)
        p = einops.reduce(p, "b (g two) j -> b g j", "max", two=2)  # <- library
        return p @ v


class Branches(nn.Module):
    def either(self, y: Tensor) -> Tensor:
        return y if y.sum() > 0 else -y  # <- branch

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.either(attend(q, k, v))


def line(mark: str) -> str:
    (number,) = (i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith(f"# <- {mark}"))
    return f"{__file__}:{number}"


def inspected(model: nn.Module, **config: Any) -> Report:
    torch._dynamo.reset()
    return attnopt.inspect(model.eval(), tuple(torch.randn(3, 2, 8, 16)), config=attnopt.OptimizeConfig(**config))


@pytest.mark.parametrize("capture", ["export", "dynamo"])
def test_a_softmax_in_a_helper_function_is_found_there(capture: str) -> None:
    assert [s.source for s in inspected(Helped(), capture=capture).sites] == [line("attend")]


def test_a_library_is_passed_over_for_the_line_that_calls_it() -> None:
    (site,) = inspected(Library()).sites
    assert site.remarks[0].node is not None and site.remarks[0].node.source == line("library")


def test_a_model_that_is_a_library_s_own_is_named_by_its_own_helper() -> None:
    model = hf_model("llama")
    (first, *_) = attnopt.inspect(model, hf_inputs("llama")).sites
    path, _, number = first.source.rpartition(":")
    assert "softmax" in Path(path).read_text().splitlines()[int(number) - 1]


def test_what_stops_export_is_named_by_its_line() -> None:
    report = inspected(Branches())
    assert [(r.code, r.source) for r in report.remarks] == [("AO302", line("branch"))]
    with pytest.raises(CaptureError) as error:
        inspected(Branches(), capture="export")
    assert error.value.source == line("branch")


@pytest.mark.parametrize("model", [Helped, Branches])
def test_torch_is_left_as_it_was(model: Callable[[], nn.Module]) -> None:
    before = inspect.getattr_static(proxy_tensor._ModuleStackTracer, "_filter_traceback_frames")
    inspected(model())
    assert inspect.getattr_static(proxy_tensor._ModuleStackTracer, "_filter_traceback_frames") is before
    program = torch.export.export(Helped(), tuple(torch.randn(3, 2, 8, 16)), strict=False)
    (softmax,) = (n for n in program.graph.nodes if "softmax" in n.name)
    assert "in forward" in softmax.meta["stack_trace"] and "in attend" not in softmax.meta["stack_trace"]
