"""``serving.generate`` through the runtime: many requests, a small cache, chunks and shared prefixes, against the model's own generation."""

from __future__ import annotations

import random

import pytest
import torch

import attnopt
from attnopt.errors import ServingError
from attnopt.runtime import SamplingParams
from attnopt.serving import ServingModel
from serving.models import (
    CONFIGS,
    PAIRS,
    example,
    hand_written,
    plain_generate,
    prompts,
    source,
    transformers_generate,
    transformers_model,
    transformers_translate,
)


def serving_model(model: torch.nn.Module, *args: torch.Tensor, **kwargs: object) -> ServingModel:
    made = attnopt.optimize(model, args, kwargs=kwargs, config=attnopt.OptimizeConfig(kv_cache="paged", verify=False))
    assert isinstance(made, ServingModel)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_ragged_requests_get_what_the_model_generates_by_itself(kind: str) -> None:
    """Whole prompts, chunks of 1 and 7, and a cache so small that requests are preempted."""
    model = transformers_model(kind)
    texts = prompts(5, 23, 1, 17)
    texts += [texts[1] + [3, 4]]
    expected = [tuple(transformers_generate(model, p, 14)) for p in texts]
    serving = serving_model(model, **example())
    small = {"pages": 10, "page_size": 4, "chunk": 7, "token_budget": 12}
    many: list[dict[str, int | bool]] = [{}, {"chunk": 1}, {"chunk": 7}, {"pages": 4, "chunk": 7}, small, {**small, "prefix_sharing": False}]
    for options in many:
        engine = serving.engine_for(texts, SamplingParams(14), **options)
        for x in (x for pair in engine.cache.tensors for x in pair):
            x.fill_(torch.nan)
        results = engine.generate(texts, SamplingParams(14))
        assert [r.error for r in results] == [None] * len(texts)
        assert [r.tokens for r in results] == expected, options
        assert engine.manager.available == engine.manager.pages
        if "page_size" in options:
            assert engine.statistics().preemptions > 0


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "t5" else pytest.mark.slow) for k in PAIRS])
def test_an_encoder_decoder_generates_what_its_own_generate_does(kind: str) -> None:
    """Alone, ragged, in chunks from a longer start, and as requests that arrive over time while pages of both kinds are few."""
    model = transformers_model(kind)
    name = "input_features" if kind == "whisper" else "input_ids"
    serving = serving_model(model, **{name: torch.cat([source(kind, 24)] * 2), "decoder_input_ids": torch.randint(3, 128, (2, 11)), "use_cache": False})
    sources = [source(kind, n) for n in (9, 40, 2, 17)]
    expected = [transformers_translate(model, x, 18) for x in sources]
    assert len({tuple(x) for x in expected}) == 4 and any(len(set(x)) > 3 for x in expected), "a model that always says the same shows nothing"
    for chunk in (1, 7, None):
        for start in (1, 9):
            results = serving.generate([x[:start] for x in expected], SamplingParams(len(expected[0]) - start), contexts=sources, chunk=chunk)
            assert [list(r.tokens) for r in results] == [x[start:] for x in expected], (chunk, start)
    alone = serving.generate([expected[1][:1]], SamplingParams(18), contexts=[(sources[1],)])
    assert list(alone[0].tokens) == expected[1][1:19]
    engine = serving.engine(pages=8, page_size=4, context_pages=2 * -(-serving.context_length(sources[1]) // 4) + 2, chunk=7, token_budget=12)
    assert engine.contexts is not None
    for x in (x for cache in (engine.cache, engine.contexts.cache) for pair in cache.tensors for x in pair):
        x.fill_(torch.nan)
    requests = []
    for i in (0, 1, 2, 3, 3, 1):
        requests.append((engine.add(expected[i][:3], SamplingParams(len(expected[i]) - 3), context=(sources[i],)), expected[i][3:]))
        engine.step()
    while engine.step():
        pass
    assert [r.output for r, _ in requests] == [x for _, x in requests]
    assert engine.statistics().preemptions > 0
    assert engine.manager.available == engine.manager.pages and engine.contexts.available == engine.contexts.cache.pages


@pytest.fixture(scope="module")
def hand_made() -> tuple[torch.nn.Module, ServingModel]:
    torch.manual_seed(0)
    model = hand_written(None)
    return model, serving_model(model, torch.randint(0, 128, (2, 12)))


@pytest.mark.parametrize(
    ("count", "chunk"),
    [(8, 7), *(pytest.param(40, chunk, marks=pytest.mark.slow) for chunk in (1, 7, None))],
    ids=["few", "40-chunk1", "40-chunk7", "40-whole"],
)
def test_requests_that_arrive_at_random_are_preempted_and_get_their_tokens(
    hand_made: tuple[torch.nn.Module, ServingModel], count: int, chunk: int | None
) -> None:
    rng = random.Random(0)
    model, serving = hand_made
    engine = serving.engine(pages=6, chunk=chunk, token_budget=48)
    left = prompts(*(rng.randint(1, 30) for _ in range(count)))
    requests = []
    while left or engine.scheduler.busy:
        for _ in range(min(len(left), rng.randint(0, 4))):
            requests.append(engine.add(left.pop(), SamplingParams(max_new_tokens=rng.randint(5, 25))))
        engine.step()
    assert engine.statistics().preemptions > 0
    for r in requests:
        assert r.output == plain_generate(model, r.prompt, r.params.max_new_tokens)


def test_generate_and_stream_make_a_cache_of_their_own_and_tell_errors_by_prompt(hand_made: tuple[torch.nn.Module, ServingModel]) -> None:
    model, serving = hand_made
    text = [5, 6, 7]
    expected = tuple(plain_generate(model, text, 6))
    good, empty, unknown, long, ends = serving.generate([text, [], [128], [1] * 64, [1] * 63], SamplingParams(6))
    assert good.tokens == expected and good.error is None
    assert [str(x.error) for x in (empty, unknown, long)] == [
        "The prompt is empty; it must have at least one token.",
        "The prompt has the token id 128; ids must be from 0 to 127.",
        "The prompt has 64 tokens, and the model has positions for at most 63.",
    ]
    assert ends.finish_reason == "capacity" and len(ends.tokens) == 1
    assert tuple(e.token for e in serving.stream([text], SamplingParams(6))) == expected
    with pytest.raises(ServingError, match="it must hold at least one"):
        serving.generate([text], size_bytes=10)
