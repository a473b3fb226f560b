"""The functions that stand in place of overloads end in the same operators, with the same arguments."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.emit.direct import DIRECT, call_directly
from attnopt.emit.function import graph_function

X, W, B = torch.rand(2, 3, 4) + 0.5, torch.randn(5, 4), torch.randn(5)
CALLS: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "add.Tensor": [((X, X), {}), ((X, 1e-6), {}), ((X, X), {"alpha": 2}), ((torch.arange(3), 0), {})],
    "sub.Tensor": [((X, X), {}), ((X, 2), {}), ((X, X), {"alpha": 2})],
    "mul.Tensor": [((X, X), {}), ((X, 0.5), {}), ((torch.arange(3), 2), {})],
    "addmm.default": [((B, X[0], W.T), {}), ((B, X[0], W.T), {"beta": 0.5, "alpha": 2})],
    "bmm.default": [((X, X.mT), {})],
    "matmul.default": [((X, X.mT), {}), ((X, W.T), {})],
    "linear.default": [((X, W), {}), ((X, W, B), {}), ((X, W, None), {})],
    "cat.default": [(([X, X], -1), {}), (([X],), {})],
    "embedding.default": [((W, torch.tensor([[0, 4]])), {}), ((W, torch.tensor([1]), 0), {}), ((W, torch.tensor([1]), -1, False, False), {})],
    "gelu.default": [((X,), {}), ((X,), {"approximate": "tanh"})],
    "layer_norm.default": [((X, [4], B[:4], B[1:], 1e-5, False), {}), ((X, [4]), {})],
    "mean.dim": [((X, [-1], True), {}), ((X, [0, 1]), {"dtype": torch.float64})],
    "pow.Tensor_Scalar": [((X, 2), {}), ((X, 3.0), {})],
    "reshape.default": [((X, [-1, 4]), {}), ((X, [2, 12]), {})],
    "permute.default": [((X, [2, 0, 1]), {})],
    "select.int": [((X, 0, 1), {}), ((X, -1, 0), {})],
    "transpose.int": [((X, 1, 2), {}), ((X, -1, -2), {})],
    "unsqueeze.default": [((X, 0), {}), ((X, -1), {})],
}
UNARY = ("cos", "exp", "neg", "relu", "rsqrt", "sigmoid", "silu", "sin", "tanh")
CALLS |= {f"{name}.default": [((X,), {})] for name in UNARY}


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(f"{func} {args} {kwargs}")
        return func(*args, **(kwargs or {}))


def seen(function: Any, args: Any, kwargs: Any) -> tuple[list[str], Any]:
    with Calls() as mode:
        out = function(*args, **kwargs)
    return mode.seen, out


OURS = [op for op in DIRECT if op.namespace == "attnopt"]
"""Functions with a test of their own (tests/kernels/test_eager.py)."""


@pytest.mark.parametrize("op", OURS, ids=str)
def test_functions_of_ours_take_what_their_operators_take(op: torch._ops.OpOverload) -> None:
    found = inspect.signature(DIRECT[op]).parameters
    assert [(x.name, x.has_default_value()) for x in op._schema.arguments] == [(x.name, x.default is not x.empty) for x in found.values()]
    assert all(tuple(x.default_value or ()) == tuple(found[x.name].default or ()) for x in op._schema.arguments if x.has_default_value())


@pytest.mark.parametrize("op", [op for op in DIRECT if op not in OURS], ids=str)
def test_the_same_operators(op: torch._ops.OpOverload) -> None:
    for args, kwargs in CALLS[str(op).removeprefix("aten.")]:
        (want, there), (got, here) = seen(op, args, kwargs), seen(DIRECT[op], args, kwargs)
        assert got == want and want
        torch.testing.assert_close(list(here) if isinstance(here, (list, tuple)) else here, there, rtol=0, atol=0)


def test_a_graph_is_run_by_functions_and_stays_as_it_is() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.down(x)).transpose(0, 1)

    model = Model()
    gm = torch.export.export(model, (X[0],)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    before = str(gm.graph)
    found = graph_function(gm, model)
    assert str(gm.graph) == before
    assert "torch._C._nn.linear(" in found.source and "ops.aten" not in found.source
    torch.testing.assert_close(found.run(model, X[0])[0], model(X[0]), rtol=0, atol=0)
    call_directly(graph := fx.Graph())
    assert not list(graph.nodes)
