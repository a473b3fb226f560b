"""The table over distances as an operator, and its way into the generated kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir import expr as E
from attnopt.kernels.distance_table_op import table_alone
from attnopt.kernels.materialise import DISTANCE, load_tensors, part_tensor
from attnopt.kernels.programs import programs_of
from tests.kernels.cases import BY_NAME
from tests.kernels.conftest import Run
from tests.kernels.shared_tables import CASE, table

distance_table = torch.ops.attnopt.distance_table
B, Hq, _, Sq, Skv, _, _ = CASE.shape
SHAPE = {"b": B, "h": Hq, "q": Sq, "k": Skv}
(PART,) = programs_of(CASE.spec()).parts


def arguments(weight: Tensor, margin: int = 0) -> tuple[object, ...]:
    spec = table_alone(CASE.spec(), PART, {0: 0})
    assert spec is not None
    return weight, [weight], [], B, Hq, Sq, Skv, spec.to_json(), margin


def test_schema() -> None:
    assert str(distance_table.default._schema) == (
        "attnopt::distance_table(Tensor like, Tensor[] loads, SymInt[] sizes, SymInt B, SymInt Hq, SymInt Sq, SymInt Skv, str spec, int margin) -> Tensor"
    )


@pytest.mark.parametrize("margin", [0, 7])
def test_the_operator_keeps_its_promises(margin: int) -> None:
    torch.library.opcheck(distance_table.default, arguments(torch.randn(8, Hq), margin))


@pytest.mark.parametrize("margin", [0, 7])
def test_it_is_the_kernels_own_table(margin: int) -> None:
    weight = torch.randn(8, Hq)
    whole = distance_table(*arguments(weight, margin))
    want = part_tensor(PART, SHAPE, [weight], {}, weight.device)
    assert whole.shape == (Hq, Sq + Skv - 1 + 2 * margin) and whole.is_contiguous()
    assert torch.equal(whole[:, margin : margin + Sq + Skv - 1], want)
    (_, given) = load_tensors([PART], SHAPE, [weight], {}, weight.device, margin, [whole])
    assert given.data_ptr() == whole[:, margin:].data_ptr() and torch.equal(given, want)


def test_a_weight_with_a_gradient_may_be_read() -> None:
    assert not distance_table(*arguments(torch.randn(8, Hq, requires_grad=True))).requires_grad


def test_a_table_of_too_small_a_margin_is_made_again() -> None:
    weight = torch.randn(8, Hq)
    wrong = torch.zeros_like(distance_table(*arguments(weight, 2)))
    (_, found) = load_tensors([PART], SHAPE, [weight], {}, weight.device, 3, [wrong])
    assert torch.equal(found, part_tensor(PART, SHAPE, [weight], {}, weight.device))
    assert found.storage_offset() == 3


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([torch.zeros(Hq, Sq + Skv)], "its last axis has 81 entries"),
        ([torch.zeros(Hq, Sq + Skv - 3)], "37 queries and 45 keys of 4 heads"),
        ([torch.zeros(Hq + 1, Sq + Skv - 1)], r"The table \(5, 81\)"),
        ([torch.zeros(Sq + Skv - 1)], r"The table \(81,\)"),
        ([torch.zeros(Hq, Sq + Skv - 1)] * 2, "reads 1 tables over distances that may be given, and was given 2"),
    ],
    ids=["odd", "short", "heads", "axes", "two"],
)
def test_a_table_that_does_not_fit_is_refused(tables: list[Tensor], words: str) -> None:
    with pytest.raises(AttnoptError, match=words):
        load_tensors([PART], SHAPE, [torch.randn(8, Hq)], {}, torch.device("cpu"), 0, tables)


def test_slots_are_renamed_and_the_distance_is_written_out() -> None:
    spec = table_alone(CASE.spec(), PART, {0: 3})
    assert spec is not None
    assert {x.value for x in spec.score.leaves if x.op == "load"} == {3} and DISTANCE not in spec.score.leaves


def test_a_program_that_is_no_table_is_refused() -> None:
    spec = BY_NAME["dense-bias"].spec()
    weight = torch.randn(8, Hq)
    text = spec.replace(score=E.load(0, (spec.dims.h, spec.dims.k), "float"), mask=E.TRUE).to_json()
    with pytest.raises(ValueError, match="a table over distances is a float that reads"):
        distance_table(weight, [weight], [], B, Hq, Sq, Skv, text, 0)


@pytest.mark.parametrize("what", ["forward", "graph"])
def test_the_triton_kernel_reads_it(what: str, interpreted: Run) -> None:
    interpreted("check", f"table-{what}")


def test_a_kernel_that_takes_none_says_so() -> None:
    launch = pytest.importorskip("attnopt.kernels.triton.launch", reason="triton is not installed")
    from attnopt.kernels.gluon import launch as hopper

    assert launch.table_margin(CASE.spec()) == 0
    c = hopper.kernel_for(CASE.spec(), CASE.shape[5], CASE.shape[6]).config
    assert hopper.table_margin(CASE.spec()) == max(c.BLOCK_M, c.BLOCK_N)
    assert table(torch.randn(8, Hq), 0).shape == (Hq, Sq + Skv - 1)
