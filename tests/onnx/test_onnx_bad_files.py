"""What cannot be rewritten is refused in one sentence, and no wrong or half-written file is ever left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from exported import operators, run, small, weighted

import attnopt
from attnopt.cli.main import run as command
from attnopt.emit.onnx import lower
from attnopt.errors import AttnoptError, VerificationError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    weighted(path)
    return path


def _opset_26(path: Path) -> None:
    m = onnx.load(path)
    m.opset_import[0].version = 26
    onnx.save(m, path)


def _opset_12(path: Path) -> None:
    m = onnx.load(path)
    m.opset_import[0].version = 12
    onnx.save(m, path)


def _corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _text(path: Path) -> None:
    path.write_text("a line of text\n" * 50)


def _of_pytorch(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _gone(path: Path) -> None:
    path.unlink()


def _data_gone(path: Path) -> None:
    weighted(path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (path.parent / "weights.bin").unlink()


def _data_short(path: Path) -> None:
    weighted(path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with (path.parent / "weights.bin").open("r+b") as f:
        f.truncate(100)


def _bfloat16(path: Path) -> None:
    onnx.save(small("y = Neg(x)", inputs="bfloat16[a, 4] x", outputs="bfloat16[a, 4] y"), path)


def _strings(path: Path) -> None:
    onnx.save(small("y = Identity(x)", inputs="string[a, 4] x", outputs="string[a, 4] y"), path)


def _unknown_operator(path: Path) -> None:
    onnx.save(small("y = my.Own(x)", head=', "my": 1'), path)


def _twice(path: Path) -> None:
    onnx.save(small("y = Neg(x) y = Abs(x)"), path)


def _does_not_fit(path: Path) -> None:
    onnx.save(small("y = MatMul(x, x)"), path)


BAD = {
    _opset_26: "is of opset 26; supported are 13 to 25",
    _opset_12: "is of opset 12; supported are 13 to 25",
    _corrupt: "is no ONNX model, or a damaged one",
    _text: "is no ONNX model, or a damaged one",
    _of_pytorch: "is no ONNX model, or a damaged one",
    _empty: "is no ONNX model, or a damaged one",
    _twice: "a damaged one: Output 'y' is redeclared",
    _gone: "does not exist",
    _data_gone: "keeps w in .*weights.bin, which does not exist",
    _data_short: "too short for it: 100 bytes, and 256 are needed",
    _bfloat16: "no bfloat16 on a CPU",
    _strings: "is of type STRING; supported are FLOAT",
    _unknown_operator: "does not load .*model.onnx",
    _does_not_fit: "ONNX Runtime does not run .*model.onnx on inputs made for it",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__.strip("_"))
def test_a_file_that_cannot_be_used_is_refused_in_a_sentence(spoil: Any, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(source)
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept.onnx").write_text("an older file")
    before = sorted(p.name for p in source.parent.iterdir())
    assert command(["optimize", str(source), "-o", str(out / "kept.onnx")]) in (1, 2)
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 2 and "Traceback" not in said.err and "bug" not in said.err
    with pytest.raises(AttnoptError, match=BAD[spoil]):
        attnopt.optimize_onnx(source, out / "kept.onnx")
    assert [p.name for p in out.iterdir()] == ["kept.onnx"] and (out / "kept.onnx").read_text() == "an older file"
    assert sorted(p.name for p in source.parent.iterdir()) == before


def test_a_place_that_cannot_be_written_and_a_wrong_request(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, words in ((tmp_path / "missing" / "a.onnx", "does not exist"), (tmp_path, "is a folder"), (source / "a.onnx", "does not exist")):
        with pytest.raises(AttnoptError, match=words):
            attnopt.optimize_onnx(source, place)
    requests: list[tuple[dict[str, Any], str]] = [
        ({"opset": 22}, "Opset 22 is not supported; supported are 23 and 24"),
        ({"target": "gpu"}, "Target 'gpu' is unknown"),
        ({"example_inputs": {"ids": torch.ones(1)}}, "no input 'ids'; its inputs are x"),
        ({"example_inputs": {"x": torch.ones(2, 4)}}, r"The input x is float32\[2, 4\]; the file takes float32\[batch, sequence, 8\]"),
    ]
    with pytest.raises(AttnoptError, match="The model is damaged: Output 'y' is redeclared"):
        attnopt.optimize_onnx(small("y = Neg(x) y = Abs(x)"))
    for request, words in requests:
        with pytest.raises(AttnoptError, match=words):
            attnopt.optimize_onnx(source, **request)
    for arguments, words in (
        (["--input", "float32[2,3,8]"], "has no name"),
        (["--input", "z=float32[2,3,8]"], "no input 'z'"),
        (["--input", "x=float16[2,3,8]"], "The input x is float16"),
        (["--backend", "sdpa"], "--backend does not apply to an ONNX file"),
        (["-o", "a.pt2"], "an ONNX file is written as ONNX"),
        (["--no-verify"], "does not apply to an ONNX file"),
        (["-o", str(tmp_path / "missing" / "a.onnx")], "does not exist"),
    ):
        assert command(["optimize", str(source), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert command(["inspect", str(source)]) == 2
    assert "attnopt optimize" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("fault", ["scale", "values", "disk"])
def test_a_wrong_result_is_found_and_nothing_written(fault: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, replace = lower.Lowering.build, os.replace

    def wrong(self: Any, plan: Any) -> Any:
        if fault == "scale":
            self.q = self.op.Mul(self.q, self._as(self.q, 1.01))
        o = right(self, plan)
        return self.op.Mul(o, self._as(o, 1.0001)) if fault == "values" else o

    def full(a: Any, b: Any) -> None:
        raise OSError(28, "No space left on device")

    if fault == "disk":
        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.setattr(lower.Lowering, "build", wrong)
    before = source.read_bytes()
    expected, words = (AttnoptError, "cannot be written: No space left") if fault == "disk" else (VerificationError, "differs from .*so nothing was written")
    with pytest.raises(expected, match=words) as error:
        attnopt.optimize_onnx(source, source)
    assert error.value.exit_code == (2 if fault == "disk" else 1)
    assert [p.name for p in source.parent.iterdir()] == ["model.onnx"] and source.read_bytes() == before
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(lower.Lowering, "build", right)
    attnopt.optimize_onnx(source, source)  # over the file itself
    assert "Attention" in operators(onnx.load(source)) and [p.name for p in source.parent.iterdir()] == ["model.onnx"]


def test_weights_in_a_file_of_their_own_are_read_and_written_into_the_model(tmp_path: Path) -> None:
    source, out = tmp_path / "in" / "model.onnx", tmp_path / "out.onnx"
    source.parent.mkdir()
    weighted(source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert len(attnopt.optimize_onnx(source, out).fused) == 1
    x = {"x": np.random.default_rng(1).standard_normal((3, 11, 8)).astype(np.float32)}
    expected = run(str(source), x)
    (source.parent / "weights.bin").unlink()
    np.testing.assert_allclose(run(str(out), x)[0], expected[0], rtol=1e-4, atol=1e-5)


def test_large_weights_stay_in_a_file_of_their_own(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.emit.onnx.write.EXTERNAL", 100)
    out = tmp_path / "out.onnx"
    assert len(attnopt.optimize_onnx(source, out).fused) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out.onnx", "out.onnx.data"]
    x = {"x": np.random.default_rng(1).standard_normal((3, 11, 8)).astype(np.float32)}
    np.testing.assert_allclose(run(str(out), x)[0], run(str(source), x)[0], rtol=1e-4, atol=1e-5)
