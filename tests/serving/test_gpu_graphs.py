"""Serving models under CUDA graphs: the tokens of runs without them, and new graphs where weights or caches are elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnopt
from attnopt.runtime import DecodeGraphs, Engine, SamplingParams
from attnopt.serving import ServingModel
from serving.models import example, prompts, transformers_model

pytestmark = pytest.mark.gpu
TEXTS = prompts(5, 23, 1, 17, 40)


def serving_model(kind: str) -> ServingModel:
    model = transformers_model(kind).to("cuda")
    kwargs = {name: x.to("cuda") if isinstance(x, torch.Tensor) else x for name, x in example().items()}
    made = attnopt.optimize(model, (), kwargs=kwargs, config=attnopt.OptimizeConfig(kv_cache="paged"))
    assert isinstance(made, ServingModel)
    return made


def graphs_of(engine: Engine) -> DecodeGraphs:
    assert isinstance(engine.run, DecodeGraphs)
    return engine.run


@pytest.mark.parametrize("kind", ["llama", "bloom", "gemma2", "gpt2"])
def test_the_same_tokens_with_and_without(kind: str) -> None:
    serving = serving_model(kind)
    params = [SamplingParams(max_new_tokens=n) for n in (9, 30, 17, 25, 12)]
    plain = serving.engine(pages=64, graphs=False).generate(TEXTS, params)
    engine = serving.engine(pages=64)
    found = engine.generate(TEXTS, params)
    assert [r.error for r in plain] == [r.error for r in found] == [None] * len(TEXTS)
    assert [r.tokens for r in found] == [r.tokens for r in plain]
    graphs = graphs_of(engine)
    assert graphs.reason is None and graphs.replays > graphs.recorded > 1
    before = graphs.recorded
    assert [r.tokens for r in engine.generate(TEXTS, params)] == [r.tokens for r in plain]
    assert graphs.recorded == before, "the same steps need no new graphs"


def test_new_weights_are_seen() -> None:
    serving = serving_model("llama")
    params = SamplingParams(max_new_tokens=12)
    engine = serving.engine(pages=64, prefix_sharing=False)
    graphs = graphs_of(engine)
    first = [r.tokens for r in engine.generate(TEXTS, params)]
    made = graphs.recorded
    head = next(m for name, m in serving.named_modules() if name.endswith("lm_head"))
    old = head.weight
    head.weight = nn.Parameter(torch.randn_like(old), requires_grad=False)
    other = [r.tokens for r in engine.generate(TEXTS, params)]
    assert graphs.recorded > made and other != first
    assert other == [r.tokens for r in serving.engine(pages=64, graphs=False).generate(TEXTS, params)]
    made = graphs.recorded
    with torch.no_grad():
        head.weight.copy_(old)  # at the same place: no new graph, and the new numbers
    assert [r.tokens for r in engine.generate(TEXTS, params)] == first
    assert graphs.recorded == made


def test_two_engines_do_not_share_caches() -> None:
    serving = serving_model("llama")
    params = SamplingParams(max_new_tokens=12)
    want = [r.tokens for r in serving.engine(pages=64, graphs=False).generate(TEXTS, params)]
    engines = [serving.engine(pages=64) for _ in range(2)]
    for engine in engines:
        for text in TEXTS:
            engine.add(text, params)
    requests = [[*engine.scheduler.waiting] for engine in engines]
    while any(engine.scheduler.busy for engine in engines):
        for engine in engines:
            engine.step()
    assert [[tuple(r.output) for r in mine] for mine in requests] == [want, want]
    assert all(graphs_of(engine).replays > 0 for engine in engines)
