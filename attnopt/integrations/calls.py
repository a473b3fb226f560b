"""One attention over tensors, as a library calls it: the spec of what it computes, and who computes it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnopt.config import disabled_backends
from attnopt.errors import AttnoptError
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec, Dims, Load, Traits
from attnopt.kernels import eager, paged_choice, registry
from attnopt.kernels.paged_choice import CacheSetting

CACHED = "cached"
"""The kernels of ``attnopt::paged_attention``, over one page for each request."""
Axes = tuple[bool, bool, bool, bool]
"""Which axes of a tensor [B, Hq, Sq, Skv] are there; the others have one entry, which holds for all."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv] -> o [B, Hq, Sq, Dv].

    ``mask``: bool (True: seen) or added to the scores, ``bias``: added to the scores, both [B or 1, Hq or 1, Sq or 1, Skv]. ``causal``: query i sees the
    keys up to i. ``scale`` is D^-0.5 unless given; with ``softcap`` c a score s becomes c * tanh(s / c), before anything is added. ``sinks`` [Hq]. A row that sees no key is
    zero. Differentiable.
    """
    B = max(q.shape[0], k.shape[0])
    q, k, v = (x if x.shape[0] == B else x.expand(B, -1, -1, -1) for x in (q, k, v))
    shape = (B, q.shape[1], q.shape[2], k.shape[2])
    added = tuple(x for x in (mask if mask is not None and mask.dtype != torch.bool else None, bias) if x is not None)
    seen = mask if mask is not None and mask.dtype == torch.bool else None
    loads = [x for x in (seen, *added, sinks) if x is not None]
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *loads))
    call = Call(
        q.shape[1],
        k.shape[1],
        q.shape[3],
        v.shape[3],
        q.shape[3] ** -0.5 if scale is None else float(scale),
        None if softcap is None else float(softcap),
        causal,
        None if seen is None else _axes(seen, shape),
        tuple(_axes(x, shape) for x in added),
        sinks is not None,
        float(dropout),
    )
    text, kernel = plan(tuple(call), q.device.type, q.dtype, training, backend, tuple(x.dtype for x in loads), q.shape[2] == 1)
    if kernel == CACHED:
        # each request's keys are one page of a contiguous cache, of which the keys of one query are split over many programs
        counts = torch.arange(B + 1, dtype=torch.int32, device=q.device)
        lengths = torch.full((B,), shape[3], dtype=torch.int32, device=q.device)
        cache = (k.transpose(1, 2), v.transpose(1, 2), counts[:B, None], counts, lengths)
        o = eager.paged_attention(q[:, :, 0], *cache, loads, [], text, "triton")[:, :, None]
    else:
        o = eager.attention(q, k, v, loads, [], text, kernel)
    return o


def _axes(x: Tensor, shape: tuple[int, int, int, int]) -> Axes:
    if x.dim() != 4 or any(n not in (1, m) for n, m in zip(x.shape, shape, strict=True)):
        raise AttnoptError(f"The mask or bias is {tuple(x.shape)}; it must be [B, Hq, Sq, Skv], here {shape}, with 1 where an entry holds for all.")
    B, H, Sq, Skv = (n == m and n != 1 for n, m in zip(x.shape, shape, strict=True))
    return B, H, Sq, Skv


class Call(NamedTuple):
    """All of a call that its spec follows from: no sizes of batch, queries and keys."""

    Hq: int
    Hkv: int
    D: int
    Dv: int
    scale: float
    softcap: float | None
    causal: bool
    seen: Axes | None
    """The axes of a mask of bools."""
    added: tuple[Axes, ...]
    """Of what is added to the scores."""
    sinks: bool
    dropout: float


def plan(call: tuple[Any, ...], device: str, dtype: torch.dtype, training: bool, backend: str, loads: tuple[torch.dtype, ...], single: bool) -> tuple[str, str]:
    """The spec as text, and the kernel's name. It follows from what is no tensor, so a compiler takes it as a constant.

    ``call`` is a ``Call`` as a plain tuple, which is what torch.compile takes for a constant.
    ``CACHED`` instead of a kernel's name where there is a ``single`` query and the kernels for caches can.
    """
    return _planned(disabled_backends(), Call(*call), device, dtype, training, backend, loads, single)


torch.compiler.assume_constant_result(plan)


@lru_cache(maxsize=4096)
def _planned(
    disabled: frozenset[str], call: Call, device: str, dtype: torch.dtype, training: bool, backend: str, loads: tuple[torch.dtype, ...], single: bool
) -> tuple[str, str]:
    spec = spec_of(call)
    if single and not training and not call.dropout and backend in ("auto", CACHED):
        setting = CacheSetting(device, dtype, page_size=1, D=call.D, Dv=call.Dv, contiguous=True)
        if paged_choice.choose(spec, setting)[0] == "triton":
            return spec.to_json(), CACHED
    return spec.to_json(), registry.choose(spec, device=device, dtype=dtype, training=training, backend=backend, loads=loads)[0]


def spec_of(call: Call) -> AttentionSpec:
    """What one call computes, whatever the sizes of batch, queries and keys are."""
    c = E.const
    d = Dims(E.sym("B"), c(call.Hq), c(call.Hkv), E.sym("Sq"), E.sym("Skv"), c(call.D), c(call.Dv))
    loads: list[Load] = []

    def read(name: str, kind: E.Kind, axes: Axes) -> Expr:
        loads.append(Load(name, kind))
        return E.load(len(loads) - 1, tuple(x if there else E.ZERO for x, there in zip((d.b, d.h, d.q, d.k), axes, strict=True)), kind)

    score = E.mul(c(call.scale), E.score())
    if call.softcap is not None:
        score = E.mul(c(call.softcap), E.function("tanh", E.mul(c(1.0 / call.softcap), score)))
    rest = E.TRUE if call.seen is None else read("mask", "bool", call.seen)
    mask = E.all_of(E.le(d.k, d.q), rest) if call.causal else rest
    bias = None
    for axes in call.added:
        one = read("bias", "float", axes)
        bias = one if bias is None else E.add(bias, one)
    sink = None
    if call.sinks:
        loads.append(Load("sinks", "float"))
        sink = E.load(len(loads) - 1, (d.h,), "float")
    return AttentionSpec(
        d,
        score if bias is None else E.add(score, bias),
        mask,
        empty_rows="zero",
        sink=sink,
        loads=tuple(loads),
        dropout=call.dropout,
        traits=Traits(
            scale=call.scale, softcap=call.softcap, bias=bias, causal="top_left" if call.causal else None, window=(None, 0) if call.causal else (None, None), mask_rest=rest
        ),
    )
