"""``attnopt generate`` as a user meets it: texts and token ids, good prompts beside bad ones, and what is printed where."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoder import DECODER

from attnopt.cli.main import run

BYTES = """

class Bytes:
    def encode(self, text):
        if "!" in text:
            raise ValueError("no exclamations")
        return [b - 64 for b in text.encode()]

    def decode(self, ids):
        return bytes(i + 64 for i in ids).decode(errors="replace")


tokenizer = Bytes
"""
"""Ids 0 to 63 are the bytes from ``@`` on."""


@pytest.fixture
def speaking(decoder: str, tmp_path: Path) -> str:
    (tmp_path / "speaking.py").write_text(DECODER + BYTES)
    return "speaking.py:model"


def alone(prompt: list[int], n: int) -> list[int]:
    """Greedily, by the model as the file has it."""
    space: dict[str, Any] = {}
    exec(DECODER, space)
    model, ids = space["model"](), torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


def generated(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    assert run(["generate", *argv, "--json", "--no-verify"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_one_prompt_is_written_as_it_comes(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", f"{decoder}:model", "--prompt", "1 2, 3", "--max-new-tokens", "9"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1] == " ".join(map(str, alone([1, 2, 3], 9))) and err == ""
    assert "9 steps; cache of 1 pages of 16 tokens" in lines[2]
    assert lines[-1].startswith("Done: 1 of 1 prompt, 9 tokens in ") and "tokens/s, the first after " in lines[-1]


@pytest.mark.parametrize("layout", ["paged", "contiguous"])
def test_prompts_of_a_file_have_their_own_rules(decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    first = alone([1, 2, 3], 9)
    lines = [
        "[1, 2, 3]",
        "",
        '{"prompt": [4, 5], "max_new_tokens": 3}',
        f'{{"prompt": [1, 2, 3], "stop": {first[4]}}}',
        '{"prompt": [7], "temperature": 1.5, "seed": 3, "top_k": 5}',
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    facts = generated(
        capsys, f"{decoder}:model", "--prompts", "prompts.jsonl", "--prompt", "9 9", "--max-new-tokens", "9", "--batch", "2", "--kv-cache", layout
    )
    one, whole, short, stopped, drawn = facts["results"]
    assert one["tokens"] == alone([9, 9], 9) and one["name"] == "prompt 0"
    assert (whole["tokens"], whole["finish_reason"], whole["name"]) == (first, "length", "prompt 1 (prompts.jsonl:1)")
    assert (short["tokens"], short["name"]) == (alone([4, 5], 3), "prompt 2 (prompts.jsonl:3)")
    assert stopped["tokens"] == first[: first.index(first[4]) + 1] and stopped["finish_reason"] == "stop"
    assert drawn["seed"] == 3 and len(drawn["tokens"]) == 9
    again = generated(capsys, f"{decoder}:model", "--prompt", "7", "--max-new-tokens", "9", "--temperature", "1.5", "--seed", "3", "--top-k", "5")
    assert again["results"][0]["tokens"] == drawn["tokens"], "what else ran at once, and the layout, are nothing to a request"
    assert facts["statistics"]["generated"] == sum(len(x["tokens"]) for x in facts["results"]) and facts["exit_code"] == 0
    assert facts["cache"]["layout"] == layout and facts["cache"]["page_size"] == (16 if layout == "paged" else 12)


def test_a_bad_prompt_is_told_in_one_sentence_and_the_others_get_their_tokens(decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "[1, 64]": "The prompt has the token id 64; ids must be from 0 to 63.",
        "[1, -1]": "The prompt has the token id -1; ids must be from 0 to 63.",
        json.dumps([1] * 49): "The prompt has 49 tokens, and the model has positions for at most 48.",
        "[]": "The prompt is empty; it must have at least one token.",
        '"hello"': "'hello' is text, and the model has no tokenizer; token ids such as '1 2 3' can be given, or `tokenizer` in the model's file.",
        "{": "The line is not valid JSON: Expecting property name enclosed in double quotes (column 2).",
        '{"text": [1]}': "The line has the key 'text'; supported are prompt, stop, source, source_file, max_new_tokens, temperature, top_k, top_p, seed.",
        '{"seed": 1}': 'The line has no prompt; expected "text", [1, 2, 3], or {"prompt": ...} with one of these.',
        "[1.5]": 'The line has no prompt; expected "text", [1, 2, 3], or {"prompt": ...} with one of these.',
        '{"prompt": [1], "top_p": 0}': "top_p is 0; it must be above 0 and at most 1.",
        '{"prompt": [1], "max_new_tokens": 2.5}': "max_new_tokens is 2.5; it must be a whole number.",
        '{"prompt": [1], "temperature": "hot"}': 'temperature is "hot"; it must be a number.',
        '{"prompt": [1], "stop": {}}': "stop is {}; it must be a text, a token id, or a list of these.",
        '{"prompt": [1], "stop": "end"}': "The stop 'end' is text, and the model has no tokenizer; a token id can be given.",
    }
    (tmp_path / "prompts.jsonl").write_text("\n".join(["[1, 2, 3]", *bad, "[4, 5]"]))
    assert run(["generate", f"{decoder}:model", "--prompts", "prompts.jsonl", "--max-new-tokens", "5", "--no-verify"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"error: prompt {i} (prompts.jsonl:{i + 1}): {text}" for i, text in enumerate(bad.values(), 1)]
    lines = out.splitlines()
    assert lines[1:5] == [
        "prompt 0 (prompts.jsonl:1) 3 tokens, then 5 (length)",
        " ".join(map(str, alone([1, 2, 3], 5))),
        "prompt 15 (prompts.jsonl:16) 2 tokens, then 5 (length)",
        " ".join(map(str, alone([4, 5], 5))),
    ]
    assert lines[-1].startswith("Not done: 2 of 16 prompts, 10 tokens in ")
    facts = generated(capsys, f"{decoder}:model", "--prompts", "prompts.jsonl", "--max-new-tokens", "5", code=1)
    assert [x["error"] for x in facts["results"]] == [None, *bad.values(), None] and facts["exit_code"] == 1


def test_a_prompt_that_the_cache_can_never_hold_is_told_and_the_others_run(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    long = " ".join(["5"] * 20)
    good, bad = generated(capsys, f"{decoder}:model", "--prompt", "1 2 3", "--prompt", long, "--max-new-tokens", "4", "--cache-size", "4KiB", code=1)["results"]
    assert good["tokens"] == alone([1, 2, 3], 4) and bad["tokens"] == []
    assert bad["error"] == "The prompt has 20 tokens, and the cache of 1 pages of 16 can hold at most 16."


def test_the_example_file_of_prompts_runs(capsys: pytest.CaptureFixture[str]) -> None:
    examples = Path(__file__).parents[2] / "examples"
    results = generated(
        capsys, str(examples / "nanogpt.py"), "--input", "idx=int64[2,64]", "--prompts", str(examples / "prompts.jsonl"), "--max-new-tokens", "24"
    )["results"]
    assert [(len(x["tokens"]), x["finish_reason"]) for x in results[:3]] == [(24, "length"), (8, "length"), (24, "length")]
    assert results[3]["tokens"] == results[0]["tokens"][: len(results[3]["tokens"])]


def test_texts_go_through_the_tokenizer_of_the_file(speaking: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = bytes(i + 64 for i in alone([1, 2, 3], 8)).decode(errors="replace")
    facts = generated(capsys, speaking, "--prompt", "ABC", "--prompt", "no!", "--prompt", "ABC", "--max-new-tokens", "8", code=1)
    first, failed, second = facts["results"]
    assert first["text"] == second["text"] == said and first["prompt_tokens"] == 3
    assert failed["error"] == "The tokenizer failed: ValueError: no exclamations"
    (one,) = generated(capsys, speaking, "--prompt", "1 2 3", "--ids", "--max-new-tokens", "8")["results"]
    assert one["text"] == said
    assert "'ABC' is text, and --ids says that prompts are token ids" in generated(capsys, speaking, "--prompt", "ABC", "--ids", code=1)["results"][0]["error"]
    (ended,) = generated(capsys, speaking, "--prompt", "ABC", "--max-new-tokens", "8", "--stop", said[3:5])["results"]
    assert ended["text"] == said[: said.index(said[3:5])] and ended["finish_reason"] == "stop" and len(ended["tokens"]) < 8
    monkeypatch.setattr(sys, "stdin", io.StringIO('"ABC"\n'))
    assert run(["generate", speaking, "--prompts", "-", "--max-new-tokens", "8", "--no-verify"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == said


def test_a_tokenizer_that_fails_on_an_answer_ends_that_request_alone(speaking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (tmp_path / "speaking.py").read_text().replace("bytes(i + 64 for i in ids)", "bytes(i + (64 if len(ids) < 2 else 999) for i in ids)")
    (tmp_path / "speaking.py").write_text(text)
    long, short = generated(capsys, speaking, "--prompts", _file(tmp_path, '"ABC"', '{"prompt": "ABC", "max_new_tokens": 1}'), code=1)["results"]
    assert long["error"].startswith("The tokenizer failed: ValueError: bytes must be in range") and short["error"] is None and short["text"]


def _file(folder: Path, *lines: str) -> str:
    (folder / "some.jsonl").write_text("\n".join(lines))
    return str(folder / "some.jsonl")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([":averaging", "--prompt", "1"], "Decoder cannot be served from a KV cache: aten::mean"),
        (
            [":model", "--prompt", "1", "--cache-size", "4000"],
            "The cache may take 4000 bytes, and one page of 16 tokens takes 4096 over 2 layers; it must hold at least one.",
        ),
        ([":model", "--prompt", "1", "--cache-size", "900TiB"], "which could not be allocated"),
        ([":model"], "There is nothing to continue: give --prompt or --prompts FILE.jsonl."),
        ([":model", "--prompts", "none.jsonl"], "--prompts none.jsonl cannot be read: No such file or directory."),
        ([":model", "--prompts", "empty.jsonl"], "empty.jsonl holds no prompts: expected one a line."),
        ([":model", "--prompt", "1", "--top-p", "2"], "top_p is 2.0; it must be above 0 and at most 1."),
        ([":model", "--prompt", "1", "--max-new-tokens", "0"], "max_new_tokens is 0; it must be at least 1."),
        ([":model", "--prompt", "1", "--stop", "end"], "The stop 'end' is text, and the model has no tokenizer; a token id can be given."),
        ([":model", "--prompt", "1", "--backend", "flex"], "There is no backend 'flex' for a paged cache"),
    ],
    ids=["not-causal", "less-than-a-page", "more-than-memory", "no-prompt", "no-file", "empty-file", "top-p", "no-tokens", "stop", "backend"],
)
def test_what_no_prompt_can_run_with_is_one_clear_error(decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    assert run(["generate", decoder + argv[0], *argv[1:]]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and words in lines[0] and all(x.startswith("hint: ") for x in lines[1:])
    assert out == "" and "Traceback" not in err


def test_a_tokenizer_that_is_none_is_told(decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.py").write_text(DECODER + "\ntokenizer = 3\n")
    assert run(["generate", "wrong.py:model", "--prompt", "1"]) == 2
    assert "wrong.py:tokenizer is of type int: expected an object with encode(text) and decode(ids)" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "words"), [("12 parrots", "'12 parrots' is no size"), ("", "'' is no size")])
def test_a_size_that_is_none_is_bad_usage(decoder: str, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    assert run(["generate", decoder, "--prompt", "1", "--cache-size", text]) == 2
    assert words in capsys.readouterr().err


# ---- a Hugging Face folder


def test_a_folder_speaks_with_its_tokenizer_as_its_own_generate_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["the cache keeps", "für alle", "keys and values of the past, and of the keys"]
    argv = [x for text in texts for x in ("--prompt", text)]
    facts = generated(capsys, str(folder), *argv, "--max-new-tokens", "12")
    for text, found in zip(texts, facts["results"], strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert found["tokens"] == expected and found["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_folder_says_with_which_token_a_text_ends(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the", return_tensors="pt").input_ids
    first = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    end = first[4]
    at = first.index(end)
    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [end, 0]}))
    (ended,) = generated(capsys, str(tmp_path), "--prompt", "the", "--max-new-tokens", "12")["results"]
    assert ended["tokens"] == first[: at + 1] and ended["finish_reason"] == "stop"
    (on,) = generated(capsys, str(tmp_path), "--prompt", "the", "--max-new-tokens", "12", "--ignore-end")["results"]
    assert on["tokens"] == first


def test_a_folder_that_names_no_class_gets_a_head_and_one_without_a_head_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "architectures"}))
    facts = generated(capsys, str(tmp_path), "--prompt", "1 2", "--max-new-tokens", "2")
    assert "LlamaForCausalLM" in facts["model"] and "random" in facts["notes"][0]
    (tmp_path / "config.json").write_text(json.dumps({**settings, "architectures": ["LlamaModel"]}))
    assert run(["generate", str(tmp_path), "--prompt", "1 2"]) == 2
    assert "(LlamaModel) has no head that gives logits of tokens" in capsys.readouterr().err


def test_a_bar_with_statistics_stands_on_a_terminal_and_results_stay_where_they_were_sent(
    decoder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(["generate", f"{decoder}:model", "--prompt", "1 2 3", "--prompt", "4", "--max-new-tokens", "20", "--no-verify"]) == 0
    out, err = capsys.readouterr()
    assert "tokens/s" in err and "running" in err and "cache" in err
    assert err.count("\n") < 300, "the bar of the capture sees itself"
    assert " ".join(map(str, alone([1, 2, 3], 20))) in out and " ".join(map(str, alone([4], 20))) in out
