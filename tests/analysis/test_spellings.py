"""Every spelling is replaced, computes the same at other sizes, and is recognised as what it is."""

from __future__ import annotations

import pytest
import torch
from spellings import EXPECT, SPELLINGS, B, C, S
from torch import nn
from torch.export import Dim

from attnopt.config import OptimizeConfig
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.passes.pipeline import PipelineResult, run_pipeline


def lifted(model: nn.Module, *args: torch.Tensor, dynamic: bool = True) -> PipelineResult:
    shapes = tuple({0: Dim.AUTO, 1: Dim.AUTO} if a.dim() > 1 else None for a in args) if dynamic else None
    gm = torch.export.export(model.eval(), args, dynamic_shapes=shapes, strict=False).module(check_guards=False)
    return run_pipeline(gm, OptimizeConfig(backend="reference"))


def assert_same(model: nn.Module, result: PipelineResult, *args: torch.Tensor, tol: float = 2e-6) -> None:
    # With gradients on, PyTorch's own modules run as they were captured; its inference-only shortcuts differ on empty rows.
    want = model.double()(*(a.double() if a.is_floating_point() else a for a in args)).detach()
    model.float()
    with torch.no_grad():
        got = result.graph_module(*args)
    assert torch.equal(want.isnan(), got.isnan())
    assert (want - got).nan_to_num().norm() <= tol * want.nan_to_num().norm()


def _rest(spec: AttentionSpec) -> str:
    """The names of the conjuncts that are neither a diagonal nor padding."""
    t = spec.traits
    words = [f"chunk {t.chunk}"] if t.chunk else []
    words += ["prefix"] if t.prefix else []
    words += ["global"] if t.global_tokens else []
    words += [f"blocks {t.blocks[0]}x{t.blocks[1]}"] if t.blocks else []
    return " ".join([*words, *([] if t.mask_rest is E.TRUE else [str(t.mask_rest)])])


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_replaced(name: str, dynamic: bool) -> None:
    model = SPELLINGS[name]()
    x = torch.randn(B, S, C, generator=torch.Generator().manual_seed(1))
    result = lifted(model, x, dynamic=dynamic)
    assert [s.status for s in result.sites] == ["replaced"], [str(r) for s in result.sites for r in s.remarks]
    spec = result.sites[0].spec
    assert spec is not None
    for field, value in EXPECT[name].items():
        found = _rest(spec) if field == "rest" else getattr(spec, field)
        assert found == pytest.approx(value) if isinstance(value, float) else found == value, f"{field}: {found} of {spec}, mask {spec.mask}, score {spec.score}"
    assert_same(model, result, x)
    if dynamic:
        assert_same(model, result, torch.randn(3, 2 * S + 1, C, generator=torch.Generator().manual_seed(2)))
