"""Runs generated Triton kernels under Triton's interpreter: a process of its own, since the interpreter is chosen at import.

Reads one request a line from standard input, writes one JSON reply a line. Run as ``python -m tests.kernels.interpreter``.
A request is [name, dtype] for a forward, [name, dtype, "backward"] for its gradients, ["check", NAME] for one of ``CHECKS``, or
["paged", CHECK, ...] for one of those of ``paged_checks``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.runtime.interpreter as interpreter

from attnopt.kernels import reference
from attnopt.kernels.triton import launch, launch_backward
from attnopt.kernels.triton.launch_backward import BackwardConfig, Blocks
from tests.kernels import dropout_checks, paged_checks, shared_tables
from tests.kernels.cases import BY_NAME, Case
from tests.kernels.mask_cases import MASKS
from tests.kernels.operations import OPERATION_CASES
from tests.kernels.poison import poisoned

TOLERANCE = {"float32": 5e-6, "float16": 3e-3, "bfloat16": 2e-2}
GRADIENTS = {"float32": 2e-5, "float16": 1e-2}
"""Of the largest element: weights and their gradients are rounded to half precision before the products."""
SMALL_BLOCKS = BackwardConfig(Blocks(16, 32, 4, 1), Blocks(16, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1))
"""So small that even these attentions have blocks that are seen whole, cut and not at all."""


def upcast_products() -> None:
    """The interpreter multiplies the raw bits of bfloat16: give its products float32 instead."""
    original = interpreter.InterpreterBuilder.create_dot

    def widened(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        import triton.language as tl

        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *args, **kwargs):  # type: ignore[no-untyped-def]
        return original(self, widened(a), widened(b), d, *args, **kwargs)

    interpreter.InterpreterBuilder.create_dot = create_dot


def round_to_fp8() -> None:
    """The interpreter's own rounding to float8_e4m3fn loses a carry (7.96 becomes 4), and rounds halves up: let torch do it."""
    original = interpreter.InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self, src, dst_type, rounding_mode):  # type: ignore[no-untyped-def]
        import triton.language as tl

        if dst_type.scalar != tl.float8e4nv or src.dtype.scalar != tl.float32:
            return original(self, src, dst_type, rounding_mode)
        data = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(data, dst_type.scalar)

    interpreter.InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


EVERY: dict[str, Case] = BY_NAME | MASKS | OPERATION_CASES


def run(name: str, dtype: str, what: str = "forward", *rest: str) -> dict[str, object]:
    if name == "check":
        (dropout_checks.CHECKS | shared_tables.CHECKS)[dtype]()
        return {"ok": True, "poisoned": False}
    if name == "paged":
        paged_checks.CHECKS[dtype](what, *rest)
        return {"ok": True, "poisoned": True}
    case = EVERY[name]
    q, k, v, loads = case.tensors(getattr(torch, dtype))
    sizes, spec = list(case.sizes.values()), case.spec()
    o, lse = launch.attention(q, k, v, loads, sizes, spec)
    if what == "backward":
        return backward(case, q, k, v, loads, o, lse, dtype)
    want, want_lse = case.naive(q, k, v, loads)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(o.double(), want, atol=tolerance, rtol=tolerance, equal_nan=True)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-5)
    assert o.transpose(1, 2).is_contiguous() and o.dtype == q.dtype
    c = launch.config(q.shape[3], v.shape[3], q.shape[2], q.dtype, launch.SHARED_MEMORY_SM90, False)
    hidden = poisoned(case, q, k, v, loads, c.BLOCK_N) if name in MASKS else None
    if hidden is not None:
        again, _ = launch.attention(q, *hidden, loads, list(case.sizes.values()), case.spec())
        assert torch.equal(again.nan_to_num(7.0), o.nan_to_num(7.0)), "NaN leaks from keys that no query sees"
    return {"ok": True, "poisoned": hidden is not None}


def backward(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, loads: list[torch.Tensor], o: torch.Tensor, lse: torch.Tensor, dtype: str) -> dict[str, object]:
    """All gradients against those of the formula in float64."""
    sizes, spec = list(case.sizes.values()), case.spec()
    grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o.dtype)
    needs = [True] * 3 + [x.is_floating_point() for x in loads]
    got = launch_backward.gradients(grad, q, k, v, o, lse, loads, sizes, spec, 0, needs, SMALL_BLOCKS)
    # a sum with float32's least number means another thing in float64
    exact = torch.float64 if case.float64 else torch.float32
    wide = [x.to(exact) if x.is_floating_point() else x for x in loads]
    want = reference.gradients(grad.to(exact), q.to(exact), k.to(exact), v.to(exact), wide, sizes, spec, 0, needs)
    for a, b, like in zip(got, want, [q, k, v, *(x for x in loads if x.is_floating_point())], strict=True):
        assert a.dtype == like.dtype and a.shape == like.shape
        most = float(b.nan_to_num(0.0).abs().max())
        torch.testing.assert_close(a.to(exact), b, atol=GRADIENTS[dtype] * max(most, 0.1), rtol=GRADIENTS[dtype], equal_nan=True)
    return {"ok": True}


def main() -> None:
    torch.set_num_threads(1)
    # the interpreter computes with NumPy, which warns of what a GPU does in silence: infinities subtracted, sums that are zero
    warnings.simplefilter("ignore", RuntimeWarning)
    upcast_products()
    round_to_fp8()
    for line in sys.stdin:
        try:
            reply = run(*json.loads(line))
        except Exception:  # noqa: BLE001  (it is handed to the test, which fails with it)
            reply = {"ok": False, "error": traceback.format_exc()}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
