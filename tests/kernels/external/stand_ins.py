"""Stand-ins for kernels that need a GPU: they keep their packages' conventions, record each call, and compute in float64.

Each works in the words of the package it stands for (layout, alignment, windows, names of arguments), written out from the
package's own documentation and not from attnopt's translation, so a wrong translation gives wrong numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass
class Recorder:
    """A module of one package, as ``flash_packages`` sees it."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def module(self, **functions: Any) -> ModuleType:
        module = ModuleType("stand_in")
        for name, f in functions.items():
            setattr(module, name, f)
        return module


def _visible(Sq: int, Skv: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """Bottom-right causal, and windows of ``window`` keys to the left and right of key i + Skv - Sq, -1 for no bound."""
    i, j = torch.arange(Sq)[:, None] + Skv - Sq, torch.arange(Skv)[None, :]
    left, right = window
    if causal:
        right = 0
    seen = torch.ones(Sq, Skv, dtype=torch.bool)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    return seen


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, window: tuple[int, int], softcap: float, slopes: Tensor | None) -> Tensor:
    """[B, Hq, Sq, Skv] in float64 from q [B, Sq, Hq, D] and k [B, Skv, Hkv, D]."""
    q, k = q.double().transpose(1, 2), k.double().transpose(1, 2)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = scale * (q @ k.transpose(-1, -2))
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    Sq, Skv = s.shape[-2:]
    if slopes is not None:
        distance = (torch.arange(Sq)[:, None] + Skv - Sq - torch.arange(Skv)[None, :]).abs()
        s = s - slopes.double().view(-1, slopes.shape[-1], 1, 1) * distance
    return s.masked_fill(~_visible(Sq, Skv, causal, window), -math.inf)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    *,
    empty_lse: float = -math.inf,
    empty_out: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, Hq, Dv] in q's dtype and lse [B, Hq, Sq] in float32; what stands on rows without keys is the package's own."""
    s = _scores(q, k, scale, causal, window, softcap, slopes)
    lse = torch.logsumexp(s, -1)
    p = torch.where(lse.unsqueeze(-1) == -math.inf, 0.0, torch.exp(s - lse.unsqueeze(-1)))
    values = v.double().transpose(1, 2).repeat_interleave(q.shape[2] // v.shape[2], 1)
    out = torch.where(lse.unsqueeze(-1) == -math.inf, empty_out, p @ values)
    lse = torch.where(lse == -math.inf, empty_lse, lse)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.float()


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernels do it: probabilities are exp(score - lse) and the mean is sum(grad * out), from the ``out`` and ``lse`` given."""
    groups = q.shape[2] // k.shape[2]
    heads = lambda x: x.double().transpose(1, 2)  # noqa: E731
    g, o, values, keys = heads(grad), heads(out), heads(v).repeat_interleave(groups, 1), heads(k).repeat_interleave(groups, 1)
    s = _scores(q, k, scale, causal, window, softcap, slopes)
    p = torch.exp(s - lse.double().unsqueeze(-1))
    ds = p * (g @ values.transpose(-1, -2) - (g * o).sum(-1, keepdim=True))
    if softcap:
        raw = scale * (heads(q) @ keys.transpose(-1, -2))
        ds = ds * (1 - torch.tanh(raw / softcap) ** 2)
    shared = lambda x: x.unflatten(1, (-1, groups)).sum(2)  # noqa: E731
    dq = scale * ds @ keys
    dk, dv = shared(scale * ds.transpose(-1, -2) @ heads(q)), shared(p.transpose(-1, -2) @ g)
    return tuple(x.transpose(1, 2).to(y.dtype).contiguous() for x, y in ((dq, q), (dk, k), (dv, v)))  # type: ignore[return-value]


def package_2() -> tuple[ModuleType, Recorder]:
    """``flash_attn.flash_attn_interface``: lse of empty rows is +inf."""
    seen = Recorder()

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        seen.calls.append({"shape": tuple(q.shape), "causal": causal, "window": window_size, "softcap": softcap, "slopes": alibi_slopes, "scale": softmax_scale})
        out, lse = flash(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, empty_lse=math.inf)
        return (out, lse, None) if return_attn_probs else out

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        found = flash_backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes)
        for into, x in zip((dq, dk, dv), found, strict=True):
            into.copy_(x)
        return softmax_lse

    return seen.module(flash_attn_func=flash_attn_func, _flash_attn_backward=_flash_attn_backward), seen


def package_3(early: bool = False) -> tuple[ModuleType, Recorder]:
    """``flash_attn_interface``. ``early`` releases always return lse, and take the window of the backward as a pair."""
    seen = Recorder()

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, return_attn_probs=False):  # type: ignore[no-untyped-def]
        seen.calls.append({"shape": tuple(q.shape), "causal": causal, "window": window_size, "softcap": softcap, "scale": softmax_scale})
        out, lse = flash(q, k, v, softmax_scale, causal, window_size, softcap, empty_out=7.0)
        return (out, lse) if return_attn_probs else out

    def early_flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):  # type: ignore[no-untyped-def]
        return flash_attn_func(q, k, v, softmax_scale, causal, window_size, softcap, True)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        found = flash_backward(dout, q, k, v, out, softmax_lse, softmax_scale, is_causal, (window_size_left, window_size_right), softcap)
        for into, x in zip((dq, dk, dv), found, strict=True):
            into.copy_(x)
        return softmax_lse

    def early_flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        deterministic=False,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        return _flash_attn_backward(
            dout, q, k, v, out, softmax_lse, None, None, dq, dk, dv, softmax_scale, causal, window_size[0], window_size[1], softcap, deterministic
        )  # fmt: skip

    functions = (early_flash_attn_func, early_flash_attn_backward) if early else (flash_attn_func, _flash_attn_backward)
    return seen.module(flash_attn_func=functions[0], _flash_attn_backward=functions[1]), seen


def package_4() -> tuple[ModuleType, Recorder]:
    """``flash_attn.cute.interface``: no bound of a window is None, and gradients are returned."""
    seen = Recorder()
    pair = lambda left, right: (-1 if left is None else left, -1 if right is None else right)  # noqa: E731

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, return_lse=False):  # type: ignore[no-untyped-def]
        seen.calls.append({"shape": tuple(q.shape), "causal": causal, "window": window_size, "softcap": softcap, "scale": softmax_scale})
        out, lse = flash(q, k, v, softmax_scale, causal, pair(*window_size), softcap)
        return out, lse if return_lse else None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, window_size_right=None, deterministic=False
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        return flash_backward(dout, q, k, v, out, lse, softmax_scale, causal, pair(window_size_left, window_size_right), softcap)

    return seen.module(flash_attn_func=flash_attn_func, _flash_attn_bwd=_flash_attn_bwd), seen
