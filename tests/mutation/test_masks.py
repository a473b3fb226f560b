"""What a mask may be called: near misses of each word, as expressions."""

from __future__ import annotations

import pytest

from attnopt.ir.bounds import nonnegative
from attnopt.ir.expr import Expr
from attnopt.ir.mask import key_range
from mutation.words import BASE, D, E, padding, seen

b, h, q, k = D.b, D.h, D.q, D.k


def ids(x: Expr, slot: int = 0) -> Expr:
    return E.load(slot, (b, x), "int")


def test_a_mask_that_reads_the_query_too_is_no_key_padding() -> None:
    assert not seen(E.load(0, (b, q, k), "bool")).key_padding


def test_a_mask_that_does_not_read_the_key_is_no_key_padding() -> None:
    assert not seen(E.load(0, (b,), "bool")).key_padding


def test_a_mask_without_a_tensor_is_no_key_padding() -> None:
    assert not seen(E.lt(k, E.const(3))).key_padding


def test_key_padding() -> None:
    assert seen(padding()).key_padding


def test_ids_that_are_one_apart_are_no_documents() -> None:
    assert not seen(E.eq(ids(q), E.add(ids(k), E.ONE))).document


def test_twice_an_id_is_no_document() -> None:
    assert not seen(E.eq(E.mul(E.const(2), ids(q)), ids(k))).document


def test_ids_of_two_tensors_are_no_documents() -> None:
    assert not seen(E.eq(ids(q), ids(k, 1))).document


def test_ids_at_other_places_are_no_documents() -> None:
    assert not seen(E.eq(ids(q), ids(E.add(k, E.ONE)))).document


def test_the_same_id_twice_along_the_query_is_no_document() -> None:
    assert not seen(E.eq(E.load(0, (b, q), "float"), E.load(0, (b, q), "float"))).document


def test_an_order_of_ids_is_no_document() -> None:
    assert not seen(E.le(ids(k), ids(q))).document


def test_documents() -> None:
    assert seen(E.eq(ids(q), ids(k))).document


def test_chunks_of_two_lengths_are_no_chunks() -> None:
    assert seen(E.eq(E.floordiv(q, E.const(4)), E.floordiv(k, E.const(2)))).chunk is None


def test_later_chunks_are_no_chunks() -> None:
    assert seen(E.le(E.floordiv(k, E.const(4)), E.floordiv(q, E.const(4)))).chunk is None


def test_every_second_chunk_is_no_chunk() -> None:
    assert seen(E.eq(E.mul(E.const(2), E.floordiv(q, E.const(4))), E.floordiv(k, E.const(4)))).chunk is None


def test_chunks_beside_a_tensor_are_no_chunks() -> None:
    assert seen(E.eq(E.floordiv(q, E.const(4)), ids(k))).chunk is None


def test_chunks_shifted_against_each_other_are_no_chunks() -> None:
    assert seen(E.eq(E.floordiv(q, E.const(4)), E.floordiv(E.add(k, E.const(1)), E.const(4)))).chunk is None


def test_chunks() -> None:
    assert seen(E.eq(E.floordiv(q, E.const(4)), E.floordiv(k, E.const(4)))).chunk == 4


def test_two_diagonals_are_no_prefix() -> None:
    assert not seen(E.any_of(E.le(k, q), E.le(k, E.add(q, E.sub(D.Skv, D.Sq))), E.lt(k, E.const(3)))).prefix


def test_rows_that_see_all_are_no_prefix() -> None:
    assert not seen(E.any_of(E.le(k, q), E.lt(q, E.const(3)))).prefix


def test_a_prefix_and_a_causal_mask_together_are_no_prefix() -> None:
    assert not seen(E.all_of(E.le(k, E.add(q, E.const(3))), E.lt(k, E.const(7)))).prefix


def test_a_prefix() -> None:
    assert seen(E.any_of(E.le(k, q), E.lt(k, E.const(3)))).prefix


def band(left: int = 2, right: int = 2) -> Expr:
    return E.all_of(E.le(k, E.add(q, E.const(right))), E.ge(k, E.sub(q, E.const(left))))


def test_two_bands_are_not_local_and_global() -> None:
    other = E.all_of(E.le(k, E.add(q, E.const(7))), E.ge(k, E.add(q, E.const(5))))
    assert not seen(E.any_of(band(), other, E.lt(k, E.ONE))).global_tokens


def test_a_band_or_nothing_else_is_not_global() -> None:
    assert not seen(band()).global_tokens


def test_tokens_that_depend_on_both_are_not_global() -> None:
    assert not seen(E.any_of(band(), E.eq(E.add(q, k), E.const(4)))).global_tokens


def test_a_triangle_or_a_row_is_not_local() -> None:
    assert not seen(E.any_of(E.le(k, E.add(q, E.const(2))), E.lt(q, E.ONE))).global_tokens
    assert not seen(E.any_of(E.ge(k, E.sub(q, E.const(2))), E.lt(k, E.ONE))).global_tokens


def test_a_band_with_a_padding_is_not_local() -> None:
    assert not seen(E.any_of(E.all_of(band(), padding()), E.lt(k, E.ONE))).global_tokens


def test_a_band_of_a_batch_is_not_local() -> None:
    """One bound of the band is a tensor's."""
    assert not seen(E.any_of(E.all_of(E.le(k, E.add(q, E.const(2))), E.ge(k, E.load(0, (b,), "int"))), E.lt(k, E.ONE))).global_tokens


def test_local_and_global() -> None:
    assert seen(E.any_of(band(), E.lt(k, E.ONE), E.lt(q, E.ONE))).global_tokens


def test_a_bias_that_does_not_hide_is_no_padding() -> None:
    """Of a bias of numbers it is only known which of them would hide a key; another comparison is the model's own."""
    bias = E.load(0, (b, k), "float")
    assert not seen(E.lt(E.const(-3e4), bias)).key_padding and not seen(E.lt(E.const(-1e3), bias)).key_padding
    assert seen(E.le(E.const(-3e4), bias)).key_padding and seen(E.lt(E.const(0.5), bias)).key_padding


def test_a_table_of_numbers_is_no_table_of_blocks() -> None:
    at = (h, E.floordiv(q, E.const(4)), E.floordiv(k, E.const(4)))
    assert seen(E.load(0, at, "bool")).blocks == (4, 4)
    assert seen(E.eq(E.load(0, at, "int"), E.ONE)).blocks is None


def test_a_table_at_other_places_is_no_table_of_blocks() -> None:
    assert seen(E.load(0, (E.floordiv(q, E.const(4)), E.floordiv(k, E.const(4)), E.sub(q, k)), "bool")).blocks is None


# ------------------------------------------------------------------------------------------------ diagonals and windows


@pytest.mark.parametrize(("right", "expected"), [(-1, None), (0, "top_left"), (1, None)])
def test_only_the_main_diagonal_is_causal(right: int, expected: str | None) -> None:
    found = seen(E.le(k, E.add(q, E.const(right))))
    assert found.causal == expected
    assert (found.rest is E.TRUE) == (right >= 0)


def test_the_corner_is_causal_from_the_bottom_right() -> None:
    corner = E.sub(D.Skv, D.Sq)
    assert seen(E.le(k, E.add(q, corner))).causal == "bottom_right"
    assert seen(E.le(k, E.add(q, corner, E.ONE))).causal is None
    assert seen(E.le(k, E.add(q, E.sub(D.Sq, D.Skv)))).causal is None


def test_a_bound_of_two_queries_is_no_diagonal() -> None:
    assert seen(E.le(k, E.mul(E.const(2), q))).causal is None
    assert seen(E.le(E.mul(E.const(2), k), q)).causal is None


def test_a_bound_that_a_tensor_shifts_is_no_diagonal() -> None:
    assert seen(E.le(k, E.add(q, E.load(0, (b,), "int")))).causal is None


def test_the_diagonal_alone_is_no_diagonal_bound() -> None:
    assert key_range(E.eq(k, q)).right == ()
    assert key_range(E.eq(k, q)).rest is E.eq(k, q)


def test_the_left_bound_counts_from_the_corner() -> None:
    corner = E.sub(D.Skv, D.Sq)
    mask = E.all_of(E.le(k, E.add(q, corner)), E.ge(k, E.sub(E.add(q, corner), E.const(3))))
    assert seen(mask).window == (3, 0)
    mixed = E.all_of(E.le(k, E.add(q, corner)), E.ge(k, E.sub(q, E.const(3))))
    assert seen(mixed).window == (None, None) and seen(mixed).rest is not E.TRUE


# ------------------------------------------------------------------------------------------------ bounds


def test_what_may_be_negative_is_not_proven() -> None:
    s = E.sym("s", 2)
    i = E.var("i", s)
    assert nonnegative(E.sub(E.sub(s, E.ONE), i))
    assert not nonnegative(E.sub(i, E.ONE))
    assert not nonnegative(E.sub(E.sub(s, E.const(3)), E.ZERO))


def test_a_square_is_not_linear() -> None:
    """Between the ends of an index's range a square may be lower than at both."""
    i = E.var("i", 10)
    assert not nonnegative(E.add(E.mul(i, i), E.mul(E.const(-9), i), E.const(1)))


def test_a_tensor_has_no_bounds() -> None:
    assert not nonnegative(E.load(0, (q,), "int"))
    assert not nonnegative(E.add(E.floordiv(E.load(0, (q,), "int"), E.const(2)), E.const(5)))


def test_a_float_has_no_bounds() -> None:
    assert not nonnegative(E.as_float(E.sub(E.ZERO, E.var("i", 4))))


def test_an_unbounded_end_proves_nothing() -> None:
    s = E.sym("s", 1)
    x = E.absolute(E.sub(E.load(0, (q,), "int"), s))
    assert nonnegative(x)
    assert not nonnegative(E.sub(E.const(1000), x))


def test_both_ends_count() -> None:
    assert BASE and not nonnegative(E.sub(E.var("i", 4), E.var("j", 2)))


def test_an_or_of_paddings_and_positions_keeps_its_words_apart() -> None:
    """A conjunction is no disjunction: each of these would be a prefix or global tokens, were ``and`` read as ``or``."""
    assert not seen(E.negate(E.any_of(E.le(k, q), E.lt(k, E.const(3))))).prefix
    assert not seen(E.eq(ids(k), E.ONE)).global_tokens


def test_no_chunk_of_a_sum_of_three() -> None:
    assert seen(E.eq(E.add(E.floordiv(q, E.const(4)), E.load(0, (b,), "int")), E.floordiv(k, E.const(4)))).chunk is None


def test_the_chunk_of_a_head_is_no_chunk() -> None:
    assert seen(E.eq(E.floordiv(E.add(q, k), E.const(4)), E.floordiv(k, E.const(4)))).chunk is None
    assert seen(E.eq(E.floordiv(h, E.const(4)), E.floordiv(k, E.const(4)))).chunk is None


# ------------------------------------------------------------------------------------------------ positions from a tensor


def test_positions_that_a_tensor_gives() -> None:
    assert seen(E.le(ids(k), ids(q))).by_position
    assert seen(E.le(ids(k), E.add(ids(q), E.const(3)))).by_position


def test_equal_positions_are_no_order() -> None:
    assert not seen(E.eq(ids(q), E.add(ids(k), E.ONE))).by_position
    assert not seen(E.eq(ids(q), ids(k))).by_position


def test_positions_of_two_tensors_are_not_compared() -> None:
    assert not seen(E.le(ids(k), ids(q, 1))).by_position


def test_a_position_and_its_place_are_not_compared() -> None:
    assert not seen(E.le(ids(k), q)).by_position
    assert not seen(E.le(ids(k), E.add(ids(q), h))).by_position


def test_two_positions_along_one_axis_are_not_compared() -> None:
    assert not seen(E.le(ids(k), ids(E.add(k, E.ONE)))).by_position
    assert not seen(E.le(ids(q), ids(E.add(q, E.ONE)))).by_position


def test_positions_at_other_places_are_not_compared() -> None:
    assert not seen(E.le(ids(k), ids(E.add(q, E.const(7))))).by_position


def test_a_position_twice_is_no_position() -> None:
    assert not seen(E.le(E.mul(E.const(2), ids(k)), ids(q))).by_position


def test_an_agreement_is_no_choice() -> None:
    """Two conditions that are both true or both false: with ``or`` in its place these would be a prefix and global tokens."""
    assert not seen(E.eq(E.le(k, q), padding())).prefix
    assert not seen(E.eq(band(), E.lt(k, E.ONE))).global_tokens


def test_a_square_may_fall_where_its_slope_does_not() -> None:
    i = E.var("i", 10)
    assert not nonnegative(E.sub(i, E.mul(i, i)))
