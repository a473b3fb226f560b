"""Tiny modules for the guards' tests: captured, rewritten, and compared with what they computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim

from attnopt.config import OptimizeConfig
from attnopt.passes.pipeline import PipelineResult, run_pipeline
from attnopt.report import Site


class Wrapped(nn.Module):
    def __init__(self, f: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.f = f
        for name, t in tensors.items():
            self.register_buffer(name, t)

    def forward(self, *args: Tensor) -> Tensor:
        return self.f(self, *args) if self._buffers else self.f(*args)


def rewritten(f: Callable[..., Tensor], *args: Tensor, dynamic: bool = False, **tensors: Tensor) -> PipelineResult:
    module = Wrapped(f, **tensors).eval()
    shapes = ({"args": tuple(dict.fromkeys(range(a.dim()), Dim.AUTO) for a in args)}) if dynamic else None
    exported = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
    return run_pipeline(exported.module(check_guards=False), OptimizeConfig(backend="reference"))


def sites(f: Callable[..., Tensor], *args: Tensor, dynamic: bool = False, **tensors: Tensor) -> list[Site]:
    """The sites found in ``f``, after checking that the rewritten graph computes what ``f`` does (NaN in the same places)."""
    result = rewritten(f, *args, dynamic=dynamic, **tensors)
    with torch.no_grad():
        want = Wrapped(f, **tensors)(*args)
        got = result.graph_module(*args)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)
    return result.sites


def only(f: Callable[..., Tensor], *args: Tensor, dynamic: bool = False, **tensors: Tensor) -> Site:
    (site,) = sites(f, *args, dynamic=dynamic, **tensors)
    return site


def refused(code: str, f: Callable[..., Tensor], *args: Tensor, saying: str = "", dynamic: bool = False, **tensors: Tensor) -> None:
    """``f`` has one softmax or call, which is left as it is for the reason ``code``."""
    site = only(f, *args, dynamic=dynamic, **tensors)
    assert site.status == "missed" and [r.code for r in site.remarks] == [code], [str(r) for r in site.remarks]
    assert saying in site.remarks[0].message, site.remarks[0].message


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


Q, K, V = tensor(2, 2, 5, 4), tensor(2, 2, 5, 4, seed=1), tensor(2, 2, 5, 4, seed=2)
