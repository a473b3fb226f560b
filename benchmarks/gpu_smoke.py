"""A first look on a CUDA device: do the examples optimize there in half precision, and what does it bring?

Each model is optimized on the device (with verification), then eager, optimized and, for the Llama example, the same model
written with PyTorch's scaled_dot_product_attention are timed in turn (CUDA events, medians), with peak memory.

    python benchmarks/gpu_smoke.py [--dtypes float16,bfloat16] [--length 4096]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from common import example, show, write
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt
from attnopt.cli.measure import Comparison, compare


def with_sdpa(llama: ModuleType, model: nn.Module) -> nn.Module:
    """A copy of the Llama example whose attentions call PyTorch's own, the way a person would write it."""

    def forward(self: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        B, S, _ = x.shape
        c = self.config
        q = self.q_proj(x).view(B, S, c.heads, c.head_size).transpose(1, 2)
        k = self.k_proj(x).view(B, S, c.kv_heads, c.head_size).transpose(1, 2)
        v = self.v_proj(x).view(B, S, c.kv_heads, c.head_size).transpose(1, 2)
        q, k = q * cos + llama.rotate_half(q) * sin, k * cos + llama.rotate_half(k) * sin
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).reshape(B, S, c.width))

    made = copy.deepcopy(model)
    attentions = [m for m in made.modules() if type(m).__name__ == "Attention"]
    assert attentions, "the example's attention class was renamed"
    for module in attentions:
        module.forward = partial(forward, module)  # type: ignore[method-assign]
    return made


def cases(length: int) -> dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]]:
    llama, nanogpt, scores = example("llama"), example("nanogpt"), example("custom_scores")
    x = torch.randn(2, length, scores.WIDTH, generator=torch.Generator().manual_seed(0))
    return {
        "llama": (llama.model, lambda: llama.example_inputs(2, length)),
        "nanogpt": (nanogpt.model, nanogpt.example_inputs),
        "alibi": (scores.alibi, lambda: x),
        "sliding window": (scores.sliding_window, lambda: x),
        "softcap": (scores.softcap, lambda: x),
    }


def measure(name: str, build: Callable[[], nn.Module], make_inputs: Callable[[], Any], dtype: torch.dtype) -> list[dict[str, Any]]:
    model = build().to("cuda", dtype)
    given = make_inputs()
    move = lambda t: t.cuda().to(dtype) if t.is_floating_point() else t.cuda()  # noqa: E731
    args = () if isinstance(given, dict) else (move(given),)
    kwargs = {k: move(v) for k, v in given.items()} if isinstance(given, dict) else {}
    optimized = attnopt.optimize(model, args, kwargs=kwargs)
    report = optimized.attnopt_report
    rows = [_row(name, dtype, "eager", compare(model, optimized, args, kwargs), report)]
    if name == "llama":
        rows.append(_row(name, dtype, "sdpa", compare(with_sdpa(example("llama"), model), optimized, args, kwargs), report))
    return rows


def _row(name: str, dtype: torch.dtype, peer: str, c: Comparison, report: Any) -> dict[str, Any]:
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "replaced": f"{len(report.replaced)}/{len(report.sites)}",
        "kernels": ", ".join(sorted({s.kernel for s in report.replaced})),
        "verdict": "unverified" if report.verdict.passed is None else "passed" if report.verdict.passed else "FAILED",
        "error": report.verdict.error,
        "budget": report.verdict.budget,
        "peer": peer,
        "peer ms": c.original.seconds * 1e3,
        "optimized ms": c.optimized.seconds * 1e3,
        "faster": c.speedup,
        "peer peak MiB": (c.original.peak_bytes or 0) / 2**20,
        "optimized peak MiB": (c.optimized.peak_bytes or 0) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtypes", default="float16,bfloat16")
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu_smoke.py needs a CUDA device, and PyTorch sees none.")
    rows = [
        row
        for dtype in options.dtypes.split(",")
        for name, (build, make_inputs) in cases(options.length).items()
        for row in measure(name, build, make_inputs, getattr(torch, dtype))
    ]
    show(f"CUDA, length {options.length}", rows)
    write("gpu_smoke", rows, length=options.length)
    if any(row["verdict"] == "FAILED" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
