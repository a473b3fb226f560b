"""The generated Triton kernels under Triton's interpreter, against attention written out in float64."""

from __future__ import annotations

import pytest

from tests.kernels.cases import CASES
from tests.kernels.conftest import Run
from tests.kernels.mask_cases import MASKS
from tests.kernels.operations import OPERATION_CASES

POISONED = ("padding-long", "padding-by-lengths", "documents-causal-padded-window", "packed")
"""Masks with keys that no query sees, where rows without a key do not read all values."""

# One of each kind of mask, score, load and policy in float32; all others in half precision, which the interpreter has done sooner.
EXACT = [
    "full-Dv-more",
    "causal-top-left-Sq-more",
    "causal-bottom-right-empty-rows-uniform",
    "window-both-sides",
    "alibi-causal",
    "dense-bias-finfo-min",
    "relative-buckets",
    "sinks-padding",
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_case(interpreted: Run, name: str, dtype: str) -> None:
    interpreted(name, dtype)


@pytest.mark.parametrize("name", list(MASKS))
def test_mask(interpreted: Run, name: str) -> None:
    assert interpreted(name, "float32") == (name in POISONED)


@pytest.mark.parametrize("name", ["documents-causal-padded-window", "block-table", "dense-mask"])
def test_mask_in_half_precision(interpreted: Run, name: str) -> None:
    interpreted(name, "bfloat16")


@pytest.mark.parametrize("name", list(OPERATION_CASES))
def test_operation(interpreted: Run, name: str) -> None:
    interpreted(name, "float32")


@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_gradients(interpreted: Run, name: str) -> None:
    interpreted(name, "float32" if name in EXACT else "float16", "backward")


@pytest.mark.parametrize("name", ["rate", "replay", "checkpointing"])
def test_dropout(interpreted: Run, name: str) -> None:
    interpreted("check", name)
