"""Steps that give back what they are given go where a model stays as it is, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import attnopt
from attnopt.passes.insert_kv_cache import PLAN
from attnopt.passes.skip_idle_steps import SkipIdleSteps
from tests.serving.models import HandWritten

X, N = torch.randn(2, 3), torch.arange(6).view(2, 3)
aten = torch.ops.aten
IDLE: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "cast to its dtype": (X, lambda x: aten.to.dtype(x, torch.float32)),
    "moved to its device": (X, lambda x: aten.to.device(x, torch.device("cpu"), torch.float32)),
    "dropout that is off": (X, lambda x: aten.dropout.default(x, 0.5, False)),
    "dropout of nothing": (X, lambda x: aten.dropout.default(x, 0.0, True)),
    "integers plus 0": (N, lambda x: aten.add.Tensor(x, 0)),
    "times 1": (X, lambda x: aten.mul.Tensor(x, 1.0)),
    "detached": (X, lambda x: aten.detach.default(x)),
}
BUSY: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "cast to another dtype": (X, lambda x: aten.to.dtype(x, torch.bfloat16)),
    "a copy": (X, lambda x: aten.to.dtype(x, torch.float32, False, True)),
    "dropout": (X, lambda x: aten.dropout.default(x, 0.5, True)),
    "floats plus 0, which makes 0 of -0": (X, lambda x: aten.add.Tensor(x, 0)),
    "plus 1": (N, lambda x: aten.add.Tensor(x, 1)),
    "times 2": (X, lambda x: aten.mul.Tensor(x, 2)),
    "integers times 1.0": (N, lambda x: aten.mul.Tensor(x, 1.0)),
    "another tensor plus 0": (X, lambda x: aten.add.Tensor(x, torch.ones(3))),
}


def steps(x: Tensor, f: Callable[[Tensor], Tensor], served: bool = True) -> int:
    """How many of the steps are left."""
    from torch.fx.experimental.proxy_tensor import make_fx

    class Root(nn.Module):
        pass

    traced = make_fx(lambda x: f(x), tracing_mode="fake", pre_dispatch=True)(x)
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    module = fx.GraphModule(Root(), graph)
    for target, value in ((n.target, getattr(traced, str(n.target))) for n in graph.find_nodes(op="get_attr")):
        setattr(module, str(target), value)
    if served:
        module.meta[PLAN] = object()
    SkipIdleSteps().run(module)
    return sum(n.op == "call_function" and n.target not in (aten.lift_fresh_copy.default, aten.ones.default) for n in module.graph.nodes)


@pytest.mark.parametrize("name", IDLE)
def test_idle(name: str) -> None:
    x, f = IDLE[name]
    assert (f(x) == x).all()
    assert steps(x, f) == 0
    assert steps(x, f, served=False) == 1, "a model that is not served may be moved"


@pytest.mark.parametrize("name", BUSY)
def test_busy(name: str) -> None:
    assert steps(*BUSY[name]) == 1


def test_a_serving_model_has_none() -> None:
    class Dropped(HandWritten):
        def forward(self, ids: Tensor) -> Tensor:
            x = super().forward(ids)
            return nn.functional.dropout(x * 1.0, 0.1, self.training).float()

    made = attnopt.optimize(Dropped().eval(), torch.randint(0, 128, (2, 10)), config=attnopt.OptimizeConfig(kv_cache="paged"))
    assert made.attnopt_report.verdict.passed
    source = made.function.source
    assert not [name for name in ("dropout.default(", "aten.to.", "torch.mul(linear") if name in source], source
