"""Functions in place of operators: the same numbers, without the dispatcher where nobody needs it, and by way of it where somebody does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import attnopt.kernels.eager as eager
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import ops, paged_op
from attnopt.kernels.gluon import launch as hopper
from attnopt.kernels.triton.launching import form_of
from tests.kernels.cases import BY_NAME

CASE = BY_NAME["alibi-causal"]
Q, K, V, LOADS = CASE.tensors(torch.float32)
TEXT = CASE.spec().to_json()
TABLE = torch.arange(2, dtype=torch.int32)[:, None]
LENGTHS = torch.tensor([37, 20], dtype=torch.int32)
STARTS = torch.tensor([0, 1, 2], dtype=torch.int32)


def attention(q: Tensor = Q) -> Tensor:
    return eager.attention(q, K, V, LOADS, [], TEXT)


def paged(q: Tensor = Q[:, :, 0]) -> Tensor:
    return eager.paged_attention(q, K.transpose(1, 2), V.transpose(1, 2), TABLE, STARTS, LENGTHS, LOADS, [], TEXT)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that go to what the operator would end in, without it."""
    seen: list[str] = []

    def watched(module: Any) -> Callable[..., Tensor]:
        real = module.run

        def run(*args: Any) -> Tensor:
            seen.append(module.__name__.rpartition(".")[2])
            return real(*args)  # type: ignore[no-any-return]

        return run

    monkeypatch.setattr(eager, "ops", type("Watched", (), {"run": staticmethod(watched(ops))}))
    monkeypatch.setattr(eager, "paged_op", type("Watched", (), {"run": staticmethod(watched(paged_op))}))
    return seen


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad mode"])
def test_the_same_numbers_without_the_dispatcher(grad: bool, direct: list[str]) -> None:
    with torch.set_grad_enabled(grad):
        assert torch.equal(attention(), torch.ops.attnopt.attention(Q, K, V, LOADS, [], TEXT))
        want = torch.ops.attnopt.paged_attention(Q[:, :, 0], K.transpose(1, 2), V.transpose(1, 2), TABLE, STARTS, LENGTHS, LOADS, [], TEXT)
        assert torch.equal(paged(), want)
    assert direct == ["ops", "paged_op"]
    assert not attention().requires_grad and torch.is_grad_enabled()


def test_gradients_go_by_the_operator(direct: list[str]) -> None:
    q = Q.clone().requires_grad_()
    (got,) = torch.autograd.grad(attention(q).sum(), q)
    (want,) = torch.autograd.grad(torch.ops.attnopt.attention(q, K, V, LOADS, [], TEXT).sum(), q)
    assert torch.equal(got, want) and direct == []
    with torch.no_grad():
        attention(q)
    assert direct == ["ops"]


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A tensor of a class that has a say in what is done with it."""


@pytest.mark.parametrize("function", [attention, paged], ids=["attention", "paged"])
def test_whoever_looks_sees_the_operator(function: Callable[..., Tensor], direct: list[str]) -> None:
    name = "attnopt." + ("attention" if function is attention else "paged_attention")
    with Seen() as seen:
        function()
    assert any(x == f"{name}.default" for x in seen.names)
    graph = make_fx(lambda q: function(q))(function.__defaults__[0]).graph  # type: ignore[attr-defined]
    assert any(str(n.target) == f"{name}.default" for n in graph.nodes)
    q = function.__defaults__[0]  # type: ignore[attr-defined]
    function(q.as_subclass(Own))
    with torch.profiler.profile() as profiler:
        function()
    assert any(e.name == name.replace(".", "::") for e in profiler.events())
    assert direct == []


def test_tensors_without_memory_have_a_shape_alone(direct: list[str]) -> None:
    q, k, v, load = (x.to("meta") for x in (Q, K, V, LOADS[0]))
    o = eager.attention(q, k, v, [load], [], TEXT)
    assert o.is_meta and o.shape == Q.shape and direct == []


@pytest.mark.parametrize("function", [attention, paged], ids=["attention", "paged"])
def test_compilers_and_exports_see_the_operator(function: Callable[..., Tensor], direct: list[str]) -> None:
    q = function.__defaults__[0]  # type: ignore[attr-defined]
    targets: list[str] = []

    def compiler(gm: torch.fx.GraphModule, example: Any) -> Any:
        targets.extend(str(n.target) for n in gm.graph.nodes)
        return gm.forward

    torch.testing.assert_close(torch.compile(function, backend=compiler, fullgraph=True)(q), function(q))
    assert any("attnopt" in x for x in targets)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return function(q)

    for strict in (False, True):
        program = torch.export.export(Module(), (q,), strict=strict)
        assert any(str(n.target).startswith("attnopt.") for n in program.graph.nodes)


def test_a_call_is_known_again_by_all_that_matters() -> None:
    """Shapes, strides, dtypes, alignment: what a prepared launch of these tensors relies on."""
    x = torch.zeros(2, 3, 8)
    others = [x.transpose(0, 1), x[:, :2], x.double(), x.flatten()[1:].as_strided((2, 3, 4), (12, 4, 1)), torch.zeros(2, 3, 8, device="meta")]
    assert form_of(x) == form_of(torch.ones_like(x))
    assert all(form_of(x) != form_of(y) for y in others[:-1]) and form_of(others[-1])[3] != form_of(x)[3]
    aligned = torch.zeros(100)
    assert form_of(aligned[:96]) != form_of(aligned[1:97])


def test_a_spec_hashes_as_its_equals_and_anew_in_another_process() -> None:
    import pickle

    spec, again = CASE.spec(), AttentionSpec.from_json(TEXT)
    assert spec == again and hash(spec) == hash(again)
    assert hash(spec.replace(dropout=0.5)) != hash(spec)
    there = pickle.loads(pickle.dumps(spec))
    assert "_hash" in spec.__dict__ and "_hash" not in there.__dict__
    assert there == spec and hash(there) == hash(spec)


def test_the_hopper_kernels_calls_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second call with tensors of the same forms only puts these in; another shape, or another stride, is worked out."""
    made: list[Any] = []
    launched: list[list[Any]] = []
    real = hopper.Call.of
    monkeypatch.setattr(hopper, "_CALLS", {})
    monkeypatch.setattr(hopper, "processors", lambda index: 3)
    monkeypatch.setattr(hopper.Call, "of", staticmethod(lambda *args: made.append(args) or real(*args)))
    monkeypatch.setattr(hopper.Plan, "launch", lambda plan, arguments, device: launched.append(arguments))
    case = BY_NAME["causal-GQA"]
    for _ in range(3):
        q, k, v, loads = case.tensors(torch.bfloat16)
        hopper.attention(q, k, v, loads, [], case.spec())
    assert len(made) == 1 and len(launched) == 3
    bases = [next(x.base for x in arguments if getattr(x, "base", None) is not None) for arguments in launched]
    assert len({x.data_ptr() for x in bases}) == 3, "each call reads its own tensors"
    hopper.attention(q[:, :, 1:], k, v, loads, [], case.spec())
    hopper.attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, loads, [], case.spec())
    assert len(made) == 3
