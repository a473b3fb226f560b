"""Maps of blocks: never wrong on any program, exact on the masks that models have, and of the form that kernels read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.kernels import enclosure
from attnopt.kernels.block_map import BlockMap, block_map
from attnopt.kernels.evaluate import Env, as_tensor, evaluate
from tests.kernels.cases import CASES, Case
from tests.kernels.mask_cases import MASK_CASES, MASKS
from tests.kernels.mask_programs import SHAPES, Shape, programs

INVISIBLE, PARTIAL, FULL = 0, 1, 2
CPU = torch.device("cpu")
INEXACT = ("documents-causal-padded-window", "chunks-by-position")
"""A block that holds the end of one sequence and the start of another holds, as an interval, all ids or chunks between theirs."""


def dense(mask: Expr, loads: Sequence[Tensor], sizes: Mapping[str, int], shape: tuple[int, int, int, int]) -> Tensor:
    """The mask itself, [B, H, Sq, Skv]."""
    env = Env(dict(zip("bhqk", ((0, n) for n in shape), strict=True)), loads, sizes, torch.float32, CPU)
    (value,), _ = evaluate((mask,), env)
    return as_tensor(value, "bool", env).expand(shape)


def classes(m: Tensor, BLOCK_M: int, BLOCK_N: int, transposed: bool = False) -> Tensor:
    """What each tile of a dense mask is, [B, H, M, N]; a last block of keys (queries in a transposed map) cut short is not full."""
    B, H, Sq, Skv = m.shape
    M, N = -(-Sq // BLOCK_M), -(-Skv // BLOCK_N)
    out = torch.empty(B, H, M, N, dtype=torch.int64)
    for i in range(M):
        for j in range(N):
            tile = m[:, :, i * BLOCK_M : (i + 1) * BLOCK_M, j * BLOCK_N : (j + 1) * BLOCK_N].flatten(2)
            cut = (i + 1) * BLOCK_M > Sq if transposed else (j + 1) * BLOCK_N > Skv
            full = tile.all(-1) & (not cut)
            out[:, :, i, j] = torch.where(full, FULL, torch.where(tile.any(-1), PARTIAL, INVISIBLE))
    return out


def read(found: BlockMap, shape: tuple[int, int]) -> Tensor:
    """The map as [B, H, rows, blocks] of classes, with its form checked."""
    counts, indices = found.counts, found.indices
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.is_contiguous() and indices.is_contiguous()
    assert counts.shape == (*indices.shape[:3], 3)
    n = indices.shape[3]
    order, listed_blocks = counts[..., 2].flatten(), counts[..., :2].sum(-1).flatten()
    assert sorted(order.tolist()) == list(range(len(order)))
    assert (listed_blocks[order].diff() <= 0).all()
    out = torch.empty(indices.shape, dtype=torch.int64)
    for where in torch.cartesian_prod(*(torch.arange(x) for x in indices.shape[:3])).view(-1, 3).tolist():
        partial, full = counts[tuple(where)][:2].tolist()
        listed = indices[tuple(where)].tolist()
        assert sorted(listed) == list(range(n))
        for part in (listed[:partial], listed[partial : partial + full], listed[partial + full :]):
            assert part == sorted(part)
        row = torch.full((n,), INVISIBLE)
        row[listed[:partial]] = PARTIAL
        row[listed[partial : partial + full]] = FULL
        out[tuple(where)] = row
    return out.expand(*shape, -1, -1)


# ------------------------------------------------------------------------------------------------ soundness


@settings(max_examples=250, deadline=None)
@given(st.data(), SHAPES, st.sampled_from([(4, 4), (2, 4), (4, 1), (16, 8)]), st.booleans())
def test_a_map_is_never_wrong(data: st.DataObject, shape: Shape, blocks: tuple[int, int], transposed: bool) -> None:
    program = data.draw(programs(shape))
    m = dense(program.mask, program.loads, shape.sizes, shape.extents)
    found = block_map(program.mask, program.loads, shape.sizes, shape.extents, *blocks, CPU, transposed)
    got = read(found, shape.extents[:2])
    got = got.transpose(2, 3) if transposed else got
    want = classes(m, *blocks, transposed)
    wrong = (got != want) & (got != PARTIAL)
    assert not wrong.any(), f"{program.mask} at {wrong.nonzero().tolist()[:4]}: {got[wrong].tolist()[:4]}, and it is {want[wrong].tolist()[:4]}"


@settings(max_examples=60, deadline=None)
@given(st.data(), SHAPES)
def test_tiles_of_one_pair_are_exact(data: st.DataObject, shape: Shape) -> None:
    """With one query and one key to a tile nothing is lost, but where a value cannot be held."""
    program = data.draw(programs(shape))
    if any(not x.is_floating_point() and x.dtype != torch.bool and bool((x.abs() > 100).any() or (x < -100).any()) for x in program.loads):
        return
    if any(e.kind == "float" for e in E.postorder(program.mask)):
        return
    m = dense(program.mask, program.loads, shape.sizes, shape.extents)
    found = block_map(program.mask, program.loads, shape.sizes, shape.extents, 1, 1, CPU)
    assert torch.equal(read(found, shape.extents[:2]), classes(m, 1, 1))


# ------------------------------------------------------------------------------------------------ models' own masks


def both(case: Case, BLOCK_M: int, BLOCK_N: int, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """What the map of a case says, and what is so."""
    loads = case.tensors(torch.float32)[3]
    B, Hq, _, Sq, Skv, _, _ = case.shape
    sizes = {"s0": B, "s1": Sq, "s2": Skv, **case.sizes}
    spec = case.spec()
    found = block_map(spec.mask, loads, sizes, (B, Hq, Sq, Skv), BLOCK_M, BLOCK_N, CPU, transposed)
    want = classes(dense(spec.mask, loads, sizes, (B, Hq, Sq, Skv)), BLOCK_M, BLOCK_N, transposed)
    got = read(found, (B, Hq))
    return (got.transpose(2, 3) if transposed else got), want


@pytest.mark.parametrize("transposed", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 8)], ids=["16x16", "32x8"])
@pytest.mark.parametrize("case", [*(c for c in CASES if c.mask is not None), *MASK_CASES], ids=lambda c: c.name)
def test_masks_of_models_are_mapped_exactly(case: Case, blocks: tuple[int, int], transposed: bool) -> None:
    got, want = both(case, *blocks, transposed)
    if case.name in INEXACT:
        assert ((got == want) | (got == PARTIAL)).all()
        assert (got != want).float().mean() < 0.12
    else:
        assert torch.equal(got, want)


def test_only_axes_that_the_mask_reads_are_kept() -> None:
    def extents(name: str) -> tuple[int, ...]:
        case = MASKS[name]
        B, Hq, _, Sq, Skv, _, _ = case.shape
        found = block_map(case.spec().mask, case.tensors(torch.float32)[3], {"s0": B, "s1": Sq, "s2": Skv}, (B, Hq, Sq, Skv), 16, 8, CPU)
        return tuple(found.indices.shape)

    assert extents("documents") == (2, 1, 7, 13)
    assert extents("block-table") == (1, 2, 7, 13)
    assert extents("dense-mask") == (2, 2, 5, 11)
    assert extents("distance-table") == (1, 1, 7, 13)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_to_map(shape: tuple[int, int, int, int], transposed: bool) -> None:
    d = Shape(*shape).dims
    found = block_map(E.le(d.k, d.q), [], {"s0": shape[0], "s1": shape[2], "s2": shape[3]}, shape, 4, 4, CPU, transposed)
    assert not found.counts.any()
    assert found.indices.shape[3] == -(-shape[2 if transposed else 3] // 4)


def test_a_table_too_large_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less is known then, and nothing wrong."""
    exact, want = both(MASKS["distance-table"], 16, 16)
    monkeypatch.setattr(enclosure, "_TABLE_ELEMENTS", 10)
    got, _ = both(MASKS["distance-table"], 16, 16)
    assert torch.equal(exact, want)
    assert ((got == want) | (got == PARTIAL)).all() and not torch.equal(got, want)


def test_what_reads_no_tensor_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = MASKS["documents-causal-padded-window"]
    calls: list[Expr] = []
    whole: Callable[..., object] = enclosure._Enclosing.node
    monkeypatch.setattr(enclosure._Enclosing, "node", lambda self, e: (calls.append(e), whole(self, e))[1])
    both(case, 8, 32)
    first = len(calls)
    calls.clear()
    both(case, 8, 32)
    assert all(any(x.op == "load" for x in e.leaves) for e in calls)
    assert 0 < len(calls) < first


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_floats_that_are_not_numbers(odd: float) -> None:
    d = Shape(1, 1, 8, 8).dims
    load = E.load(0, (d.k,), "float")
    x = torch.tensor([odd, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    for mask in (E.le(load, E.const(0.5)), E.lt(E.const(-1.0), E.absolute(load)), E.eq(load, load)):
        found = block_map(mask, [x], {"s1": 8}, (1, 1, 8, 8), 4, 4, CPU)
        want = classes(dense(mask, [x], {"s1": 8}, (1, 1, 8, 8)), 4, 4)
        got = read(found, (1, 1))
        assert ((got == want) | (got == PARTIAL)).all()
