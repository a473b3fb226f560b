"""A contiguous cache: one page for each request, as long as a request may become. The same pass, and the same tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnopt
from attnopt.errors import ServingError
from attnopt.runtime import SamplingParams
from attnopt.serving import ServingModel
from serving.models import example, plain_generate, prompts, transformers_generate, transformers_model

CONTIGUOUS = attnopt.OptimizeConfig(kv_cache="contiguous")
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def serving(original: nn.Module) -> ServingModel:
    made = attnopt.optimize(original, IDS, config=CONTIGUOUS)
    assert isinstance(made, ServingModel)
    return made


def test_each_request_has_one_page_and_gets_the_tokens_of_the_model_alone(original: nn.Module, serving: ServingModel) -> None:
    assert serving.plan.layout == "contiguous" and serving.attnopt_report.verdict.passed
    assert all("contiguous cache" in r.message for s in serving.attnopt_report.sites for r in s.remarks if r.code == "AO104")
    texts = prompts(4, 9, 1, 30)
    engine = serving.engine(pages=2, chunk=7)
    assert engine.cache.page_size == serving.max_positions
    for pair in engine.cache.tensors:
        for x in pair:
            x.fill_(torch.nan)
    tables = []
    run = engine.run
    engine.run = lambda *inputs: tables.append(inputs[3].shape[1]) or run(*inputs)  # type: ignore[func-returns-value]
    results = engine.generate(texts, SamplingParams(14))
    assert [list(r.tokens) for r in results] == [plain_generate(original, p, 14) for p in texts]
    assert set(tables) == {1}, "a request had more than one page"
    assert engine.statistics().peak_pages == 2 and engine.statistics().preemptions == 0


def test_a_window_keeps_the_whole_request() -> None:
    """Pages behind a window are given back in a paged cache; here the only page is never dead."""
    model = transformers_model("mistral")
    made = attnopt.optimize(model, (), kwargs=example(), config=CONTIGUOUS)
    assert any(x.window for x in made.layers)
    texts = prompts(5, 23)
    assert [list(r.tokens) for r in made.generate(texts, SamplingParams(14))] == [transformers_generate(model, p, 14) for p in texts]


def test_a_prompt_longer_than_its_page_is_told(original: nn.Module, serving: ServingModel) -> None:
    good, long = serving.generate([[1, 2, 3], [1] * 9], SamplingParams(3), page_size=8)
    assert list(good.tokens) == plain_generate(original, [1, 2, 3], 3)
    assert str(long.error) == "The prompt has 9 tokens, and the page of 8 that each request has can hold at most 8."
    (ends,) = serving.generate([[1] * 7], SamplingParams(9), page_size=8)
    assert ends.finish_reason == "capacity" and len(ends.tokens) == 2


def test_without_positions_the_length_must_be_said() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.tokens(ids)[:, None]
            return self.head(torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0])

    made = attnopt.optimize(Called().eval(), IDS % 32, config=CONTIGUOUS)
    assert made.max_positions is None
    with pytest.raises(ServingError, match="a contiguous cache needs page_size, in tokens"):
        made.engine(pages=2)
    assert made.engine(pages=2, page_size=32).cache.page_size == 32
    assert len(made.generate([[1, 2, 3]], SamplingParams(4))[0].tokens) == 4
