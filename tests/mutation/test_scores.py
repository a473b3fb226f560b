"""What scores may be called: near misses of fill, scale, softcap and ALiBi, as expressions."""

from __future__ import annotations

import math

import pytest

from attnopt.analysis import classify, visible
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Load, Traits
from mutation.words import D, E

b, h, q, k, s = D.b, D.h, D.q, D.k, E.score()
FLOAT, COUNT = Load("slope", "float"), Load("count", "int", "cumsum")


def named(score: Expr, *loads: Load) -> Traits:
    return classify.traits(score, E.TRUE, D, loads)


def slope() -> Expr:
    return E.load(0, (h,), "float")


@pytest.mark.parametrize("fill", [-math.inf, -3.4e38, -1e9, -5e4])
def test_a_large_fill_hides(fill: float) -> None:
    parts = visible.split(E.where(E.le(k, q), s, E.const(fill)), "nan")
    assert parts.mask is E.le(k, q) and parts.score is s


@pytest.mark.parametrize("fill", [-1e4, -100.0, 0.0, 1e9])
def test_a_small_fill_is_a_number(fill: float) -> None:
    logits = E.where(E.le(k, q), s, E.const(fill))
    assert visible.split(logits, "nan").mask is E.TRUE


def test_a_choice_between_tensors_is_no_mask() -> None:
    logits = E.where(E.le(k, q), s, E.load(0, (k,), "float"))
    assert visible.split(logits, "nan").mask is E.TRUE


def test_a_choice_of_whole_numbers_is_no_mask() -> None:
    """An integer far below zero is no logit: the score is what it is cast to."""
    inner = E.where(E.eq(E.load(0, (k,), "int"), E.ONE), E.load(1, (k,), "int"), E.const(-100000))
    parts = visible.split(E.add(s, E.as_float(inner)), "nan")
    assert parts.mask is E.TRUE


# ------------------------------------------------------------------------------------------------ what hides is proven

SEEN, PAD, TABLE = E.le(k, q), E.load(8, (b, k), "bool"), E.load(9, (b, k), "float")


def masked(logits: Expr, **options: object) -> Expr:
    return visible.split(logits, "nan", **options).mask  # type: ignore[arg-type]


def test_a_fill_below_an_unknown_factor_leaves_finite_fills_in_the_score() -> None:
    """A learned factor may be negative, and more than one: what it makes of a fill may be lower than another fill, or no fill."""
    scaled = E.mul(E.load(0, (h,), "float"), E.where(PAD, s, E.const(-1e9)))
    assert masked(E.where(SEEN, scaled, E.const(-1e9))) is E.TRUE
    assert masked(E.where(SEEN, scaled, E.const(-math.inf))) is SEEN
    revealed = E.mul(E.load(0, (h,), "float"), E.where(PAD, s, E.const(1e9)))
    assert masked(E.where(SEEN, revealed, E.const(-1e9))) is E.TRUE


def test_a_fill_that_a_large_number_may_lift_is_no_mask() -> None:
    lifted = E.add(E.where(SEEN, s, E.const(-4e4)), E.where(PAD, E.const(4e4), E.FZERO))
    assert masked(lifted) is E.TRUE
    assert masked(lifted, sink=E.load(0, (h,), "float")) is E.TRUE
    assert masked(lifted, underflows=True) is E.TRUE


def test_a_fill_that_a_factor_makes_small_is_no_mask() -> None:
    chosen = E.where(SEEN, E.add(s, TABLE), E.const(-4e4))
    assert masked(E.mul(E.const(0.5), chosen)) is E.TRUE
    assert masked(E.mul(E.const(8.0), E.where(SEEN, E.add(s, E.load(0, (h,), "float")), E.const(-1e4)))) is SEEN


def test_an_upper_clamp_hides_as_much_as_what_it_clamps() -> None:
    parts = visible.split(E.minimum(E.where(SEEN, s, E.const(-math.inf)), E.const(2.0)), "nan")
    assert parts.mask is SEEN and parts.score is E.minimum(s, E.const(2.0))
    assert masked(E.maximum(E.where(SEEN, s, E.const(-math.inf)), E.const(-3.0))) is E.TRUE


def test_a_bias_of_numbers_is_a_condition_beside_a_finite_fill_only() -> None:
    shown = E.lt(E.const(visible.HIDDEN), TABLE)
    assert masked(E.where(SEEN, E.add(s, TABLE), E.const(-1e9))) is E.all_of(SEEN, shown)
    assert masked(E.where(SEEN, E.add(s, TABLE), E.const(-math.inf))) is SEEN
    assert masked(E.add(s, TABLE)) is E.TRUE


def test_a_sum_of_numbers_and_a_constant_is_one_condition() -> None:
    """min - min * m is a mask that is one where a key is seen."""
    small = E.add(E.mul(E.const(1e9), E.as_float(E.load(9, (b, k), "int"))), E.const(-1e9))
    assert masked(E.add(E.where(SEEN, s, E.const(-1e9)), small)) is E.all_of(SEEN, E.lt(E.const(visible.HIDDEN), small))


def test_a_mask_may_be_subtracted_and_a_temperature_given() -> None:
    subtracted = E.mul(E.const(-0.5), TABLE)
    assert masked(E.where(SEEN, E.add(s, subtracted), E.const(-1e9))) is E.all_of(SEEN, E.lt(E.const(visible.HIDDEN), subtracted))
    temperature = E.load(7, (q,), "float")
    assert masked(E.where(SEEN, E.mul(E.minimum(s, E.const(2.0)), temperature), E.const(-1e9))) is SEEN
    scaled = E.mul(E.const(0.5), temperature)  # alone it is added: a mask of rows, which a scale follows
    assert masked(E.where(SEEN, E.add(s, scaled), E.const(-1e9))) is E.all_of(SEEN, E.lt(E.const(visible.HIDDEN), scaled))


def test_a_bias_of_a_head_is_no_mask() -> None:
    """It is the same for all queries and keys, so it hides no key from a query that sees another."""
    assert masked(E.where(SEEN, E.add(s, E.load(0, (b, h), "float")), E.const(-1e9))) is SEEN


def test_a_temperature_may_divide() -> None:
    """What is the same for all keys of a row, and nothing else."""
    temperature = E.load(7, (q,), "float")
    assert masked(E.where(SEEN, E.div(s, temperature), E.const(-1e9))) is SEEN
    assert masked(E.where(SEEN, E.div(s, TABLE), E.const(-1e9))) is E.TRUE
    assert masked(E.where(SEEN, E.div(s, E.minimum(temperature, E.const(-1e9))), E.const(-1e9))) is E.TRUE
    assert masked(E.where(SEEN, E.div(E.where(PAD, s, E.const(-4e4)), temperature), E.const(-1e9))) is E.TRUE


def test_a_mask_times_a_learned_factor_is_a_condition() -> None:
    """It may be lower than the fill beside it, and is then no reason to see what the fill hides."""
    small = E.mul(slope(), E.where(PAD, E.FZERO, E.const(-1e9)))
    assert masked(E.where(SEEN, E.add(s, small), E.const(-1e9))) is E.all_of(SEEN, E.lt(E.const(visible.HIDDEN), small))


def test_a_slope_and_a_count_are_no_masks() -> None:
    bias = E.add(E.mul(slope(), E.as_float(E.sub(k, q))), E.mul(slope(), E.as_float(E.load(1, (b, k), "int"))))
    assert masked(E.where(SEEN, E.add(s, bias), E.const(-1e9))) is SEEN
    assert masked(E.where(SEEN, E.add(s, E.as_float(E.load(1, (b, k), "int"))), E.const(-1e9))) is SEEN


def test_rows_of_fills_are_computed_from_all_of_them() -> None:
    logits = E.add(s, E.where(SEEN, E.FZERO, E.const(-1e9)), E.where(PAD, E.FZERO, E.const(-1e9)))
    parts = visible.split(logits, "zero")
    assert (parts.empty_rows, parts.empty_score, parts.weightless) == ("program", logits, "zero")
    assert visible.split(E.where(SEEN, s, E.const(-1e9)), "nan").empty_rows == "uniform"
    assert visible.split(E.where(SEEN, s, E.const(-math.inf)), "zero").empty_rows == "zero"


def test_an_unshifted_exponential_is_zero_sooner() -> None:
    assert masked(E.where(SEEN, s, E.const(-1e4)), underflows=True) is SEEN
    assert masked(E.where(SEEN, s, E.const(-500.0)), underflows=True) is E.TRUE
    assert masked(E.add(s, TABLE), underflows=True) is E.lt(E.const(visible.VANISHED), TABLE)


# ------------------------------------------------------------------------------------------------ scale and bias


def test_two_scores_have_no_scale() -> None:
    assert named(E.add(s, E.function("tanh", s))).scale is None
    assert named(E.add(E.mul(E.const(0.5), s), E.mul(slope(), s)), FLOAT).scale is None


def test_a_scale() -> None:
    assert named(E.mul(E.const(0.5), s)).scale == 0.5


def alibi(bias: Expr, *loads: Load) -> bool:
    return named(E.add(s, bias), *loads).alibi


def test_alibi() -> None:
    assert alibi(E.mul(slope(), E.as_float(E.sub(k, q))), FLOAT)
    assert alibi(E.mul(slope(), E.as_float(k)), FLOAT)


def test_a_slope_that_depends_on_the_query_is_no_alibi() -> None:
    assert not alibi(E.mul(E.load(0, (h, q), "float"), E.as_float(k)), FLOAT)


def test_a_slope_that_is_the_same_for_all_heads_is_no_alibi() -> None:
    assert not alibi(E.mul(E.const(0.5), E.as_float(k)))


def test_a_slope_times_a_tensor_over_keys_is_no_alibi() -> None:
    assert not alibi(E.mul(slope(), E.load(1, (b, k), "float")), FLOAT, FLOAT)


def test_a_slope_times_a_square_is_no_alibi() -> None:
    assert not alibi(E.mul(slope(), E.as_float(E.mul(k, k))), FLOAT)


def test_a_slope_times_a_float_of_positions_is_no_alibi() -> None:
    assert not alibi(E.mul(slope(), E.function("sqrt", E.as_float(k))), FLOAT)


def test_a_slope_times_a_function_of_the_head_and_key_is_no_alibi() -> None:
    assert not alibi(E.mul(slope(), E.as_float(E.add(k, E.mul(h, k)))), FLOAT)


def test_a_bias_of_a_row_beside_is_alibi() -> None:
    assert alibi(E.add(E.mul(slope(), E.as_float(k)), E.load(1, (b, h, q), "float")), FLOAT, FLOAT)


def test_only_a_bias_of_a_row_is_no_alibi() -> None:
    assert not alibi(E.load(0, (b, h, q), "float"), FLOAT)


def counted(x: Expr) -> bool:
    return alibi(E.mul(slope(), x), FLOAT, COUNT, FLOAT)


COUNTED, MASK = E.load(1, (b, k), "int"), E.load(2, (b, k), "float")


def test_a_running_count_is_a_position() -> None:
    assert counted(E.as_float(COUNTED))
    assert counted(E.mul(E.as_float(E.sub(COUNTED, E.ONE)), MASK))


def test_a_count_and_an_index_together_are_no_position() -> None:
    index = E.mul(slope(), E.as_float(E.sub(k, q)))
    assert alibi(E.add(index, E.mul(E.const(2.0), slope(), E.as_float(k))), FLOAT)
    assert not alibi(E.add(index, E.mul(slope(), E.as_float(COUNTED))), FLOAT, COUNT)


def test_a_sum_without_a_count_is_no_position() -> None:
    other = E.load(2, (b, k), "int")
    assert not counted(E.as_float(E.add(other, E.ONE)))


def test_a_count_and_a_function_of_the_query_is_no_position() -> None:
    assert not counted(E.as_float(E.add(COUNTED, E.mul(q, k))))


def test_a_count_times_a_tensor_of_the_query_is_no_position() -> None:
    assert not counted(E.mul(E.as_float(COUNTED), E.load(2, (q, k), "float")))


def test_a_mask_times_a_mask_is_no_position() -> None:
    assert not counted(E.mul(MASK, MASK))


def causal_alibi(x: Expr, mask: Expr) -> bool:
    return classify.traits(E.add(s, E.mul(slope(), E.as_float(x))), mask, D, (FLOAT,)).alibi


def test_a_distance_is_a_position_below_the_diagonal_only() -> None:
    distance = E.absolute(E.sub(q, k))
    assert causal_alibi(distance, E.le(k, q))
    assert not causal_alibi(distance, E.TRUE)
    assert not causal_alibi(distance, E.le(k, E.add(q, E.sub(D.Skv, D.Sq))))
    assert not causal_alibi(E.absolute(E.add(q, E.sub(D.Skv, D.Sq), E.neg(k))), E.TRUE)


def test_another_distance_is_no_position() -> None:
    assert not causal_alibi(E.absolute(E.sub(q, E.mul(E.const(2), k))), E.le(k, q))
    assert not causal_alibi(E.absolute(E.sub(E.add(q, E.ONE), k)), E.le(k, q))
