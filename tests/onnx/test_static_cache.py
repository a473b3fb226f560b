"""Decoders over caches of a fixed length: ragged rows in ONNX Runtime beside the original on each row alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_decoder import DECODER
from torch import Tensor, nn

import attnopt
from attnopt.cli.main import run
from attnopt.config import OptimizeConfig
from attnopt.emit.onnx import static
from attnopt.emit.onnx.lower import Lowering
from attnopt.emit.onnx.report import OnnxReport
from attnopt.errors import AttnoptError, VerificationError
from attnopt.verify.static_cache import schedule

LAZY = OptimizeConfig(backend="reference", verify=False, capture="export")
STEPS = 12


class Tiny(nn.Module):
    """One attention with grouped heads, by position alone: no cache of its own, no mask, no library."""

    def __init__(self, window: int | None = None, softcap: float | None = None, alibi: bool = False, sinks: bool = False, last: bool = False, prefix: int = 0, hidden: int = 0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.window, self.softcap, self.last, self.prefix, self.hidden = window, softcap, last, prefix, hidden
        self.tokens, self.q, self.kv = nn.Embedding(61, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]) if alibi else None
        self.sinks = nn.Parameter(torch.randn(4)) if sinks else None
        with torch.no_grad():
            self.q.weight.mul_(6)

    def forward(self, ids: Tensor) -> Tensor:
        (b, s), x = ids.shape, self.tokens(ids)
        q = self.q(x).view(b, s, 4, 8).transpose(1, 2)
        k, v = (y.reshape(b, s, 2, 8).transpose(1, 2).repeat_interleave(2, 1) for y in self.kv(x).chunk(2, -1))
        score = q @ k.transpose(-2, -1) / 8**0.5
        if self.softcap:
            score = self.softcap * torch.tanh(score / self.softcap)
        i = torch.arange(s)
        apart = i[:, None] - i[None]
        if self.slopes is not None:
            score = score - self.slopes * apart
        if self.hidden:  # the first queries see nothing, and average all
            score = score.masked_fill((apart < 0) | (i < self.hidden), torch.finfo(torch.float32).min)
        seen = apart >= 0 if self.window is None else (apart >= 0) & (apart < self.window)
        if self.prefix:
            seen = seen | (i < self.prefix)
        if not self.hidden:
            score = score.masked_fill(~seen, float("-inf"))
        if self.sinks is not None:
            score = torch.cat([score, self.sinks.view(1, 4, 1, 1).expand(b, 4, s, 1)], -1)
        p = score.softmax(-1)[..., :s]
        x = x + (p @ v).transpose(1, 2).flatten(2)
        return (x[:, -1:] if self.last else x) @ self.tokens.weight.T


def export(model: nn.Module, path: Path, max_length: int = 24, **options: Any) -> OnnxReport:
    given = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    return attnopt.optimize(model.eval(), given, config=LAZY).export_onnx(path, with_past="static", max_length=max_length, **options)


def operators(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("options", "target", "lowered", "why"),
    [
        pytest.param({}, "onnx", "Attention", "is_causal and nonpad_kv_seqlen", id="causal"),
        pytest.param({"window": 6}, "ort", "Attention", "is_causal and nonpad_kv_seqlen, boolean mask", id="window"),
        pytest.param({"alibi": True}, "onnx", "Attention", "is_causal and nonpad_kv_seqlen, additive mask", id="alibi"),
        pytest.param({"sinks": True, "window": 6}, "onnx", "Attention", "additive mask with a column for the sinks", id="sinks"),
        pytest.param({"softcap": 5.0}, "onnx", "standard ops", "softcap 5: ONNX Runtime's Attention is slower with it than its parts on a CPU", id="softcap"),
        pytest.param({"window": 6}, "decomposed", "standard ops", "--target decomposed", id="decomposed"),
    ],
)
def test_each_form_of_attention(options: dict[str, Any], target: str, lowered: str, why: str, tmp_path: Path) -> None:
    report = export(Tiny(**options), tmp_path / "tiny.onnx", target=target, opset=23 if target == "decomposed" else 24)
    assert [(x.lowered_to, x.why) for x in report.layers] == [(lowered, why)]
    assert report.layers[0].error is not None and report.layers[0].error < 1e-6
    found = operators(tmp_path / "tiny.onnx")
    assert (found["TensorScatter"], found["ScatterElements"]) == ((0, 2) if target == "decomposed" else (2, 0))
    nodes = [n for n in onnx.load(tmp_path / "tiny.onnx").graph.node if n.op_type == "Attention"]
    assert all((len(n.input) == 7 and n.input[6] != "") == ("nonpad" in why) for n in nodes)
    names = [c.name for c in report.verdict.checks]
    assert {"prompt", "token 3", "chunk", "full", "full: other slots"} <= {n.split(": ", 1)[1] for n in names}
    assert any("rows at 24: full" in n for n in names) and any("rows at 24, 19, 14: full" in n for n in names)


def test_logits_of_the_last_token_alone_become_those_of_all(tmp_path: Path) -> None:
    report = export(Tiny(last=True), tmp_path / "tiny.onnx")
    assert report.outputs["logits"] == ["batch", "sequence", 61]
    assert report.inputs["past_key_values.0.key"] == ["batch", 2, 24, 8] == report.outputs["present.0.key"]


def _top_left(self: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, is_causal: int) -> Any:
    return Lowering._attention(self, q, k, v, mask, scale, is_causal)


def _from_the_front(op: Any, cache: Any, new: Any, write_indices: Any) -> Any:
    return op.TensorScatter(cache, new, axis=2)


@pytest.mark.parametrize(("place", "name", "wrong", "target"), [(static.StaticLowering, "_attention", _top_left, "onnx"), (static, "_scattered", _from_the_front, "decomposed")])
def test_a_cache_that_is_read_or_written_from_its_front_is_found(place: Any, name: str, wrong: Any, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are invisible in a prompt, where each row begins at 0."""
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(VerificationError, match="differs from the original in ONNX Runtime"):
        export(Tiny(), tmp_path / "tiny.onnx", target=target)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_static_cache_is_refused_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = attnopt.optimize(Tiny().eval(), torch.ones(2, 9, dtype=torch.long), config=LAZY)
    path = tmp_path / "tiny.onnx"
    for options, said in (
        ({"with_past": "static"}, "with_past='static' needs max_length, the number of tokens that a cache holds, and none was given"),
        ({"with_past": "static", "max_length": 0}, "max_length is 0; supported are integers from 1 on"),
        ({"with_past": True, "max_length": 8}, "max_length is 8, and only with_past='static' has caches of a fixed length"),
        ({"with_past": "growing"}, "with_past is 'growing'; supported are False, True"),
        ({"with_past": "static", "max_length": 8, "opset": 23}, "TensorScatter, which ONNX has since opset 24, and opset 23 was asked for"),
    ):
        with pytest.raises(AttnoptError, match=said):
            model.export_onnx(path, **options)
    for wrong, said in ((Tiny(prefix=3), "sees first keys after the query, which may not be written yet"), (Tiny(hidden=2), "averages all keys in this attention")):
        with pytest.raises(AttnoptError, match=f"Tiny has no form with a static cache: .*{said}"):
            export(wrong, path)
    source = tmp_path / "decoder.py"
    source.write_text(DECODER)
    for target, length, said in (
        (f"{source}:averaging", 40, "Decoder has no form with a static cache: "),
        (f"{source}:model", 49, "max_length is 49, and Decoder takes at most 48 tokens; supported are 1 to 48."),
        (f"{source}:model", 0, "--static-cache"),
    ):
        assert run(["export", target, "-o", str(path), "--static-cache", str(length)]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert run(["export", f"{source}:model", "-o", str(path), "--static-cache", "8", "--with-past"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["decoder.py"]


def test_a_file_of_the_command_line_writes_in_place_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    source, path = tmp_path / "decoder.py", tmp_path / "decoder.onnx"
    source.write_text(DECODER)
    assert run(["export", f"{source}:model", "-o", str(path), "--static-cache", "6"]) == 0
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    caches = {i.name: np.zeros((1, *i.shape[1:]), np.float32) for i in session.get_inputs()[2:]}
    assert len(caches) == 4 and caches["past_key_values.1.value"].shape == (1, 2, 6, 8)
    rng, held = np.random.default_rng(0), {n: onnxruntime.OrtValue.ortvalue_from_numpy(x) for n, x in caches.items()}
    past, start = caches, 0
    for tokens in (3, 1, 2):  # with one memory for past and present, and with two
        ids = rng.integers(0, 64, (1, tokens))
        results = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"input_ids": ids, "write_indices": np.array([start]), **past}), strict=True))
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("write_indices", np.array([start]))
        binding.bind_output("logits")
        for name, cache in held.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        session.run_with_iobinding(binding)
        past, start = {n: results[n.replace("past_key_values", "present")] for n in caches}, start + tokens
        assert np.array_equal(binding.get_outputs()[0].numpy(), results["logits"]) and all(np.array_equal(held[n].numpy(), past[n]) for n in caches)
    for tokens, start, fits in ((6, 0, True), (7, 0, False), (2, 4, True), (2, 5, False), (1, -1, False)):
        feed = {"input_ids": np.ones((1, tokens), np.int64), "write_indices": np.array([start]), **caches}
        if fits:
            assert session.run(["logits"], feed)[0].shape == (1, tokens, 64)
        else:
            with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="TensorScatter"):
                session.run(["logits"], feed)


def test_the_operators_themselves() -> None:
    new, cache, starts = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 7, 8), torch.tensor([4, 1])
    written = torch.ops.attnopt.cache_update(cache, new, starts)
    for b, w in enumerate((4, 1)):
        assert torch.equal(written[b, :, w : w + 3], new[b]) and torch.equal(written[b, :, :w], cache[b, :, :w]) and torch.equal(written[b, :, w + 3 :], cache[b, :, w + 3 :])
    for wrong in (5, -1):
        with pytest.raises(AttnoptError, match=rf"A cache of 7 slots does not hold 3 tokens from \[4, {wrong}\] on"):
            torch.ops.attnopt.cache_update(cache, new, torch.tensor([4, wrong]))


@pytest.mark.parametrize("max_length", [1, 2, 5, 11, 40, 4000])
@pytest.mark.parametrize("window", [0, 16, 4096])
def test_no_call_of_the_comparison_leaves_the_cache(max_length: int, window: int) -> None:
    for batch in (1, 3):
        calls, done = schedule(batch, max_length, window), [0] * batch
        for _, counts in calls:
            assert len(counts) == batch and min(counts) >= 1 and max(done) + max(counts) <= max_length
            done = [d + n for d, n in zip(done, counts, strict=True)]
        assert max(done) == max_length or max_length > 64


@pytest.mark.slow
@pytest.mark.parametrize(("name", "max_length"), [(n, 40) for n in ("gpt2", "llama", "mistral", "gemma2", "bloom")])
def test_greedy_decoding_is_that_of_the_original(name: str, max_length: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from zoo.models import CASES

    model = CASES[name].build("eager")
    if name == "gpt2":  # whose random positions are small beside its tokens, so that it would repeat one token
        model.transformer.wpe.weight.data.mul_(30)
    given = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(12))
    inputs = {"input_ids": given, "attention_mask": torch.ones_like(given), "use_cache": False}
    report = attnopt.optimize(model, kwargs=inputs, config=LAZY).export_onnx(tmp_path / "m.onnx", with_past="static", max_length=max_length)
    assert [x.lowered_to for x in report.layers] == ["standard ops" if name == "gemma2" else "Attention"] * 2
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx"}
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    lengths = [21, 4, 13]
    tokens = torch.randint(3, 100, (3, max(lengths)), generator=torch.Generator().manual_seed(5))
    caches = {i.name: np.zeros((3, *i.shape[1:]), np.float32) for i in session.get_inputs()[2:]}
    new, starts, chosen = tokens.numpy(), np.zeros(3, np.int64), []
    for step in range(STEPS):
        results = dict(zip((o.name for o in session.get_outputs()), session.run(None, {"input_ids": new, "write_indices": starts, **caches}), strict=True))
        caches = {n: results[n.replace("past_key_values", "present")] for n in caches}
        counts = np.array(lengths) if step == 0 else np.ones(3, np.int64)
        new = results["logits"][np.arange(3), counts - 1].argmax(-1)[:, None]
        starts = starts + counts
        chosen.append(new)
    for b, n in enumerate(lengths):
        row = tokens[b : b + 1, :n]
        for _ in range(STEPS):
            with torch.no_grad():
                row = torch.cat([row, model(input_ids=row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert row[0, n:].tolist() == np.concatenate(chosen, 1)[b].tolist()
        assert name != "gpt2" or len(set(row[0, n:].tolist())) > 3
