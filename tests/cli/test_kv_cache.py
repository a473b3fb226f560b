"""``attnopt optimize --kv-cache``: the report of a serving model, and what does not go together with it."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from attnopt.cli.main import app, run
from attnopt.config import OptimizeConfig


def test_every_field_of_the_configuration_has_an_option() -> None:
    options = {p.name for p in app.commands["optimize"].params}
    assert {f.name for f in fields(OptimizeConfig)} <= options


def test_the_report_tells_what_is_cached(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", f"{decoder}:model", "--kv-cache", "paged", "--no-benchmark"]) == 0
    lines = [" ".join(x.split()) for x in capsys.readouterr().out.splitlines()]
    assert "Cache (paged)" in lines and any("2 x 8" in x and "float32" in x and "all tokens" in x and "256" in x for x in lines)
    assert "256 bytes a token in all; a request may have 48 tokens at most, prompt included; 64 token ids." in lines
    assert any(x.startswith("attnopt generate decoder.py:model --prompt") for x in lines) and not any("--output" in x for x in lines)
    assert lines[-1].startswith("Done: 2 of 2 attentions replaced, verified: 3 checks")


def test_generation_is_measured_in_place_of_a_forward_pass(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", f"{decoder}:model", "--kv-cache", "paged", "--no-verify"]) == 0
    out = capsys.readouterr().out
    assert "Generation (greedy, 24 new tokens each; the original by the whole text" in out, "half of its positions"
    assert out.splitlines()[-1].startswith("Done: 2 of 2 attentions replaced, unverified, ") and "tokens/s where the original has" in out.splitlines()[-1]


def test_the_report_in_json(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", f"{decoder}:model", "--kv-cache", "contiguous", "--no-verify", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    cache = facts["cache"]
    assert [(x["batch"], x["prompt"], x["same"]) for x in facts["benchmark"]["cases"]] == [(1, 24, 1), (4, 24, 4)]
    assert (cache["layout"], cache["vocabulary"], cache["max_positions"], cache["bytes_per_token"]) == ("contiguous", 64, 48, 256)
    assert [(x["Hkv"], x["D"], x["Dv"], x["window"], x["dtype"], x["bytes"]) for x in cache["layers"]] == [(2, 8, 8, None, "float32", 128)] * 2


def test_scales_are_counted(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", f"{decoder}:model", "--kv-cache", "paged", "--kv-cache-dtype", "int8", "--no-verify", "--no-benchmark", "--json"]) == 0
    cache = json.loads(capsys.readouterr().out)["cache"]
    assert [(x["dtype"], x["bytes"]) for x in cache["layers"]] == [("int8", 2 * (8 + 8 + 2 * 4))] * 2 and cache["bytes_per_token"] == 96


def test_inspect_and_explain_take_it_too(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", f"{decoder}:model", "--kv-cache", "paged"]) == 0
    assert "AO104" in (text := capsys.readouterr().out) and "attnopt optimize decoder.py:model --kv-cache paged" in text
    assert run(["explain", f"{decoder}:averaging", "--kv-cache", "paged"]) == 0
    assert "AO214" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["decoder.py:averaging"], "Decoder cannot be served from a KV cache: aten::mean"),
        (["decoder.py:model", "--train"], "A model that generates from a KV cache is in evaluation mode, and --train asks for training mode"),
        (["decoder.py:model", "--output", "model.pt2"], "--kv-cache makes a serving model, which is not saved yet"),
        (["decoder.py:model", "--capture", "dynamo"], "capture is 'dynamo'; supported are 'auto' and 'export'"),
        (["decoder.py:model", "--backend", "sdpa"], "There is no backend 'sdpa' for a paged cache; the backends are triton, batched, reference, and 'auto'"),
    ],
    ids=["refused", "train", "output", "dynamo", "backend"],
)
def test_what_does_not_go_together_is_one_clear_error(decoder: str, capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert run(["optimize", *argv, "--kv-cache", "paged"]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and words in lines[0] and all(x.startswith("hint: ") for x in lines[1:])
    assert "Traceback" not in out + err


def test_an_unknown_layout_is_bad_usage(decoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", decoder, "--kv-cache", "dense"]) == 2
    assert "'dense' is not one of 'paged', 'contiguous'" in capsys.readouterr().err
