"""The command line for real: the examples, saving, and each kind of bad input. What a process is for (a file that another one reads, a fresh
start, exit code and streams as a shell gets them) runs in one of its own; the rest is called here, as ``main`` calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from attnopt.cli.main import run

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def call(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # kernel tests set it in their own process
    env = {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "140"}
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def attnopt(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return call("-c", "from attnopt.cli.main import main; main()", *argv, cwd=cwd)


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Here = Callable[..., Done]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """A command line within this process, from a folder; what it put on the path and into the modules is taken back."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def started(*argv: str, cwd: Path = ROOT) -> Done:
        monkeypatch.chdir(cwd)
        code = run(list(argv))
        return Done(code, *capsys.readouterr())

    yield started
    for name in set(sys.modules) - before:
        if name.startswith("attnopt_user_"):
            del sys.modules[name]


def test_optimize_saves_what_a_fresh_process_runs(tmp_path: Path) -> None:
    file = tmp_path / "nanogpt.pt2"
    done = attnopt("optimize", "examples/nanogpt.py", "--output", str(file), "--no-benchmark", "--input", "idx=int64[2,64]")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("Done: 3 of 3 attentions replaced, verified: ")
    assert "causal" in done.stdout and "h.0-2.attn (3)" in done.stdout
    code = (
        "import sys, torch, attnopt; sys.path.insert(0, 'examples'); import nanogpt\n"
        f"again = torch.export.load({str(file)!r}).module()\n"
        "x = nanogpt.example_inputs()[:, :100]\n"
        "print((again(idx=x) - nanogpt.model()(x)).abs().max().item())"
    )
    loaded = call("-c", code)
    assert loaded.returncode == 0, loaded.stderr
    assert float(loaded.stdout) < 1e-4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["examples/bert_hf.py", "--input", "input_ids=int64[2,32]", "--input", "attention_mask=int64[2,32]"], ["full", "key padding"]),
        (["examples/custom_scores.py:alibi", "--input", "float32[2,80,256]"], ["causal", "ALiBi"]),
        (["examples/custom_scores.py:sliding_window", "--input", "float32[2,80,256]"], ["causal", "window 64"]),
        (["examples/custom_scores.py:softcap", "--input", "float32[2,80,256]"], ["causal", "softcap 30"]),
    ],
    ids=["padding", "alibi", "window", "softcap"],
)
def test_each_example_is_recognised_as_what_it_is(argv: list[str], words: list[str], here: Here) -> None:
    done = here("optimize", *argv, "--json", "--no-benchmark", "--require-all")
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert facts["sites"] and facts["verdict"]["passed"] is True
    for site in facts["sites"]:
        assert site["status"] == "replaced"
        assert all(word in site["spec"]["words"] for word in words), site["spec"]["words"]


def test_inspect_of_the_demo(here: Here) -> None:
    done = here("inspect", "examples/llama.py", "--json", "--input", "input_ids=int64[2,64]", "--input", "attention_mask=int64[2,64]")
    assert done.returncode == 0, done.stdout + done.stderr
    sites = json.loads(done.stdout)["sites"]
    assert [s["name"] for s in sites] == [f"layers.{i}.self_attn" for i in range(4)]
    for site in sites:
        spec = site["spec"]
        assert (spec["causal"], spec["groups"], spec["key_padding"], spec["empty_rows"]) == ("top_left", 4, True, "uniform")
        assert "llama.py:" in site["source"]


TALKING = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self, mixed):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(2)) if mixed else None
    def forward(self, x):
        h = x.unflatten(-1, (2, 8)).transpose(1, 2)
        scores = h @ h.mT * 0.25
        if self.mix is not None:
            scores = torch.einsum("bhqk,hg->bgqk", scores, self.mix)
        return (scores.softmax(-1) @ h).transpose(1, 2).flatten(2)

model = nn.Sequential(Attention(False), Attention(True))
example_inputs = torch.ones(2, 9, 16)
"""


def test_explain_finds_the_line_that_is_in_the_way(tmp_path: Path, here: Here) -> None:
    (tmp_path / "talking.py").write_text(TALKING)
    done = here("explain", "talking.py", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    (site,) = facts["sites"]
    (remark,) = site["remarks"]
    assert (facts["known_sites"], site["name"], remark["code"]) == (["0", "1"], "1", "AO212")
    assert remark["lines"]["text"].startswith("scores = torch.einsum") and site["lines"]["text"].startswith("return (scores.softmax(-1)")
    one = here("explain", "talking.py", "--site", "0", cwd=tmp_path)
    assert one.returncode == 0 and "0: replaced: full" in one.stdout and "0.25 * s" in one.stdout


def test_verify_against_another_model(tmp_path: Path, here: Here) -> None:
    text = "import torch\nfrom torch import nn\ndef model():\n    torch.manual_seed(0)\n    return nn.Linear(4, 4)\nexample_inputs = torch.ones(2, 4)\n"
    (tmp_path / "one.py").write_text(text)
    (tmp_path / "same.py").write_text(text)
    (tmp_path / "other.py").write_text(text.replace("seed(0)", "seed(1)"))
    assert here("verify", "one.py", "--against", "same.py", cwd=tmp_path).returncode == 0
    done = here("verify", "one.py", "--against", "other.py", cwd=tmp_path)
    assert done.returncode == 1 and "FAILED" in done.stdout


@pytest.mark.parametrize("script", [pytest.param("train.py", marks=pytest.mark.slow), "python_api.py", "transformers_attention.py"])
def test_example_scripts_run(script: str) -> None:
    done = call(str(EXAMPLES / script), *(["2"] if script == "train.py" else []))
    assert done.returncode == 0, done.stdout + done.stderr


BAD = {
    "missing-file": (["nothing.py"], "does not exist"),
    "no-model-in-it": (["empty.py"], "holds no model"),
    "model-that-fails": (["fails.py"], "RuntimeError"),
    "inputs-of-other-names": (["good.py", "--input", "y=float32[2,4]"], "do not fit"),
    "inputs-of-other-shapes": (["good.py", "--input", "float32[2,5]"], "shapes cannot be multiplied"),
    "unknown-backend": (["good.py", "--backend", "flahs"], "no backend 'flahs'"),
    "backend-without-its-device": (["good.py", "--backend", "triton"], "'triton' cannot be used here"),
}


@pytest.mark.parametrize(("argv", "part"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_sentence(tmp_path: Path, argv: list[str], part: str, here: Here) -> None:
    import torch

    if "triton" in argv and torch.cuda.is_available():
        pytest.skip("Triton's backend can be used on this machine, so it refuses nothing")
    head = "import torch\nfrom torch import nn\n"
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "good.py").write_text(head + "model = nn.Linear(4, 4)\nexample_inputs = torch.ones(2, 4)\n")
    (tmp_path / "fails.py").write_text(head + "class M(nn.Module):\n    def forward(self, x):\n        raise RuntimeError('no')\nmodel = M()\nexample_inputs = torch.ones(2)\n")
    # A device is looked for once in a process, and a failing model is the case in which most was under way.
    apart = part == "RuntimeError" or "triton" in argv
    done = (attnopt if apart else here)("optimize", *argv, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and part in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
