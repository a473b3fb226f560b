"""Index maps and views agree with torch: reshapes are followed element by element, and realised maps are run."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_expr import evaluate

from attnopt.analysis.views import reindex
from attnopt.ir import expr as E
from attnopt.ir.index import IndexMap


def _run(tensor: torch.Tensor, views: list) -> torch.Tensor:
    for name, args in views:
        n = [int(a.value) if isinstance(a, E.Expr) else a for a in args]
        if name == "select":
            tensor = tensor.select(n[0], n[1])
        elif name == "narrow":
            tensor = tensor.narrow(n[0], n[1], n[2])
        elif name == "reshape":
            tensor = tensor.reshape(n)
        elif name == "permute":
            tensor = tensor.permute(n)
        else:
            tensor = tensor.expand(n)
    return tensor


def _shapes(total: int) -> list[list[int]]:
    """Every way to write ``total`` as a product, with an axis of size one here and there."""
    if total == 1:
        return [[]]
    found = [[d, *rest] for d in range(2, total + 1) if total % d == 0 for rest in _shapes(total // d)]
    return found + [[*f[:1], 1, *f[1:]] for f in found[:3]]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_reindex_follows_a_reshape(data: st.DataObject) -> None:
    total = data.draw(st.sampled_from([12, 16, 24, 36]))
    out, into = (data.draw(st.sampled_from(_shapes(total))) for _ in range(2))
    names = tuple(E.ZERO if n == 1 else E.var(f"o{i}", n) for i, n in enumerate(out))
    index = reindex([E.const(n) for n in out], [E.const(n) for n in into], names)
    tensor = torch.arange(total).reshape(into)
    viewed = tensor.reshape(out)
    for at in itertools.product(*(range(n) for n in out)):
        env = {v: i for v, i in zip(names, at, strict=True) if v is not E.ZERO}
        assert tensor[tuple(evaluate(x, env) for x in index)] == viewed[at]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_chain_of_views_is_realised_as_it_ran(data: st.DataObject) -> None:
    """A random reshape and permutation, composed into one map and made real again, reads the same elements."""
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=4))
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    order = data.draw(st.permutations(range(len(shape))))
    permuted = tensor.permute(order)
    out = tuple(E.ZERO if n == 1 else E.var(f"o{i}", n) for i, n in enumerate(permuted.shape))
    index = [E.ZERO] * len(shape)
    for i, d in enumerate(order):
        index[d] = out[i]
    variables = tuple(E.var(f"one{i}", 1) if v is E.ZERO else v for i, v in enumerate(out))
    views = IndexMap(variables, tuple(index)).realise([E.const(n) for n in shape])
    assert views is not None
    assert torch.equal(_run(tensor, views), permuted)


def test_grouped_heads_are_realised_by_expansion() -> None:
    b, h, s, d = (E.var(n, x) for n, x in (("b", 2), ("h", 4), ("s", 3), ("d", 5)))
    tensor = torch.randn(2, 2, 3, 5)
    views = IndexMap((b, h, s, d), (b, E.floordiv(h, E.const(2)), s, d)).realise([E.const(n) for n in tensor.shape])
    assert views is not None
    assert torch.equal(_run(tensor, views), tensor.repeat_interleave(2, dim=1))


def test_a_packed_projection_is_realised_by_a_narrow_and_a_reshape() -> None:
    b, h, s, d = (E.var(n, x) for n, x in (("b", 2), ("h", 4), ("s", 3), ("d", 5)))
    tensor = torch.randn(2, 3, 60)
    feature = E.add(E.mul(h, E.const(5)), d, E.const(20))
    views = IndexMap((b, h, s, d), (b, s, feature)).realise([E.const(n) for n in tensor.shape])
    assert views is not None
    assert torch.equal(_run(tensor, views), tensor[..., 20:40].view(2, 3, 4, 5).transpose(1, 2))


def test_a_map_that_no_view_makes_is_refused() -> None:
    q, k = E.var("q", 4), E.var("k", 4)
    assert IndexMap((q, k), (E.sub(k, q), k)).realise([E.const(4), E.const(4)]) is None
    assert IndexMap((q, k), (q, q)).realise([E.const(4), E.const(4)]) is None
