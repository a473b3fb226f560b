"""Random arrivals, forks, cancels and out-of-memory, by hypothesis: no page leaks, none that is shared is written, and tokens are those of a request alone."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from attnopt.errors import ServingError
from attnopt.runtime import BlockManager, OutOfPages, Request, SamplingParams
from attnopt.runtime.block_manager import DEAD
from runtime.toy import VOCABULARY, expected, make_engine

TEXTS = st.one_of(st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(1, 14).map(lambda n: [0, 1, 2, 1] * 3 + [2] * n))
"""Few different tokens, so that prefixes meet."""


class Pages(RuleBasedStateMachine):
    """A BlockManager beside a memory in which each slot remembers all tokens up to its own, as keys and values do."""

    @initialize(pages=st.integers(1, 14), size=st.integers(1, 4), sharing=st.booleans(), window=st.one_of(st.none(), st.integers(1, 7)))
    def begin(self, pages: int, size: int, sharing: bool, window: int | None) -> None:
        self.manager = BlockManager(pages, size, sharing, window)
        self.memory: dict[int, tuple[int, ...]] = {}
        self.texts: dict[int, list[int]] = {}
        self.names = 0

    def name(self) -> int:
        self.names += 1
        return self.names

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.texts)))

    def grow(self, name: int, new: list[int]) -> None:
        """Append, write and commit; a refusal must change nothing."""
        manager, size, first = self.manager, self.manager.page_size, self.manager.length(name)
        room, before = manager.room(name), (manager.table(name), manager.usage())
        try:
            copy = manager.append(name, len(new))
        except OutOfPages:
            assert room < len(new) and (manager.table(name), manager.usage()) == before
            return
        assert room >= len(new)
        if copy is not None:
            for offset in range(size):
                if copy[0] * size + offset in self.memory:
                    self.memory[copy[1] * size + offset] = self.memory[copy[0] * size + offset]
        self.texts[name] = text = self.texts[name][:first] + new
        for position, slot in enumerate(manager.slots(name, first, len(text)), first):
            page = slot // size
            assert sum(page in manager.table(other) for other in self.texts) == 1, "a shared page is written"
            assert page not in manager._hash_of, "a page that others may find is written"
            self.memory[slot] = tuple(text[: position + 1])
        manager.commit(name, new)

    @rule(text=TEXTS)
    def arrive(self, text: list[int]) -> None:
        name = self.name()
        stored = self.manager.match(self.manager.page_hashes(text[:-1]))[0]
        found = self.manager.allocate(name, text)
        assert found == stored * self.manager.page_size < len(text) and (self.manager.prefix_sharing or found == 0)
        self.texts[name] = text[:found]
        self.grow(name, text[found:])

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), new=st.lists(st.integers(0, 2), min_size=0, max_size=5))
    def append(self, data: st.DataObject, new: list[int]) -> None:
        self.grow(self.pick(data), new)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        name, child = self.pick(data), self.name()
        held = self.manager.usage().held
        self.manager.fork(name, child)
        assert self.manager.usage().held == held
        self.texts[child] = list(self.texts[name])

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), trusted=st.booleans())
    def free(self, data: st.DataObject, trusted: bool) -> None:
        name = self.pick(data)
        pages = {p for p in self.manager.table(name) if p != DEAD}
        self.manager.free(name, trusted)
        del self.texts[name]
        assert trusted or not pages & set(self.manager._hash_of), "a page that is not trusted can be found"

    @invariant()
    def every_request_finds_its_own(self) -> None:
        if not hasattr(self, "manager"):
            return
        manager, size = self.manager, self.manager.page_size
        manager.check()
        for name, text in self.texts.items():
            table = manager.table(name)
            assert manager.length(name) == len(text)
            needed = range(max(0, len(text) - manager.window + 1), len(text)) if manager.window else range(len(text))
            for position in needed:
                assert table[position // size] != DEAD
                assert self.memory[manager.slots(name, position, position + 1)[0]] == tuple(text[: position + 1])
            if manager.window:
                assert all(p == DEAD for p in table[: needed.start // size]), "a page that the window has passed is held"

    def teardown(self) -> None:
        for name in list(getattr(self, "texts", ())):
            self.manager.free(name)
        if hasattr(self, "manager"):
            self.manager.check()
            assert self.manager.available == self.manager.pages


class Traffic(RuleBasedStateMachine):
    """An engine with the toy model, whose cache is NaN wherever nothing is stored."""

    @initialize(
        pages=st.integers(4, 14),
        chunk=st.sampled_from([1, 7, None]),
        budget=st.integers(1, 20),
        sharing=st.booleans(),
        window=st.sampled_from([None, None, 5]),
        most=st.integers(1, 6),
        ahead=st.booleans(),
    )
    def begin(self, pages: int, chunk: int | None, budget: int, sharing: bool, window: int | None, most: int, ahead: bool) -> None:
        self.window = window
        self.engine = make_engine(pages, 4, window, chunk=chunk, token_budget=budget, prefix_sharing=sharing, max_requests=most, run_ahead=ahead)
        self.requests: list[Request] = []

    @rule(text=TEXTS, new=st.integers(1, 8), temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 3), stops=st.sampled_from([0, 0, VOCABULARY // 3]))
    def arrive(self, text: list[int], new: int, temperature: float, seed: int, stops: int) -> None:
        params = SamplingParams(max_new_tokens=new, temperature=temperature, seed=seed, stop_tokens=tuple(range(stops)))
        try:
            self.requests.append(self.engine.add(text, params))
        except ServingError as error:
            assert "can hold at most" in str(error) and len(text) > self.engine.manager.pages * 4

    @rule(text=st.sampled_from([[], [VOCABULARY], [0] * 2000]))
    def refused(self, text: list[int]) -> None:
        if self.window and len(text) == 2000:
            return
        with pytest.raises(ServingError):
            self.engine.add(text)

    @precondition(lambda self: any(r.state != "finished" for r in self.requests))
    @rule(data=st.data(), seed=st.integers(0, 3))
    def fork(self, data: st.DataObject, seed: int) -> None:
        parent = data.draw(st.sampled_from([r for r in self.requests if r.state != "finished"]))
        self.requests.append(self.engine.fork(parent, SamplingParams(max_new_tokens=5, temperature=1.0, seed=seed)))

    @precondition(lambda self: any(r.state != "finished" for r in self.requests))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.engine.cancel(data.draw(st.sampled_from([r for r in self.requests if r.state != "finished"])))

    @precondition(lambda self: any(r.state != "finished" for r in self.requests))
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        failed = data.draw(st.sampled_from([r for r in self.requests if r.state != "finished"]))
        self.engine.scheduler.fail(failed, ServingError("Stopped by the test."))

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            oldest = self.engine.scheduler.running[0] if self.engine.scheduler.running else None
            before = oldest.computed if oldest else 0
            self.engine.step()
            assert oldest is None or oldest.computed > before, "the oldest request gets ahead in every step"

    @invariant()
    def pages_are_sound(self) -> None:
        if hasattr(self, "engine"):
            self.engine.manager.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.scheduler.busy:
                break
            self.engine.step()
        assert not self.engine.scheduler.busy, "requests starve"
        self.engine.manager.check()
        assert self.engine.manager.available == self.engine.manager.pages, "pages leak"
        for r in self.requests:
            full = expected(r, self.window)
            assert r.output == full[: len(r.output)]
            assert r.finish_reason in ("stop", "length", "capacity", "cancelled", "error") and (r.error is not None) == (r.finish_reason == "error")
            assert (r.finish_reason == "stop") == (bool(r.output) and r.output[-1] in r.params.stop_tokens) or r.finish_reason in ("cancelled", "error")
            if r.finish_reason == "length":
                assert len(r.output) == r.params.max_new_tokens
            if r.finish_reason == "capacity":
                assert r.length == self.engine.manager.pages * 4 + 1


def run(machine: type[RuleBasedStateMachine], examples: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=25, deadline=None, suppress_health_check=checks))


def test_pages_through_random_use() -> None:
    run(Pages, 100)


def test_traffic_through_random_use() -> None:
    run(Traffic, 25)


@pytest.mark.slow
def test_pages_through_much_random_use() -> None:
    run(Pages, 2000)


@pytest.mark.slow
def test_traffic_through_much_random_use() -> None:
    run(Traffic, 500)
