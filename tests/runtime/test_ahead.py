"""A step that is launched before the tokens of the one before it are read: when, and what becomes of it where they turn out otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.errors import ServingError
from attnopt.runtime import Engine, SamplingParams
from attnopt.runtime.sampling import Chosen
from runtime.toy import alone, expected, make_engine

TEXT = [3, 1, 4, 1, 5]
PARAMS = SamplingParams(max_new_tokens=6)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What an engine does, in order."""
    found: list[str] = []
    read = Chosen.read

    def noted(self: Chosen) -> list[int | None]:
        found.append("read")
        return read(self)

    monkeypatch.setattr(Chosen, "read", noted)
    return found


def logged(engine: Engine, log: list[str]) -> Engine:
    run = engine.run

    def noted(*inputs: Tensor) -> Tensor:
        log.append(f"run {len(inputs[0])}")
        return run(*inputs)  # type: ignore[call-arg]

    engine.run = noted  # type: ignore[assignment]
    return engine


def finish(engine: Engine) -> None:
    while engine.step() is not None:
        engine.manager.check()
    assert engine.manager.available == engine.manager.pages


def test_a_step_is_launched_before_the_tokens_of_the_one_before_are_read(log: list[str]) -> None:
    engine = logged(make_engine(run_ahead=True), log)
    requests = [engine.add(text, SamplingParams(max_new_tokens=n)) for text, n in ((TEXT, 2), ([9, 2, 6], 3))]
    finish(engine)
    # the last one has nobody to run for behind it
    assert log == ["run 8", "run 2", "read", "run 1", "read", "read"]
    assert [r.output for r in requests] == [expected(r) for r in requests]


def test_what_waits_is_not_passed_by(log: list[str]) -> None:
    engine = logged(make_engine(run_ahead=True, max_requests=1), log)
    requests = [engine.add(TEXT, SamplingParams(max_new_tokens=2)) for _ in range(2)]
    finish(engine)
    assert log[:4] == ["run 5", "read", "run 1", "read"]
    assert [r.output for r in requests] == [expected(r) for r in requests]


def test_a_request_that_ends_meanwhile(log: list[str]) -> None:
    """The step in flight computes one token more of it, which nobody is told of; alone, it is called back."""
    whole = alone(tuple(TEXT), PARAMS)
    stops = SamplingParams(max_new_tokens=6, stop_tokens=(whole[1],))
    for texts in ([TEXT], [TEXT, [2, 7]]):
        engine = logged(make_engine(run_ahead=True), log)
        requests = [engine.add(text, stops if text is TEXT else PARAMS) for text in texts]
        told = []
        while (changed := engine.step()) is not None:
            told += changed
        assert requests[0].output == list(whole[: whole.index(whole[1]) + 1]) and requests[0].finish_reason == "stop"
        assert all(told.count(r) == len(r.output) for r in requests)
        assert engine.statistics().generated == len(told) and engine.statistics().finished == len(requests)
        assert engine.manager.available == engine.manager.pages


def test_cancelled_while_in_flight() -> None:
    engine = make_engine(run_ahead=True)
    request, other = engine.add(TEXT, PARAMS), engine.add([2, 7], PARAMS)
    engine.step()
    engine.cancel(request)
    assert engine.step() == [other]
    engine.cancel(other)
    assert engine.step() is None
    again = engine.add(TEXT, PARAMS)
    finish(engine)
    assert again.output == expected(again)


def test_a_fork_calls_it_back() -> None:
    """Both go on from what is known, and the page of the token in flight is free again."""
    for length in range(1, 9):
        engine = make_engine(run_ahead=True)
        request = engine.add(list(range(length)), PARAMS)
        engine.step()
        child = engine.fork(request, SamplingParams(max_new_tokens=5, temperature=1.0, seed=3))
        engine.manager.check()
        finish(engine)
        assert request.output == expected(request) and child.output == expected(child)


def test_a_model_that_raises_in_flight_is_asked_again() -> None:
    """It is told of when the tokens are known, and to the request alone."""
    engine = make_engine(run_ahead=True)
    run = engine.run
    raised = 0

    def fragile(*inputs: Tensor) -> Tensor:
        nonlocal raised
        if bool((inputs[1] == len(TEXT)).any()):
            raised += 1
            raise RuntimeError("out of order")
        return run(*inputs)  # type: ignore[call-arg]

    engine.run = fragile  # type: ignore[assignment]
    bad, good = engine.add(TEXT, PARAMS), engine.add([2, 7], SamplingParams(max_new_tokens=3))
    finish(engine)
    assert bad.error is not None and "out of order" in str(bad.error) and bad.output == expected(bad)[:1]
    assert good.error is None and good.output == expected(good)
    assert raised == 3, "in flight, with the other, and alone"


def test_an_interrupt_while_one_is_in_flight() -> None:
    engine, stop = make_engine(run_ahead=True), [False]
    run = engine.run

    def interrupted(*inputs: Tensor) -> Tensor:
        if stop[0]:
            raise KeyboardInterrupt
        return run(*inputs)  # type: ignore[call-arg]

    engine.run = interrupted  # type: ignore[assignment]
    request = engine.add(TEXT, PARAMS)
    engine.step()
    stop[0] = True
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    stop[0] = False
    engine.manager.check()
    finish(engine)
    assert request.output == expected(request) and request.preemptions == 1


def test_only_what_was_scheduled_last_is_taken_back() -> None:
    engine = make_engine(run_ahead=False)
    engine.add(TEXT, PARAMS)
    step = engine.scheduler.schedule()
    assert step is not None
    following = engine.scheduler.schedule_next(step, torch.tensor([1]))
    assert following is not None and following.positions.tolist() == [5] and following.seqlens_k.tolist() == [6]
    with pytest.raises(ServingError, match="not the one that was scheduled last"):
        engine.scheduler.retract(step)
    with pytest.raises(ServingError, match="not the oldest"):
        engine.scheduler.complete(following, [1])
    engine.scheduler.retract(following)
    engine.scheduler.complete(step, [1])
    assert engine.manager.length(0) == 5
