"""In which order backends are tried: by a table of measured speeds where it has the attention's like, by experience where not.

``choice_table.json`` holds TFLOP/s of each backend per device capability, direction, class of program, head sizes and length;
``tools/choice_table.py`` makes it from ``benchmarks/results/kernels.json``. The nearest measured shape decides. A backend without
a figure there stands behind those that have one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import torch

from attnopt.config import disabled_backends
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import device, sdpa
from attnopt.kernels.affine import capped
from attnopt.kernels.tiling import cached_key_range

if TYPE_CHECKING:
    from attnopt.kernels.registry import Setting

Direction = Literal["forward", "backward"]
TYPICAL_LENGTH = 2048
"""Taken where no length is known."""
FARTHEST_HEAD_DIM = 1.5
"""A row counts for head sizes within this factor of its own,"""
SHORTEST = 0.25
"""and for lengths from this part of its own on: what is faster at short lengths, where launching is most of the time, shows there only."""


@dataclass(frozen=True)
class Row:
    """One measured shape. ``tflops`` by backend; FlashAttention's generations stand apart, as ``flash_attn_4``."""

    direction: Direction
    program: str
    D: int
    Dv: int
    S: int
    tflops: Mapping[str, float]
    device: str


def parse(data: Mapping[str, Any]) -> dict[str, tuple[Row, ...]]:
    """The rows of a table's JSON by device capability (``sm_90``)."""
    if data.get("format") != 1:
        raise ValueError(f"the choice table has format {data.get('format')!r}; supported is 1")
    return {
        arch: tuple(Row(r["direction"], r["program"], r["D"], r["Dv"], r["S"], r["tflops"], one["device"]) for r in one["rows"])
        for arch, one in data["tables"].items()
    }


@lru_cache(maxsize=1)
def table() -> dict[str, tuple[Row, ...]]:
    """The table that the package ships."""
    return parse(json.loads(resources.files("attnopt.kernels").joinpath("choice_table.json").read_text()))


@lru_cache(maxsize=1024)
def program_class(spec: AttentionSpec) -> str:
    """What makes the speed of a program, as ``causal``, ``window+softcap`` or ``full+bias``: what it skips, then what each score costs."""
    found = cached_key_range(spec.mask)
    words = ["window" if found.left else "causal" if found.right else "full"]
    t = spec.traits
    if found.rest is not E.TRUE:
        words.append("documents" if t.document else "padding" if t.key_padding else "mask")
    score = capped(spec.score)
    if score is None:
        words.append("score")
    else:
        words += ["softcap"] if score.softcap is not None else []
        words += [] if score.bias is None else ["alibi" if t.alibi else _bias_word(score.bias)]
    return "+".join([*words, *(["sinks"] if spec.sinks else []), *(["dropout"] if spec.dropout else [])])


def _bias_word(bias: Expr) -> str:
    """``bias`` for an element read per query and key, ``alibi`` for a slope times a distance, else ``table``."""
    loads = [e for e in E.postorder(bias) if e.op == "load"]
    if any({"q", "k"} <= {a.value for a in e.args if a.op == "var"} for e in loads):
        return "bias"
    return "alibi" if loads and all(not {"q", "k"} & {v.value for v in e.variables} for e in loads) else "table"


@lru_cache(maxsize=4096)
def nearest(spec: AttentionSpec, dtype: torch.dtype, lengths: tuple[int, int] | None, arch: str, direction: Direction) -> Row | None:
    """The measured shape that is most like this one, if any is like it at all. Measured in half precision."""
    D, Dv = spec.dims.D, spec.dims.Dv
    if dtype not in (torch.float16, torch.bfloat16) or not D.is_const or not Dv.is_const:
        return None
    Sq, Skv = lengths or (TYPICAL_LENGTH, TYPICAL_LENGTH)
    program = program_class(spec)
    best: tuple[float, Row] | None = None
    for row in table().get(arch, ()):
        if row.direction != direction or row.program != program:
            continue
        heads = max(_apart(int(D.value), row.D), _apart(int(Dv.value), row.Dv))
        if heads > math.log2(FARTHEST_HEAD_DIM) or min(Sq, Skv) < SHORTEST * row.S:
            continue
        distance = 4 * heads + _apart(math.sqrt(Sq * Skv), row.S)
        if best is None or distance < best[0]:
            best = distance, row
    return None if best is None else best[1]


def _apart(a: float, b: float) -> float:
    return abs(math.log2(a / b))


def row_for(spec: AttentionSpec, setting: Setting, direction: Direction) -> Row | None:
    """The row that decides for an attention in this setting."""
    return nearest(spec, setting.dtype, setting.lengths, device.arch(), direction) if setting.device == "cuda" else None


def forward_order(spec: AttentionSpec, setting: Setting) -> tuple[str, ...]:
    """Names of backends, the fastest first. Some may not be registered here, or not take it."""
    return _ranked(row_for(spec, setting, "forward"), _forward_experience(spec, setting), spec, backward=False)


def backward_order(forward: str, spec: AttentionSpec, setting: Setting) -> tuple[str, ...]:
    """As ``forward_order``, for the gradients after the forward of backend ``forward``."""
    return _ranked(row_for(spec, setting, "backward"), _backward_experience(forward, spec, setting), spec, backward=True)


def _ranked(row: Row | None, others: Sequence[str], spec: AttentionSpec, backward: bool) -> tuple[str, ...]:
    if row is None:
        return tuple(dict.fromkeys(others))
    figures = {n: x for n in others if (x := figure(row, n, spec, backward)) is not None}
    return tuple(dict.fromkeys([*sorted(figures, key=lambda n: -figures[n]), *others]))


def figure(row: Row, name: str, spec: AttentionSpec, backward: bool) -> float | None:
    """The TFLOP/s of backend ``name`` in a row; None where it has none."""
    if name != "flash_attn":
        return row.tflops.get(name)
    if name in disabled_backends() or not any(n.startswith(name) for n in row.tflops):  # then nothing needs to be imported
        return None
    return row.tflops.get(measured_name(name, spec, backward))


def measured_name(name: str, spec: AttentionSpec, backward: bool = False) -> str:
    """A backend as the table calls it: with the generation of FlashAttention that would compute ``spec`` here."""
    if name != "flash_attn":
        return name
    from attnopt.kernels.external import flash_attn

    return f"flash_attn_{flash_attn.generation(spec, backward)}"


def comparison(row: Row | None, name: str, others: Sequence[str], spec: AttentionSpec, setting: Setting, backward: bool = False) -> str:
    """What the table says for ``name`` over the best of ``others`` that has a figure, as "1.21x over cudnn at this shape (H200 table)"."""
    own = None if row is None else figure(row, name, spec, backward)
    if row is None or own is None:
        return ""
    figures = {n: x for n in others if n != name and (x := figure(row, n, spec, backward)) is not None}
    if not figures:
        return ""
    second = max(figures, key=lambda n: figures[n])
    return f"{own / figures[second]:.2f}x over {second} {_where(row, spec, setting)} ({row.device.removeprefix('NVIDIA ')} table)"


def _where(row: Row, spec: AttentionSpec, setting: Setting) -> str:
    same_heads = (spec.dims.D.value, spec.dims.Dv.value) == (row.D, row.Dv)
    if setting.lengths is not None and same_heads and _apart(math.sqrt(math.prod(setting.lengths)), row.S) <= 0.5:
        return "at this shape"
    return f"at D {row.D}, S {row.S}"


# ------------------------------------------------------------------------------------------------ without a figure


def _forward_experience(spec: AttentionSpec, setting: Setting) -> tuple[str, ...]:
    """torch's fused kernels win on what they take whole, on every device; on a CPU they win with a mask as well (see ``benchmarks/``);
    on a GPU their mask is a dense tensor, and a generated kernel has none. ``flex`` is for those who ask for it: it compiles."""
    if setting.device != "cuda":
        return ("sdpa", "reference")
    # sdpa gives no lse: where it is more than one call of PyTorch's, its gradients are interpreted
    if sdpa.takes_whole(spec) and (not setting.training or sdpa.is_one_call(spec)):
        return _with_flash("gluon", "cudnn", "sdpa", "triton", "reference")
    return ("gluon", "triton", "flash_attn", "cudnn", "sdpa", "reference")


def _backward_experience(forward: str, spec: AttentionSpec, setting: Setting) -> tuple[str, ...]:
    if setting.device != "cuda":
        return (forward, "reference")
    if sdpa.takes_whole(spec):
        return (*_with_flash("cudnn", "triton"), forward, "reference")
    return (forward, "triton", "flash_attn", "cudnn", "reference")


def _with_flash(*names: str) -> tuple[str, ...]:
    """FlashAttention 3 and 4 stand before cuDNN, which on Hopper and newer is faster than 2."""
    if "flash_attn" in disabled_backends():  # then nothing needs to be imported to find out which it is
        return (*names, "flash_attn")
    from attnopt.kernels.external import flash_attn

    at = names.index("cudnn") + (0 if flash_attn.newest() != 2 or device.capability()[0] < 9 else 1)
    return (*names[:at], "flash_attn", *names[at:])
