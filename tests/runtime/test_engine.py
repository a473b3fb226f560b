"""Whole generation through scheduler, pages and sampling: each request gets the tokens that it would have got alone."""

from __future__ import annotations

import io
import random

import pytest
import torch
from rich.console import Console

from attnopt.errors import ServingError
from attnopt.runtime import Engine, PagedCache, SamplingParams
from attnopt.runtime.progress import ProgressBar
from runtime import toy
from runtime.toy import VOCABULARY, Toy, alone, expected, make_engine


@pytest.fixture(autouse=True, params=[False, True], ids=["in_turn", "ahead"])
def run_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "RUN_AHEAD", request.param)


SAMPLED = SamplingParams(max_new_tokens=9, temperature=0.8, top_k=11, top_p=0.9, seed=5)


def prompts(count: int, longest: int = 30, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def assert_empty(engine: Engine) -> None:
    engine.manager.check()
    assert engine.manager.available == engine.manager.pages


def test_the_toy_reads_every_key() -> None:
    """Otherwise the tests with it would prove little: each token of the prompt, and the order of any two neighbours, changes the result."""
    text = [3, 1, 4, 15, 9, 2, 6, 5, 3, 5]
    from runtime.toy import whole

    base = whole(text, None)
    for i in range(len(text)):
        assert not torch.allclose(whole([*text[:i], text[i] + 1, *text[i + 1 :]], None), base, atol=1e-4)
    for i in range(len(text) - 1):
        assert not torch.allclose(whole([*text[:i], text[i + 1], text[i], *text[i + 2 :]], None), base, atol=1e-4)


@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "no-sharing"])
@pytest.mark.parametrize("chunk", [1, 7, None], ids=["chunk1", "chunk7", "whole"])
@pytest.mark.parametrize("window", [None, 6], ids=["full", "window6"])
@pytest.mark.parametrize("params", [SamplingParams(max_new_tokens=9), SAMPLED], ids=["greedy", "sampled"])
def test_each_request_gets_the_tokens_it_would_have_got_alone(sharing: bool, chunk: int | None, window: int | None, params: SamplingParams) -> None:
    texts = prompts(8)
    texts.append(texts[0] + [1, 2])
    engine = make_engine(window=window, prefix_sharing=sharing, chunk=chunk, token_budget=40)
    results = engine.generate(texts, params)
    assert [r.tokens for r in results] == [alone(tuple(t), params, params.seed or 0, window) for t in texts]
    assert {r.finish_reason for r in results} == {"length"}
    assert_empty(engine)


@pytest.mark.parametrize("chunk", [1, 7, None], ids=["chunk1", "chunk7", "whole"])
def test_forty_requests_that_arrive_at_random_through_a_small_cache(chunk: int | None) -> None:
    """Preemption is forced: the cache holds two of the longest requests."""
    rng = random.Random(1)
    engine = make_engine(pages=18, chunk=chunk, token_budget=24)
    waiting = [(t, SamplingParams(max_new_tokens=rng.randint(1, 12), temperature=rng.choice([0.0, 1.0]))) for t in prompts(40, 40)]
    requests = []
    while waiting or engine.scheduler.busy:
        for _ in range(min(len(waiting), rng.randint(0, 4))):
            requests.append(engine.add(*waiting.pop()))
        engine.step()
        engine.manager.check()
    assert engine.statistics().preemptions > 0
    assert [r.output for r in requests] == [expected(r) for r in requests]
    assert_empty(engine)


def test_the_budget_of_tokens_is_kept() -> None:
    engine = make_engine(token_budget=10, chunk=7)
    engine.generate(prompts(6), SamplingParams(max_new_tokens=5))
    assert isinstance(engine.run, Toy) and engine.run.most_tokens == 10


def test_context_and_generation_run_in_one_step() -> None:
    engine = make_engine(token_budget=8, run_ahead=False)
    first = engine.add([1, 2, 3], SamplingParams(max_new_tokens=8))
    engine.step()
    engine.add(list(range(20)), SamplingParams(max_new_tokens=2))
    step = engine.scheduler.schedule()
    assert step is not None and step.requests[0] is first and step.counts == (1, 7)
    assert step.cu_seqlens_q.tolist() == [0, 1, 8] and step.seqlens_k.tolist() == [4, 7]
    assert step.rows.tolist() == [0] and step.sampled == (first,)


def test_a_long_prompt_does_not_stop_those_that_generate() -> None:
    engine = make_engine(token_budget=4)
    old = engine.add(list(range(20)), SamplingParams(max_new_tokens=2))
    engine.step()
    young = engine.add([1], SamplingParams(max_new_tokens=3))
    while old.state != "finished":
        engine.step()
    assert old.output == expected(old)
    while engine.step() is not None:
        pass
    assert young.output == expected(young)


def test_one_running_at_a_time_is_first_come_first_served() -> None:
    engine = make_engine(max_requests=1)
    requests = [engine.add(p, SamplingParams(max_new_tokens=2)) for p in prompts(5)]
    ended = []
    while engine.scheduler.busy:
        ended += [r for r in engine.step() if r.state == "finished"]
    assert ended == requests


# ---------------------------------------------------------------------------------------------------- sharing


def test_a_prefix_of_1000_tokens_of_32_requests_is_stored_once() -> None:
    """62 pages of 16 are full of the prefix. Its last 8 tokens stand in a page with each request's own."""
    prefix = [i * 7 % VOCABULARY for i in range(1000)]
    engine = make_engine(pages=200, page_size=16, token_budget=600)
    requests = [engine.add([*prefix, r % VOCABULARY, r // 2], SamplingParams(max_new_tokens=3)) for r in range(32)]
    while any(r.state == "waiting" or r.remaining > 1 for r in requests):
        assert engine.step() is not None
    tables = [engine.manager.table(r.id) for r in requests if r.state == "running"]
    assert len(tables) == 32 and len({tuple(t[:62]) for t in tables}) == 1
    assert engine.manager.usage().held == 62 + 32
    while engine.step() is not None:
        pass
    assert [r.output for r in requests[::8]] == [expected(r) for r in requests[::8]]
    assert [r.shared for r in requests] == [0] + [992] * 31
    assert engine.statistics().prefix_hits == pytest.approx(31 * 992 / (32 * 1002))
    assert_empty(engine)


def test_a_freed_prefix_is_found_until_it_is_evicted() -> None:
    engine = make_engine(pages=8)
    text = list(range(12))
    params = SamplingParams(max_new_tokens=1)
    assert [engine.generate([text], params)[0].shared for _ in range(2)] == [0, 8]
    engine.generate([[5] * 29], params)
    assert engine.manager.evictions > 0
    (result,) = engine.generate([text], params)
    assert result.shared == 0 and result.tokens == alone(tuple(text), params)


def test_a_salt_keeps_prefixes_apart() -> None:
    engine = make_engine()
    for salt, shared in ((b"a", 0), (b"b", 0), (b"a", 8)):
        request = engine.add(list(range(11)), SamplingParams(max_new_tokens=1), salt)
        engine.step()
        assert request.shared == shared


def test_forks_share_pages_until_they_write() -> None:
    engine = make_engine()
    parent = engine.add(list(range(10)), SamplingParams(max_new_tokens=12))
    for _ in range(2):
        engine.step()
    held = engine.manager.usage().held
    children = [engine.fork(parent, SamplingParams(max_new_tokens=6, temperature=1.5, seed=s)) for s in range(3)]
    assert engine.manager.usage().held == held
    step = engine.scheduler.schedule()
    assert step is not None and len(step.copies) == 3, "the last of four holders writes in place"
    engine.scheduler.abandon(step)
    while engine.step() is not None:
        engine.manager.check()
    for request in (parent, *children):
        assert request.output == expected(request)
    assert len({tuple(c.output) for c in children}) > 1
    assert_empty(engine)


# ---------------------------------------------------------------------------------------------------- ends and errors


def test_stop_tokens_end_a_request_with_the_token() -> None:
    text = (1, 2, 3)
    free = alone(text, SamplingParams(max_new_tokens=20))
    stop = free[4]
    (result,) = make_engine().generate([text], SamplingParams(max_new_tokens=20, stop_tokens=(stop,)))
    assert result.tokens == free[: free.index(stop) + 1] and result.finish_reason == "stop"


def test_a_request_ends_where_the_cache_can_hold_no_more() -> None:
    engine = make_engine(pages=3)
    (result,) = engine.generate([list(range(10))], SamplingParams(max_new_tokens=50))
    assert result.finish_reason == "capacity" and result.tokens == alone(tuple(range(10)), SamplingParams(max_new_tokens=3))


def test_a_request_ends_where_the_model_has_no_more_positions() -> None:
    engine = make_engine(max_positions=8)
    full, long = engine.generate([[1] * 8, [1] * 9], SamplingParams(max_new_tokens=50))
    assert full.finish_reason == "capacity" and len(full.tokens) == 1
    assert str(long.error) == "The prompt has 9 tokens, and the model has positions for at most 8."


def test_a_window_lets_a_request_grow_past_the_cache() -> None:
    engine = make_engine(pages=5, window=6, chunk=4)
    params = SamplingParams(max_new_tokens=30)
    (result,) = engine.generate([list(range(25))], params)
    assert result.tokens == alone(tuple(range(25)), params, window=6)
    assert engine.statistics().peak_pages <= 4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "The prompt is empty; it must have at least one token."),
        ([1, VOCABULARY], f"The prompt has the token id {VOCABULARY}; ids must be from 0 to {VOCABULARY - 1}."),
        ([-1], f"The prompt has the token id -1; ids must be from 0 to {VOCABULARY - 1}."),
        ([0] * 257, "The prompt has 257 tokens, and the cache of 64 pages of 4 can hold at most 256."),
        ([0.5], "The prompt is no sequence of token ids: 'float' object cannot be interpreted as an integer."),
        ("text", "The prompt is no sequence of token ids: 'str' object cannot be interpreted as an integer."),
    ],
    ids=["empty", "unknown-id", "negative-id", "too-long", "float", "string"],
)
def test_a_bad_prompt_is_an_error_of_its_own(prompt: list[int], message: str) -> None:
    engine = make_engine()
    good = [[1, 2, 3], [4, 5]]
    params = SamplingParams(max_new_tokens=4)
    results = engine.generate([good[0], prompt, good[1]], params)
    assert isinstance(results[1].error, ServingError) and str(results[1].error) == message and results[1].finish_reason == "error"
    assert [results[0].tokens, results[2].tokens] == [alone(tuple(t), params) for t in good]
    assert results[0].error is None
    assert_empty(engine)


@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_a_request_on_which_the_model_fails_takes_no_other_down(kind: str) -> None:
    engine = make_engine(token_budget=30)
    toy = engine.run
    poisonous = 28

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        logits = toy(*inputs)  # type: ignore[call-arg]
        if poisonous in inputs[0].tolist():
            if kind == "raises":
                raise RuntimeError("expert 3 is on fire")
            owners = torch.searchsorted(inputs[4].long(), (inputs[0] == poisonous).nonzero().flatten(), right=True) - 1
            logits[(torch.searchsorted(inputs[4].long(), inputs[6], right=True) - 1)[:, None].eq(owners).any(-1)] = torch.nan
        return logits

    engine.run = run  # type: ignore[assignment]
    texts = [[1, 2, 3], [5, 28], [8, 9]]
    params = SamplingParams(max_new_tokens=3)
    results = engine.generate(texts, params)
    assert "expert 3 is on fire" in str(results[1].error) if kind == "raises" else "NaN" in str(results[1].error)
    for i in (0, 2):
        assert poisonous not in alone(tuple(texts[i]), params), "choose other prompts"
        assert results[i].tokens == alone(tuple(texts[i]), params)
    assert_empty(engine)


@pytest.mark.parametrize("kind", ["raises", "nan"])
def test_a_retry_does_not_begin_with_the_pages_of_a_request_that_failed(kind: str) -> None:
    """A fault that passes: once, the model leaves NaN in all that it writes. What it wrote before is given up too."""
    engine = make_engine(chunk=5, token_budget=5)
    toy, text, calls = engine.run, list(range(14)), 0

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = toy(*inputs)  # type: ignore[call-arg]
        if calls == 2:
            for pair in engine.cache.tensors:
                for x in pair:
                    x.flatten(0, 1)[inputs[2]] = torch.nan
        if calls == 3 and kind == "raises":
            raise RuntimeError("overheated")
        return logits

    engine.run = run  # type: ignore[assignment]
    params = SamplingParams(max_new_tokens=3)
    failed, again = (engine.generate([text], params)[0] for _ in range(2))
    assert failed.error is not None
    assert (again.error, again.shared, again.tokens) == (None, 0, alone(tuple(text), params))
    assert_empty(engine)


def test_those_who_share_pages_with_a_request_that_failed_keep_them() -> None:
    engine = make_engine()
    parent = engine.add(list(range(10)), SamplingParams(max_new_tokens=6))
    engine.step()
    child = engine.fork(parent)
    engine.scheduler.fail(parent, ServingError("Stopped by the test."))
    engine.manager.check()
    while engine.step() is not None:
        engine.manager.check()
    assert child.output == expected(child)
    assert_empty(engine)


def test_an_interrupt_leaves_requests_that_go_on() -> None:
    engine = make_engine()
    request = engine.add(list(range(9)), SamplingParams(max_new_tokens=5))
    engine.step()
    toy = engine.run

    def interrupted(*inputs: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    engine.run = interrupted  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.run = toy
    while engine.step() is not None:
        pass
    assert request.output == expected(request)


def test_cancelled_requests_give_back_their_pages() -> None:
    engine = make_engine()
    requests = [engine.add(p, SamplingParams(max_new_tokens=20)) for p in prompts(4)]
    for _ in range(4):
        engine.step()
    engine.cancel(requests[1])
    engine.cancel(requests[1])
    assert requests[1].finish_reason == "cancelled"
    while engine.step() is not None:
        pass
    for r in requests:
        assert r.output == expected(r)[: len(r.output)]
        assert len(r.output) == (4 if r is requests[1] else 20)
    assert_empty(engine)


def test_logits_of_another_shape_are_one_clear_error() -> None:
    engine = make_engine()
    engine.run = lambda *inputs: torch.zeros(5, 7)  # type: ignore[assignment]
    (result,) = engine.generate([[1]])
    assert "The model gave logits (5, 7) where 1 rows [N, vocabulary] were wanted." in str(result.error)


# ---------------------------------------------------------------------------------------------------- streams and statistics


def test_a_stream_gives_tokens_as_they_come_and_the_end_of_each() -> None:
    texts = [[1, 2, 3], [], [4] * 9]
    params = SamplingParams(max_new_tokens=4)
    events = list(make_engine().stream(texts, params))
    for i in (0, 2):
        mine = [e for e in events if e.index == i]
        assert tuple(e.token for e in mine) == alone(tuple(texts[i]), params)
        assert [e.finish_reason for e in mine] == [None] * 3 + ["length"]
    assert [e.finish_reason for e in events if e.index == 1] == ["error"]


def test_closing_a_stream_cancels_the_rest() -> None:
    engine = make_engine()
    stream = engine.stream([[1, 2, 3], [4]], SamplingParams(max_new_tokens=40))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not engine.scheduler.busy
    assert_empty(engine)


def test_a_stream_tells_of_requests_that_were_cancelled() -> None:
    engine = make_engine()
    events = []
    for event in engine.stream([[1, 2, 3], [4]], SamplingParams(max_new_tokens=5)):
        events.append(event)
        if len(events) == 2:
            engine.cancel(engine.scheduler.running[0])
    assert [e.finish_reason for e in events if e.index == 0] == [None, "cancelled"]
    assert [e.token for e in events if e.index == 1] == list(alone((4,), SamplingParams(max_new_tokens=5)))


def test_a_stream_tells_each_token_of_a_request_that_is_cancelled_in_the_middle_of_a_step() -> None:
    engine = make_engine()
    events, cancelled = [], None
    for event in engine.stream([[1, 2, 3], [4]], SamplingParams(max_new_tokens=5)):
        events.append(event)
        if cancelled is None:
            cancelled = engine.scheduler.running[1]
            engine.cancel(cancelled)
    assert cancelled is not None and len(cancelled.output) == 1
    assert [(e.token, e.finish_reason) for e in events if e.index == 1] == [(cancelled.output[0], None), (None, "cancelled")]
    assert [e.token for e in events if e.index == 0] == list(alone((1, 2, 3), SamplingParams(max_new_tokens=5)))


def test_statistics_and_the_bar_say_what_happened() -> None:
    engine = make_engine()
    engine.generate([[1, 2, 3, 4], [5] * 6], SamplingParams(max_new_tokens=3))
    s = engine.statistics()
    assert (s.generated, s.computed, s.finished, s.running, s.waiting) == (6, 10 + 2 * 2, 2, 0, 0)
    assert s.steps == 3 and s.tokens_per_second > 0 and s.peak_pages == 4
    # steps hold 4 + 6, 5 + 7 and 6 + 8 tokens in 3, 4 and 4 pages of 4
    assert s.mean_waste == pytest.approx(1 - 36 / 44)
    assert s.mean_padded_waste == pytest.approx(1 - 36 / (2 * (6 + 7 + 8)))
    assert s.mean_reserved_waste == pytest.approx(1 - 36 / (3 * 2 * 9))
    out = io.StringIO()
    with ProgressBar(6, Console(file=out, width=200, force_terminal=True)) as bar:
        bar.update(3, s)
    assert "50%" in out.getvalue() and "2 finished" not in out.getvalue() and "tokens/s" in out.getvalue()


def test_progress_changes_no_result() -> None:
    params = SamplingParams(max_new_tokens=3)
    assert make_engine().generate([[1, 2]], params, progress=True)[0].tokens == alone((1, 2), params)


def test_sampling_rules_are_one_for_all_or_one_for_each() -> None:
    with pytest.raises(ServingError, match="There are 2 prompts and 1 sampling parameters; give one for all, or one for each."):
        make_engine().generate([[1], [2]], [SamplingParams()])


def test_an_engine_says_what_options_it_supports() -> None:
    cache = PagedCache([make_layer()], 4, 4)
    with pytest.raises(ServingError, match="token_budget is 0; it must be at least 1."):
        Engine(Toy(cache), cache, token_budget=0)


def make_layer() -> object:
    from attnopt.runtime import LayerShape

    return LayerShape(1, 2, 2)
