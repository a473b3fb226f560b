"""Forty requests that arrive at random through a cache so small that they are preempted get, token for token, what the model's own ``generate`` gives each alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt.runtime import Engine, Request, SamplingParams
from attnopt.serving import ServingModel
from serving.models import (
    CONFIGS,
    PAIRS,
    example,
    hand_written,
    plain_generate,
    prompts,
    source,
    transformers_continue,
    transformers_generate,
    transformers_model,
    transformers_translate,
)

CHUNKS = (1, 7, None)
COUNT, NEW, LONGEST = 40, 12, 26
"""How many requests, the most tokens that each generates, and the longest prompt."""
Wanted = tuple[list[int], int, tuple[Tensor, ...], list[int]]
"""A prompt, how many tokens, the inputs of the other sequence if there is one, and what has to come."""


def serving_model(model: torch.nn.Module, *args: Tensor, **kwargs: object) -> ServingModel:
    made = attnopt.optimize(model, args, kwargs=kwargs, config=attnopt.OptimizeConfig(kv_cache="paged", verify=False))
    assert isinstance(made, ServingModel)
    return made


def decoder_requests(generate: Callable[[list[int], int], list[int]]) -> list[Wanted]:
    rng = random.Random(1)
    found: list[Wanted] = []
    for prompt in prompts(*(rng.randint(1, LONGEST) for _ in range(COUNT))):
        if found and rng.random() < 0.25:
            prompt = [*rng.choice(found)[0], *prompt[:3]]  # begins like another
        n = rng.randint(3, NEW)
        found.append((prompt, n, (), generate(prompt, n)))
    return found


def pair_requests(model: Any, kind: str) -> list[Wanted]:
    rng = random.Random(1)
    found: list[Wanted] = []
    sources = [source(kind, n) for n in (9, 33, 2, 17, 24, 5, 12, 28)]
    texts = [transformers_translate(model, x, 20) for x in sources]
    assert len({tuple(text) for text in texts}) > 5, "a model that always says the same shows nothing"
    for _ in range(COUNT):
        i, start, n = rng.randrange(len(sources)), rng.randint(1, 8), rng.randint(3, NEW)
        if kind == "whisper":  # its generate() takes no beginning but its own
            prompt, text = texts[i][:start], texts[i][start : start + n]
        else:
            prompt = [model.config.decoder_start_token_id, *(rng.randrange(3, 128) for _ in range(start - 1))]
            text = transformers_continue(model, sources[i], prompt, n)
        found.append((prompt, n, (sources[i],), text))
    return found


def run_arrivals(engine: Engine, wanted: list[Wanted]) -> None:
    for pair in (*engine.cache.tensors, *(engine.contexts.cache.tensors if engine.contexts else ())):
        for x in pair:
            x.fill_(torch.nan)
    rng = random.Random(2)
    left = list(wanted)
    requests: list[Request] = []
    while left or engine.scheduler.busy:
        for _ in range(min(len(left), rng.randint(0, 4))):
            prompt, n, context, _ = left.pop(0)
            requests.append(engine.add(prompt, SamplingParams(n), context=context))
        engine.step()
        engine.manager.check()
    assert [r.error for r in requests] == [None] * len(requests)
    assert [r.output for r in requests] == [text for *_, text in wanted]
    assert engine.statistics().preemptions > 0
    assert engine.manager.available == engine.manager.pages
    assert engine.contexts is None or engine.contexts.available == engine.contexts.cache.pages


@cache
def prepared(kind: str) -> tuple[ServingModel, list[Wanted]]:
    if kind == "by hand":
        model = hand_written(None)
        return serving_model(model, torch.randint(0, 128, (2, 12))), decoder_requests(lambda p, n: plain_generate(model, p, n))
    model = transformers_model(kind)
    if kind in PAIRS:
        name = "input_features" if kind == "whisper" else "input_ids"
        ids = torch.randint(3, 128, (2, 11))
        return serving_model(model, **{name: torch.cat([source(kind, 24)] * 2), "decoder_input_ids": ids, "use_cache": False}), pair_requests(model, kind)
    return serving_model(model, **example()), decoder_requests(lambda p, n: transformers_generate(model, p, n))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", CHUNKS, ids=["chunk1", "chunk7", "whole"])
@pytest.mark.parametrize("kind", [*CONFIGS, *PAIRS, "by hand"])
def test_forty_requests_that_arrive_at_random_get_what_the_model_generates_by_itself(kind: str, chunk: int | None) -> None:
    serving, wanted = prepared(kind)
    assert len({tuple(text) for *_, text in wanted}) > 10, "a model that always says the same shows nothing"
    if kind in PAIRS:
        most = max(serving.context_length(*context) for _, _, context, _ in wanted)
        engine = serving.engine(pages=9, page_size=4, context_pages=3 * -(-most // 4), chunk=chunk, token_budget=24)
    else:
        engine = serving.engine(pages=20, page_size=4, chunk=chunk, token_budget=48)
    run_arrivals(engine, wanted)
