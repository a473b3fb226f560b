"""Compiles generated kernels for a GPU that need not be there. Run as ``python -m tests.kernels.compiler ARCH '[[name, D, dtype, Sq], ...]'``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.triton import launch
from attnopt.kernels.triton.flash_forward import MAP_TENSORS
from tests.kernels.cases import BY_NAME, Case, causal, softcap, window

SHARED = {80: 163 * 1024, 90: 227 * 1024}
EXTRA = {"softcap-window": Case("softcap-window", score=softcap, mask=lambda d: E.all_of(causal(d), window(d, 1023, None)))}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def signature(spec: AttentionSpec, dtype: torch.dtype) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and alignments of contiguous tensors, as a launch would find them."""
    source = launch.kernel_for(spec).source
    kinds = [x.kind for x in spec.loads] + [p.kind for p in source.parts]
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(source.arguments):
        if name in ("Q", "K", "V", "O", "LSE"):
            types[name] = f"*{NAMES[dtype] if name != 'LSE' else 'fp32'}"
        elif name in MAP_TENSORS:
            types[name] = "*i32"
        elif re.fullmatch(r"L\d+", name):
            types[name] = {"bool": "*u8", "int": "*i64", "float": "*fp32"}[kinds[int(name[1:])]]
        elif name in ("Q_s3", "K_s3", "V_s3", "O_s3"):
            types[name], constants[name] = "constexpr", 1
            continue
        else:
            types[name] = "i32"
        if types[name].startswith("*") or re.search(r"_s\d", name):
            aligned[(i,)] = [["tt.divisibility", 16]]
    return types, constants, aligned


def compile_one(arch: int, name: str, D: int, dtype_name: str, Sq: int) -> dict[str, Any]:
    spec = (BY_NAME.get(name) or EXTRA[name]).spec()
    dtype = getattr(torch, dtype_name)
    kernel = launch.kernel_for(spec)
    c = launch.config(D, D, Sq, dtype, SHARED[arch], kernel.source.heavy)
    types, constants, aligned = signature(spec, dtype)
    constants |= launch.constants(D, D, c, dtype)
    types |= dict.fromkeys(launch.CONSTEXPRS, "constexpr")
    source = ASTSource(fn=kernel.function, signature=types, constexprs=constants, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": c.num_warps, "num_stages": c.num_stages})
    return {"kernel": f"{name} D{D} {dtype_name} Sq{Sq} sm_{arch} {c}", "shared": done.metadata.shared, "spills": spills(done.asm["ptx"], arch)}


def spills(ptx: str, arch: int) -> str:
    """What the assembler says about the stack."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "kernel.ptx"
        text.write_text(ptx)
        name = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
        done = subprocess.run([assembler, "-v", f"--gpu-name={name}", text, "-o", Path(folder) / "kernel.cubin"], capture_output=True, text=True, check=True)
    found = re.search(r"\d+ bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads", done.stderr)
    assert found is not None, done.stderr
    return found[0]


if __name__ == "__main__":
    arch = int(sys.argv[1])
    print(json.dumps([compile_one(arch, *k) for k in json.loads(sys.argv[2])]))
