"""What the report says of a choice by the table of ``test_choice.py``, word for word, on a device of capability 9.0 where everything but flash-attn and cuDNN is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.kernels import choice, device, registry
from attnopt.kernels.external import flash_attn
from tests.kernels.cases import BY_NAME
from tests.kernels.mask_cases import MASKS
from tests.kernels.test_choice import TABLE

pytest.importorskip("triton", reason="triton is not installed")
TEXTS = [
    ("full", 64, "cuda", "bfloat16", False, 8192, "gluon", "generated Hopper flash forward"),
    ("causal-GQA", 128, "cuda", "bfloat16", False, 8192, "triton", "generated flash forward"),
    ("causal-GQA", 128, "cuda", "bfloat16", True, 2048, "sdpa", "the fused kernel that PyTorch picks, causal without a mask tensor, 1.22x over triton at this shape (H200 table), backward by reference (not cudnn: there is none)"),
    ("alibi-causal", 128, "cuda", "bfloat16", False, 8192, "gluon", "generated Hopper flash forward"),
    ("alibi-causal", 64, "cuda", "bfloat16", True, 2048, "gluon", "generated Hopper flash forward, backward by triton"),
    ("relative-buckets", 64, "cuda", "bfloat16", False, 2048, "gluon", "generated Hopper flash forward"),
    ("window-causal", 128, "cuda", "bfloat16", False, 8192, "triton", "generated flash forward"),
    ("softcap-causal", 128, "cuda", "bfloat16", False, 8192, "gluon", "generated Hopper flash forward"),
    ("documents", 128, "cuda", "bfloat16", True, 8192, "gluon", "generated Hopper flash forward, skips the blocks that the mask hides, backward by triton"),
    ("padding-zero", 64, "cuda", "bfloat16", False, 2048, "gluon", "generated Hopper flash forward, skips the blocks that the mask hides"),
    ("dense-bias", 64, "cuda", "bfloat16", False, 2048, "gluon", "generated Hopper flash forward"),
    ("causal-GQA", 128, "cuda", "float32", True, 2048, "triton", "generated flash forward, backward by triton (not gluon: it computes float16 and bfloat16, and the query is float32)"),
    ("causal-GQA", 64, "cpu", "float32", False, 2048, "sdpa", "CPU flash, causal without a mask tensor"),
    ("relative-buckets", 64, "cpu", "float32", True, 2048, "sdpa", "CPU flash, mask built tile by tile, backward by reference"),
]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from attnopt.kernels.gluon import launch as hopper
    from attnopt.kernels.triton import launch

    monkeypatch.setattr(device, "arch", lambda: "sm_90")
    monkeypatch.setattr(device, "capability", lambda: (9, 0))
    monkeypatch.setattr(flash_attn, "newest", lambda: 0)
    monkeypatch.setattr(flash_attn, "generation", lambda spec, backward=False: 0)
    for module in (hopper, launch):
        monkeypatch.setattr(module, "available", lambda: None)
    monkeypatch.setitem(registry._BACKENDS, "cudnn", replace(registry._BACKENDS["cudnn"], available=lambda: "there is none"))
    rows = choice.parse(TABLE)
    monkeypatch.setattr(choice, "table", lambda: rows)
    choice.nearest.cache_clear()  # it holds rows of other tests' tables
    yield
    choice.nearest.cache_clear()


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(("name", "D", "where", "dtype", "training", "S", "kernel", "why"), TEXTS)
def test_the_reason(name: str, D: int, where: str, dtype: str, training: bool, S: int, kernel: str, why: str) -> None:
    spec = (BY_NAME | MASKS)[name].spec()
    spec = spec.replace(dims=replace(spec.dims, D=E.const(D), Dv=E.const(D)))
    for _ in range(2):
        assert registry.choose(spec, device=where, dtype=getattr(torch, dtype), training=training, lengths=(S, S)) == (kernel, why)
