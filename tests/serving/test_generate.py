"""Greedy generation from the paged cache is, token for token, what the model generates by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt.serving import ServingModel
from serving.greedy import generate
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

CHUNKS = (1, 7, 1000)
NEW = 14
IN_CI = {"llama", "bloom", "gpt_oss"}
"""A rotary embedding and groups; ALiBi; a window, sinks and experts. The others are slow for their number alone, as are encoder-decoders."""


def serving_model(model: torch.nn.Module, *args: Tensor, **kwargs: object) -> ServingModel:
    made = attnopt.optimize(model, args, kwargs=kwargs, config=attnopt.OptimizeConfig(kv_cache="paged", verify=False))
    assert isinstance(made, ServingModel)
    return made


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in IN_CI else pytest.mark.slow) for k in CONFIGS])
def test_a_model_of_transformers_generates_what_its_own_generate_does(kind: str) -> None:
    model = transformers_model(kind)
    texts = prompts(5, 23, 1, 17)
    expected = [transformers_generate(model, p, NEW) for p in texts]
    assert len({tuple(x) for x in expected}) > 1 and any(len(set(x)) > 3 for x in expected), "a model that always says the same shows nothing"
    serving = serving_model(model, **example())
    if "kv_lora_rank" in CONFIGS[kind]:
        assert [(x.Hkv, x.D, x.Dv) for x in serving.layers] == [(1, 40, 0)] * 2, "latents are cached"
    for chunk in CHUNKS:
        assert generate(serving, texts, NEW, chunk) == expected, f"chunks of {chunk}"
    assert generate(serving, texts[1:2], NEW, 7) == expected[1:2], "alone"


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(PAIRS))
def test_an_encoder_decoder_generates_what_its_own_generate_does(kind: str) -> None:
    model = transformers_model(kind)
    sources = [source(kind, n) for n in (9, 40, 2)]
    expected = [transformers_translate(model, x, NEW) for x in sources]
    assert len({tuple(x) for x in expected}) == 3 and any(len(set(x)) > 3 for x in expected), "a model that always says the same shows nothing"
    name = "input_features" if kind == "whisper" else "input_ids"
    serving = serving_model(model, **{name: torch.cat([source(kind, 24)] * 2), "decoder_input_ids": torch.randint(3, 128, (2, 11)), "use_cache": False})
    assert serving.plan.context == (name,)
    contexts = [serving.encode(x) for x in sources]
    start = [x[:1] for x in expected]
    for chunk in CHUNKS:
        assert generate(serving, start, NEW, chunk, contexts) == [x[1:] for x in expected], f"chunks of {chunk}"
    assert generate(serving, [x[:6] for x in expected], NEW - 5, 4, contexts) == [x[6:] for x in expected], "from a longer start"


@pytest.mark.parametrize(
    "last",
    [pytest.param(None, id="all"), pytest.param(lambda x: x[:, [-1], :], id="list"), pytest.param(lambda x: x[:, -1:], id="slice"), pytest.param(lambda x: x[:, -1], id="select")],
)
def test_a_hand_written_model_generates_what_it_does_without_a_cache(last: Callable[[Tensor], Tensor] | None) -> None:
    model = hand_written(last)
    texts = prompts(4, 9, 1)
    expected = [plain_generate(model, p, NEW) for p in texts]
    serving = serving_model(model, torch.randint(0, 128, (2, 12)))
    assert serving.max_positions == 63, "the slice of a triangle of 64 is captured for less than the whole of it"
    for chunk in CHUNKS:
        assert generate(serving, texts, NEW, chunk) == expected, f"chunks of {chunk}"
