"""From a model to a verified file, by the command line and from Python; and that no wrong or half-written file is ever left."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from tiny_models import LENGTH, TinyGPT
from torch import Tensor, nn

import attnopt
from attnopt.cli.main import run
from attnopt.config import OptimizeConfig
from attnopt.emit.onnx import lower, parts
from attnopt.emit.onnx.layers import distance
from attnopt.errors import AttnoptError, VerificationError

MODEL = """
import torch
from tiny_models import LENGTH, TinyGPT

torch.manual_seed(0)
model = TinyGPT(layers=2).eval()
example_inputs = (torch.randint(0, 61, (2, 16)),)
"""
LAZY = OptimizeConfig(backend="reference", verify=False, capture="export")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "gpt.py"
    path.write_text(MODEL)
    return path


def optimized(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return attnopt.optimize(TinyGPT(layers=1).eval().to(dtype), torch.randint(0, 61, (2, 16)), config=LAZY)


def test_the_command_writes_a_verified_file(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out" / "gpt.onnx"
    path.parent.mkdir()
    path.write_text("an older file")
    assert run(["export", str(model_file), "-o", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [(x["name"], x["lowered_to"]) for x in facts["layers"]] == [("blocks.0.attention", "Attention"), ("blocks.1.attention", "Attention")]
    assert all(x["error"] is not None and x["error"] < 1e-6 for x in facts["layers"])
    assert (facts["inputs"], facts["outputs"]) == ({"ids": ["batch", "sequence"]}, {"output": ["batch", "sequence", 61]})
    assert facts["verdict"]["passed"] and {"whole model: longer", "whole model: shorter", "batch of one: example"} <= {
        c["name"] for c in facts["verdict"]["checks"]
    }
    assert [p.name for p in path.parent.iterdir()] == ["gpt.onnx"]
    model = onnx.load(path)
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (10, [("", 24)])
    assert sum(n.op_type == "Attention" for n in model.graph.node) == 2
    assert not any(n.op_type == "Softmax" for n in model.graph.node)
    props = {p.key: p.value for p in model.metadata_props}
    assert json.loads(props["attnopt.site.1"])["name"] == "blocks.1.attention" and props["attnopt.target"] == "onnx" and props["attnopt.version"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    original, ids = TinyGPT(layers=2).eval(), torch.arange(33).view(3, 11)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0]), original(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fault", ["scale", "causal", "values"])
def test_a_wrong_lowering_is_found_and_nothing_written(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong between the spec and the file, the comparison sees it."""
    right = lower.Lowering._attention

    def wrong(self: Any, q: Any, k: Any, v: Any, mask: Any, scale: float, is_causal: int) -> Any:
        if fault == "values":
            return self.op.Mul(right(self, q, k, v, mask, scale, is_causal), self._as(self.v, 1.0001))
        return right(self, q, k, v, mask, scale * (1.01 if fault == "scale" else 1.0), 0 if fault == "causal" else is_causal)

    monkeypatch.setattr(lower.Lowering, "_attention", wrong)
    with pytest.raises(VerificationError, match="differs from the original in ONNX Runtime.*was not written") as error:
        optimized().export_onnx(tmp_path / "model.onnx")
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_operators_of_onnx_runtime_come_with_functions_for_other_runtimes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    report = optimized(torch.float16).export_onnx(path, target="ort")
    assert [(x.lowered_to, x.why) for x in report.layers] == [("GroupQueryAttention", "causal over as many queries as keys, proven")]
    assert report.layers[0].error is not None and report.layers[0].error < 1e-3  # also where the exporter merged its transposition into the next
    model = onnx.load(path)
    assert [(f.domain, f.name, f.overload) for f in model.functions] == [("com.microsoft", "GroupQueryAttention", "")]
    plain = onnx.inliner.inline_local_functions(model)
    assert {n.domain for n in plain.graph.node} == {""} and sum(n.op_type == "Attention" for n in plain.graph.node) == 1
    ids = torch.arange(22).view(2, 11).numpy()
    fused, inlined = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"ids": ids})[0] for m in (model, plain)
    )
    torch.testing.assert_close(torch.from_numpy(inlined), torch.from_numpy(fused), rtol=4e-3, atol=4e-3)


def test_a_causal_attention_is_taken_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In operators of the standard, at lengths of one part and of several."""
    monkeypatch.setattr(parts, "PART", 7)
    path, module = tmp_path / "model.onnx", optimized()
    report = module.export_onnx(path, target="ort")
    assert [(x.lowered_to, x.why) for x in report.layers] == [("Attention", "in parts of at most 128 queries, each with the keys up to its last")]
    assert report.layers[0].error is not None and report.layers[0].error < 1e-6
    model = onnx.load(path)
    (loop,) = (n for n in model.graph.node if n.op_type == "Loop")
    assert not model.functions and {n.domain for n in model.graph.node} == {""}
    assert [n.op_type for n in loop.attribute[0].g.node].count("Attention") == 1
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, length in ((1, 1), (2, 7), (1, 8), (2, 29), (1, LENGTH)):
        ids = torch.arange(batch * length).view(batch, length) % 61
        with torch.no_grad():
            expected = module(ids)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0]), expected, rtol=1e-4, atol=1e-5)


def test_a_file_without_metadata_says_nothing_of_where_it_was_made(tmp_path: Path) -> None:
    module = optimized()
    for name, strip in (("full.onnx", False), ("bare.onnx", True)):
        module.export_onnx(tmp_path / name, target="ort", strip_metadata=strip)
    full, bare = (onnx.load(tmp_path / name) for name in ("full.onnx", "bare.onnx"))
    assert {p.key for p in full.metadata_props} == {"attnopt.version", "attnopt.target", "attnopt.site.0"}
    marked = {(n.op_type, p.key, p.value) for n in full.graph.node for p in n.metadata_props}
    assert ("Concat", "attnopt.site", "blocks.0.attention") in marked and len({m[1:] for m in marked}) == 1
    assert not bare.metadata_props and not any(n.metadata_props or n.doc_string for n in bare.graph.node)
    for name in ("full.onnx", "bare.onnx"):
        text = (tmp_path / name).read_bytes()
        assert b"/attnopt/" not in text and str(Path(__file__).parent).encode() not in text


def test_optimize_writes_a_file_too(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpt.onnx"
    assert run(["optimize", str(model_file), "--emit", "onnx", "-o", str(path), "--no-benchmark", "--no-verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["onnx"]["fused"] == 2 and facts["onnx"]["verdict"]["passed"] and facts["output"] == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["gpt.onnx"]
    assert run(["optimize", str(model_file), "--emit", "onnx"]) == 2
    assert "--emit onnx needs --output" in capsys.readouterr().err
    assert run(["optimize", str(model_file), "--emit", "onnx", "-o", str(tmp_path), "--no-benchmark"]) == 2
    assert run(["optimize", str(model_file), "--emit", "onnx", "-o", str(tmp_path / "b.onnx"), "--dtype", "bfloat16", "--no-benchmark"]) == 2
    assert "no bfloat16 on a CPU" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["gpt.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into every folder")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(AttnoptError, match="closed does not permit it"):
        optimized().export_onnx(closed / "a.onnx")


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails while a file is written: the one from before stays, and nothing stands beside it."""
    (tmp_path / "a.onnx").write_text("an older file")

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnopt.emit.onnx.write.ir.save", full)
    with pytest.raises(AttnoptError, match="a.onnx cannot be written: No space left on device"):
        optimized().export_onnx(tmp_path / "a.onnx")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.onnx", "an older file")]


def test_bad_requests_are_refused_in_a_sentence(tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = optimized()
    with pytest.raises(AttnoptError, match=r"Opset 26 is not supported; supported are 23 and 24"):
        module.export_onnx(tmp_path / "a.onnx", opset=26)
    with pytest.raises(AttnoptError, match="Target 'cuda' is unknown; supported are onnx, ort, decomposed"):
        module.export_onnx(tmp_path / "a.onnx", target="cuda")
    with pytest.raises(AttnoptError, match="the folder .*missing does not exist"):
        module.export_onnx(tmp_path / "missing" / "a.onnx")
    with pytest.raises(AttnoptError, match="is a folder"):
        module.export_onnx(tmp_path)
    assert run(["export", str(model_file), "-o", str(tmp_path / "a.onnx"), "--dtype", "bfloat16"]) == 2
    assert "no bfloat16 on a CPU, and the model is in bfloat16; supported are float16, float32 and float64" in capsys.readouterr().err
    assert run(["export", str(model_file), "-o", str(tmp_path / "a.onnx"), "--train"]) == 2
    assert "training mode" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_distance_counts_nan_in_other_places_as_infinite() -> None:
    x = torch.tensor([1.0, float("nan")])
    assert distance(x, x) == 0.0
    assert distance(torch.tensor([float("nan"), 1.0]), x) == float("inf") == distance(x[:1], x)
    assert distance(torch.tensor([1.1, float("nan")]), x) == pytest.approx(0.1)


class Padded(nn.Module):
    """Attention over packed heads of two groups, with a mask from the caller as large negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.kv = nn.Embedding(61, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        b, s, _ = x.shape
        q = self.q(x).view(b, s, 4, 8).transpose(1, 2)
        k, v = self.kv(x).view(b, s, 2, 2, 8).permute(2, 0, 3, 1, 4)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        low = (1.0 - attention_mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
        weights = (q @ k.transpose(-2, -1) / math.sqrt(8) + low).softmax(-1)
        return {"hidden": (weights @ v).transpose(1, 2).reshape(b, s, 32), "ids": ids}


@pytest.mark.parametrize("target", ["onnx", pytest.param("decomposed", marks=pytest.mark.slow)])
def test_padding_on_both_sides_and_of_a_whole_row_is_compared(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    inputs = {"ids": torch.randint(0, 61, (2, 12)), "attention_mask": mask}
    report = attnopt.optimize(Padded().eval(), inputs, config=LAZY).export_onnx(tmp_path / "model.onnx", target=target)
    assert {"whole model: right padding", "whole model: left padding", "whole model: a padded row"} <= {c.name for c in report.verdict.checks}
    assert [x.lowered_to for x in report.layers] == ["Attention" if target == "onnx" else "standard ops"]
    assert report.inputs == {"ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    assert list(report.outputs) == ["hidden", "ids_output"]
    nodes = [n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type == "Attention"]
    assert all(a.i == 0 for n in nodes for a in n.attribute if a.name == "is_causal")


PARTS, MHA, GQA = "Attention", "MultiHeadAttention", "GroupQueryAttention"
ENCODER = {"bert", "roberta", "vit"}
PAIRS = {"t5": [MHA] * 2 + [GQA, MHA] * 2, "bart": [MHA] * 2 + [PARTS, MHA] * 2, "whisper": [MHA] * 2 + [PARTS, MHA] * 2, "clip": [MHA] * 2 + [PARTS] * 2}
MODELS = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "bloom", "falcon", "gpt_oss", "bert", "roberta", "vit", "clip", "t5", "bart", "whisper")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_zoo(name: str, target: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from zoo.models import CASES

    case = CASES[name]
    inputs = case.inputs(case.padded, 2, 64)
    model = case.build("eager")
    report = attnopt.optimize(model, kwargs=inputs, config=LAZY).export_onnx(tmp_path / "model.onnx", target=target)
    if name == "gemma2":  # softcap, by the rule that nothing slower than its parts is chosen
        expected = ["standard ops"] * case.sites
    elif target == "ort":
        expected = PAIRS.get(name, [MHA if name in ENCODER else PARTS] * case.sites)
    else:
        expected = ["Attention"] * case.sites
    assert [x.lowered_to for x in report.layers] == expected
    assert all(("in parts" in x.why) == (target == "ort" and x.lowered_to not in (MHA, GQA)) for x in report.layers)
    assert all(x.error is None or x.error < 1e-5 for x in report.layers)
    checks = {c.name for c in report.verdict.checks}
    assert report.verdict.passed and "batch of one: example" in checks
    assert not case.padded or {"whole model: right padding", "whole model: left padding", "whole model: longer"} <= checks
