"""What a rotary embedding may be made of: each condition of the proof, on cells and coefficients by themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from attnopt.analysis import rotary as R
from attnopt.analysis.complex import reader
from attnopt.analysis.lift import Lifter
from attnopt.analysis.linear import Cell, affine, cells, combination, index_of
from attnopt.analysis.scores import output_index
from attnopt.ir.expr import Expr
from mutation.graphs import Wrapped
from mutation.words import E

GRAPH = fx.Graph()
X, TABLE = GRAPH.placeholder("x"), GRAPH.placeholder("table")
B, H, S = E.var("b", 2), E.var("h", 4), E.var("s", 8)
I = index_of(4)
HALF = E.load(TABLE, (S, I), "float")
COS, SIN = E.function("cos", HALF), E.function("sin", HALF)


def x(feature: Expr, head: Expr = H) -> Expr:
    return E.load(X, (B, head, S, feature), "float")


def low(value: Expr = E.FZERO, first: int = 0, step: int = 1, count: int = 4) -> Cell:
    return Cell(first, step, count, value)


FIRST, SECOND = x(I), x(E.add(I, E.const(4)))
TURNED = ({FIRST: COS, SECOND: E.neg(SIN)}, {FIRST: SIN, SECOND: COS})


def turn(a: dict[Expr, Expr] = TURNED[0], b: dict[Expr, Expr] = TURNED[1], one: Cell | None = None, other: Cell | None = None) -> R._Turn | None:
    return R._turn(one or low(), a, other or low(first=4), b)


# ------------------------------------------------------------------------------------------------ functions of a feature


def test_a_slope_of_an_index() -> None:
    assert affine(E.add(E.mul(E.const(2), I), S), I) == (2, S)
    assert affine(S, I) is None
    assert affine(E.add(I, E.mul(I, S)), I) is None
    assert affine(E.add(I, E.floordiv(I, E.const(3))), I) is None


def test_a_feature_of_variable_number_has_no_cells() -> None:
    d = E.var("d", E.sym("D"))
    assert cells(E.as_float(d), d) is None


def test_what_never_changes_its_form_is_one_cell() -> None:
    d = E.var("d", 8)
    assert [(c.first, c.count) for c in cells(x(d), d) or ()] == [(0, 8)]
    assert [(c.first, c.count) for c in cells(E.where(E.lt(d, E.const(3)), x(d), E.FZERO), d) or ()] == [(0, 3), (3, 5)]


def test_a_comparison_with_something_else_is_no_cut() -> None:
    d = E.var("d", 8)
    assert [(c.first, c.count) for c in cells(E.where(E.lt(S, E.const(3)), x(d), E.FZERO), d) or ()] == [(0, 8)]
    assert [(c.first, c.count) for c in cells(E.where(E.lt(E.add(S, d), E.const(3)), x(d), E.FZERO), d) or ()] == [(0, 8)]
    assert [(c.first, c.count) for c in cells(E.where(E.lt(E.mul(d, S), E.const(3)), x(d), E.FZERO), d) or ()] == [(0, 8)]


def test_a_linear_combination() -> None:
    assert combination(E.add(E.mul(COS, FIRST), E.mul(SIN, SECOND)), X) == {FIRST: COS, SECOND: SIN}
    assert combination(E.mul(FIRST, SECOND), X) is None
    assert combination(E.add(FIRST, COS), X) is None
    assert combination(COS, X) is None
    assert combination(E.add(FIRST, E.function("tanh", SECOND)), X) is None
    assert combination(E.add(E.mul(COS, FIRST), E.div(E.FONE, SECOND)), X) is None


# ------------------------------------------------------------------------------------------------ pairs


def test_a_pair() -> None:
    found = turn()
    assert found is not None and (found.x, found.y, found.cos, found.sin) == (FIRST, SECOND, COS, SIN)


def test_halves_of_different_length_are_no_pair() -> None:
    assert turn(other=low(first=4, count=2)) is None


def test_halves_of_different_step_are_no_pair() -> None:
    assert turn(other=low(first=4, step=2)) is None


def test_halves_that_read_other_elements_are_no_pair() -> None:
    assert turn(b={FIRST: SIN, x(E.add(I, E.const(5))): COS}) is None


def test_a_reflection_is_no_pair() -> None:
    assert turn(b={FIRST: E.neg(SIN), SECOND: COS}) is None
    assert turn(b={FIRST: SIN, SECOND: E.mul(E.const(2.0), COS)}) is None


def test_a_cell_without_a_partner_is_no_pair() -> None:
    assert R._pairs([(low(), TURNED[0]), (low(first=4), TURNED[1])]) is not None
    assert R._pairs([(low(), TURNED[0])]) is None
    assert R._pairs([(low(), TURNED[0]), (low(first=4), TURNED[0])]) is None


def test_blocks_that_follow_each_other_are_one() -> None:
    assert R._merge([(0, 4, 1, 2), (2, 6, 1, 2)]) == R.Pairing(0, 4, 1)
    assert R._merge([(0, 4, 1, 2), (3, 6, 1, 2)]) is None
    assert R._merge([(0, 4, 1, 2), (2, 7, 1, 2)]) is None
    assert R._merge([(0, 4, 1, 2), (2, 6, 2, 2)]) is None


def turns(*pairs: tuple[Expr, Expr]) -> list[R._Turn]:
    return [R._Turn(low(), low(first=4), a, c, COS, SIN) for a, c in pairs]


def test_where_pairs_stand() -> None:
    assert R._origin(turns((FIRST, SECOND))) is not None


def test_pairs_that_differ_in_two_places_stand_nowhere() -> None:
    assert R._origin(turns((FIRST, x(E.add(I, E.const(4)), E.ZERO)))) is None


def test_pairs_at_a_tensors_place_stand_nowhere() -> None:
    assert R._origin(turns((x(E.mul(I, I)), SECOND))) is None


def test_pairs_of_two_steps_stand_nowhere() -> None:
    assert R._origin(turns((FIRST, x(E.add(E.mul(E.const(2), I), E.const(4)))))) is None


def test_pairs_that_move_along_with_a_token_stand_nowhere() -> None:
    assert R._origin(turns((FIRST, x(E.add(I, S, E.const(4)))))) is None


def test_pairs_of_two_heads_stand_nowhere() -> None:
    other = (x(E.add(I, E.const(8)), E.ZERO), x(E.add(I, E.const(12)), E.ZERO))
    assert R._origin(turns((FIRST, SECOND), other)) is None


def test_pairs_whose_other_places_run_along_them_stand_nowhere() -> None:
    assert R._origin(turns((x(I, I), x(E.add(I, E.const(4)), I)))) is None


def rest(value: dict[Expr, Expr] | None, factor: Expr = E.FONE, count: int = 4) -> bool:
    return R._rest_is_same([(low(first=8), value)], (B, H, S, E.ZERO), 3, 0, factor, count)


def test_the_rest_stands_where_it_stood() -> None:
    assert rest({x(E.add(I, E.const(8))): E.FONE})
    assert not rest({x(E.add(I, E.const(9))): E.FONE})
    assert not rest({x(E.add(I, E.const(8)), E.ZERO): E.FONE})
    assert not rest({x(E.add(I, E.const(8))): E.const(2.0)})
    assert not rest({x(E.add(I, E.const(8))): E.FONE}, count=5)
    assert not rest(None)
    assert not rest({x(E.add(I, E.const(8))): E.FONE, FIRST: E.FONE})


# ------------------------------------------------------------------------------------------------ angles


def angle(cos: Expr, sin: Expr) -> R._Angle | None:
    return R._angle(R._Turn(low(), low(first=4), FIRST, SECOND, cos, sin), S, H, Lifter())


POSITION = E.mul(E.as_float(S), E.load(TABLE, (I,), "float"))


def test_an_angle() -> None:
    assert angle(E.function("cos", POSITION), E.function("sin", POSITION)) is not None


def test_cos_and_sin_of_two_sizes_are_no_angle() -> None:
    assert angle(E.mul(E.const(2.0), E.function("cos", POSITION)), E.function("sin", POSITION)) is None


def test_a_product_of_two_functions_is_no_angle() -> None:
    other = E.mul(E.function("cos", POSITION), E.load(TABLE, (S, S), "float"))
    assert angle(other, E.function("sin", POSITION)) is None
    assert angle(E.function("cos", POSITION), E.mul(E.function("sin", POSITION), E.load(TABLE, (S, S), "float"))) is None


def test_an_angle_of_a_head_is_none() -> None:
    mine = E.mul(POSITION, E.load(TABLE, (H,), "float"))
    assert angle(E.function("cos", mine), E.function("sin", mine)) is None


def test_a_factor_of_a_pair_is_no_factor() -> None:
    factor = E.load(TABLE, (E.ZERO, I), "float")
    assert angle(E.mul(factor, E.function("cos", POSITION)), E.mul(factor, E.function("sin", POSITION))) is None


def test_an_angle_that_is_not_the_other_is_none() -> None:
    assert angle(E.function("cos", POSITION), E.function("sin", E.mul(E.const(2.0), POSITION))) is None


def row(*at: Expr, table: fx.Node = TABLE) -> Expr:
    return E.load(table, at, "float")


def test_one_row_of_two_tables() -> None:
    assert R._same_row(row(S, I), row(S, I, table=X))
    assert not R._same_row(row(S, I), row(E.add(S, E.ONE), I, table=X))


def test_one_row_of_a_table_that_holds_both() -> None:
    assert R._same_row(row(S, I), row(S, E.add(I, E.const(4))))


def test_two_rows_of_a_table_are_not_one() -> None:
    assert not R._same_row(row(S, I), row(E.add(S, E.ONE), I))


def test_places_that_differ_twice_are_not_one_row() -> None:
    assert not R._same_row(row(S, I), row(E.add(S, E.ONE), E.add(I, E.ONE)))


def test_places_that_differ_by_a_variable_are_not_one_row() -> None:
    assert not R._same_row(row(S, I), row(S, E.mul(E.const(2), I)))


def test_rows_that_a_tensor_names_are_not_one() -> None:
    named = E.load(X, (B,), "int")
    assert not R._same_row(row(named, I), row(E.add(named, E.ONE), I))


def test_a_table_that_the_model_computes_is_none() -> None:
    node = fx.Graph().call_function(torch.ops.aten.relu.default, (TABLE,))
    assert not R._is_table(E.load(node, (S, I), "float"), Lifter())
    assert R._is_table(row(S, I), Lifter())


def test_pairs_of_two_heads_at_one_place_stand_nowhere() -> None:
    one = R._Turn(low(count=1), low(first=1, count=1), x(E.ZERO, E.ZERO), x(E.const(4), E.ONE), COS, SIN)
    assert R._origin([one]) is None


def test_rows_and_columns_that_both_differ_are_not_one_row() -> None:
    assert not R._same_row(row(E.ZERO, I), row(E.ONE, E.add(I, E.ONE)))


# ------------------------------------------------------------------------------------------------ the whole proof

J = index_of(2)
SOURCE = fx.Graph().placeholder("source")
SOURCE.meta["val"] = torch.empty(2, 4, 8, 8)


def quarter(first: int, partner: int, at: int, position: Expr, factor: float = 1.0) -> list[Cell]:
    """Two features from ``first`` on, turned with two from ``partner`` on; ``at`` is their place in the table of frequencies."""

    def element(n: int) -> Expr:
        return E.load(SOURCE, (B, H, S, E.add(J, E.const(n))), "float")

    angle = E.mul(position, E.load(TABLE, (E.add(J, E.const(at)),), "float"))
    c, z = E.mul(E.const(factor), E.function("cos", angle)), E.mul(E.const(factor), E.function("sin", angle))
    a, b = element(first), element(partner)
    return [Cell(first, 1, 2, E.add(E.mul(c, a), E.neg(E.mul(z, b)))), Cell(partner, 1, 2, E.add(E.mul(c, b), E.mul(z, a)))]


def proven(*parts: list[Cell]) -> R.Rotation | None:
    return R._proven([c for p in parts for c in p], SOURCE, tuple(map(E.const, (2, 4, 8, 8))), (B, H, S, E.var("d", 8)), Lifter())


TOKEN = E.as_float(S)


def test_a_rotation_of_all_features() -> None:
    found = proven(quarter(0, 4, 0, TOKEN), quarter(2, 6, 2, TOKEN))
    assert found is not None and found.whole and found.form.dim == 8


def test_a_pair_without_an_angle_makes_no_rotation() -> None:
    assert proven(quarter(0, 4, 0, TOKEN), quarter(2, 6, 2, E.mul(TOKEN, E.as_float(H)))) is None


def test_pairs_of_two_factors_make_no_rotation() -> None:
    assert proven(quarter(0, 4, 0, TOKEN), quarter(2, 6, 2, TOKEN, 2.0)) is None


def test_features_with_holes_are_no_rotation() -> None:
    assert proven(quarter(0, 4, 0, TOKEN)) is None


def test_pairs_that_do_not_follow_each_other_are_no_rotation() -> None:
    assert proven(quarter(0, 6, 0, TOKEN), quarter(2, 4, 2, TOKEN)) is None


def test_nothing_turned_is_no_rotation() -> None:
    assert proven([Cell(0, 1, 2, E.FONE)]) is None


# ------------------------------------------------------------------------------------------------ products over an axis of size one


def read(f: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> Expr:
    """The last operator of ``f``, as the reader of rotations sees it."""
    exported = torch.export.export(Wrapped(f), tuple(torch.ones(s) for s in shapes), strict=False)
    node = next(n for n in reversed(exported.graph.nodes) if n.op == "call_function")
    lifter = Lifter()
    index = output_index(node)
    assert index is not None
    return lifter.lift(node, index, reader(lifter, None))


def test_an_outer_product() -> None:
    assert read(lambda a, b: a @ b, (5, 1), (1, 6)).op == "mul"
    assert read(lambda a, b: torch.einsum("i,j->ij", a, b), (5,), (6,)).op == "mul"


def test_a_sum_of_products_is_no_outer_product() -> None:
    assert read(lambda a, b: a @ b, (5, 2), (2, 6)).op == "load"
    assert read(lambda a, b: torch.einsum("ik,kj->ij", a, b), (5, 2), (2, 6)).op == "load"


def test_an_outer_product_with_an_addend_is_none() -> None:
    assert read(lambda c, a, b: torch.baddbmm(c, a, b), (2, 5, 6), (2, 5, 1), (2, 1, 6)).op == "load"


# ------------------------------------------------------------------------------------------------ complex numbers


def test_a_real_factor_of_a_complex_number_is_real() -> None:
    found = read(lambda a, b: torch.view_as_real(torch.view_as_complex(a) * b), (5, 2), (5,))
    loads = {x for x in found.leaves if x.op == "load"}
    assert {len(x.args) for x in loads} == {1, 2} and len(loads) == 3


def test_a_complex_number_times_a_plain_one() -> None:
    found = read(lambda a: torch.view_as_real(torch.view_as_complex(a) * 3.0), (5, 2))
    assert {len(x.args) for x in found.leaves if x.op == "load"} == {2}
