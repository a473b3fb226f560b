"""Decoders with a past: token by token in ONNX Runtime, and in onnxruntime-genai, beside greedy decoding of the original without any cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.cli.main import run
from attnopt.config import OptimizeConfig
from attnopt.emit.onnx import lower
from attnopt.errors import AttnoptError, VerificationError

LAZY = OptimizeConfig(backend="reference", verify=False, capture="export")
STEPS = 25


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(length))


def exported(name: str, folder: Path, target: str = "onnx") -> tuple[nn.Module, Path, Any]:
    pytest.importorskip("transformers")
    from zoo.models import CASES

    model = CASES[name].build("eager")
    if name == "gpt2":  # whose random positions are small beside its tokens, so that it would repeat one token
        model.transformer.wpe.weight.data.mul_(30)
    path = folder / "model.onnx"
    inputs = {"input_ids": ids(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long), "use_cache": False}
    return model, path, attnopt.optimize(model, kwargs=inputs, config=LAZY).export_onnx(path, target=target, with_past=True)


def greedy(model: nn.Module, tokens: Tensor, mask: Tensor, steps: int) -> Tensor:
    """``steps`` further tokens of each row, by runs over all tokens without a cache."""
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        last = mask.cumsum(-1).argmax(-1)  # the last token that is there
        chosen = logits[torch.arange(len(tokens)), last].argmax(-1)
        tokens, mask = torch.cat([tokens, chosen[:, None]], 1), torch.cat([mask, torch.ones_like(chosen)[:, None]], 1)
    return tokens[:, -steps:]


def greedy_in_onnx_runtime(path: Path, tokens: Tensor, mask: Tensor, steps: int) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    past = {i.name: np.zeros((len(tokens), i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    names = [o.name for o in session.get_outputs()]
    new, chosen = tokens, []
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        feed = {"input_ids": new.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **past}
        results = dict(zip(names, session.run(None, feed), strict=True))
        past = {name.replace("present", "past_key_values"): x for name, x in results.items() if name.startswith("present.")}
        seen = mask[:, -new.shape[1] :].cumsum(-1).argmax(-1)
        new = torch.from_numpy(results["logits"])[torch.arange(len(tokens)), seen].argmax(-1)[:, None]
        chosen.append(new)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    return torch.cat(chosen, 1)


@pytest.mark.parametrize(
    ("name", "target"),
    [("llama", "onnx"), ("gpt2", "ort"), pytest.param("llama", "ort", marks=pytest.mark.slow), pytest.param("mistral", "onnx", marks=pytest.mark.slow)],
)
def test_greedy_decoding_is_that_of_the_original(name: str, target: str, tmp_path: Path) -> None:
    model, path, report = exported(name, tmp_path, target)
    assert [x.lowered_to for x in report.layers] == ["GroupQueryAttention" if target == "ort" else "Attention"] * 2
    assert target == "onnx" or all("causal from the end of the past, proven" in x.why and x.error < 1e-6 for x in report.layers)
    joined = [n for n in onnx.load(path).graph.node if n.op_type == "Concat" and any(i.startswith("past_key_values.") for i in n.input)]
    assert len(joined) == (0 if target == "ort" else 4)
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "genai_config.json"}
    assert {"left padding: token 3", "right padding: token 3", "a prompt, batch of one: prompt"} <= {c.name for c in report.verdict.checks}
    heads = 4 if name == "gpt2" else 2
    assert report.inputs["past_key_values.1.value"] == ["batch", heads, "past", 16] and report.inputs["attention_mask"] == ["batch", "total"]
    assert report.outputs["present.1.value"] == ["batch", heads, "past + sequence", 16]
    tokens, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    for padded in (slice(0, 4), slice(6, 9)):
        mask[:], mask[1, padded] = 1, 0
        expected = greedy(model, tokens, mask, STEPS)
        assert len(set(expected.flatten().tolist())) > 3
        assert torch.equal(greedy_in_onnx_runtime(path, tokens, mask, STEPS), expected)
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: the file was run in plain ONNX Runtime only")
    runtime = genai.Model(str(tmp_path))
    options = genai.GeneratorParams(runtime)
    options.set_search_options(max_length=9 + STEPS, min_length=9 + STEPS, do_sample=False)
    generator = genai.Generator(runtime, options)
    generator.append_tokens(tokens[:1].numpy().astype(np.int32))
    for _ in range(STEPS):
        generator.generate_next_token()
    assert list(generator.get_sequence(0)) == tokens[0].tolist() + greedy(model, tokens[:1], torch.ones(1, 9, dtype=torch.long), STEPS)[0].tolist()


class Pairs(nn.Module):
    """A decoder of one layer whose cache is a tuple of pairs."""

    def __init__(self, end: int | None = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv = nn.Embedding(61, 16), nn.Linear(16, 48)
        self.config = type("Config", (), {"eos_token_id": end, "max_position_embeddings": 64})()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, use_cache: bool = False) -> Any:
        b, s = input_ids.shape
        q, k, v = (x.view(b, s, 2, 8).transpose(1, 2) for x in self.qkv(self.embed(input_ids)).chunk(3, -1))
        if past_key_values:
            k, v = (torch.cat([old, new], 2) for old, new in zip(past_key_values[0], (k, v), strict=True))
        n = k.shape[2]
        seen = torch.arange(n)[None] <= torch.arange(n - s, n)[:, None]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None].bool()
        o = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(~seen, -1e9).softmax(-1) @ v
        return {"logits": o.transpose(1, 2).reshape(b, s, 16) @ self.embed.weight.T, "past_key_values": ((k, v),)}


def test_a_cache_of_pairs_and_no_positions(tmp_path: Path) -> None:
    report = attnopt.optimize(Pairs().eval(), kwargs={"input_ids": ids(1, 2) % 61}, config=LAZY).export_onnx(tmp_path / "tiny.onnx", with_past=True)
    assert list(report.inputs) == ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
    assert list(report.outputs) == ["logits", "present.0.key", "present.0.value"]
    config = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    assert config["decoder"]["filename"] == "tiny.onnx" and "position_ids" not in config["decoder"]["inputs"]
    assert (config["vocab_size"], config["context_length"], config["eos_token_id"], config["pad_token_id"]) == (61, 64, 2, 2)


def test_a_past_that_is_aligned_wrongly_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causality from the first key on instead of from the end of the past: invisible in a prompt, wrong in the tokens that follow."""
    right = lower.Lowering._attention

    def wrong(self: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, is_causal: int) -> Any:
        return right(self, q, k, v, None, scale, 1)

    monkeypatch.setattr(lower.Lowering, "_attention", wrong)
    with pytest.raises(VerificationError, match="differs from the original in ONNX Runtime"):
        attnopt.optimize(Pairs().eval(), kwargs={"input_ids": ids(2, 8) % 61}, config=LAZY).export_onnx(tmp_path / "tiny.onnx", with_past=True)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_past_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def export(model: nn.Module, **inputs: Tensor) -> None:
        attnopt.optimize(model, kwargs=inputs, config=LAZY).export_onnx(tmp_path / "model.onnx", with_past=True)

    with pytest.raises(AttnoptError, match="Linear takes no input_ids"):
        attnopt.optimize(nn.Linear(4, 4).eval(), torch.ones(2, 4), config=LAZY).export_onnx(tmp_path / "model.onnx", with_past=True)
    with pytest.raises(AttnoptError, match="genai_config.json needs eos_token_id, and the configuration of Pairs does not say it"):
        export(Pairs(end=None).eval(), input_ids=ids(2, 8) % 61)
    model = tmp_path / "gpt.py"
    model.write_text("import torch\nfrom tiny_models import tiny_gpt\nmodel = tiny_gpt()\nexample_inputs = (torch.ones(2, 8, dtype=torch.long),)\n")
    assert run(["export", str(model), "-o", str(tmp_path / "gpt.onnx"), "--with-past"]) == 2
    assert "TinyGPT takes no input_ids; a decoder with a past takes input_ids, attention_mask, past_key_values, use_cache" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["gpt.py"]
