"""The packages of FlashAttention and how each is called: ``flash_attn`` (2), ``flash_attn_interface`` (3), ``flash_attn.cute`` (4).

All take q, k and v as [B, S, H, D], align causal and window masks at the bottom right (query i stands at key i + Skv - Sq), count the
keys of a window to each side inclusively, and return lse in natural logarithms. They differ in names, in how "no window" is
spelt, and in what they can do. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import named

Arch = tuple[int, int]
"""A CUDA compute capability, as (9, 0)."""


@dataclass(frozen=True)
class Call:
    """One attention in the packages' words. ``left`` and ``right``: keys of the window to each side, None for no bound."""

    scale: float
    left: int | None
    right: int | None
    softcap: float
    slopes: Tensor | None = None

    @property
    def causal(self) -> bool:
        return self.left is None and self.right == 0


@dataclass(frozen=True)
class Wanted:
    """What an attention asks of a package."""

    D: int
    Dv: int
    softcap: bool = False
    slopes: bool = False
    backward: bool = False


@dataclass(frozen=True)
class Package:
    """One generation. ``forward`` and ``backward`` are called with its module."""

    generation: int
    module: str
    distribution: str
    """Its name on the package index."""
    unfit: Callable[[Wanted, Arch], str | None]
    """Why it cannot compute that there, as a phrase."""
    forward: Callable[[ModuleType, Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor]]
    """q, k, v [B, S, H, D] -> o [B, Sq, Hq, Dv], lse [B, Hq, Sq]."""
    backward: Callable[[ModuleType, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor, Tensor]]
    """grad, q, k, v, o [B, S, H, D], lse -> dq, dk, dv."""

    def __str__(self) -> str:
        return f"FlashAttention-{self.generation}"

    def load(self) -> ModuleType | str:
        """The imported module, or why there is none."""
        return load(self.module, self.distribution)


@lru_cache(maxsize=16)
def load(module: str, distribution: str) -> ModuleType | str:
    """The imported module, or why there is none. A broken install may raise anything on import, and is a reason, not a crash."""
    top = module.split(".")[0]
    if importlib.util.find_spec(top) is None:
        return f"the package {distribution} is not installed"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is not None and module.startswith(e.name):
            return f"the package {distribution} is not installed"
        return _broken(module, e)
    except Exception as e:  # noqa: BLE001 - see above
        return _broken(module, e)


def _broken(module: str, e: Exception) -> str:
    return f"{module} is installed and does not import: {named(e)}"


def _has(function: Any, name: str) -> bool:
    """Whether a function (or a custom operator made of one) has a parameter of this name: they were renamed between releases."""
    return name in inspect.signature(getattr(function, "_init_fn", function)).parameters


def _window(function: Any, call: Call) -> dict[str, Any]:
    """The window of ``call`` for generations 2 and 3, where -1 is no bound: one pair or two numbers, by release."""
    pair = tuple(-1 if n is None else n for n in (call.left, call.right))
    return {"window_size": pair} if _has(function, "window_size") else {"window_size_left": pair[0], "window_size_right": pair[1]}


def _range(name: str, n: int, most: int, step: int = 8) -> str | None:
    if n % step or n > most:
        return f"it has head sizes that are multiples of {step} up to {most}, and {name} is {n}"
    return None


def _sizes(want: Wanted, most: int) -> str | None:
    return _range("D", want.D, most) or _range("Dv", want.Dv, most)


def _one_size(want: Wanted) -> str | None:
    return None if want.Dv == want.D else f"it has one head size for keys and values, and D is {want.D} and Dv is {want.Dv}"


def _arch_name(arch: Arch) -> str:
    return f"sm_{arch[0]}{arch[1]}"


# ------------------------------------------------------------------------------------------------ 2


def _unfit_2(want: Wanted, arch: Arch) -> str | None:
    if arch < (8, 0):
        return f"it runs on sm_80 and newer, and this device is {_arch_name(arch)}"
    return _sizes(want, 256) or _one_size(want)


def _forward_2(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    pair = tuple(-1 if n is None else n for n in (call.left, call.right))
    o, lse, _ = module.flash_attn_func(
        q, k, v, softmax_scale=call.scale, causal=call.causal, window_size=pair, softcap=call.softcap, alibi_slopes=call.slopes, return_attn_probs=True
    )
    return o, lse


def _backward_2(
    module: ModuleType, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    f = module._flash_attn_backward
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    f(
        grad, q, k, v, o, lse, dq, dk, dv,
        dropout_p=0.0, softmax_scale=call.scale, causal=call.causal, softcap=call.softcap, alibi_slopes=call.slopes,
        deterministic=torch.are_deterministic_algorithms_enabled(), **_window(f, call),
    )  # fmt: skip
    return dq, dk, dv


# ------------------------------------------------------------------------------------------------ 3


def _unfit_3(want: Wanted, arch: Arch) -> str | None:
    if arch[0] != 9:
        return f"it runs on sm_90, and this device is {_arch_name(arch)}"
    if want.slopes:
        return "it has no ALiBi slopes"
    return _sizes(want, 256) or _one_size(want)


def _forward_3(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    f = module.flash_attn_func
    pair = tuple(-1 if n is None else n for n in (call.left, call.right))
    # early releases always return lse beside o, later ones when asked
    more = {"return_attn_probs": True} if _has(f, "return_attn_probs") else {}
    o, lse, *_ = f(q, k, v, softmax_scale=call.scale, causal=call.causal, window_size=pair, softcap=call.softcap, **more)
    return o, lse


def _backward_3(
    module: ModuleType, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    f = module._flash_attn_backward
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    causal = {"is_causal" if _has(f, "is_causal") else "causal": call.causal}
    f(
        grad, q, k, v, o, lse, dq=dq, dk=dk, dv=dv, softmax_scale=call.scale, softcap=call.softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(), **causal, **_window(f, call),
    )  # fmt: skip
    return dq, dk, dv


# ------------------------------------------------------------------------------------------------ 4


def _unfit_4(want: Wanted, arch: Arch) -> str | None:
    if arch[0] not in ((9, 10, 11, 12) if want.backward else (8, 9, 10, 11, 12)):
        return f"its {'backward' if want.backward else 'forward'} does not run on {_arch_name(arch)}"
    if want.slopes:
        return "it has no ALiBi slopes"
    if arch[0] == 9:
        return _sizes(want, 256)
    pair = (want.D, want.Dv)
    if arch[0] in (10, 11) and (pair == (192, 128) or (pair == (256, 256) and not (want.backward and want.softcap))):
        return None
    return _sizes(want, 128)


def _forward_4(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    o, lse = module.flash_attn_func(
        q, k, v, softmax_scale=call.scale, causal=call.causal, window_size=(call.left, call.right), softcap=call.softcap, return_lse=True
    )
    return o, lse


def _backward_4(
    module: ModuleType, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = module._flash_attn_bwd(
        q, k, v, o, grad, lse, softmax_scale=call.scale, causal=call.causal, softcap=call.softcap, window_size_left=call.left,
        window_size_right=call.right, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


PACKAGES = (
    Package(4, "flash_attn.cute.interface", "flash-attn-4", _unfit_4, _forward_4, _backward_4),
    Package(3, "flash_attn_interface", "flash-attn-3", _unfit_3, _forward_3, _backward_3),
    Package(2, "flash_attn.flash_attn_interface", "flash-attn", _unfit_2, _forward_2, _backward_2),
)


def packages_for(arch: Arch) -> tuple[Package, ...]:
    """All packages, the one to try first on a device of this capability first: the newest that was written for it."""
    return PACKAGES if arch[0] >= 9 else tuple(reversed(PACKAGES))
