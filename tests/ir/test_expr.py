"""Normalisation never changes a value, and a proof never claims what is false: checked against plain evaluation."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.ir import expr as E
from attnopt.ir.bounds import nonnegative
from attnopt.ir.expr import Expr
from attnopt.ir.mask import key_range
from attnopt.ir.serial import decode, encode

SIZE = E.sym("S", 1)
GROUP = E.const(2)
Q, K, H = E.var("q", SIZE), E.var("k", SIZE), E.var("h", 4)
Env = dict[Expr, int]
Pair = tuple[Expr, Callable[[Env], float]]

PYTHON: dict[str, Callable[..., float]] = {
    "add": lambda *a: sum(a),
    "mul": lambda *a: math.prod(a),
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
    "abs": abs,
    "pow": operator.pow,
    "div": operator.truediv,
    "where": lambda c, a, b: a if c else b,
    "ge0": lambda x: x >= 0,
    "eq0": lambda x: x == 0,
    "le": operator.le,
    "lt": operator.lt,
    "eq": operator.eq,
    "same": operator.eq,
    "not": operator.not_,
    "and": lambda *a: all(a),
    "or": lambda *a: any(a),
    "float": float,
    "trunc": int,
    **E.FUNCTIONS,
}


def evaluate(e: Expr, env: Env) -> float:
    """What an expression is, computed the slow and plain way."""
    if e.op == "const":
        return e.value
    if e in env:
        return env[e]
    return PYTHON[e.op](*(evaluate(a, env) for a in e.args))


def environments(largest: int = 4) -> list[Env]:
    return [{SIZE: s, Q: q, K: k, H: h} for s in range(1, largest + 1) for q in range(s) for k in range(s) for h in (0, 3)]


def _unary(build: Callable[..., Expr], run: Callable[..., float]) -> Callable[[Pair], Pair]:
    return lambda a: (build(a[0]), lambda env: run(a[1](env)))


def _binary(build: Callable[..., Expr], run: Callable[..., float]) -> Callable[[Pair, Pair], Pair]:
    return lambda a, b: (build(a[0], b[0]), lambda env: run(a[1](env), b[1](env)))


def leaf(e: Expr) -> Pair:
    return (e, lambda env: evaluate(e, env))


def integers() -> st.SearchStrategy[Pair]:
    leaves = st.one_of(st.sampled_from([leaf(x) for x in (Q, K, H, SIZE)]), st.integers(-3, 5).map(lambda n: leaf(E.const(n))))

    def extend(inner: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
        divisor = st.integers(1, 4).map(lambda n: leaf(E.const(n)))
        two = st.sampled_from([_binary(E.add, operator.add), _binary(E.sub, operator.sub), _binary(E.mul, operator.mul), _binary(E.minimum, min), _binary(E.maximum, max)])
        return st.one_of(
            st.builds(lambda f, a, b: f(a, b), two, inner, inner),
            st.builds(lambda f, a, b: f(a, b), st.sampled_from([_binary(E.floordiv, operator.floordiv), _binary(E.mod, operator.mod)]), inner, divisor),
            inner.map(_unary(E.absolute, abs)),
            st.builds(
                lambda c, a, b: (E.where(c[0], a[0], b[0]), lambda env: a[1](env) if c[1](env) else b[1](env)),
                st.builds(lambda f, a, b: f(a, b), st.sampled_from([_binary(E.le, operator.le), _binary(E.eq, operator.eq)]), inner, inner),
                inner,
                inner,
            ),
        )

    return st.recursive(leaves, extend, max_leaves=8)


def booleans() -> st.SearchStrategy[Pair]:
    compare = st.sampled_from(
        [_binary(E.le, operator.le), _binary(E.lt, operator.lt), _binary(E.ge, operator.ge), _binary(E.gt, operator.gt), _binary(E.eq, operator.eq), _binary(E.ne, operator.ne)]
    )
    leaves = st.builds(lambda f, a, b: f(a, b), compare, integers(), integers())

    def extend(inner: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
        two = st.sampled_from([_binary(E.all_of, lambda a, b: a and b), _binary(E.any_of, lambda a, b: a or b)])
        return st.one_of(st.builds(lambda f, a, b: f(a, b), two, inner, inner), inner.map(_unary(E.negate, operator.not_)))

    return st.recursive(leaves, extend, max_leaves=4)


@settings(max_examples=300, deadline=None)
@given(st.one_of(integers(), booleans()))
def test_normal_form_has_the_same_value(pair: Pair) -> None:
    built, direct = pair
    for env in environments():
        assert evaluate(built, env) == direct(env), (built, env)


@settings(max_examples=300, deadline=None)
@given(integers())
def test_what_is_proven_nonnegative_is(pair: Pair) -> None:
    built, direct = pair
    if nonnegative(built):
        assert all(direct(env) >= 0 for env in environments(5)), built


@settings(max_examples=200, deadline=None)
@given(booleans())
def test_a_key_range_is_the_mask(pair: Pair) -> None:
    mask, direct = pair
    r = key_range(mask)
    whole = E.all_of(*(E.le(K, E.add(Q, o)) for o in r.right), *(E.ge(K, E.sub(Q, o)) for o in r.left), r.rest)
    for env in environments():
        assert bool(evaluate(whole, env)) == bool(direct(env))


def test_a_condition_and_its_opposite_in_parts_are_false() -> None:
    """Of the opposite, an alternative of two, nothing is left beside the condition's two parts."""
    bound = E.minimum(E.ONE, K)
    assert E.all_of(E.ge(bound, Q), E.negate(E.ge(bound, Q))) is E.FALSE
    assert E.any_of(E.ge(bound, Q), E.negate(E.ge(bound, Q))) is E.TRUE


@settings(max_examples=200, deadline=None)
@given(st.one_of(integers(), booleans()))
def test_written_and_read_again_it_is_the_same_object(pair: Pair) -> None:
    nodes, roots = encode([pair[0]])
    assert decode(nodes)[roots[0]] is pair[0]


def test_equal_expressions_are_one_object() -> None:
    assert E.add(Q, K) is E.add(K, Q)
    assert E.sub(E.add(Q, K), K) is Q
    assert E.le(K, Q) is E.negate(E.lt(Q, K))
    assert E.all_of(E.le(K, Q), E.le(K, Q)) is E.le(K, Q)


def test_division_undoes_a_flattened_index() -> None:
    flat = E.add(E.mul(Q, E.const(4)), H)
    assert E.floordiv(flat, E.const(4)) is Q
    assert E.mod(flat, E.const(4)) is H
    flat = E.add(E.mul(H, SIZE), K)
    assert E.floordiv(flat, SIZE) is H
    assert E.mod(flat, SIZE) is K
    assert E.add(E.mul(E.floordiv(H, GROUP), GROUP), E.mod(H, GROUP)) is H


def test_bounds_decide_comparisons() -> None:
    assert E.lt(Q, SIZE) is E.TRUE
    assert E.ge(Q, SIZE) is E.FALSE
    assert E.le(K, Q) not in (E.TRUE, E.FALSE)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (E.le(K, Q), "k <= q"),
        (E.gt(K, E.sub(Q, E.const(16))), "q <= k + 15"),
        (E.add(E.mul(E.score(), E.const(0.125)), E.mul(E.as_float(E.sub(K, Q)), E.const(0.5))), None),
        (E.as_bool(E.load(0, [Q], "int")), "not load0[q] == 0"),
        (E.mul(E.const(2), E.floordiv(H, E.const(2))), "2 * (h // 2)"),
    ],
)
def test_printing(expression: Expr, text: str | None) -> None:
    assert text is None or repr(expression) == text
    assert repr(expression)


def test_masks_from_absolute_distance_split_into_two_bounds() -> None:
    r = key_range(E.le(E.absolute(E.sub(K, Q)), E.const(8)))
    assert (r.right, r.left, r.rest) == ((E.const(8),), (E.const(8),), E.TRUE)


def test_every_operation_has_a_plain_meaning_here() -> None:
    assert set(PYTHON) >= E.OPERATIONS, E.OPERATIONS - set(PYTHON)


def test_choices_between_constants_stay_choices() -> None:
    m = E.le(K, Q)
    dense = E.mul(E.sub(E.const(1.0), E.as_float(m)), E.const(-1e9))
    assert dense is E.where(m, E.const(0.0), E.const(-1e9))
    assert all(evaluate(dense, env) == (0 if env[K] <= env[Q] else -1e9) for env in environments())


def test_environments_cover_what_they_should() -> None:
    assert {(e[Q], e[K]) for e in environments(3)} == set(itertools.product(range(3), repeat=2))


def test_index_arithmetic_in_floats_stays_integer() -> None:
    distance = E.sub(E.as_float(K), E.as_float(Q))
    assert distance is E.as_float(E.sub(K, Q))
    assert E.sub(E.as_float(E.add(K, E.ONE)), E.const(1.0)) is E.as_float(K)
    mask = E.add(E.as_float(K), E.const(-3.4e38))
    assert mask.op == "add", "a number that no int32 holds is no index"
