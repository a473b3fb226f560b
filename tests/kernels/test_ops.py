"""The operator: schema, shapes, gradients, dropout, and its way through torch's compilers and files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.errors import AttnoptError
from attnopt.kernels import ops
from tests.kernels.cases import BY_NAME, SMALL, Case, alibi, causal, naive_alibi, naive_causal, slopes

ROOT = Path(__file__).parents[2]
attention = torch.ops.attnopt.attention
KERNELS = pytest.mark.parametrize("kernel", ["reference", "sdpa"])
NAMES = ["causal-GQA", "alibi-causal", "causal-left-padding-uniform", "dense-bias", "full-Dv-less"]


def arguments(name: str, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[int], str]:
    case = BY_NAME[name]
    q, k, v, loads = case.tensors(dtype)
    if grad:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        loads = [x.clone().requires_grad_() if x.is_floating_point() else x for x in loads]
    return q, k, v, loads, list(case.sizes.values()), case.spec().to_json()


def test_importing_registers_the_operator() -> None:
    assert ops.__doc__
    assert str(attention.default._schema) == (
        'attnopt::attention(Tensor q, Tensor k, Tensor v, Tensor[] loads, SymInt[] sizes, str spec, str backend="reference", '
        "Tensor? counts=None, Tensor? indices=None, int[] block_sizes=[], Tensor[]? tables=None) -> Tensor"
    )


@KERNELS
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", ["causal-GQA", "alibi-causal"])
def test_opcheck(name: str, grad: bool, kernel: str) -> None:
    torch.library.opcheck(attention.default, (*arguments(name, grad=grad), kernel))


def test_opcheck_of_the_training_operator() -> None:
    torch.library.opcheck(torch.ops.attnopt.attention_for_training.default, (*arguments("alibi-causal", grad=True), "reference"))


@pytest.mark.parametrize("name", ["causal-GQA", "sinks-causal-GQA", "causal-bottom-right-empty-rows-zero"])
def test_the_training_operator_gives_lse(name: str) -> None:
    q, k, v, loads, sizes, spec = arguments(name, torch.float32, grad=True)
    o, lse, _ = torch.ops.attnopt.attention_for_training(q, k, v, loads, sizes, spec, "reference")
    want, want_lse = BY_NAME[name].naive(q, k, v, loads)
    assert lse.dtype == torch.float32 and not lse.requires_grad and o.requires_grad
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(o.double(), want, atol=1e-5, rtol=1e-5)


def test_large_scores_beside_a_sink_are_as_right_as_small_ones() -> None:
    """Probabilities come from scores less the largest, not less their logarithmic sum, which is rounded to eps times its size."""
    case = BY_NAME["sinks-causal-GQA"]
    q, k, v, loads = case.tensors(torch.float32)
    q, k = (q * 64).round(), (k * 4).round() / 4  # scores without rounding
    want, _ = case.naive(q, k, v, loads)
    got = attention(q, k, v, loads, list(case.sizes.values()), case.spec().to_json(), "reference")
    assert float((q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT).abs().max()) > 200
    assert float((got.double() - want).norm() / want.norm()) < 2 * torch.finfo(torch.float32).eps


@KERNELS
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_inputs_and_loads(name: str, kernel: str) -> None:
    q, k, v, loads, sizes, spec = arguments(name, torch.float64, grad=True)
    leaves = [q, k, v, *(x for x in loads if x.requires_grad)]
    o = attention(q, k, v, loads, sizes, spec, kernel)
    want, _ = BY_NAME[name].naive(q, k, v, loads)
    grad = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(o, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_gradcheck() -> None:
    shape = (1, 2, 1, 4, 5, 3, 2)
    case = Case("small", shape=shape, score=alibi, naive_score=naive_alibi, mask=causal, naive_mask=naive_causal, loads=slopes)
    q, k, v, (slope,) = case.tensors(torch.float64)
    spec = case.spec().to_json()
    inputs = tuple(x.requires_grad_() for x in (q, k, v, slope))
    assert torch.autograd.gradcheck(lambda q, k, v, slope: attention(q, k, v, [slope], [], spec), inputs)


def test_only_the_gradients_asked_for() -> None:
    q, k, v, loads, sizes, spec = arguments("alibi-causal")
    v.requires_grad_()
    attention(q, k, v, loads, sizes, spec).sum().backward()
    assert v.grad is not None and q.grad is None and k.grad is None and loads[0].grad is None


def test_half_precision_gradients_are_those_of_float64_rounded() -> None:
    q, k, v, loads, sizes, spec = arguments("causal-GQA", torch.bfloat16, grad=True)
    want, _ = BY_NAME["causal-GQA"].naive(q, k, v, loads)
    grad = torch.randn_like(want).bfloat16()
    got = torch.autograd.grad(attention(q, k, v, loads, sizes, spec), (q, k, v), grad)
    exact = torch.autograd.grad(want, (q, k, v), grad.double())
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


# ------------------------------------------------------------------------------------------------ dropout


def with_dropout(rate: float) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[int], str]:
    q, k, v, loads, sizes, _ = arguments("causal-GQA", torch.float64, grad=True)
    return q, k, v, loads, sizes, BY_NAME["causal-GQA"].spec().replace(dropout=rate).to_json()


def test_dropout_follows_the_seed_and_changes_from_call_to_call() -> None:
    args = with_dropout(0.5)
    torch.manual_seed(7)
    first, second = attention(*args), attention(*args)
    torch.manual_seed(7)
    again = attention(*args)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_dropout_keeps_the_mean() -> None:
    with torch.no_grad():
        args = with_dropout(0.3)
        mean = torch.stack([attention(*args) for _ in range(400)]).mean(0)
        want = attention(*arguments("causal-GQA", torch.float64))
    # standard error of one element: about 0.65 * |v| / 20
    torch.testing.assert_close(mean, want, atol=0.25, rtol=0.0)
    assert (mean - want).abs().mean() < 0.03


def test_the_backward_pass_drops_what_the_forward_dropped() -> None:
    q, k, v, loads, sizes, spec = with_dropout(0.4)
    grad = torch.randn(*SMALL[:2], SMALL[3], SMALL[6], dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(11)
        return (attention(x, k, v, loads, sizes, spec) * grad).sum()

    (got,) = torch.autograd.grad(loss(q), q)
    direction = torch.randn_like(q)
    with torch.no_grad():
        step = 1e-6
        slope = (loss(q + step * direction) - loss(q - step * direction)) / (2 * step)
    torch.testing.assert_close((got * direction).sum(), slope, atol=1e-6, rtol=1e-6)


def test_checkpointing_replays_dropout() -> None:
    q, k, v, loads, sizes, spec = with_dropout(0.4)
    torch.manual_seed(3)
    (want,) = torch.autograd.grad(attention(q, k, v, loads, sizes, spec).sum(), q)
    torch.manual_seed(3)
    (got,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(lambda x: attention(x, k, v, loads, sizes, spec), q, use_reentrant=False).sum(), q)
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------ compilers


class Model(torch.nn.Module):
    """Projections around one attention, as a model has them, with a trainable slope per head."""

    def __init__(self, kernel: str = "sdpa") -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        self.out = torch.nn.Linear(32, 32)
        self.slope = torch.nn.Parameter(torch.tensor([0.5, 0.25]))
        self.kernel = kernel
        self.spec = Case("m", shape=(2, 2, 2, 9, 9, 16, 16), score=alibi, mask=causal, loads=slopes).spec().to_json()

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, 2, 16).permute(2, 0, 3, 1, 4)
        o = attention(q, k, v, [self.slope], [], self.spec, self.kernel)
        return self.out(o.transpose(1, 2).reshape(B, S, 32))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_forward_and_backward(backend: str) -> None:
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for S in (9, 14):
        x = torch.randn(2, S, 32)
        want = model(x)
        got = compiled(x)
        torch.testing.assert_close(got, want)
        parameters = list(model.parameters())
        for a, b in zip(torch.autograd.grad(got.square().sum(), parameters), torch.autograd.grad(want.square().sum(), parameters), strict=True):
            torch.testing.assert_close(a, b)


@KERNELS
@torch.no_grad()
def test_inductor_compiles_inference(kernel: str) -> None:
    """Inductor may pass an argument that has its default value by name, beside a parameter of its own called ``kernel``."""
    model = Model(kernel)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_sizes_may_be_symbolic() -> None:
    """A size that the program reads is a symbol when the graph is compiled, and stays one in its backward pass."""
    spec = BY_NAME["scale-by-size"].spec().to_json()

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, [], [k.shape[2]], spec)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for S in (7, 12):
        q, k, v = (torch.randn(2, h, S, 16, requires_grad=True) for h in (4, 2, 2))
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=S**-0.5, enable_gqa=True)
        got = compiled(q, k, v)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_make_fx_keeps_the_operator() -> None:
    q, k, v, loads, sizes, spec = arguments("causal-GQA")
    graph = make_fx(lambda q, k, v: attention(q, k, v, loads, sizes, spec), tracing_mode="symbolic")(q, k, v)
    assert attention.default in {n.target for n in graph.graph.nodes}
    torch.testing.assert_close(graph(q, k, v), attention(q, k, v, loads, sizes, spec))


SECOND_PROCESS = """
import sys, torch
import attnopt.kernels.ops
program = torch.export.load(sys.argv[1])
x, want = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), want)
"""


def test_export_again_decompose_save_and_load_elsewhere(tmp_path: Path) -> None:
    model = Model()
    S = torch.export.Dim("S", min=2, max=64)
    program = torch.export.export(model, (torch.randn(2, 9, 32),), dynamic_shapes={"x": {1: S}}, strict=False)
    again = torch.export.export(program.module(), (torch.randn(2, 9, 32),), dynamic_shapes=({1: S},), strict=False)
    inference = again.run_decompositions()
    for p in (program, again, inference):
        assert attention.default in {n.target for n in p.graph.nodes}
    x = torch.randn(2, 23, 32)
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(program.module()(x), want)
    torch.export.save(again, tmp_path / "model.pt2")
    torch.save((x, want), tmp_path / "data.pt")
    subprocess.run([sys.executable, "-c", SECOND_PROCESS, str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")], check=True, cwd=ROOT, timeout=120)


def test_an_exported_module_trains() -> None:
    model = Model()
    module = torch.export.export(model, (torch.randn(2, 9, 32),), strict=False).module()
    x = torch.randn(2, 9, 32)
    (got,) = torch.autograd.grad(module(x).square().sum(), dict(module.named_parameters())["slope"])
    (want,) = torch.autograd.grad(model(x).square().sum(), model.slope)
    torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------ what does not fit


def test_heads_that_do_not_fit_are_named() -> None:
    q, k, v, loads, sizes, spec = arguments("causal-GQA")
    with pytest.raises(AttnoptError, match=r"q \(2, 3, 37, 16\), k \(2, 2, 37, 16\)"):
        attention(q[:, :3], k, v, loads, sizes, spec)


def test_missing_loads_and_sizes_are_counted() -> None:
    q, k, v, loads, sizes, spec = arguments("alibi-causal")
    with pytest.raises(AttnoptError, match=r"reads 1 tensors .* given 0"):
        attention(q, k, v, [], sizes, spec)
    with pytest.raises(AttnoptError, match=r"reads 0 sizes .* given 1"):
        attention(q, k, v, loads, [3], spec)
