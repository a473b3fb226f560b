"""Compiles generated kernels for a GPU that need not be there. Run as ``python -m tests.kernels.compiler ARCH '[[name, D, dtype, Sq], ...]'``,
or with ``backward`` behind it for the kernels of the gradients, ``paged`` for those over a paged cache, ``write`` for those that write to it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.triton import cache_write, empty_rows, launch, launch_backward, launch_paged
from attnopt.kernels.triton.flash_forward import MAP_TENSORS
from attnopt.kernels.triton.launch import Config
from tests.kernels.cases import BY_NAME, Case, causal, softcap, window
from tests.kernels.mask_cases import MASKS

SHARED = {80: 163 * 1024, 90: 227 * 1024}
EXTRA = {"softcap-window": Case("softcap-window", score=softcap, mask=lambda d: E.all_of(causal(d), window(d, 1023, None)))}
OPERANDS = {"Q", "K", "V", "O", "DO", "DQ", "DK", "DV_OUT"}
ROWS = {"LSE", "BASE", "DELTA", "SHIFT", "EMPTY", "EMPTY_SHIFT"}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def signature(
    arguments: Sequence[str], kinds: Sequence[str], dtype: torch.dtype
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and alignments of contiguous tensors, as a launch would find them. ``kinds`` are those of the loads."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    strides = [re.fullmatch(r"L(\d+)_s(\d+)", name) for name in arguments]
    last = {m[1]: m[0] for m in strides if m}  # of each load, which lies as a contiguous tensor does
    for i, name in enumerate(arguments):
        if name in last.values():
            types[name], constants[name] = "constexpr", 1
            continue
        if name in OPERANDS:
            types[name] = f"*{NAMES[dtype]}"
        elif name in (*MAP_TENSORS, "RUNS"):
            types[name] = "*i32"
        elif name in ROWS or re.fullmatch(r"[GRC]\d*", name):
            types[name] = "*fp32"
        elif re.fullmatch(r"L\d+", name):
            types[name] = {"bool": "*u8", "int": "*i64", "float": "*fp32"}[kinds[int(name[1:])]]
        elif name.endswith("_s3") and name[:-3] in OPERANDS:
            types[name], constants[name] = "constexpr", 1
            continue
        else:
            types[name] = "i32"
        if types[name].startswith("*") or re.search(r"_s\d", name) or name == "ROWS":
            aligned[(i,)] = [["tt.divisibility", 16]]
    return types, constants, aligned


def spec_of(name: str) -> AttentionSpec:
    if name.endswith("-dropout"):
        return spec_of(name.removesuffix("-dropout")).replace(dropout=0.1)
    return (BY_NAME.get(name) or MASKS.get(name) or EXTRA[name]).spec()


def compile_kernel(arch: int, function: Any, arguments: Sequence[str], kinds: Sequence[str], dtype: torch.dtype, constexprs: dict[str, Any], c: Config) -> dict[str, Any]:
    types, constants, aligned = signature(arguments, kinds, dtype)
    return compile_typed(arch, function, types, constants, constexprs, aligned, c)


def compile_one(arch: int, name: str, D: int, dtype_name: str, Sq: int) -> list[dict[str, Any]]:
    spec, dtype = spec_of(name), getattr(torch, dtype_name)
    kernel = launch.kernel_for(spec)
    c = launch.config(D, D, Sq, dtype, SHARED[arch], kernel.source.heavy)
    kinds = [x.kind for x in spec.loads] + [p.kind for p in kernel.source.parts]
    found = compile_kernel(arch, kernel.function, kernel.source.arguments, kinds, dtype, launch.constants(D, D, c, dtype), c)
    return [{"kernel": f"{name} D{D} {dtype_name} Sq{Sq} sm_{arch} {c}", **found}]


def compile_empty(arch: int, name: str, D: int, dtype_name: str, Sq: int) -> list[dict[str, Any]]:
    """The kernel that computes rows without a visible key."""
    spec, dtype = spec_of(name), getattr(torch, dtype_name)
    source = empty_rows.generate(spec)
    c = launch.config(D, D, Sq, dtype, SHARED[arch], True)
    kinds = [x.kind for x in spec.loads] + [p.kind for p in source.parts]
    found = compile_kernel(arch, launch.import_source(source.text).empty_rows, source.arguments, kinds, dtype, launch.constants(D, D, c, dtype), c)
    return [{"kernel": f"empty rows of {name} D{D} {dtype_name} Sq{Sq} sm_{arch} {c}", **found}]


def compile_backward(arch: int, name: str, D: int, dtype_name: str, Sq: int) -> list[dict[str, Any]]:
    """All kernels of a spec's gradients, those of its loads too."""
    spec, dtype = spec_of(name), getattr(torch, dtype_name)
    kernels = launch_backward.kernels_for(spec, frozenset(i for i, x in enumerate(spec.loads) if x.kind == "float"))
    chosen = launch_backward.config(kernels.source, D, D, Sq, Sq, dtype, SHARED[arch])
    kinds = [x.kind for x in spec.loads] + [p.kind for p in kernels.source.parts]
    out = []
    for k in (kernels.source.rows, kernels.source.keys, kernels.source.queries, *(k for _, k in kernels.source.scores)):
        c = chosen.of(k.name)
        found = compile_kernel(arch, kernels.functions[k.name], k.arguments, kinds, dtype, launch_backward.constants(D, D, c, dtype), c)
        out.append({"kernel": f"{k.name} of {name} D{D} {dtype_name} Sq{Sq} sm_{arch} {c}", **found})
    return out


PAGED_TYPES = {"TABLE": "*i32", "STARTS": "*i32", "LENGTHS": "*i32", "PART": "*fp32", "LSE": "*fp32", "K_SCALE": "*fp32", "V_SCALE": "*fp32"}
CACHES = {"int8": (torch.int8, "*i8"), "fp8": (torch.float8_e4m3fn, "*fp8e4nv")}


def compile_paged(arch: int, name: str, D: int, dtype_name: str, queries: int, groups: int = 4, page: int = 16, cache: str = "", changes: Any = ()) -> list[dict[str, Any]]:
    """The forward over pages with splits and without, with ``changes`` of its usual settings. D 576 is that of latents: one KV head, and the values are features of the keys."""
    spec, dtype = spec_of(name), getattr(torch, dtype_name)
    packed = cache if cache and dtype != torch.float32 and not launch_paged.head_parts(D)[1] else "scaled" if cache else ""
    Dv = min(D, launch_paged.MAX_VALUE_DIM)
    usual = launch_paged.config(D, Dv, groups, queries, dtype, SHARED[arch], D == 576)
    usual = launch_paged.for_bytes(usual, D, Dv, 1, SHARED[arch]) if packed in launch_paged.PACKED else usual
    c = replace(usual, **dict(changes))
    kernel = launch_paged.kernel_for(spec, packed)
    kinds = [x.kind for x in spec.loads] + [p.kind for p in kernel.source.parts]
    types, fixed, aligned = signature(kernel.source.arguments, kinds, dtype)
    for i, argument in enumerate(kernel.source.arguments):
        if argument in PAGED_TYPES:
            types[argument] = PAGED_TYPES[argument]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif argument in ("K", "V") and cache:
            types[argument] = "*i16" if packed != "scaled" else CACHES[cache][1]
        elif argument in ("Q_s2", "O_s2"):
            types[argument], fixed[argument] = "constexpr", 1
            aligned.pop((i,), None)
        elif argument in ("T", "R"):
            types[argument] = "i32"
    out = []
    label = f"{name} D{D} {dtype_name} {cache} queries{queries} groups{groups} page{page} sm_{arch} {c}"
    for split in (False, True):
        constexprs = launch_paged.constants(D, Dv, groups, 16, page, split, D == 576, c, dtype, arch >= 90, arch >= 90)
        found = compile_typed(arch, kernel.module.paged_forward, types, fixed, constexprs, aligned, c)
        out.append({"kernel": f"paged {'split ' if split else ''}{label}", **found})
    parts = {"PART": "*fp32", "LSE": "*fp32", "O": f"*{NAMES[dtype]}", "O_s0": "i32", "O_s1": "i32", "O_s2": "constexpr", "Hq": "i32", "SPLITS": "i32"}
    constexprs = launch_paged.reduction_constants(Dv, 64, True, arch >= 90)
    out.append({"kernel": f"reduce {label}", **compile_typed(arch, kernel.module.paged_reduce, parts, {"O_s2": 1}, constexprs, {}, c)})
    return out


def compile_write(arch: int, cache: str, D: int, dtype_name: str) -> list[dict[str, Any]]:
    """The kernel that writes to a cache: of the dtype of the keys, or quantized."""
    plain = NAMES[getattr(torch, dtype_name)]
    kind, cached = CACHES.get(cache, (None, f"*{plain}"))
    types: dict[str, str] = dict.fromkeys(cache_write.cache_write.arg_names, "i32")
    types |= {"K": f"*{plain}", "V": f"*{plain}", "K_CACHE": cached, "V_CACHE": cached, "K_SCALE": "*fp32", "V_SCALE": "*fp32", "SLOTS": "*i64"}
    greatest = 0.0 if kind is None else cache_write.GREATEST[kind]
    constexprs = {"HKV": 8, "D": D, "DV": D, "BLOCK_D": D, "BLOCK_DV": D, "ROWS": 16, "GREATEST": greatest, "ROUND": kind is torch.int8}
    found = compile_typed(arch, cache_write.cache_write, types, {}, constexprs, {}, Config(0, 0, 4, 3))
    return [{"kernel": f"write D{D} {dtype_name} {cache} sm_{arch}", **found}]


def compile_typed(
    arch: int, function: Any, types: dict[str, str], fixed: dict[str, Any], constexprs: dict[str, Any], aligned: dict[tuple[int], list[list[Any]]], c: Any
) -> dict[str, Any]:
    source = ASTSource(fn=function, signature=types | dict.fromkeys(constexprs, "constexpr"), constexprs=fixed | constexprs, attrs=aligned)
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": c.num_warps, "num_stages": c.num_stages})
    stack, hot = spills(done.asm["ptx"], arch)
    return {"shared": done.metadata.shared, "spills": stack, "hot": hot}


def binary(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def spills(ptx: str, arch: int) -> tuple[str, int]:
    """What the assembler says about the stack, and how many instructions use it within loops of matrix products."""
    with tempfile.TemporaryDirectory() as folder:
        text, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        text.write_text(ptx)
        name = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
        done = subprocess.run([binary("ptxas"), "-v", f"--gpu-name={name}", text, "-o", cubin], capture_output=True, text=True, check=True)
        listing = subprocess.run([binary("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+ bytes stack frame, \d+ bytes spill stores, \d+ bytes spill loads", done.stderr)
    assert found is not None, done.stderr
    return found[0], hot_spills(listing)


def hot_spills(listing: str) -> int:
    """Local loads and stores in the innermost loops that hold matrix products."""
    lines = listing.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_\w+):", line.strip()))}
    jumps = [(labels[m[1]], i) for i, line in enumerate(lines) if (m := re.search(r"BRA\b.*`\((\.L_\w+)\)", line)) and labels.get(m[1], i) < i]
    inner = [(a, b) for a, b in jumps if not any((c, d) != (a, b) and a <= c and d <= b for c, d in jumps)]
    bodies = [lines[a:b] for a, b in inner]
    with_products = [body for body in bodies if any("MMA" in x for x in body)]
    return sum("LDL" in x or "STL" in x for body in with_products for x in body)


if __name__ == "__main__":
    arch = int(sys.argv[1])
    one = {"backward": compile_backward, "paged": compile_paged, "write": compile_write, "empty": compile_empty}.get(sys.argv[-1], compile_one)
    print(json.dumps([r for k in json.loads(sys.argv[2]) for r in one(arch, *k)]))
