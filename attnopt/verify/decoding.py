"""A decoder with its past in another runtime: prompts from nothing, then token by token, beside the original."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.capture.with_past import WithPast, positions_of
from attnopt.report import Check, Verdict
from attnopt.verify.budget import computing_dtype, judge
from attnopt.verify.compare import leaves
from attnopt.verify.modules import double, float64_copy, in_float64
from attnopt.verify.packed import LONG

STEPS = 3
"""Tokens that are decoded one by one after each prompt."""
LENGTH = 7

PADDINGS = {"a prompt, batch of one": (1, None), "no padding": (2, None), "left padding": (3, slice(0, 3)), "right padding": (3, slice(-2, None))}
"""Batch, and the places of the first sequence's prompt that are padding."""


def verify_decoding(original: WithPast, run: Callable[..., Any], ids: Tensor, past: Sequence[Tensor], window: int = 0) -> Verdict:
    """Each prompt is run with an empty past and continued by ``STEPS`` tokens drawn from ``ids``, each run with its own past; all results of all steps are compared.

    ``run`` takes the original's arguments and gives its results in their order; ``past`` are tensors of the shape of a past. A padded token of the prompt is hidden from
    all later ones, whose positions go on after the tokens that are there. Prompts are longer than ``window``, the longest of the model, where that is not above ``LONG``.
    """
    exact, why = float64_copy(original)
    checks: list[Check] = []
    drawn = torch.Generator().manual_seed(5)
    vocabulary = ids.flatten()
    length = max(LENGTH, window + 2 if window <= LONG else 0)
    for name, (batch, padded) in PADDINGS.items():
        tokens = vocabulary[torch.randint(0, vocabulary.numel(), (batch, length + STEPS), generator=drawn)]
        mask = torch.ones_like(tokens)
        if padded is not None:
            mask[0, :length][padded] = 0
        mine = theirs = original.empty_past(past, batch)
        exactly = double(mine)
        for step in range(STEPS + 1):
            start, end = (0, length) if step == 0 else (length + step - 1, length + step)
            call: dict[str, Any] = {"input_ids": tokens[:, start:end], "attention_mask": mask[:, :end]}
            if original.takes_positions:
                call["position_ids"] = positions_of(mask[:, :end])[:, start:]
            with torch.no_grad():
                expected = leaves(original(**call, past_key_values=mine))
                truth: list[Any] | None = None
                if exact is not None:
                    found, why = in_float64(exact, **call, past_key_values=exactly)
                    truth, exact = (None, None) if why else (leaves(found), exact)
            got = leaves(run(**call, past_key_values=theirs))
            text = "decoding" if truth is not None else f"decoding, against the original at its own dtype ({why})"
            checks.append(judge(f"{name}: {'prompt' if step == 0 else f'token {step}'}", got, expected, truth, computing_dtype(expected), detail=text))
            mine, theirs = expected[1:], got[1:]
            exactly = [] if truth is None else truth[1:]
    return Verdict(all(c.passed for c in checks), checks)
