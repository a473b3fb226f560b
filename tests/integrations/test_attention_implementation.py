"""``attn_implementation="attnopt"``: the library's own ``generate`` says with it what it says with its eager attention."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.models import CONFIGS, PAIRS, prompts, sharpened, source, transformers_translate
from torch import Tensor, nn

from attnopt.errors import AttnoptError
from attnopt.integrations import calls, packed
from attnopt.integrations import transformers as integration
from integrations import one_call
from integrations.one_call import kernels_of_calls, truth

NEW = 14
TEXTS = {"one": prompts(23), "left-padded": prompts(5, 23, 1, 17)}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    integration.register()
    integration.register()  # twice is as good as once


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that were called, in order."""
    found: list[str] = []
    plan = calls.plan

    def noted(*call: Any) -> tuple[str, str]:
        planned = plan(*call)
        found.append(planned[1])
        return planned

    monkeypatch.setattr(calls, "plan", noted)
    yield found


def made(kind: str, implementation: str) -> Any:
    import transformers

    torch.manual_seed(0)
    auto, settings = PAIRS[kind] if kind in PAIRS else ("AutoModelForCausalLM", CONFIGS[kind])
    config = transformers.AutoConfig.for_model(kind, **settings)
    model: Any = getattr(transformers, auto).from_config(config, attn_implementation=implementation).eval()
    model.generation_config.eos_token_id = None
    return sharpened(model, norms=kind == "bart")


def generated(model: Any, texts: list[list[int]], **settings: Any) -> list[list[int]]:
    """Greedily; shorter texts are padded on the left."""
    from transformers import GenerationConfig

    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(t)) + t for t in texts])
    seen = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in texts])
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0, use_cache=True, **settings)
    out: list[list[int]] = model.generate(ids, attention_mask=seen, generation_config=config)[:, longest:].tolist()
    return out


# ---- the library's generate


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma2", "gpt_oss", "opt", "deepseek_v3", "llama4_text"])
def test_greedy_generation_is_that_of_the_eager_attention(kind: str, counted: list[str]) -> None:
    eager, ours = made(kind, "eager"), made(kind, "attnopt")
    try:
        generated(eager, TEXTS["one"], cache_implementation="static")
    except TypeError as error:
        pytest.skip(f"this version of transformers does not generate with its own {kind}: {error}")
    for texts in TEXTS.values():
        expected = generated(eager, texts)
        assert any(len(set(x)) > 3 for x in expected), "a model that always says the same shows nothing"
        before = len(counted)
        assert generated(ours, texts) == expected
        assert len(counted) - before == NEW * eager.config.num_hidden_layers, "each layer of each step is one call"
        assert generated(ours, texts, cache_implementation="static") == expected


@pytest.mark.parametrize("kind", list(PAIRS))
def test_encoder_decoders_too(kind: str) -> None:
    """With relative positions (t5) as a bias, and attention to another sequence."""
    eager, ours = made(kind, "eager"), made(kind, "attnopt")
    for n in (9, 40):
        assert transformers_translate(ours, source(kind, n), NEW) == transformers_translate(eager, source(kind, n), NEW)


def test_gradients_and_compilation() -> None:
    """Softcap, window, groups and left padding; the rows of padding are nobody's business."""
    eager, ours = made("gemma2", "eager"), made("gemma2", "attnopt")
    ids = torch.tensor(prompts(23, 23))
    seen = torch.ones_like(ids)
    seen[0, :5] = 0
    labels = ids.masked_fill(torch.arange(23) < 6, -100)
    for model in (eager, ours):
        model(ids, attention_mask=seen, labels=labels).loss.backward()
    for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4 * float(b.grad.abs().max()))
    with torch.no_grad():
        compiled = torch.compile(ours, backend="eager", fullgraph=True)(ids, attention_mask=seen, use_cache=False).logits
        torch.testing.assert_close(compiled, ours(ids, attention_mask=seen, use_cache=False).logits)


def test_the_library_s_continuous_batching_runs_through_the_paged_form(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    ran: list[int | None] = []
    original = packed.attention
    monkeypatch.setattr(packed, "attention", lambda *a, **k: (ran.append(k["window"]), original(*a, **k))[1])
    texts = prompts(5, 23, 1, 17)
    page = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
    for kind in ("mistral", "gpt_oss"):
        ours = made(kind, "attnopt")
        settings = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=32, **{page: 16})
        greedy = GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0, eos_token_id=-1)
        with integration.continuous_batching(ours) as model:
            found = model.generate_batch(texts, generation_config=greedy, continuous_batching_config=settings, progress_bar=False)
        tokens = [found[key].generated_tokens for key in sorted(found, key=lambda x: int(x.rpartition("_")[2]))]
        eager = made(kind, "eager")
        assert tokens == [generated(eager, [t])[0] for t in texts]
        assert ours.config._attn_implementation == "attnopt" and generated(ours, texts[:1]) == tokens[:1], "it is what it was before"
    assert len(ran) > 2 * NEW and set(ran) == {None, 16}


# ---- what is refused


def test_nothing_registers_on_import() -> None:
    code = (
        "import sys, attnopt, attnopt.integrations.transformers as i\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AttentionInterface\n"
        "assert 'attnopt' not in AttentionInterface()\n"
        "i.register()\n"
        "assert {'attnopt', 'paged|attnopt'} <= set(AttentionInterface())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("version", "words"),
    [("4.57.1", "transformers is version 4.57.1; its attention interface is supported from 5.17 on"), (None, "transformers is not installed")],
)
def test_another_version_is_told(monkeypatch: pytest.MonkeyPatch, version: str | None, words: str) -> None:
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    with pytest.raises(AttnoptError, match=words):
        integration.register()


def test_a_model_whose_attentions_are_its_own_is_told() -> None:
    with pytest.raises(AttnoptError, match=r"BloomModel has attentions of its own, which take no implementation from outside; attnopt.optimize"):
        made("bloom", "attnopt")(torch.tensor(prompts(9)))


def _tensors() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    return nn.Module(), q, k, k


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"head_gates": torch.ones(4)}, r"was given 'head_gates' \(float32\[4\]\), which it does not know; supported are scaling, dropout, softcap"),
        ({"output_attentions": True}, "never makes the probabilities that output_attentions asks for"),
        ({"position_bias": torch.ones(5, 5)}, r"The mask or bias is \(5, 5\); it must be \[B, Hq, Sq, Skv\], here \(1, 4, 5, 5\)"),
    ],
)
def test_a_keyword_that_is_not_known_is_one_clear_error(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(AttnoptError, match=words):
        integration.attention(*_tensors(), None, **keywords)


def test_the_paged_form_is_for_continuous_batching_alone() -> None:
    with pytest.raises(AttnoptError, match=r"'paged\|attnopt' was called without a paged cache; it is for continuous batching alone"):
        integration.paged_attention(*_tensors(), None)
    with pytest.raises(AttnoptError, match="gave a block table"):
        integration.paged_attention(*_tensors(), None, cache=object(), block_table=torch.zeros(1))
    with pytest.raises(AttnoptError, match="Linear is no model of transformers"), integration.continuous_batching(nn.Linear(2, 2)):
        pass


# ---- one call, against float64


@pytest.mark.parametrize("Sq", [1, 7])
def test_a_call_computes_what_it_says(Sq: int) -> None:
    assert calls.CACHED not in kernels_of_calls(Sq)


def test_one_query_runs_through_the_kernels_for_caches_where_they_can() -> None:
    """Under the interpreter, in a process of its own: the keys of a query are split over many programs."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(Path(one_call.__file__)), "1"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {calls.CACHED}


def test_a_packing_is_shared_by_the_layers_of_a_step_and_by_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = packed.pack
    monkeypatch.setattr(packed, "pack", lambda *a, **k: (made.append(1), original(*a, **k))[1])
    q, k = torch.randn(8, 4, 16), torch.randn(8, 2, 16)
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    first = packed.attention(q, k, k, ends, ends)
    assert torch.equal(packed.attention(q, k, k, ends, ends), first) and len(made) == 1
    packed.attention(q, k, k, ends, ends, window=2)
    assert len(made) == 2
    ends[1] = 5
    assert not torch.equal(packed.attention(q, k, k, ends, ends), first) and len(made) == 3, "the tensor was written to"
    with torch.inference_mode():
        ends = torch.tensor([0, 3, 8], dtype=torch.int32)
        packed.attention(q, k, k, ends, ends)
        ends[1] = 5
        second = packed.attention(q, k, k, ends, ends)
    torch.testing.assert_close(second, packed.attention(q, k, k, ends.clone(), ends.clone()))


def test_packed_requests_are_each_causal_to_their_own_end() -> None:
    torch.manual_seed(0)
    lengths, new = [(9, 9), (20, 1), (13, 4)], 16
    q, k, v = torch.randn(14 + 2, 4, 16), torch.randn(42 + 5, 2, 16), torch.randn(42 + 5, 2, 8)
    cu_k, cu_q = torch.tensor([0, 9, 29, 42], dtype=torch.int32), torch.tensor([0, 9, 10, 14], dtype=torch.int32)
    sinks = torch.randn(4)
    o = packed.attention(q, k, v, cu_q, cu_k, scale=0.3, window=6, softcap=3.0, sinks=sinks)
    assert o.shape == (new, 4, 8) and bool((o[14:] == 0).all()), "what lies behind the last request belongs to nobody"
    for r, (n, m) in enumerate(lengths):
        at = torch.arange(n - m, n)[:, None]
        seen = (torch.arange(n) <= at) & (torch.arange(n) > at - 6)
        parts = (x[None].transpose(1, 2) for x in (q[cu_q[r] : cu_q[r + 1]], k[cu_k[r] : cu_k[r + 1]], v[cu_k[r] : cu_k[r + 1]]))
        expected = truth(*parts, seen, 0.3, 3.0, sinks, None)[0].transpose(0, 1)
        torch.testing.assert_close(o[cu_q[r] : cu_q[r + 1]].double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AttnoptError, match=r"sinks must be \[Hq\], here \[4\]; they are \(2,\)"):
        packed.attention(q, k, v, cu_q, cu_k, sinks=sinks[:2])
