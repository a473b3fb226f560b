"""One call of ``attnopt.integrations.calls`` after another, against float64. A script too, for a process in which kernels are interpreted."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from attnopt.integrations import calls


def truth(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None, sinks: Tensor | None, bias: Tensor | None) -> Tensor:
    """float64 [B, Hq, Sq, Dv], with the probabilities written down."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = (s if bias is None else s + bias.double()).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double().view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1)
    return s.softmax(-1).nan_to_num(0.0)[..., : k.shape[2]] @ v


def kernels_of_calls(Sq: int) -> list[str]:
    """Compares calls of every form, and says which kernels ran them."""
    kernels: list[str] = []
    plan = calls.plan

    def noted(*call: Any) -> tuple[str, str]:
        planned = plan(*call)
        kernels.append(planned[1])
        return planned

    B, Hq, Hkv, Skv, D, Dv = 2, 4, 2, 33, 16, 8
    torch.manual_seed(Sq)
    q, k, v = torch.randn(B, Hq, Sq, D), torch.randn(B, Hkv, Skv, D), torch.randn(B, Hkv, Skv, Dv)
    mask = torch.rand(B, 1, Sq, Skv) > 0.4
    mask[1, 0, 0] = False
    every = torch.ones(1, 1, Sq, Skv, dtype=torch.bool)
    sinks, bias = torch.randn(Hq), torch.randn(1, Hq, Sq, Skv)
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({}, every),
        ({"mask": mask}, mask),
        ({"mask": mask, "softcap": 2.0, "sinks": sinks, "scale": 0.7}, mask),
        ({"mask": mask, "bias": bias}, mask),
        ({"mask": torch.where(mask[:1], 0.0, -1.0)}, every),
    ]
    if Sq > 1:
        cases.append(({"causal": True, "bias": bias}, torch.ones(Sq, Skv, dtype=torch.bool).tril()))
    calls.plan = noted
    try:
        for given, seen in cases:
            added = given.get("bias") if given.get("mask") is None or given["mask"].dtype == torch.bool else given["mask"]
            expected = truth(q, k, v, seen, given.get("scale", D**-0.5), given.get("softcap"), given.get("sinks"), added)
            torch.testing.assert_close(calls.attention(q, k, v, **given).double(), expected, rtol=1e-5, atol=1e-5)
    finally:
        calls.plan = plan
    return kernels


if __name__ == "__main__":
    sys.stdout.write(" ".join(kernels_of_calls(int(sys.argv[1]))))
