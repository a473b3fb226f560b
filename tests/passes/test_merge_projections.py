"""Projections of one input as one product: what is merged, when it is one product, and that parameters stay what they were."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnopt
from attnopt.config import OptimizeConfig
from attnopt.emit.pt2 import save_pt2
from attnopt.kernels.linear import adjacent, merged_linear, pack
from attnopt.passes import pipeline
from attnopt.passes.merge_projections import MergeProjections, merged

B, S, H, D = 2, 6, 4, 8
C = H * D
QUICK = OptimizeConfig(verify=False)
X = torch.randn(B, S, C, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self, bias: tuple[bool, bool, bool] = (True, True, True), kv_heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kv_heads = kv_heads
        self.q, self.k, self.v = (nn.Linear(C, n * D, bias=b) for n, b in zip((H, kv_heads, kv_heads), bias, strict=True))
        self.o = nn.Linear(C, C)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (t.view(b, s, -1, D).transpose(1, 2) for t in self.split(x))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(b, s, C))


class Products(Attention):
    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ self.q.weight.t(), torch.matmul(x, self.k.weight.T), F.linear(x, self.v.weight)


class Tied(Attention):
    """Keys and values by the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.v.weight = self.k.weight


class Normed(Attention):
    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.layer_norm(self.q(x), (C,)) * 2, self.k(x).relu(), self.v(x)


class Cross(Attention):
    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.flip(1)
        return self.q(x), self.k(y), self.v(y)


class Latent(Attention):
    """Keys and values by way of a narrow projection, queries too."""

    def __init__(self) -> None:
        super().__init__()
        self.q_down, self.kv_down = nn.Linear(C, 8, bias=False), nn.Linear(C, 12, bias=False)
        self.q_up, self.kv_up = nn.Linear(8, C), nn.Linear(12, 2 * self.kv_heads * D)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv_up(F.layer_norm(self.kv_down(x), (12,))).chunk(2, -1)
        return self.q_up(F.layer_norm(self.q_down(x), (8,))), k, v


class Apart(Attention):
    """A projection that no attention reads is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(self.gate(x))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MergeProjections", functools.partial(MergeProjections, devices=("cpu",)))


def groups(model: nn.Module) -> list[tuple[str, ...]]:
    gm = torch.export.export(model.eval(), (X,), strict=False).module(check_guards=False)
    result = pipeline.run_pipeline(gm, OptimizeConfig())
    torch.testing.assert_close(result.graph_module(X), model(X), rtol=1e-5, atol=1e-6)
    return [g for g in merged(result.graph_module.graph) if "weight" in g[0]]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_open_batch_and_length(dtype: torch.dtype) -> None:
    """In torch 2.11 the C++ form of a linear layer asks for the number of elements, which is a symbol here."""
    model, x = Attention((False, False, False)).to(dtype).requires_grad_(False), X.to(dtype)
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    gm = torch.export.export(model.eval(), (x,), dynamic_shapes=shapes, strict=False).module(check_guards=False)
    result = pipeline.run_pipeline(gm, OptimizeConfig())
    assert [g for g in merged(result.graph_module.graph) if "weight" in g[0]] == [QKV]
    torch.testing.assert_close(result.graph_module(x[:1, :4]), model(x[:1, :4]), rtol=1e-2, atol=1e-2)


class Products_(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def products(run: Callable[[], Any]) -> int:
    with torch.no_grad(), Products_() as mode:
        run()
    return mode.count


QKV = ("q.weight", "k.weight", "v.weight")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Attention(), [QKV]),
        (Attention((True, False, True)), [QKV]),
        (Products(), [QKV]),
        (Normed(), [QKV]),
        (Cross(), [("k.weight", "v.weight")]),
        (Latent(), [("kv_down.weight", "q_down.weight")]),
        (Apart(), [QKV]),
        (Tied(), []),
    ],
    ids=["linear", "some biases", "products", "norm between", "cross", "latent", "gate", "tied"],
)
def test_what_is_merged(model: nn.Module, expected: list[tuple[str, ...]]) -> None:
    assert groups(model) == expected


def test_on_a_cpu_nothing_is_merged_unless_asked() -> None:
    assert groups(Attention()) == []


@pytest.mark.usefixtures("on_cpu")
def test_the_pass_can_be_left_out() -> None:
    gm = torch.export.export(Attention().eval(), (X,), strict=False).module(check_guards=False)
    assert merged(pipeline.run_pipeline(gm, OptimizeConfig(disable_passes=("merge-projections",))).graph_module.graph) == ()


@pytest.mark.usefixtures("on_cpu")
def test_it_is_verified_like_everything_else() -> None:
    optimized = attnopt.optimize(Attention().eval(), X, copy=True)
    assert optimized.attnopt_report.verdict.passed is True
    assert adjacent([optimized.q.weight, optimized.k.weight, optimized.v.weight])


# ------------------------------------------------------------------------------------------------ the operator


def weights(*biases: bool) -> tuple[list[Tensor], list[Tensor | None]]:
    torch.manual_seed(0)
    return [torch.randn(n, C) for n in (16, 8, 8)], [torch.randn(n) if b else None for n, b in zip((16, 8, 8), biases, strict=True)]


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (False, True, False)], ids=["biases", "none", "one"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
def test_the_operator(biases: tuple[bool, bool, bool], packed: bool) -> None:
    w, b = weights(*biases)
    want = [F.linear(X.double(), v.double(), None if c is None else c.double()) for v, c in zip(w, b, strict=True)]
    if packed:
        assert pack(w)
        assert all(biases) is (all(biases) and pack(b))
    got = merged_linear(X, w, b)
    assert products(lambda: merged_linear(X, w, b)) == (1 if packed else 3)
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= 4e-7 * y.norm()


def test_a_gradient_is_exactly_the_original_one() -> None:
    w, b = weights(True, True, True)
    pack(w)
    x = X.clone().requires_grad_()
    parameters = [nn.Parameter(t) for t in (*w, *b)]
    sum((y * y).sum() for y in merged_linear(x, parameters[:3], parameters[3:])).backward()
    found = [t.grad.clone() for t in (x, *parameters)]
    for t in (x, *parameters):
        t.grad = None
    sum((F.linear(x, p, q) ** 2).sum() for p, q in zip(parameters[:3], parameters[3:], strict=True)).backward()
    assert all(torch.equal(g, t.grad) for g, t in zip(found, (x, *parameters), strict=True))


def test_only_the_input_wants_a_gradient() -> None:
    w, b = weights(True, True, True)
    pack(w)
    x = X.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(merged_linear(x, w, b)[1].sum(), x)[0], torch.autograd.grad(F.linear(x, w[1], b[1]).sum(), x)[0])


def test_transforms_and_autocast_see_plain_layers() -> None:
    w, b = weights(True, True, True)
    pack(w)
    got = torch.func.vmap(lambda x: merged_linear(x, w, b)[0])(X)
    torch.testing.assert_close(got, F.linear(X, w[0], b[0]), rtol=1e-5, atol=1e-5)
    got = torch.func.grad(lambda x: merged_linear(x, w, b)[0].sum())(X)
    torch.testing.assert_close(got, w[0].sum(0).expand_as(X), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merged_linear(X, w, b)[2], F.linear(X, w[2], b[2]))


class Scaled(Tensor):
    """A class that gives its linear layer another meaning, as quantized weights do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        return out * 3 if func is F.linear else out


def test_a_weight_of_another_class_keeps_its_meaning() -> None:
    w, b = weights(False, False, False)
    odd = [w[0], w[1].as_subclass(Scaled), w[2]]
    assert not pack(odd)
    assert torch.equal(merged_linear(X, odd, b)[1], F.linear(X, odd[1]))


@pytest.mark.parametrize("spoil", ["moved", "swapped", "another dtype", "transposed"])
def test_weights_that_are_not_back_to_back_are_multiplied_one_by_one(spoil: str) -> None:
    w, b = weights(False, False, False)
    assert pack(w)
    if spoil == "moved":
        w[1].data = w[1].clone()
    elif spoil == "swapped":
        w[1], w[2] = w[2], w[1]
    elif spoil == "another dtype":
        w = [v.double() if i == 1 else v for i, v in enumerate(w)]
        assert not adjacent(w)
        return
    else:
        w[1] = torch.randn(C, 8).t()
    assert not adjacent(w)
    assert all(torch.equal(x, F.linear(X, v)) for x, v in zip(merged_linear(X, w, b), w, strict=True))


def test_only_tensors_that_are_alone_in_their_storage_are_packed() -> None:
    whole = torch.randn(32, C)
    assert not pack([whole[:16], whole[16:24]])
    w, _ = weights(False, False, False)
    assert not pack([w[0], w[0]])
    assert not pack([w[0], torch.randn(4, C + 1)])
    assert not pack([w[0], w[1].half()])
    assert not pack([torch.empty(4, C, device="meta"), torch.empty(4, C, device="meta")])
    assert not pack([w[0], w[1].share_memory_()])


# ------------------------------------------------------------------------------------------------ modules


@pytest.fixture
def own() -> Iterator[tuple[Attention, Any]]:
    model = Attention().eval()
    yield model, attnopt.optimize(model, X, config=QUICK, copy=True)


def together(module: Any) -> bool:
    return adjacent([module.q.weight, module.k.weight, module.v.weight])


@pytest.mark.usefixtures("on_cpu")
def test_shared_parameters_stay_where_they_are() -> None:
    model = Attention().eval()
    alias = model.q.weight.detach()
    places = [p.data_ptr() for p in model.parameters()]
    optimized = attnopt.optimize(model, X, config=QUICK)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert not together(optimized)
    alias.mul_(2)
    assert torch.equal(optimized.q.weight, alias)
    with torch.no_grad():
        assert torch.equal(optimized(X), model(X))


@pytest.mark.usefixtures("on_cpu")
def test_packed_parameters_are_the_modules_own(own: tuple[Attention, Any]) -> None:
    model, optimized = own
    assert together(optimized)
    assert not together(model)
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(optimized.parameters(), model.parameters(), strict=True))
    assert products(lambda: optimized(X)) == 2
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), model(X), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("on_cpu")
def test_packing_leaves_no_second_copy(own: tuple[Attention, Any]) -> None:
    model, optimized = own

    def size(m: nn.Module) -> int:
        return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in m.parameters()}.values())

    assert size(optimized) == size(model)


@pytest.mark.usefixtures("on_cpu")
def test_files_are_not_larger(own: tuple[Attention, Any]) -> None:
    model, optimized = own
    sizes = []
    for m in (model, optimized):
        file = io.BytesIO()
        torch.save(dict(m.state_dict()), file)
        sizes.append(file.tell())
    assert sizes[1] <= sizes[0]


@pytest.mark.usefixtures("on_cpu")
def test_training_steps_write_through(own: tuple[Attention, Any]) -> None:
    model, optimized = own
    for m in (model, optimized):
        step = torch.optim.SGD(m.parameters(), lr=0.1)
        (m(X) ** 2).sum().backward()
        step.step()
    assert together(optimized)
    for a, b in zip(optimized.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("on_cpu")
def test_loading_writes_through_and_assigning_replaces(own: tuple[Attention, Any]) -> None:
    _, optimized = own
    other = Attention()
    for p in other.parameters():
        p.data.mul_(1.5)
    optimized.load_state_dict(other.state_dict())
    assert together(optimized)
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), other.eval()(X), rtol=1e-5, atol=1e-6)
    given = {k: v.clone() for k, v in other.state_dict().items()}
    optimized.load_state_dict(given, assign=True)
    assert not together(optimized)
    given["q.weight"].mul_(2)
    assert torch.equal(optimized.q.weight, given["q.weight"]), "the dict's tensors are the parameters"
    other.q.weight.data.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), other(X), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("on_cpu")
def test_another_dtype_is_packed_again(own: tuple[Attention, Any]) -> None:
    model, optimized = own
    optimized.to(torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(optimized(X.double()), copy.deepcopy(model).double()(X.double()))
    assert together(optimized)
    assert model.q.weight.dtype is torch.float32


@pytest.mark.usefixtures("on_cpu")
def test_moving_a_shared_module_makes_memory_that_may_be_packed() -> None:
    model = Attention().eval()
    optimized = attnopt.optimize(model, X, config=QUICK).double()
    with torch.no_grad():
        optimized(X.double())
    assert together(optimized)
    assert not together(model)


@pytest.mark.usefixtures("on_cpu")
def test_copies_are_independent(own: tuple[Attention, Any]) -> None:
    model, optimized = own
    for twin in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        with torch.no_grad():
            optimized.k.weight.add_(1)
            want = model(X)
            torch.testing.assert_close(twin(X), want, rtol=1e-5, atol=1e-6)
            optimized.k.weight.sub_(1)


@pytest.mark.usefixtures("on_cpu")
def test_parameters_moved_by_someone_else_stay_right(own: tuple[Attention, Any]) -> None:
    """As sharding wrappers do, which flatten parameters into storages of their own."""
    model, optimized = own
    flat = torch.cat([p.detach().flatten() for p in optimized.parameters()])
    start = 0
    for p in optimized.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    flat.mul_(2)
    for p in model.parameters():
        p.data.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(optimized(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("on_cpu")
def test_shared_memory_is_kept(own: tuple[Attention, Any]) -> None:
    _, optimized = own
    optimized.share_memory()
    with torch.no_grad():
        optimized(X)
    assert all(p.is_shared() for p in optimized.parameters())


@pytest.mark.usefixtures("on_cpu")
def test_a_compiler_and_an_export_see_plain_layers(own: tuple[Attention, Any], tmp_path: Path) -> None:
    model, optimized = own
    with torch.no_grad():
        want = model(X)
        torch.testing.assert_close(torch.compile(optimized, backend="aot_eager")(X), want, rtol=1e-5, atol=1e-6)
    program = save_pt2(optimized, tmp_path / "model.pt2")
    assert "attnopt.merged_linear" in str(program.graph)
    assert "attnopt.merged_linear" not in str(program.run_decompositions().graph)
    torch.save((X, want), tmp_path / "expected.pt")
    code = f"""
import torch, attnopt
run = torch.export.load({str(tmp_path / "model.pt2")!r}).module()
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
