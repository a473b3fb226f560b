"""Requests that wait: for a page that another computes, and after they gave their own back."""

from __future__ import annotations

from attnopt.runtime import SamplingParams
from runtime.toy import expected, make_engine


def test_who_waits_for_the_page_of_another_is_not_starved_by_those_behind() -> None:
    """A small request arrives in every step. Those that came before the page was there may overtake, no later one."""
    engine = make_engine(max_requests=2, chunk=4)
    prefix = list(range(24))
    first = engine.add([*prefix, 1], SamplingParams(max_new_tokens=20))
    late = engine.add([*prefix, 2], SamplingParams(max_new_tokens=2))
    small = []
    while first.remaining > 1 or not first.output:
        small.append(engine.add([3], SamplingParams(max_new_tokens=2)))
        engine.step()
    assert any(r.state == "finished" for r in small), "nobody overtakes, so nothing is tested"
    behind = [engine.add([4], SamplingParams(max_new_tokens=2)) for _ in range(8)]
    while late.state != "finished":
        engine.step()
    assert not any(r.output for r in behind) and late.shared == 24
    while engine.step() is not None:
        pass
    assert all(r.output == expected(r) for r in (first, late, *small, *behind))


def test_who_gave_its_pages_back_has_all_its_tokens_to_compute() -> None:
    engine = make_engine(pages=4, prefix_sharing=False)
    engine.add([1, 2, 3, 4], SamplingParams(max_new_tokens=8))
    young = engine.add([5, 6, 7], SamplingParams(max_new_tokens=8))
    while not young.preemptions:
        engine.step()
    assert young.state == "waiting" and young.computed == 0 and young.remaining == 3 + len(young.output) > 3


def test_without_sharing_no_freed_page_is_kept() -> None:
    for sharing, kept in ((True, 2), (False, 0)):
        engine = make_engine(prefix_sharing=sharing)
        engine.generate([list(range(9))], SamplingParams(max_new_tokens=1))
        assert engine.manager.usage().reusable == kept
