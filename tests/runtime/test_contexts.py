"""Other sequences that requests read: encoded once each, in pages of their own, which come back whatever happens."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from attnopt.errors import ServingError
from attnopt.runtime import ContextCache, Engine, LayerShape, PagedCache, Request, SamplingParams
from runtime.test_machines import run

VOCABULARY = 31
LAYERS = [LayerShape(1, 2, 1)] * 2
BROKEN = 1000.0


def encode(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    if bool((x == BROKEN).any()):
        raise ValueError("this sequence cannot be encoded")
    n = x.shape[1]
    return [(torch.stack([x[0], x[0] * layer], -1).view(n, 1, 2), (x[0] + layer).view(n, 1, 1)) for layer in range(2)]


def length_of(x: Tensor) -> int:
    return x.shape[1]


def following(token: int, position: int, x: Tensor) -> int:
    """The next token, of all that is known of a request."""
    total = sum(float((k * torch.arange(1, x.shape[1] + 1)[:, None, None]).sum() + v.sum()) for k, v in encode(x))
    return int(token + 3 * position + total) % VOCABULARY


def alone(prompt: list[int], x: Tensor, count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(following(text[-1], len(text) - 1, x))
    return text[len(prompt) :]


def make_engine(pages: int = 64, context_pages: int = 64, **options: object) -> Engine:
    cache = PagedCache([LayerShape(1, 1, 1)], 4, pages)
    contexts = ContextCache(encode, length_of, LAYERS, 4, context_pages)
    for x in (x for pair in contexts.cache.tensors for x in pair):
        x.fill_(torch.nan)

    def run(
        tokens: Tensor, positions: Tensor, slots: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, rows: Tensor, others: Tensor, many: Tensor
    ) -> Tensor:
        out = torch.zeros(len(rows), VOCABULARY)
        for i, row in enumerate(rows.tolist()):
            r = int((starts[1:] <= row).sum())
            at = torch.arange(int(many[r]))
            where = others[r, at // 4].long(), at % 4
            total = sum(float((k[where] * (at + 1)[:, None, None]).sum() + v[where].sum()) for k, v in contexts.cache.tensors)
            out[i, int(tokens[row] + 3 * positions[row] + total) % VOCABULARY] = 1.0
        return out

    return Engine(run, cache, vocabulary=VOCABULARY, contexts=contexts, **options)  # type: ignore[arg-type]


def source(n: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 9, (1, n), generator=torch.Generator().manual_seed(100 * seed + n)).float()


def assert_empty(engine: Engine) -> None:
    engine.manager.check()
    assert engine.contexts is not None
    engine.contexts.check()
    assert engine.manager.available == engine.manager.pages
    assert engine.contexts.available == engine.contexts.cache.pages


@pytest.mark.parametrize("chunk", [1, 7, None], ids=["chunk1", "chunk7", "whole"])
def test_each_request_reads_its_own_sequence(chunk: int | None) -> None:
    engine = make_engine(chunk=chunk)
    texts, sources = [[1, 2, 3], [4], [1, 2, 3]], [source(9), source(4), source(1)]
    results = engine.generate(texts, SamplingParams(8), contexts=[(x,) for x in sources])
    assert [list(r.tokens) for r in results] == [alone(t, x, 8) for t, x in zip(texts, sources, strict=True)]
    assert len({r.tokens for r in results}) == 3
    assert engine.contexts is not None and engine.contexts.encoded == 3
    assert_empty(engine)


@pytest.mark.parametrize("context_pages", [5, 9], ids=["one-at-a-time", "some"])
def test_forty_requests_that_arrive_at_random_encode_each_sequence_once(context_pages: int) -> None:
    """Few pages of both kinds: requests are preempted and wait for the pages of others, and keep what was encoded."""
    rng = random.Random(0)
    engine = make_engine(pages=12, context_pages=context_pages, token_budget=20, chunk=7)
    left = [([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 24))], source(rng.randint(1, 20), i)) for i in range(40)]
    queued = []
    while left or engine.scheduler.busy:
        for _ in range(min(len(left), rng.randint(0, 4))):
            prompt, x = left.pop()
            queued.append((engine.add(prompt, SamplingParams(rng.randint(1, 16)), context=(x,)), prompt, x))
        engine.step()
        engine.manager.check()
    assert [r.output for r, _, _ in queued] == [alone(prompt, x, r.params.max_new_tokens) for r, prompt, x in queued]
    assert engine.contexts is not None and engine.contexts.encoded == 40
    assert engine.statistics().preemptions > 0 or context_pages == 5
    assert_empty(engine)


def test_equal_sequences_are_encoded_once_and_held_until_the_last_reader_ends() -> None:
    engine = make_engine()
    x = source(10)
    a = engine.add([1], SamplingParams(3), context=(x,))
    b = engine.add([2], SamplingParams(9), context=(x.clone(),))
    engine.step()
    c = engine.fork(b, SamplingParams(12))
    while engine.step():
        pass
    assert engine.contexts is not None and engine.contexts.encoded == 1
    assert [r.output for r in (a, b, c)] == [alone([1], x, 3), alone([2], x, 9), alone([2, *b.output[:1]], x, 12)]
    assert_empty(engine)


def test_equal_prompts_share_pages_only_where_their_sequences_are_equal() -> None:
    engine = make_engine()
    text = list(range(12))
    first, same, other = (engine.generate([text], SamplingParams(1), contexts=[(x,)])[0].shared for x in (source(5), source(5), source(6)))
    assert (first, same, other) == (0, 8, 0)


def test_a_sequence_that_cannot_be_encoded_fails_its_own_requests_alone() -> None:
    engine = make_engine()
    bad = source(6)
    bad[0, 3] = BROKEN
    good = source(7)
    results = engine.generate([[1], [2], [3]], SamplingParams(5), contexts=[(good,), (bad,), (good,)])
    assert [r.finish_reason for r in results] == ["length", "error", "length"]
    assert "this sequence cannot be encoded" in str(results[1].error)
    assert [list(results[i].tokens) for i in (0, 2)] == [alone([1], good, 5), alone([3], good, 5)]
    assert_empty(engine)


def test_cancelled_requests_give_their_sequence_back() -> None:
    engine = make_engine(context_pages=3)
    a, b = (engine.add([1], SamplingParams(20), context=(source(9, i),)) for i in range(2))
    engine.step()
    assert engine.contexts is not None and engine.contexts.available == 0
    engine.cancel(a)
    engine.cancel(b)
    assert_empty(engine)


def test_contexts_that_do_not_fit_are_told() -> None:
    engine = make_engine(context_pages=2)
    long, none = engine.generate([[1], [2]], SamplingParams(2), contexts=[(source(9),), (torch.zeros(1, 0),)])
    assert str(long.error) == "The other sequence of this request has 9 tokens; supported are from 1 to 8, as many as its cache of 2 pages holds."
    assert "has 0 tokens" in str(none.error)
    assert "reads another sequence, and none was given" in str(engine.generate([[1]], SamplingParams(2))[0].error)
    with pytest.raises(ServingError, match="There are 2 prompts and 1 contexts"):
        engine.generate([[1], [2]], contexts=[(source(3),)])
    from runtime.toy import make_engine as without

    with pytest.raises(ServingError, match="reads no other sequence, and one was given"):
        without().add([1], context=(source(3),))


class Readers(RuleBasedStateMachine):
    """Requests with other sequences that arrive, fork, are cancelled and fail, while pages of both kinds are few."""

    @initialize(pages=st.integers(5, 12), context_pages=st.integers(3, 8), chunk=st.sampled_from([1, 7, None]), budget=st.integers(1, 20), most=st.integers(1, 5))
    def begin(self, pages: int, context_pages: int, chunk: int | None, budget: int, most: int) -> None:
        self.engine = make_engine(pages, context_pages, chunk=chunk, token_budget=budget, max_requests=most)
        self.requests: list[tuple[Request, Tensor]] = []

    @rule(text=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=18), new=st.integers(1, 8), length=st.integers(1, 12), seed=st.integers(0, 2), broken=st.booleans())
    def arrive(self, text: list[int], new: int, length: int, seed: int, broken: bool) -> None:
        x = source(length, seed)
        if broken and seed == 2:
            x[0, -1] = BROKEN
        self.requests.append((self.engine.add(text, SamplingParams(new), context=(x,)), x))

    def alive(self) -> list[tuple[Request, Tensor]]:
        return [r for r in self.requests if r[0].state != "finished"]

    @precondition(lambda self: self.alive())
    @rule(data=st.data(), how=st.sampled_from(["fork", "cancel", "fail"]))
    def change(self, data: st.DataObject, how: str) -> None:
        request, x = data.draw(st.sampled_from(self.alive()))
        if how == "fork":
            self.requests.append((self.engine.fork(request, SamplingParams(5)), x))
        elif how == "cancel":
            self.engine.cancel(request)
        else:
            self.engine.scheduler.fail(request, ServingError("Stopped by the test."))

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @invariant()
    def pages_are_sound(self) -> None:
        if hasattr(self, "engine"):
            self.engine.manager.check()
            assert self.engine.contexts is not None
            self.engine.contexts.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(3000):
            if not self.engine.scheduler.busy:
                break
            self.engine.step()
        assert not self.engine.scheduler.busy, "requests starve"
        assert_empty(self.engine)
        for r, x in self.requests:
            if bool((x == BROKEN).any()):
                assert not r.output and r.finish_reason in ("error", "cancelled")
            else:
                assert r.output == alone(r.prompt, x, len(r.output))
                assert r.finish_reason != "length" or len(r.output) == r.params.max_new_tokens


def test_readers_through_random_use() -> None:
    run(Readers, 25)


@pytest.mark.slow
def test_readers_through_much_random_use() -> None:
    run(Readers, 500)
