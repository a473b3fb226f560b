"""``attnopt generate`` of encoder-decoders: each prompt with what its encoder is given, on the command line, in lines and in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from attnopt.cli.main import run

PAIR = '''
import torch
import torch.nn.functional as F
from torch import nn


def heads(x):
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


class Pair(nn.Module):
    """One layer that reads what was made of ``source``: ids, or numbers of four channels."""

    def __init__(self, channels=0):
        super().__init__()
        torch.manual_seed(2)
        self.read = nn.Linear(4, 16) if channels else nn.Embedding(64, 16)
        self.tokens, self.places = nn.Embedding(64, 16), nn.Embedding(48, 16)
        self.own, self.q, self.kv, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 64)

    def forward(self, source, ids):
        memory = self.read(source).tanh()
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        q, k, v = (heads(y) for y in self.own(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        k, v = (heads(y) for y in self.kv(memory).chunk(2, -1))
        x = x + 4 * F.scaled_dot_product_attention(heads(self.q(x)), k, v).transpose(1, 2).flatten(2)
        return self.head(x)


def model():
    return Pair().eval()
'''
IDS = PAIR + '''

def example_inputs():
    return torch.randint(0, 64, (2, 7)), torch.randint(0, 64, (2, 5))


class Bytes:
    def encode(self, text):
        return [b - 64 for b in text.encode()]

    def decode(self, ids):
        return bytes(i + 64 for i in ids).decode(errors="replace")
'''
FEATURES = PAIR + '''

def model():
    return Pair(channels=4).eval()


def example_inputs():
    return torch.randn(2, 7, 4), torch.randint(0, 64, (2, 5))
'''


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.chdir(tmp_path)
    Path("pair.py").write_text(IDS)
    Path("speaking.py").write_text(IDS + "\n\ntokenizer = Bytes\n")
    Path("features.py").write_text(FEATURES)


def made(text: str) -> nn.Module:
    space: dict[str, Any] = {}
    exec(text, space)
    found: nn.Module = space["model"]()
    return found


def alone(model: nn.Module, source: Any, prompt: list[int], n: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(torch.as_tensor(source)[None], ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


def generated(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> list[dict[str, Any]]:
    assert run(["generate", *argv, "--json", "--no-verify", "--max-new-tokens", "8"]) == code
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["results"]
    return found


def test_one_source_for_all_or_one_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    model = made(IDS)
    a, b = generated(capsys, "pair.py", "--prompt", "1 2", "--prompt", "3", "--source", "5 6 7")
    assert a["tokens"] == alone(model, [5, 6, 7], [1, 2], 8) and b["tokens"] == alone(model, [5, 6, 7], [3], 8)
    a, b = generated(capsys, "pair.py", "--prompt", "1 2", "--prompt", "1 2", "--source", "5 6 7", "--source", "40")
    assert a["tokens"] == alone(model, [5, 6, 7], [1, 2], 8) and b["tokens"] == alone(model, [40], [1, 2], 8)
    assert a["tokens"] != b["tokens"], "the source has no effect, so this says nothing"


def test_sources_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    model = made(IDS)
    Path("sub").mkdir()
    np.save("sub/source.npy", np.array([9, 8, 7]))
    torch.save({"source": torch.tensor([[4, 3]])}, "sub/source.pt")
    lines = [
        {"prompt": [1, 2], "source": [5, 6, 7]},
        {"prompt": [1, 2], "source": {"source": [40]}},
        {"prompt": [1, 2], "source_file": "source.npy"},
        {"prompt": [1, 2], "source_file": "source.pt", "max_new_tokens": 3},
        [1, 2],
    ]
    Path("sub/lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    results = generated(capsys, "pair.py", "--prompts", "sub/lines.jsonl", "--source", "11 12")
    sources, counts = ([5, 6, 7], [40], [9, 8, 7], [4, 3], [11, 12]), (8, 8, 8, 3, 8)
    assert [r["tokens"] for r in results] == [alone(model, s, [1, 2], n) for s, n in zip(sources, counts, strict=True)]
    assert len({tuple(r["tokens"]) for r in results}) > 2


def test_a_tokenizer_reads_sources_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("lines.jsonl").write_text(json.dumps({"prompt": "AB", "source": "EFG"}))
    one, two = generated(capsys, "speaking.py:model", "--prompt", "AB", "--source", "EFG", "--prompts", "lines.jsonl")
    assert one["tokens"] == two["tokens"] == alone(made(IDS), [5, 6, 7], [1, 2], 8)


def test_numbers_and_files_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    model = made(FEATURES)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    np.save("x.npy", x.numpy())
    Path("lines.jsonl").write_text(json.dumps({"prompt": [1], "source": x.tolist()}))
    one, two = generated(capsys, "features.py", "--prompt", "1", "--source-file", "x.npy", "--prompts", "lines.jsonl")
    assert one["tokens"] == two["tokens"] == alone(model, x, [1], 8)


BAD = {
    "none": ({"prompt": [1]}, "The model reads another sequence (source), and the prompt has no source; give --source, or `source` in its line."),
    "empty": ({"prompt": [1], "source": []}, 'source is []; expected "text", [1, 2, 3], numbers in lists'),
    "text": ({"prompt": [1], "source": "hello"}, "'hello' is text, and the model has no tokenizer"),
    "two": ({"prompt": [1], "source": [1], "source_file": "x.npy"}, "The line has source and source_file; supported is one of them."),
    "name": ({"prompt": [1], "source": {"ids": [1]}}, "The source has ids; the model reads source."),
    "ragged": ({"prompt": [1], "source": [[1], [2, 3]]}, "The source's source is no tensor: ValueError: "),
    "axes": ({"prompt": [1], "source": [[[1]]]}, "The source's source is [1, 1, 1]; the model reads 2 axes, a batch of one first"),
    "batch": ({"prompt": [1], "source": [[1], [2]]}, "The source's source is [2, 1]; the model reads 2 axes, a batch of one first"),
    "halves": ({"prompt": [1], "source": [0.5]}, "The source's source has numbers that are not whole; the model reads int64."),
    "file": ({"prompt": [1], "source_file": "gone.npy"}, "gone.npy cannot be read: FileNotFoundError"),
    "kind": ({"prompt": [1], "source_file": "pair.py"}, "pair.py is no file of a tensor; supported are .npy and .pt."),
    "no name": ({"prompt": [1], "source_file": 3}, "source_file is 3; it must be the name of a file."),
}


def test_a_source_that_does_not_fit_is_one_sentence_and_the_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [x for x, _ in BAD.values()] + [{"prompt": [1, 2], "source": [5, 6, 7]}]
    Path("lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    *bad, good = generated(capsys, "pair.py", "--prompts", "lines.jsonl", code=1)
    assert good["error"] is None and good["tokens"] == alone(made(IDS), [5, 6, 7], [1, 2], 8)
    for result, (name, (_, words)) in zip(bad, BAD.items(), strict=True):
        assert result["error"] and result["error"].startswith(words), (name, result["error"])


def test_options_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*argv: str) -> str:
        assert run(["generate", *argv]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "There are 2 sources and 1 of --prompt; give one for all, or one for each." in said("pair.py", "--prompt", "1", "--source", "1", "--source", "2")
    assert "Sources are given by --source and by --source-file; supported is one of the two." in said("pair.py", "--prompt", "1", "--source", "1", "--source-file", "x.npy")


def test_a_decoder_alone_takes_no_source(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = generated(capsys, f"{decoder}:model", "--prompt", "1", "--source", "1", code=1)
    assert result["error"] == "The model reads no other sequence, and the prompt has a source."
