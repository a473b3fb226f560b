"""Generated Gluon kernels, run by an interpreter of our own: their arithmetic, and that their barriers never wait in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnopt.kernels.gluon import launch
from attnopt.kernels.gluon.config import Config, parts_of
from attnopt.kernels.programs import programs_of
from tests.kernels import gluon_interpreter as interpreter
from tests.kernels.cases import BY_NAME, CASES, Case, Shape
from tests.kernels.mask_cases import MASK_CASES, MASKS
from tests.kernels.shared_tables import CASE as CASE_WITH_TABLE
from tests.kernels.shared_tables import table

TOLERANCE = 2e-2
"""Of bfloat16, in which q, k, v, o and the weights are."""
TWO = Config(2, 128, 2, 2)


def usable(case: Case) -> bool:
    spec = case.spec()
    heads = {case.shape[5], case.shape[6]}
    return launch.refusal(spec, "cuda", torch.bfloat16) is None and not programs_of(spec).retries and all(n % 8 == 0 for n in heads)


def check(case: Case, chosen: Config | None = None) -> None:
    q, k, v, loads = case.tensors(torch.bfloat16)
    o, lse = launch.attention(q, k, v, loads, list(case.sizes.values()), case.spec(), chosen=chosen)
    want, want_lse = case.naive(q, k, v, loads)
    torch.testing.assert_close(o.double(), want, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches go to the interpreter, of three multiprocessors, and what no one writes is seen."""

    def run(plan: launch.Plan, arguments: list[Any], device: torch.device) -> None:
        arguments[len(plan.boxes)].fill_(9.0)
        next(box.base for (operand, _), box in zip(plan.boxes, arguments, strict=False) if operand == 3).fill_(7.0)
        interpreter.run(plan.kernel.source.text, [interpreter.argument(x) for x in arguments], plan.grid.workers)

    monkeypatch.setattr(launch, "descriptor", lambda form, rows, columns: interpreter.Descriptor(torch.empty(0, dtype=form[2]), [1, 1, rows, columns]))
    monkeypatch.setattr(launch.Plan, "launch", run)
    processors(monkeypatch, 3)


def processors(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    launch._CALLS.clear()
    monkeypatch.setattr(launch, "processors", lambda index: n)


@pytest.mark.parametrize("case", [c for c in [*CASES, *MASK_CASES] if usable(c)], ids=lambda c: c.name)
def test_case(case: Case) -> None:
    check(case)


def test_a_table_over_distances_that_was_made_before() -> None:
    """The same numbers as from its own; from another table, others."""
    q, k, v, loads = CASE_WITH_TABLE.tensors(torch.bfloat16)
    spec = CASE_WITH_TABLE.spec()
    margin = launch.table_margin(spec)
    assert margin
    given = table(loads[0], margin)
    want = launch.attention(q, k, v, loads, [], spec)
    for x, y in zip(launch.attention(q, k, v, loads, [], spec, tables=[given]), want, strict=True):
        assert torch.equal(x, y)
    assert not torch.allclose(launch.attention(q, k, v, loads, [], spec, tables=[given.flip(1)])[0], want[0], atol=TOLERANCE)


def of_shape(name: str, shape: Shape) -> Case:
    return Case(**{**vars((BY_NAME | MASKS)[name]), "shape": shape})


@pytest.mark.parametrize("n", [1, 3, 20, 132])
@pytest.mark.parametrize("chosen", [TWO, Config(3, 128, 2, 1), Config(2, 64, 3, 1, q_registers=True)], ids=["two", "three", "registers"])
def test_many_tiles_for_each_worker(chosen: Config, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of all lengths follow each other, the last one reaches beyond the queries, and some workers have one more than others."""
    processors(monkeypatch, n)
    check(of_shape("causal-GQA", (1, 4, 2, 500, 500, 16, 16)), chosen)


@pytest.mark.parametrize(("Sq", "Skv"), [(1, 300), (17, 513), (513, 17), (129, 257)])
@pytest.mark.parametrize("name", ["full", "causal-GQA", "reverse-causal", "window-both-sides"])
def test_lengths(name: str, Sq: int, Skv: int) -> None:
    check(of_shape(name, (1, 2, 2, Sq, Skv, 16, 16)), TWO)


@pytest.mark.parametrize("chosen", [TWO, Config(3, 128, 2, 1), Config(2, 64, 4, 2, q_registers=True)], ids=["two", "three", "registers"])
@pytest.mark.parametrize(
    ("name", "Sq", "Skv"),
    [
        *((name, Sq, Skv) for name in ("relative-buckets", "alibi-causal", "padding-zero") for Sq, Skv in ((300, 700), (700, 300), (1, 500), (256, 768))),
        *(("documents", S, S) for S in (300, 700)),
    ],
)
def test_programs_over_many_blocks(name: str, Sq: int, Skv: int, chosen: Config) -> None:
    """Far from the diagonal a table has one value for whole blocks; a slope counts from the first query of a consumer; maps say which tile is next."""
    check(of_shape(name, (2, 4, 2, Sq, Skv, 16, 16)), chosen)


@pytest.mark.parametrize(("D", "Dv"), [(40, 40), (64, 64), (80, 96), (128, 128), (192, 128), (256, 256)])
def test_head_sizes(D: int, Dv: int) -> None:
    check(of_shape("causal-GQA", (1, 2, 1, 200, 200, D, Dv)))


def test_parts_of_head_sizes() -> None:
    assert {n: parts_of(n) for n in (16, 40, 64, 80, 96, 120, 128, 192, 256)} == {
        16: (16,), 40: (32, 16), 64: (64,), 80: (64, 16), 96: (64, 32), 120: (128,), 128: (128,), 192: (128, 64), 256: (256,)
    }  # fmt: skip


def test_a_barrier_that_no_one_completes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "WAIT_SECONDS", 1.0)
    kernel = launch.kernel_for(BY_NAME["full"].spec(), 16, 16)
    broken = kernel.source.text.replace("mbarrier.arrive(k_empty", "pass  # (k_empty")
    assert broken != kernel.source.text
    monkeypatch.setattr(launch, "kernel_for", lambda *args: launch.Kernel(type(kernel.source)(**{**vars(kernel.source), "text": broken}), kernel.config, None))
    with pytest.raises(interpreter.Deadlock, match="waited for"):
        check(of_shape("full", (1, 2, 2, 100, 700, 16, 16)))
