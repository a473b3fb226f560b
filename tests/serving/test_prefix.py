"""A model whose first tokens see each other: those are computed in one step, whatever chunks are asked for, and no request begins with fewer."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.errors import ServingError
from attnopt.runtime import SamplingParams
from attnopt.serving import ServingModel
from serving.models import VOCABULARY, HandWritten, plain_generate, prompts, sharpened

PREFIX = 9
IDS = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
PAGED = attnopt.OptimizeConfig(kv_cache="paged")


class Prefixed(HandWritten):
    """A query sees the keys up to its own place, and those that ``also(k, q)`` names."""

    def __init__(self, also: Any = lambda k, q: k < PREFIX) -> None:
        super().__init__(longest=80)
        self.also = also

    def forward(self, ids: Tensor) -> Tensor:
        i = torch.arange(ids.shape[1])
        x = self.tokens(ids) + self.places(i)
        seen = (i <= i[:, None]) | self.also(i, i[:, None])
        for block in self.blocks:
            q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in block.qkv(block.norm_1(x)).chunk(3, -1))
            x = x + block.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm_2(x))
        return self.head(self.norm(x))


def model(*args: Any) -> nn.Module:
    torch.manual_seed(0)
    return sharpened(Prefixed(*args).eval())


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return model()


@pytest.fixture(scope="module")
def serving(original: nn.Module) -> ServingModel:
    made = attnopt.optimize(original, IDS, config=PAGED)
    assert isinstance(made, ServingModel)
    return made


def test_it_is_verified_in_chunks_that_begin_with_the_prefix(serving: ServingModel) -> None:
    assert serving.plan.prefix == PREFIX and serving.attnopt_report.verdict.passed
    assert [c.name for c in serving.attnopt_report.verdict.checks] == [
        f"packed requests of 13, 31, 9, 25, 13 tokens, {how}" for how in ("chunks of 1", "chunks of 7", "whole")
    ]


def test_chunks_within_the_prefix_would_change_the_result(serving: ServingModel, original: nn.Module) -> None:
    """What the refusal is for: the same tokens in two calls give other logits."""
    caches, at, table = serving.new_caches(1, 16), torch.arange(12), torch.zeros(1, 1, dtype=torch.int32)
    for first, last in ((0, 5), (5, 12)):
        part = at[first:last]
        out = serving.run(IDS[0, first:last], part, part, table, torch.tensor([0, last - first]).int(), torch.tensor([last]).int(), caches)
    assert not torch.allclose(out[-1], original(IDS[:1, :12])[0, -1], atol=1e-2)


@pytest.mark.parametrize(
    "options", [{}, {"chunk": PREFIX}, {"chunk": 12, "token_budget": 14, "pages": 14, "page_size": 4}], ids=["whole", "chunks", "few-pages"]
)
def test_requests_that_arrive_at_random_get_their_tokens(serving: ServingModel, original: nn.Module, options: dict[str, int]) -> None:
    rng = random.Random(0)
    texts = prompts(*(rng.randint(PREFIX, 30) for _ in range(7)))
    texts += [texts[0] + [5, 6], texts[0][: PREFIX + 1], [*texts[1][: PREFIX - 1], 3, *texts[1][PREFIX:]]]
    engine = serving.engine(**{"pages": 60, **options})
    left, requests = list(texts), []
    while left or engine.scheduler.busy:
        for _ in range(min(len(left), rng.randint(0, 2))):
            requests.append(engine.add(left.pop(0), SamplingParams(8)))
        engine.step()
        engine.manager.check()
    assert [r.output for r in requests] == [plain_generate(original, t, 8) for t in texts]
    assert (engine.statistics().preemptions > 0) == ("page_size" in options)


def test_pages_are_shared_only_by_requests_with_the_whole_prefix_in_common(serving: ServingModel, original: nn.Module) -> None:
    """Pages of 4 tokens: the first two end within the prefix, whose last token changes what is kept of them."""
    engine = serving.engine(pages=40, page_size=4)
    text = prompts(20)[0]
    other = [*text[: PREFIX - 1], (text[PREFIX - 1] + 1) % VOCABULARY, *text[PREFIX:]]
    shared = []
    for t in (text, text, other):
        (result,) = engine.generate([t], SamplingParams(4))
        shared.append(result.shared)
        assert list(result.tokens) == plain_generate(original, t, 4)
    assert shared == [0, 16, 0]


def test_chunks_and_prompts_that_are_too_short_are_refused(serving: ServingModel) -> None:
    with pytest.raises(
        ServingError, match=r"The first 9 tokens of a request see each other, so that one step computes them all, and steps take 7 .*; supported are 9 or more"
    ):
        serving.engine(pages=8, chunk=7)
    short, good = serving.generate([[1] * 8, [1] * 9], SamplingParams(2))
    assert "The prompt has 8 tokens, and the first 9 of the model see each other" in str(short.error)
    assert good.error is None and len(good.tokens) == 2


@pytest.mark.parametrize(
    "also",
    [
        pytest.param(lambda k, q: k <= q + 2, id="a-window-to-the-right"),
        pytest.param(lambda k, q: k // 4 == q // 4, id="chunks-that-see-all-of-themselves"),
        pytest.param(lambda k, q: (k < PREFIX) | (k % 5 == 0), id="every-fifth-key"),
        pytest.param(lambda k, q: k >= PREFIX, id="later-keys"),
    ],
)
def test_other_masks_that_look_past_the_query_are_refused(also: Any) -> None:
    with pytest.raises(
        ServingError,
        match="may see keys after the query, which are not there yet when a token is generated; supported are self-attention that is causal beside a known number",
    ):
        attnopt.optimize(model(also), IDS, config=PAGED)
