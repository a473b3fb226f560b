"""What a serving model is made of, what it says when it is used in another way, and that it is not handed out when it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.errors import AttnoptError, ServingError, VerificationError
from attnopt.kernels import paged_batched
from attnopt.runtime import DecodeGraphs, SamplingParams
from attnopt.serving import ServingModel
from serving.models import HandWritten

PAGED = attnopt.OptimizeConfig(kv_cache="paged")
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def serving(original: nn.Module) -> ServingModel:
    made = attnopt.optimize(original, IDS, config=PAGED)
    assert isinstance(made, ServingModel)
    return made


class Padded(nn.Module):
    """The same model as callers of a library know it: padding, positions, and a result with names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = HandWritten()
        self.memory = nn.Linear(8, 32)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> dict[str, Tensor]:
        m = self.inner
        x = m.tokens(ids) + m.places(positions)
        for block in m.blocks:
            b, t, c = x.shape
            q, k, v = (y.view(b, t, 4, c // 4).transpose(1, 2) for y in block.qkv(x).chunk(3, -1))
            seen = (positions[:, None, :, None] >= positions[:, None, None, :]) & (mask[:, None, None, :] != 0)
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        return {"hidden": x, "logits": m.head(x)}


def test_it_has_the_parameters_and_names_of_the_original(original: nn.Module, serving: ServingModel) -> None:
    assert list(serving.state_dict()) == list(original.state_dict())
    assert all(a is b for a, b in zip(serving.parameters(), original.parameters(), strict=True))
    assert [(x.Hkv, x.D, x.Dv, x.window, x.cross) for x in serving.layers] == [(4, 8, 8, None, False)] * 2
    assert serving.vocabulary == 128 and serving.attnopt_report.verdict.passed
    assert {r.code for s in serving.attnopt_report.sites for r in s.remarks} == {"AO101", "AO104"}
    assert [r.code for r in serving.attnopt_report.remarks] == ["AO106"]


def _step(serving: ServingModel, n: int, rows: Tensor | None = None, slots: Tensor | None = None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    caches = serving.new_caches(2, 16)
    at = torch.arange(n)
    table = torch.zeros(1, 1, dtype=torch.int32)
    out = serving.run(IDS[0, :n], at, at if slots is None else slots, table, torch.tensor([0, n]).int(), torch.tensor([n]).int(), caches, rows=rows)
    return out, caches


def test_a_step_gives_the_logits_of_the_wanted_rows(original: nn.Module, serving: ServingModel) -> None:
    out, _ = _step(serving, 9)
    torch.testing.assert_close(out, original(IDS[:1, :9])[0], rtol=1e-4, atol=1e-4)
    some, _ = _step(serving, 9, rows=torch.tensor([8, 2]))
    torch.testing.assert_close(some, out[[8, 2]])


def test_a_token_without_a_slot_is_not_written(serving: ServingModel) -> None:
    _, caches = _step(serving, 4, slots=torch.tensor([0, 1, -1, 3]))
    assert all(bool(x[0, 2].eq(0).all()) and bool(x[0, 3].ne(0).any()) and bool(x[1].eq(0).all()) for pair in caches for x in pair)


def test_inputs_of_padding_and_positions_disappear_and_the_result_is_found_by_its_name() -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    made = attnopt.optimize(Padded().eval(), (IDS, mask, torch.arange(12).expand(2, -1)), config=PAGED)
    assert made.attnopt_report.verdict.passed and made.plan.ids == "ids"
    assert sorted(r.code for r in made.attnopt_report.remarks) == ["AO105", "AO105", "AO106"]


def test_ids_that_happen_to_count_are_no_positions() -> None:
    class Masked(HandWritten):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.tokens(ids)[:, None]
            i = torch.arange(ids.shape[1])
            seen = (i[:, None] >= i) & (mask[:, None, None] != 0)
            return self.head(torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=seen)[:, 0])

    report = attnopt.inspect(Masked().eval(), (torch.arange(9).expand(2, -1), torch.ones(2, 9, dtype=torch.long)), config=PAGED)
    assert {r.code for s in report.sites for r in s.remarks} >= {"AO104"} and [r.code for r in report.remarks] == ["AO105"]


def test_a_compiler_makes_no_serving_model() -> None:
    with pytest.raises(Exception, match="kv_cache needs the whole model"):
        torch.compile(nn.Linear(4, 4), backend="attnopt", options={"kv_cache": "paged"})(torch.ones(1, 4))


def test_positions_that_the_example_does_not_count_are_refused() -> None:
    with pytest.raises(ServingError, match="Padded cannot be served from a KV cache"):
        attnopt.optimize(Padded().eval(), (IDS, torch.ones(2, 12, dtype=torch.long), torch.arange(12).flip(0).expand(2, -1)), config=PAGED)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        pytest.param(lambda s: s.half(), "stays in the dtype and on the device", id="dtype"),
        pytest.param(lambda s: s.encode(IDS), "reads no other sequence", id="encode"),
        pytest.param(lambda s: s.run(IDS[0], IDS[0], IDS[0], IDS, IDS[0], IDS[0], [], cross=(IDS, IDS)), "reads no other sequence, and cross was given", id="cross"),
    ],
)
def test_another_use_is_one_clear_error(serving: ServingModel, call: Callable[[ServingModel], Any], words: str) -> None:
    with pytest.raises(ServingError, match=words):
        call(serving)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache": "dense"}, "kv_cache is 'dense'; supported are None, 'paged' and 'contiguous'"),
        ({"max_variants": 0}, "max_variants is 0; it must be at least 1"),
        ({"kv_cache": "paged", "capture": "dynamo"}, "capture is 'dynamo'; supported are 'auto' and 'export'"),
        ({"kv_cache": "paged", "disable_passes": ("insert-kv-cache",)}, "cannot be disabled"),
        ({"kv_cache": "paged", "disable_passes": ("lower",)}, "there is no pass 'lower'"),
        ({"kv_cache": "paged", "backend": "sdpa"}, "no backend 'sdpa' for a paged cache"),
    ],
)
def test_options_that_do_not_fit_are_told(original: nn.Module, options: dict[str, Any], words: str) -> None:
    with pytest.raises(AttnoptError, match=words):
        attnopt.optimize(original, IDS, config=attnopt.OptimizeConfig(**options))


def test_it_needs_inputs(original: nn.Module) -> None:
    with pytest.raises(AttnoptError, match="kv_cache needs example_inputs"):
        attnopt.optimize(original, config=PAGED)


def test_a_model_that_cannot_be_served_is_told_with_its_line() -> None:
    class Averaging(HandWritten):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids)
            return self.head(self.blocks[0](x) + x.mean(1, keepdim=True))

    with pytest.raises(ServingError, match=r"Averaging cannot be served from a KV cache: aten::mean .* the axis of the tokens.*test_serving.py:\d+"):
        attnopt.optimize(Averaging().eval(), IDS, config=PAGED)


def test_a_wrong_kernel_is_noticed(original: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    right = paged_batched.attention

    def wrong(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, ends: Tensor, lengths: Tensor, *rest: Any) -> Tensor:
        out = right(q, k_cache, v_cache, table, ends, lengths, *rest)
        return torch.where((lengths > 20).any(), out.roll(1, 0), out)

    monkeypatch.setattr(paged_batched, "attention", wrong)
    with pytest.raises(VerificationError, match="The serving model differs from HandWritten: packed requests of"):
        attnopt.optimize(original, IDS, config=PAGED)


def test_without_verification_the_report_says_so(original: nn.Module) -> None:
    made = attnopt.optimize(original, IDS, config=attnopt.OptimizeConfig(kv_cache="paged", verify=False))
    assert made.attnopt_report.verdict.passed is None and "AO304" in [r.code for r in made.attnopt_report.remarks]


def test_weights_on_the_meta_device_are_not_compared() -> None:
    class Called(HandWritten):  # a triangle that is registered has no values there
        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids)[:, None]
            return self.head(torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0])

    made = attnopt.optimize(Called().eval().to("meta"), IDS, config=PAGED)
    assert made.attnopt_report.verdict.passed is None and made.layers[0].D == 32
    assert "AO304" in [r.code for r in made.attnopt_report.remarks]


def test_without_a_gpu_steps_run_without_graphs_and_say_why(serving: ServingModel) -> None:
    engine = serving.engine(pages=8)
    assert isinstance(engine.run, DecodeGraphs) and engine.run.reason == "CUDA graphs need a CUDA device, and the caches are on cpu"
    want = serving.engine(pages=8, graphs=False).generate([[3, 4, 5]], SamplingParams(max_new_tokens=5))
    assert engine.generate([[3, 4, 5]], SamplingParams(max_new_tokens=5))[0].tokens == want[0].tokens


class NamedAsItsMethods(nn.Module):
    """Its modules and parameters have the names of what a serving model has."""

    def __init__(self) -> None:
        super().__init__()
        self.run, self.plan = nn.Embedding(32, 16), nn.Embedding(24, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.function = nn.Linear(16, 32)
        self.original = nn.Parameter(torch.randn(16))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.run(ids) + self.plan(torch.arange(ids.shape[1])) + self.original
        for layer in self.layers:
            q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in layer(x).chunk(3, -1))
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        out: Tensor = self.function(x)
        return out


def test_names_of_the_original_may_be_its_own() -> None:
    torch.manual_seed(0)
    original = NamedAsItsMethods().eval()
    prompt = [3, 1, 4, 1, 5]
    serving = attnopt.optimize(original, (torch.tensor([prompt, prompt]),), config=attnopt.OptimizeConfig(kv_cache="paged"))
    assert isinstance(serving, ServingModel) and serving.attnopt_report.verdict.passed
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(original(torch.tensor([ids]))[0, -1].argmax()))
    assert serving.generate([prompt], SamplingParams(max_new_tokens=6))[0].tokens == tuple(ids[len(prompt) :])
