"""Real architectures: every attention replaced, verified, recognised, and right at sizes it was not captured with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import TINY, B, S, build
from torch.utils import _pytree as pytree

import attnopt

CASES = [(name, mask) for name, t in TINY.items() for mask in ((False, True) if t.padded else (False,))]


def tensors(out: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point()]


@pytest.mark.parametrize(("name", "mask"), CASES, ids=[f"{n}-{'padded' if m else 'unpadded'}" for n, m in CASES])
def test_every_attention_is_replaced(name: str, mask: bool) -> None:
    tiny = TINY[name]
    model = build(name)
    optimized = attnopt.optimize(model, kwargs=tiny.inputs(mask, B, S))
    report = optimized.attnopt_report
    assert len(report.sites) == tiny.sites
    assert {s.status for s in report.sites} == {"replaced"}, str(report)
    assert report.verdict.passed is True, [c for c in report.verdict.checks if not c.passed]
    for site in report.sites:
        spec = site.spec
        assert spec is not None
        for part, facts in tiny.expect.items():
            if part in site.name:
                assert {f: getattr(spec, f) for f in facts} == facts, f"{site.name}: {spec}"
        assert spec.key_padding == (mask and tiny.padded_sites in site.name.lower()), f"{site.name}: {spec}"
        assert not spec.document
        assert spec.traits.mask_rest.is_const, f"{site.name}: {spec}"
    for b, s in ((3, 37), (1, 11)):
        inputs = tiny.inputs(mask, b, s)
        with torch.no_grad():
            want, got = tensors(model(**inputs)), tensors(optimized(**inputs))
        assert len(want) == len(got)
        for x, y in zip(want, got, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
    assert len(optimized.attnopt_report.sites) == tiny.sites
    assert not [r for r in report.remarks if r.code == "AO305"], "another size must not capture the model again"


def test_relative_bias_is_a_bucket_table() -> None:
    report = attnopt.inspect(build("t5"), TINY["t5"].inputs(True, B, S))
    biased = [s.spec.bias for s in report.sites if s.spec is not None and s.spec.bias is not None]
    assert len(biased) == 4
    for bias in biased:
        text = repr(bias)
        assert "[" in text and "log(" in text and "h]" in text, text
