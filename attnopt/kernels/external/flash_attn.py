"""The FlashAttention packages, where they are installed: full, causal and windowed attention with GQA, softcap and sinks, and ALiBi in 2.

Of the installed generations the newest that can compute an attention on the device does (``flash_packages``). Their windows are
aligned at the bottom right and have no negative reach, so a mask goes to them where that is proven for all sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.bounds import nonnegative
from attnopt.ir.expr import Expr
from attnopt.ir.printing import render
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference
from attnopt.kernels.affine import capped
from attnopt.kernels.device import capability
from attnopt.kernels.external.flash_packages import PACKAGES, Arch, Call, Package, Wanted, packages_for
from attnopt.kernels.external.sinks import sink_gradients, with_sink
from attnopt.kernels.tiling import Bounds, as_bshd, bind_sizes, bounds, cached_key_range, may_be_empty

if TYPE_CHECKING:
    from attnopt.kernels.registry import Setting

DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Form:
    """What of a spec is said in the packages' words, whatever the sizes. ``slopes`` is the load of ALiBi's slopes."""

    scale: float
    shift: float
    softcap: float
    slopes: int | None


@lru_cache(maxsize=1024)
def form(spec: AttentionSpec) -> Form | str:
    """The spec in the packages' words, or why they have none for it."""
    if spec.dropout:
        return f"its dropout cannot be replayed by seed, and this attention has dropout {spec.dropout:g}"
    score = capped(spec.score)
    if score is None:
        return f"it computes scale * s, with a softcap and ALiBi, and the score is {render(spec.score, spec.load_names)}"
    slopes = None if score.bias is None else _slopes(score.bias, spec)
    if score.bias is not None and slopes is None:
        return f"it has no bias but ALiBi's slope * (k - q) over as many queries as keys, and this one is {render(score.bias, spec.load_names)}"
    if slopes is not None and score.softcap is not None:
        return f"it has ALiBi and softcap {score.softcap:g} one at a time"
    reason = _window_refusal(spec)
    if reason is not None:
        return reason
    if spec.empty_rows not in ("nan", "zero") and spec.sink is None and may_be_empty(spec):
        return f"rows without a visible key are {spec.empty_rows} here, and it knows nan and zero"
    return Form(score.scale, score.shift, score.softcap or 0.0, slopes)


def _slopes(bias: Expr, spec: AttentionSpec) -> int | None:
    """The load whose element [h] or [b, h] is the slope of ALiBi, when the bias is slope * (k - q) under a causal mask, or -slope * |k - q|.

    The packages compute -slope * |q + Skv - Sq - k|, which is that where there are as many queries as keys.
    """
    d = spec.dims
    if d.Sq is not d.Skv:
        return None
    index = {(d.h,), (d.b, d.h)}
    for x in bias.leaves:
        if x.op != "load" or x.args not in index or x.kind != "float":
            continue
        distance = E.sub(d.k, d.q)
        causal = any(c is E.le(d.k, d.q) for c in E.conjuncts(spec.mask))
        if causal and bias is E.mul(x, E.as_float(distance)):
            return int(x.value)
        if bias is E.mul(E.const(-1.0), x, E.as_float(E.absolute(distance))):
            return int(x.value)
    return None


def _window_refusal(spec: AttentionSpec) -> str | None:
    d = spec.dims
    found = cached_key_range(spec.mask)
    if found.rest is not E.TRUE:
        return f"its masks are causal and windows, and this one also hides keys unless {render(found.rest, spec.load_names)}"
    shift = E.sub(d.Skv, d.Sq)
    for n in found.right:
        if not nonnegative(E.sub(n, shift)):
            return f"its windows are aligned bottom-right and reach to or beyond it, and this one ends at key q + {render(n)} of {render(d.Skv)}, with {render(d.Sq)} queries"
    for n in found.left:
        if not nonnegative(E.add(n, shift)):
            return f"its windows are aligned bottom-right and reach to or beyond it, and this one starts at key q - {render(n)} of {render(d.Skv)}, with {render(d.Sq)} queries"
    return None


# ------------------------------------------------------------------------------------------------ which package


def available() -> str | None:
    """None, or why no package can be used on this machine."""
    if not torch.cuda.is_available():
        return "FlashAttention needs a CUDA GPU, and there is none"
    found = [p.load() for p in PACKAGES]
    reasons = [x for x in found if isinstance(x, str)]
    return None if len(reasons) < len(found) else "; ".join(reasons)


@lru_cache(maxsize=1024)
def package(spec: AttentionSpec, arch: Arch, backward: bool = False) -> Package | str:
    """The package that computes ``spec`` on a device of capability ``arch``, or why none does."""
    found = form(spec)
    if isinstance(found, str):
        return found
    sizes = {"D": spec.dims.D, "Dv": spec.dims.Dv}
    for name, n in sizes.items():
        if not n.is_const:
            return f"it is chosen by head size, and {name} is {render(n)}"
    want = Wanted(int(spec.dims.D.value), int(spec.dims.Dv.value), bool(found.softcap), found.slopes is not None, backward)
    reasons: list[str] = []
    for one in packages_for(arch):
        module = one.load()
        reason = module if isinstance(module, str) else one.unfit(want, arch)
        if reason is None:
            return one
        if not isinstance(module, str):
            reasons.append(f"{one}: {reason}")
        elif want.slopes and one.generation == 2:
            reasons.append("FlashAttention-2, which has ALiBi, cannot be imported")
    return "; ".join(reasons) or "no package of it can be imported"


def generation(spec: AttentionSpec, backward: bool = False) -> int:
    """Which generation computes ``spec`` on this machine; 0 for none."""
    chosen = package(spec, capability(), backward)
    return chosen.generation if isinstance(chosen, Package) else 0


def newest() -> int:
    """The newest generation that can be imported here; 0 for none."""
    return next((p.generation for p in PACKAGES if not isinstance(p.load(), str)), 0)


def refusal(spec: AttentionSpec, setting: Setting, backward: bool = False) -> str | None:
    """Why no package can compute ``spec`` there (its gradients, with ``backward``); None when one can."""
    found = form(spec)
    if isinstance(found, str):
        return found
    if backward and found.slopes is not None:
        return f"it has no gradient of the slopes {spec.loads[found.slopes].name}"
    if setting.device != "cuda":
        return f"it runs on cuda, and the tensors are on {setting.device}"
    if setting.dtype not in DTYPES:
        return f"it computes float16 and bfloat16, and the query is {str(setting.dtype).removeprefix('torch.')}"
    chosen = package(spec, capability(), backward)
    return chosen if isinstance(chosen, str) else None


def why(spec: AttentionSpec) -> str:
    chosen = package(spec, capability())
    words = "windowed" if spec.traits.window != (None, None) and spec.traits.window[0] is not None else "causal" if spec.traits.causal else "full"
    return f"{chosen}, {words}"


# ------------------------------------------------------------------------------------------------ the calls


def run(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Tensor:
    """``forward`` without lse."""
    return forward(q, k, v, loads, sizes, spec)[0]


def forward(
    q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The spec on q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]: o [B, Hq, Sq, Dv] and lse [B, Hq, Sq].

    lse is float32, natural logarithm, holds the sink, and is -inf on rows without a visible key. See ``refusal``.
    """
    found = _checked(q, k, v, loads, spec)
    if _nothing(q, k, v):
        o, lse = reference.attention(q, k, v, loads, sizes, spec)
        return o, lse.float()
    values = bind_sizes(spec, sizes, q, k, v)
    limits = bounds(spec, values)
    one, module = _package(spec)
    out, lse = one.forward(module, _swap(q), _swap(k), _swap(v), _call(found, limits, q, k, loads))
    o = _swap(out)
    if found.shift:
        lse = lse + found.shift
    first, last = limits.empty_rows(q.shape[2], k.shape[2])
    for rows in (slice(0, first), slice(last, q.shape[2])):  # what the packages leave there differs
        if rows.start < rows.stop:
            o[:, :, rows] = 0.0 if spec.sinks or spec.empty_rows == "zero" else torch.nan
            lse[:, :, rows] = -torch.inf
    if spec.sinks:
        o, lse = with_sink(o, lse, loads, values, spec)
    return as_bshd(o), lse.contiguous()


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    seed: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of q, k, v and the loads that ``needs`` asks for, given o and lse of any forward. See ``refusal``."""
    found = _checked(q, k, v, loads, spec)
    if _nothing(q, k, v):
        return reference.gradients(grad, q, k, v, loads, sizes, spec, 0, needs)
    values = bind_sizes(spec, sizes, q, k, v)
    limits = bounds(spec, values)
    one, module = _package(spec, backward=True)
    stats = lse - found.shift if found.shift else lse
    first, last = limits.empty_rows(q.shape[2], k.shape[2])
    if first or last < q.shape[2]:
        # exp(score - inf) is 0 whatever the score; the output's NaN would reach the mean
        stats = torch.where(stats == -torch.inf, torch.inf, stats)
        o, grad = (x.clone() for x in (o, grad))
        for rows in (slice(0, first), slice(last, q.shape[2])):
            o[:, :, rows] = 0.0
            grad[:, :, rows] = 0.0
    call = _call(found, limits, q, k, loads)
    given = one.backward(module, _swap(grad.to(o.dtype)), _swap(q), _swap(k), _swap(v), _swap(o), stats.contiguous(), call)
    dq, dk, dv = (x.transpose(1, 2) for x in given)
    into = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) if n else None for x, n in zip(loads, needs[3:], strict=True)]
    if spec.sinks:
        sink_gradients(grad, o, lse, loads, values, spec, into)
    pairs = zip((dq, dk, dv, *into), (q, k, v, *loads), needs, strict=True)
    return [g.to(x.dtype) for g, x, need in pairs if need and g is not None]


def _checked(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], spec: AttentionSpec) -> Form:
    reference.check_shapes(q, k, v, loads, spec)
    found = form(spec)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _package(spec: AttentionSpec, backward: bool = False) -> tuple[Package, Any]:
    one = package(spec, capability(), backward)
    if isinstance(one, str):
        raise ValueError(one)
    return one, one.load()


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return 0 in q.shape or 0 in k.shape or 0 in v.shape


def _swap(x: Tensor) -> Tensor:
    """[B, H, S, D] as [B, S, H, D] and back, features side by side."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(found: Form, limits: Bounds, q: Tensor, k: Tensor, loads: Sequence[Tensor]) -> Call:
    """The call at these sizes: windows counted from the bottom right."""
    shift = k.shape[2] - q.shape[2]
    left = None if limits.left is None else limits.left + shift
    right = None if limits.right is None else limits.right - shift
    slopes = None if found.slopes is None else loads[found.slopes].float().contiguous()
    return Call(found.scale, left, right, found.softcap, slopes)
