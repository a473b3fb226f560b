"""Serving from caches of 8 bits: asked for, verified against what they are stated to lose, and refused where they lose more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt.errors import AttnoptError, VerificationError
from attnopt.kernels import paged_reference
from attnopt.passes.quantize_kv_cache import DTYPES, rounded
from attnopt.runtime import SamplingParams
from attnopt.serving import ServingModel
from serving.models import example, hand_written, prompts, transformers_model

IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
KINDS = pytest.mark.parametrize("dtype", list(DTYPES))


def serving_model(dtype: str, verify: bool = True) -> ServingModel:
    made = attnopt.optimize(hand_written(), IDS, config=attnopt.OptimizeConfig(kv_cache="paged", kv_cache_dtype=dtype, verify=verify))
    assert isinstance(made, ServingModel)
    return made


@KINDS
def test_it_is_verified_against_what_it_is_stated_to_lose(dtype: str) -> None:
    serving = serving_model(dtype)
    verdict = serving.attnopt_report.verdict
    assert verdict is not None and verdict.passed and len(verdict.checks) == 3
    for check in verdict.checks:
        assert f"rounded to {dtype}" in check.detail
        # more than the roundings of float32, and within half as much again as the rounding alone
        assert 1e-4 < check.error < 0.1 and check.budget < 1.6 * check.error
    (told,) = [r for r in serving.attnopt_report.remarks if r.code == "AO108"]
    assert dtype in told.message
    assert {x.dtype for x in serving.layers} == {DTYPES[dtype]}


@KINDS
def test_a_cache_that_loses_more_is_not_handed_out(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = paged_reference.quantized

    def coarse(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        small, scale = right(x, kind)
        step = 8 if dtype == "int8" else 128
        return ((small.float() / step).round() * step).to(kind), scale

    monkeypatch.setattr(paged_reference, "quantized", coarse)
    with pytest.raises(VerificationError, match=rf"rounded to {dtype}|packed requests"):
        serving_model(dtype)


def test_scales_in_the_wrong_place_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = paged_reference.gathered

    def shifted(cache: Tensor, scale: Tensor | None, *rest: object) -> Tensor:
        return right(cache, None if scale is None else scale.roll(1, 2), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(paged_reference, "gathered", shifted)
    with pytest.raises(VerificationError):
        serving_model("int8")


@KINDS
def test_many_requests_in_a_small_cache(dtype: str) -> None:
    """Chunks, preemption and shared prefixes: scales go with their pages."""
    serving = serving_model(dtype, verify=False)
    texts = prompts(5, 23, 1, 17)
    texts += [texts[1] + [3, 4], [*texts[1][:20], 9]]
    params = SamplingParams(max_new_tokens=14)
    alone = [serving.engine(pages=8).generate([x], params)[0].tokens for x in texts]
    assert len(set(alone)) == len(texts)
    for options in ({"pages": 60}, {"pages": 60, "chunk": 7}, {"pages": 10, "page_size": 4, "chunk": 7, "token_budget": 12}):
        engine = serving.engine(**options)
        for tensors in engine.cache.tensors:
            for x in tensors[2:]:
                x.fill_(torch.nan)
        assert [r.tokens for r in engine.generate(texts, params)] == alone, options


def test_a_fork_copies_scales() -> None:
    serving = serving_model("int8", verify=False)
    engine = serving.engine(pages=20)
    (text,) = prompts(21)
    params = SamplingParams(max_new_tokens=9)
    want = engine.generate([text], params)[0].tokens
    parent = engine.add(text, SamplingParams(max_new_tokens=9, temperature=2.0, seed=4))
    engine.step()
    child = engine.fork(parent, SamplingParams(max_new_tokens=8))
    while engine.scheduler.busy:
        engine.step()
    first = parent.output[0]
    again = serving.engine(pages=20).generate([[*text, first]], SamplingParams(max_new_tokens=8))[0].tokens
    assert tuple(child.output) == again and want


def test_bytes_are_counted_with_scales() -> None:
    serving = serving_model("fp8", verify=False)
    engine = serving.engine(pages=6)
    assert engine.cache.size_bytes == sum(x.nbytes for tensors in engine.cache.tensors for x in tensors)
    assert [len(x) for x in serving.new_caches(2, 16)] == [4] * len(serving.layers)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_is_stated_of_a_number_holds(dtype: str) -> None:
    x = torch.randn(400, 3, 32) * torch.logspace(-6, 3, 400)[:, None, None]
    x[::7, :, 0] *= 1e3
    x[3] = 0.0
    off, most = (rounded(x, DTYPES[dtype]) - x).abs(), x.abs().amax(-1, keepdim=True)
    bound = most / 127 / 2 if dtype == "int8" else torch.maximum(x.abs() / 16, most / 448 / 1024)
    assert bool((off <= bound * (1 + 1e-5)).all()) and float((off / bound.clamp(min=1e-30)).max()) > 0.9


def test_bad_options_are_told() -> None:
    with pytest.raises(AttnoptError, match=r"kv_cache_dtype is 'int4'; supported are None, 'int8' and 'fp8'\."):
        attnopt.OptimizeConfig(kv_cache="paged", kv_cache_dtype="int4")
    with pytest.raises(AttnoptError, match="kv_cache_dtype is 'int8' and kv_cache is None: there is no cache to keep in it"):
        attnopt.OptimizeConfig(kv_cache_dtype="int8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bloom", "gemma2", "gpt_oss", "deepseek_v3"])
@KINDS
def test_kinds_of_models(kind: str, dtype: str) -> None:
    made = attnopt.optimize(transformers_model(kind), (), kwargs=example(), config=attnopt.OptimizeConfig(kv_cache="paged", kv_cache_dtype=dtype))
    assert made.attnopt_report.verdict.passed


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "bloom", "gemma2"])
@KINDS
def test_on_a_gpu(kind: str, dtype: str) -> None:
    """Verified there with the generated kernels, in half precision, and under CUDA graphs as without."""
    model = transformers_model(kind).to("cuda", torch.bfloat16)
    kwargs = {name: x.to("cuda") if isinstance(x, Tensor) else x for name, x in example().items()}
    made = attnopt.optimize(model, (), kwargs=kwargs, config=attnopt.OptimizeConfig(kv_cache="paged", kv_cache_dtype=dtype))
    assert made.attnopt_report.verdict.passed
    texts, params = prompts(5, 23, 1, 17), SamplingParams(max_new_tokens=20)
    engine = made.engine(pages=64)
    assert [r.tokens for r in engine.generate(texts, params)] == [r.tokens for r in made.engine(pages=64, graphs=False).generate(texts, params)]
    assert engine.run.reason is None and engine.run.replays > 0
