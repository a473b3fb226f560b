"""``attnopt bench``: both models continue the same prompts, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnopt.cli import decode
from attnopt.cli.main import run
from attnopt.cli.measure import Measured


def measured(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert run(["bench", *argv, "--no-verify", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_model_without_a_cache_reads_the_whole_text_for_each_token(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = measured(capsys, f"{decoder}:model", "--decode", "--batch", "1,3", "--prompt-length", "4,9", "--new-tokens", "6", "--kv-cache", "contiguous")
    cases = facts["decode"]["cases"]
    assert facts["decode"]["original"] == "the whole text through the model for each token" and facts["cache"]["layout"] == "contiguous"
    assert [(x["batch"], x["prompt"], x["new"], x["same"]) for x in cases] == [(1, 4, 6, 1), (1, 9, 6, 1), (3, 4, 6, 3), (3, 9, 6, 3)]
    for x in cases:
        assert x["original_tokens_per_second"] == pytest.approx(x["batch"] * 6 / x["original"]["seconds"])
        assert x["speedup"] == pytest.approx(x["serving_tokens_per_second"] / x["original_tokens_per_second"])


def test_a_folder_s_model_generates_by_its_own_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = measured(capsys, str(folder), "--decode", "--batch", "2", "--prompt-length", "7", "--new-tokens", "9")
    (case,) = facts["decode"]["cases"]
    assert facts["decode"]["original"] == "its own generate(), with a cache" and (case["new"], case["same"]) == (9, 2)


def test_other_tokens_are_not_hidden(decoder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_whole_text", lambda model, serving, prompts, new: [[0] * new for _ in prompts])
    assert run(["bench", f"{decoder}:model", "--decode", "--batch", "2", "--prompt-length", "4", "--new-tokens", "5", "--no-verify"]) == 0
    out = capsys.readouterr().out
    assert "0 of 2" in out and "Generation (greedy, 5 new tokens each; the original by the whole text" in out
    assert out.splitlines()[-1].startswith("Done: ") and "at best (2 x 4 tokens)" in out.splitlines()[-1]


def test_a_rate_is_of_all_tokens_that_were_generated() -> None:
    case = decode.Decoded(4, 100, 50, Measured(2.0, None), Measured(0.5, None), 4)
    assert (case.rate(case.original), case.rate(case.serving), case.speedup) == (100.0, 400.0, 4.0)


def test_without_decode_a_forward_pass_is_measured(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = measured(capsys, f"{decoder}:model")
    assert facts["benchmark"]["what"] == "forward" and facts["benchmark"]["original"]["seconds"] > 0
    assert run(["bench", f"{decoder}:model", "--train", "--no-verify"]) == 0
    out = capsys.readouterr().out
    assert "forward + backward, median of" in out and out.splitlines()[-1].startswith("Done: ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([":model", "--batch", "2"], "--batch is for generation, and --decode was not given"),
        ([":model", "--decode", "--batch", "0,1"], "'0,1' is no list of numbers; expected one such as 1,4,16"),
        (
            [":model", "--decode", "--prompt-length", "20,40", "--new-tokens", "10"],
            "A prompt of 40 tokens and 10 new ones need 49 positions, and the model has 48.",
        ),
        ([":model", "--decode", "--train"], "A model that generates from a KV cache is in evaluation mode"),
        ([":averaging", "--decode"], "Decoder cannot be served from a KV cache: aten::mean"),
        (
            [":model", "--decode", "--prompt-length", "4", "--new-tokens", "4", "--cache-size", "1KiB"],
            "The cache may take 1024 bytes, and one page of 16 tokens takes 4096",
        ),
    ],
    ids=["no-decode", "numbers", "too-long", "train", "not-causal", "less-than-a-page"],
)
def test_what_cannot_be_measured_is_one_clear_error(decoder: str, capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert run(["bench", decoder + argv[0], *argv[1:], "--no-verify"]) == 2
    out, err = capsys.readouterr()
    assert words in err and "Traceback" not in out + err
