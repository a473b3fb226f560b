"""Compiles generated Gluon kernels for sm_90 without a GPU. Run as ``python -m tests.kernels.gluon_compiler '[[name, D, dtype, Skv], ...]'``."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from attnopt.kernels.gluon import launch
from attnopt.kernels.gluon.config import Config, bytes_of
from tests.kernels.compiler import NAMES, signature, spec_of, spills


def compile_one(name: str, D: int, dtype_name: str, Skv: int = 0, chosen: Config | None = None) -> dict[str, Any]:
    spec, dtype = spec_of(name), getattr(torch, dtype_name)
    kernel = launch.kernel_for(spec, D, D, Skv, chosen)
    source = kernel.source
    kinds = [x.kind for x in spec.loads] + [p.kind for p in source.parts]
    types, constants, aligned = signature(source.arguments, kinds, dtype)
    for argument, _, rows, columns in source.descriptors:
        layout = launch.layout(rows, columns, dtype)
        types[argument] = f"tensordesc<{NAMES[dtype]}[1, 1, {rows}, {columns}],{layout!r}>"
    done = triton.compile(
        GluonASTSource(kernel.function, types, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": kernel.config.registers_at_launch},
    )
    stack, hot = spills(done.asm["ptx"], 90)
    label = f"{name} D{D} {dtype_name} {kernel.config}"
    return {"kernel": label, "triton": triton.__version__, "shared": done.metadata.shared, "counted": bytes_of(kernel.config, D, D), "spills": stack, "hot": hot}


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        print(json.dumps(compile_one(*one)), flush=True)
