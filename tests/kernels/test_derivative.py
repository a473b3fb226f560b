"""Derivatives of score programs against autograd and against the interpreter's own reverse pass, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.kernels.adjoint import pull_back
from attnopt.kernels.codegen import unsupported
from attnopt.kernels.derivative import derivatives, float_loads
from attnopt.kernels.evaluate import Env, as_tensor, evaluate
from tests.kernels.cases import dims, softcap
from tests.kernels.operations import OPERATION_CASES

SHAPE = (2, 2, 2, 3, 4, 4, 4)
D = dims(SHAPE)
S = E.score()
LEAVES = (
    S,
    E.load(0, (D.h,), "float"),
    E.load(1, (D.q, D.k), "float"),
    E.load(1, (D.q, E.minimum(D.k, E.const(2))), "float"),
    E.load(2, (E.add(E.sub(D.k, D.q), E.const(2)), D.h), "float"),
)


def positive(x: Expr) -> Expr:
    return E.add(E.absolute(x), E.const(0.5))


MAKE = {
    "add": lambda x, y: E.add(x, y),
    "mul": lambda x, y: E.mul(x, y),
    "square": lambda x, y: E.mul(x, x),
    "div": lambda x, y: E.div(x, positive(y)),
    "min": E.minimum,
    "max": E.maximum,
    "pow": lambda x, y: E.power(positive(x), E.function("tanh", y)),
    "abs": lambda x, y: E.absolute(x),
    "where-index": lambda x, y: E.where(E.le(D.k, D.q), x, y),
    "where-score": lambda x, y: E.where(E.lt(x, E.const(0.3)), y, x),
    "distance": lambda x, y: E.mul(x, E.as_float(E.sub(D.k, D.q))),
    "scale": lambda x, y: E.mul(E.const(-0.7), x),
    "exp": lambda x, y: E.function("exp", E.function("tanh", x)),
    "log": lambda x, y: E.function("log", positive(x)),
    "sqrt": lambda x, y: E.function("sqrt", positive(x)),
    "rsqrt": lambda x, y: E.function("rsqrt", positive(x)),
    **{name: (lambda x, y, name=name: E.function(name, x)) for name in ("tanh", "sigmoid", "sin", "cos", "erf", "floor", "ceil", "round")},
}
programs = st.recursive(st.sampled_from(LEAVES), lambda inner: st.builds(lambda name, x, y: MAKE[name](x, y), st.sampled_from(sorted(MAKE)), inner, inner), max_leaves=6)


def tensors(seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return new(2, 2, 3, 4), [new(2), new(3, 4), new(6, 2)]


def env(score: Tensor, loads: list[Tensor]) -> Env:
    return Env({"b": (0, 2), "h": (0, 2), "q": (0, 3), "k": (0, 4)}, loads, {}, torch.float64, score.device, score)


def full(e: Expr, where: Env) -> Tensor:
    (value,), _ = evaluate((e,), where)
    return as_tensor(value, "float", where).expand(2, 2, 3, 4)


@settings(max_examples=150, deadline=None)
@given(programs, st.integers(0, 5))
def test_random_programs(root: Expr, seed: int) -> None:
    score, loads = tensors(seed)
    where = env(score, loads)
    wanted = [S, *float_loads((root,))]
    found = derivatives(root, wanted)
    grad = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    # through each load on its own: its tensor is the values that it reads, one for each element of the tile
    leaves = [score.clone().requires_grad_(), *(full(x, where).clone().requires_grad_() for x in wanted[1:])]
    given_values = env(leaves[0], loads)
    given_values.known = dict(zip(wanted[1:], leaves[1:], strict=True))
    out = full(root, given_values)
    want = torch.autograd.grad(out, leaves, grad, allow_unused=True) if out.requires_grad else [None] * len(leaves)
    for x, w in zip(wanted, want, strict=True):
        got = grad * full(found[x], where)
        torch.testing.assert_close(got, torch.zeros_like(got) if w is None else w, atol=1e-9, rtol=1e-9)

    # and the interpreter's pass, which ends in the tensors
    into = [torch.zeros_like(x) for x in loads]
    _, table = evaluate((root,), where, keep=True)
    raw = pull_back(root, grad.clone(), table, where, into)
    ours = grad * full(found[S], where)
    torch.testing.assert_close(torch.zeros_like(ours) if raw is None else raw.expand(ours.shape), ours, atol=1e-9, rtol=1e-9)
    sums = [torch.zeros_like(x) for x in loads]
    for x in wanted[1:]:
        _, table = evaluate((x,), where, keep=True)
        pull_back(x, grad * full(found[x], where), table, where, [s if i == x.value else None for i, s in enumerate(sums)])
    for a, b in zip(sums, into, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("case", OPERATION_CASES.values(), ids=lambda c: c.name)
def test_operation(case: object) -> None:
    """Each operation's derivative by the score, which the generated kernels can write."""
    score = OPERATION_CASES[case.name].spec().score  # type: ignore[attr-defined]
    (found,) = derivatives(score, [S]).values()
    leaf = torch.randn(2, 2, 3, 4, dtype=torch.float64).requires_grad_()
    out = full(score, env(leaf, []))
    (want,) = torch.autograd.grad(out.sum(), leaf)
    torch.testing.assert_close(full(found, env(leaf.detach(), [])), want, atol=1e-10, rtol=1e-10)
    assert unsupported((found,)) is None


def test_what_is_affine_has_a_constant_slope() -> None:
    slope = E.load(0, (D.h,), "float")
    distance = E.as_float(E.sub(D.k, D.q))
    found = derivatives(E.add(E.mul(E.const(0.25), S), E.mul(slope, distance)), [S, slope])
    assert found == {S: E.const(0.25), slope: distance}


def test_a_derivative_shares_the_nodes_of_its_program() -> None:
    program = softcap(D, S)
    found = derivatives(program, [S])[S]
    functions = {e for e in E.postorder(program, found) if e.op == "tanh"}
    assert len(functions) == 1


def test_equal_operands_share_and_a_corner_has_no_slope() -> None:
    """As PyTorch has it."""
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 3).requires_grad_()
    where = Env({"b": (0, 1), "h": (0, 1), "q": (0, 1), "k": (0, 3)}, [], {}, torch.float64, x.device, x)
    for program, by_torch in ((E.maximum(S, E.FZERO), x.maximum(torch.zeros_like(x))), (E.absolute(S), x.abs()), (E.minimum(S, E.const(2.0)), x.minimum(2 * torch.ones_like(x)))):
        (got,), _ = evaluate((derivatives(program, [S])[S],), where)
        assert torch.equal(got, torch.autograd.grad(by_torch.sum(), x)[0])  # type: ignore[arg-type]


def test_nothing_flows_into_the_branch_not_taken() -> None:
    """The square root has no slope at 0; autograd makes NaN of it."""
    x = torch.tensor([0.0, 4.0], dtype=torch.float64).view(1, 1, 1, 2)
    where = Env({"b": (0, 1), "h": (0, 1), "q": (0, 1), "k": (0, 2)}, [], {}, torch.float64, x.device, x)
    (got,), _ = evaluate((derivatives(E.where(E.gt(S, E.FZERO), E.function("sqrt", S), E.FZERO), [S])[S],), where)
    assert torch.equal(got, torch.tensor([0.0, 0.25], dtype=torch.float64).view(1, 1, 1, 2))  # type: ignore[arg-type]
