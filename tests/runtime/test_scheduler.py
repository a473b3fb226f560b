"""Fairness: who gets tokens and pages when there are too few."""

from __future__ import annotations

from attnopt.runtime import SamplingParams
from runtime.toy import expected, make_engine


def test_the_youngest_gives_way_when_pages_run_out() -> None:
    """The older of the two is the first that finds no page."""
    engine = make_engine(pages=4, prefix_sharing=False)
    old = engine.add([1, 2, 3, 4], SamplingParams(max_new_tokens=8))
    young = engine.add([5, 6, 7], SamplingParams(max_new_tokens=8))
    while engine.step() is not None:
        pass
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert [old.output, young.output] == [expected(old), expected(young)]


def test_the_oldest_prompt_gets_ahead_when_others_could_take_the_whole_budget() -> None:
    engine = make_engine(token_budget=2, chunk=1)
    old = engine.add(list(range(12)), SamplingParams(max_new_tokens=1))
    young = engine.add([1], SamplingParams(max_new_tokens=9))
    engine.step()
    engine.fork(young)
    for n in range(2, 6):
        engine.step()
        assert old.computed == n


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_pages() -> None:
    engine = make_engine(pages=8)
    engine.add(list(range(16)), SamplingParams(max_new_tokens=4))
    large = engine.add(list(range(1, 25)), SamplingParams(max_new_tokens=2))
    small = engine.add([3], SamplingParams(max_new_tokens=2))
    for _ in range(3):
        engine.step()
        assert large.state == small.state == "waiting"
    while engine.step() is not None:
        pass
    assert [large.output, small.output] == [expected(large), expected(small)]
