"""A serving model whose stretches between the attentions are compiled: the same function, alike stretches once, and weights looked up as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import attnopt
from attnopt.emit.pieces import OUTSIDE
from attnopt.runtime import SamplingParams
from attnopt.serving import ServingModel
from serving.models import example, prompts, sharpened

TEXTS = prompts(5, 23, 1, 17)
PARAMS = SamplingParams(max_new_tokens=12)


def made_on(device: str) -> ServingModel:
    """A decoder of four layers."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, max_position_embeddings=256, attn_implementation="eager")).eval()
    kwargs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in example().items()}
    made = attnopt.optimize(sharpened(model).to(device), (), kwargs=kwargs, config=attnopt.OptimizeConfig(kv_cache="paged", verify=False))
    assert isinstance(made, ServingModel)
    return made


@pytest.fixture(scope="module")
def serving() -> ServingModel:
    return made_on("cpu")


class Seen(NamedTuple):
    for_many: list[fx.GraphModule]
    for_one: list[fx.GraphModule]
    """For steps of one token."""


@pytest.fixture
def compiled(serving: ServingModel, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What is given to torch.compile, which hands it back."""
    seen: list[fx.GraphModule] = []
    for_one: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, **options: Any) -> Callable[..., Any]:
        tuned = {"coordinate_descent_tuning": True}
        assert options in ({"fullgraph": True, "options": None}, {"fullgraph": True, "options": tuned})
        (for_one if options["options"] else seen).append(gm)
        return gm

    monkeypatch.setattr(torch, "compile", keep)
    monkeypatch.setattr(serving, "_compiled", {})
    return Seen(seen, for_one)


def test_the_same_tokens_and_layers_alike_once(serving: ServingModel, compiled: Seen) -> None:
    plain = serving.engine(pages=40).generate(TEXTS, PARAMS)
    engine = serving.engine(pages=40, compile=True)
    assert [r.tokens for r in engine.generate(TEXTS, PARAMS)] == [r.tokens for r in plain]
    # before the first attention, between two, behind the last
    assert len(compiled.for_many) == 3 and not compiled.for_one, "no step was of one token"
    assert engine.generate([[5]], SamplingParams(max_new_tokens=2))[0].tokens == serving.engine(pages=40).generate([[5]], SamplingParams(max_new_tokens=2))[0].tokens
    assert len(compiled.for_many) == len(compiled.for_one) == 3
    both = [*compiled.for_many, *compiled.for_one]
    assert not any(n.target in OUTSIDE for gm in both for n in gm.graph.nodes)
    assert not any(n.op == "get_attr" for gm in both for n in gm.graph.nodes), "weights are arguments"
    assert all(function.source.count("piece_1(") == 3 for function in serving._compiled.values())
    serving.engine(pages=40, compile=True)
    assert len(compiled.for_many) == len(compiled.for_one) == 3, "made once for a model"


def test_a_weight_that_is_replaced_is_seen(serving: ServingModel, compiled: Seen) -> None:
    engine = serving.engine(pages=40, compile=True, prefix_sharing=False)
    before = [r.tokens for r in engine.generate(TEXTS, PARAMS)]
    layer = serving.get_submodule("model.layers.2.mlp.up_proj")
    old = layer.weight
    try:
        layer.weight = nn.Parameter(torch.randn_like(old) * 0.3, requires_grad=False)
        found = [r.tokens for r in engine.generate(TEXTS, PARAMS)]
        assert found != before and found == [r.tokens for r in serving.engine(pages=40).generate(TEXTS, PARAMS)]
    finally:
        layer.weight = old


def test_torch_compile_takes_the_pieces(serving: ServingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's part of it, whole graphs and open sizes; without a code generator."""
    right = torch.compile
    monkeypatch.setattr(torch, "compile", lambda gm, **options: right(gm, backend="eager", **options))
    monkeypatch.setattr(serving, "_compiled", {})
    want = [r.tokens for r in serving.engine(pages=40).generate(TEXTS, PARAMS)]
    assert [r.tokens for r in serving.engine(pages=40, compile=True).generate(TEXTS, PARAMS)] == want


@pytest.mark.slow
def test_inductor_takes_the_pieces(serving: ServingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_compiled", {})
    want = [r.tokens for r in serving.engine(pages=40).generate(TEXTS, PARAMS)]
    assert [r.tokens for r in serving.engine(pages=40, compile=True).generate(TEXTS, PARAMS)] == want


@pytest.mark.gpu
def test_compiled_under_graphs() -> None:
    made = made_on("cuda")
    want = [r.tokens for r in made.engine(pages=40, graphs=False).generate(TEXTS, PARAMS)]
    engine = made.engine(pages=40, compile=True)
    assert [r.tokens for r in engine.generate(TEXTS, PARAMS)] == want  # float32, where roundings do not change a token
    assert engine.run.reason is None and engine.run.replays > 0
