"""The backends: what each can compute, and which one computes a given attention.

A new kernel is one file in this package and one ``register`` line below.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnopt.config import disabled_backends
from attnopt.errors import BackendError
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import choice
from attnopt.kernels.block_map import BlockMap


class BackendRefusal(BackendError):
    """A backend that was asked for by name cannot compute this attention. ``reason`` says why, as a phrase."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"Backend {backend!r} cannot compute this attention: {reason}.", hint="backend='auto' chooses one that can")
        self.backend = backend
        self.reason = reason


@dataclass(frozen=True)
class Setting:
    """Where an attention runs, as far as that is known before it does."""

    device: str
    """A device type: ``cpu``, ``cuda``, ``meta``."""
    dtype: torch.dtype
    training: bool = False
    """Whether gradients will be asked for."""
    loads: tuple[torch.dtype, ...] | None = None
    """The dtypes of the tensors that the spec reads; None where that is not known."""
    lengths: tuple[int, int] | None = None
    """Queries and keys of the example, by which speeds are looked up; None where they are not known."""


Forward = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[int], AttentionSpec, int], tuple[Tensor, Tensor]]
"""q, k, v, loads, sizes, spec, seed -> (o, lse). lse is float32 [B, Hq, Sq]: the natural logarithm of the sum of exp(score) over the
visible keys (and the sink), -inf on rows without any. ``seed``, in [0, 2**62), decides what dropout drops."""
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[int], AttentionSpec, int, Sequence[bool]], list[Tensor]
]
"""grad [B, Hq, Sq, Dv], q, k, v, o, lse, loads, sizes, spec, seed, needs -> gradients of q, k, v and the loads, in this order, for
those that ``needs`` (one flag each) asks for, each in its tensor's dtype."""


Shared = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[int], AttentionSpec, int, BlockMap | None, Sequence[Tensor]], tuple[Tensor, Tensor]]
"""As ``Forward``, with the map of the spec's mask for the sizes of ``Backend.block_sizes``, if any, and the spec's tables over distances with margins of
``Backend.table_margin``, all or none."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an attention."""

    name: str
    available: Callable[[], str | None]
    """None, or why it cannot be used on this machine."""
    accepts: Callable[[AttentionSpec, Setting], str | None]
    """None, or why it cannot compute this attention there."""
    why: Callable[[AttentionSpec, Setting], str]
    """What it does with this attention, as one phrase for the report."""
    run: Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[int], AttentionSpec], Tensor]
    """q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv], loads, sizes, spec -> o [B, Hq, Sq, Dv], laid out BSHD."""
    forward: Forward | None = None
    """As ``run``, with lse; and with dropout, where ``generator`` says that it has it. None: it gives no lse."""
    backward: Backward | None = None
    """Gradients from what any ``forward`` gave; None: it has no backward pass."""
    accepts_backward: Callable[[AttentionSpec, Setting], str | None] = lambda spec, setting: None
    """None, or why ``backward`` cannot compute the gradients of this attention there."""
    is_torch_call: Callable[[AttentionSpec], bool] = lambda spec: False
    """Whether it stands in a graph as a call of PyTorch's own, which brings its own gradients."""
    recomputes: bool = False
    """Whether ``backward`` reads neither o nor lse, so that it can follow a backend without ``forward``."""
    block_sizes: Callable[[AttentionSpec, Setting], tuple[int, int] | None] = lambda spec, setting: None
    """(BLOCK_M, BLOCK_N) of the map of blocks that ``shared`` takes; None for an attention for which it takes none."""
    table_margin: Callable[[AttentionSpec, Setting], int | None] = lambda spec, setting: None
    """How many more distances at each end the tables have that ``shared`` takes; None where it takes none."""
    shared: Shared | None = None
    """As ``forward``, with what was worked out before, for several attentions at once. Without that ``run`` works it out itself."""
    generator: str | None = None
    """By which random numbers its dropout goes (None: it has no dropout). Backends that name the same generator drop the same
    probabilities for the same seed, so the backward of one can follow the forward of the other."""


_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> Backend:
    """Adds a backend, or replaces the one of the same name."""
    _BACKENDS[backend.name] = backend
    return backend


def backends() -> dict[str, Backend]:
    """All registered backends by name, whether or not this machine can use them."""
    return dict(_BACKENDS)


def find(name: str) -> Backend:
    """The backend of this name. Raises ``BackendError`` where it is unknown, switched off or not usable here."""
    if name not in _BACKENDS:
        raise BackendError(f"There is no backend {name!r}; the backends are {', '.join(sorted(_BACKENDS))}, and 'auto'.")
    if name in disabled_backends():
        raise BackendError(f"Backend {name!r} is switched off by ATTNOPT_DISABLE.")
    reason = _BACKENDS[name].available()
    if reason is not None:
        raise BackendError(f"Backend {name!r} cannot be used here: {reason}.")
    return _BACKENDS[name]


def choose(
    spec: AttentionSpec,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    training: bool = False,
    backend: str = "auto",
    loads: tuple[torch.dtype, ...] | None = None,
    lengths: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """The backend for one attention, and why, as one phrase: ``("sdpa", "CPU flash, causal without a mask tensor")``.

    ``loads`` and ``lengths`` as in ``Setting``. A backend that is named is taken or refused, never replaced: ``BackendError``
    where it is unknown or not usable here, ``BackendRefusal`` where it cannot compute this attention.
    """
    setting = Setting(torch.device(device).type, dtype, training, loads, lengths)
    if backend != "auto":
        chosen = find(backend)
        reason = chosen.accepts(spec, setting)
        if reason is not None:
            raise BackendRefusal(backend, reason)
        return backend, _why(chosen, spec, setting)
    passed: list[str] = []
    order = [n for n in choice.forward_order(spec, setting) if n in _BACKENDS]
    for i, name in enumerate(order):
        reason = forward_refusal(name, spec, setting)
        if reason is None:
            phrase = _why(_BACKENDS[name], spec, setting, order[i + 1 :])
            return name, phrase if not passed else f"{phrase} ({'; '.join(passed)})"
        passed.append(f"not {name}: {reason}")
    raise BackendError(f"No backend can compute this attention on {setting.device}: {'; '.join(passed)}.")


def forward_refusal(name: str, spec: AttentionSpec, setting: Setting) -> str | None:
    """Why backend ``name`` is not the one here; None when it can be."""
    if name in disabled_backends():
        return "switched off by ATTNOPT_DISABLE"
    return _BACKENDS[name].available() or _BACKENDS[name].accepts(spec, setting)


def _why(chosen: Backend, spec: AttentionSpec, setting: Setting, others: Sequence[str] = ()) -> str:
    """What it does, how much faster than the next of ``others`` it was measured to be, and in training who computes the gradients."""
    phrase = chosen.why(spec, setting)
    row = choice.row_for(spec, setting, "forward") if others else None
    if row is not None:
        known = [n for n in others if choice.figure(row, n, spec, backward=False) is not None and forward_refusal(n, spec, setting) is None]
        phrase = ", ".join(x for x in (phrase, choice.comparison(row, chosen.name, known, spec, setting)) if x)
    if not setting.training or chosen.is_torch_call(spec):
        return phrase
    try:
        name = choose_backward(chosen.name, spec, setting)
    except BackendError as e:
        return f"{phrase}, without a backward ({e.message.rstrip('.')})"
    row = choice.row_for(spec, setting, "backward")
    known = [n for n in _BACKENDS if backward_refusal(n, chosen.name, spec, setting) is None] if row is not None else []
    return ", ".join(x for x in (phrase, f"backward by {name}", choice.comparison(row, name, known, spec, setting, backward=True)) if x)


def choose_backward(forward: str, spec: AttentionSpec, setting: Setting) -> str:
    """The backend whose ``backward`` follows the forward of backend ``forward``. ``BackendError`` where there is none."""
    passed: list[str] = []
    for name in choice.backward_order(forward, spec, setting):
        if name not in _BACKENDS:
            continue
        reason = backward_refusal(name, forward, spec, setting)
        if reason is None:
            return name
        passed.append(f"{name}: {reason}")
    raise BackendError(f"No backend can compute the gradients of this attention on {setting.device} ({'; '.join(passed)}).")


def backward_refusal(name: str, after: str, spec: AttentionSpec, setting: Setting) -> str | None:
    """Why the backward of backend ``name`` cannot follow the forward of ``after``; None when it can."""
    one, forward = _BACKENDS[name], _BACKENDS[after]
    if name in disabled_backends():
        return "switched off by ATTNOPT_DISABLE"
    if one.backward is None:
        return "it has no backward"
    if forward.forward is None and not one.recomputes:
        return f"it reads lse, and {forward.name} gives none"
    if spec.dropout and one.generator != forward.generator:
        return f"its dropout goes by other random numbers than that of {forward.name}"
    return one.available() or one.accepts_backward(spec, setting)


def block_sizes(kernel: str, spec: AttentionSpec, *, device: torch.device | str, dtype: torch.dtype) -> tuple[int, int] | None:
    """(BLOCK_M, BLOCK_N) of the map of blocks that this backend takes for an attention; None where it takes none."""
    return _BACKENDS[kernel.partition("/")[0]].block_sizes(spec, Setting(torch.device(device).type, dtype))


def table_margin(kernel: str, spec: AttentionSpec, *, device: torch.device | str, dtype: torch.dtype) -> int | None:
    """How many more distances at each end the tables have that this backend takes for an attention; None where it takes none."""
    return _BACKENDS[kernel.partition("/")[0]].table_margin(spec, Setting(torch.device(device).type, dtype))


def resolve(kernel: str, spec: AttentionSpec, device: str, dtype: torch.dtype, loads: tuple[torch.dtype, ...] | None = None) -> Backend:
    """The backend that runs a call. As ``choose``, which a graph's author asked before; the tensors may have moved since.

    ``kernel`` is a backend's name, or two as ``forward/backward``.
    """
    name, _ = choose(spec, device=device, dtype=dtype, backend=kernel.partition("/")[0], loads=loads)
    return _BACKENDS[name]


def resolve_backward(kernel: str, spec: AttentionSpec, device: str, dtype: torch.dtype, loads: tuple[torch.dtype, ...] | None = None) -> Backward:
    """The backward pass that follows a call: the second name of ``kernel``, or one that is chosen."""
    forward = resolve(kernel, spec, device, dtype, loads)
    setting = Setting(device, dtype, True, loads)
    named = kernel.partition("/")[2]
    if named:
        find(named)
        reason = backward_refusal(named, forward.name, spec, setting)
        if reason is not None:
            raise BackendRefusal(named, f"after the forward of {forward.name}, {reason}")
    found = _BACKENDS[named or choose_backward(forward.name, spec, setting)].backward
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------ the backends

from attnopt.kernels import reference, sdpa  # noqa: E402  (they stand below the table that they enter)
from attnopt.kernels.external import cudnn, flash_attn, flex  # noqa: E402


def _run_reference(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Tensor:
    return reference.attention(q, k, v, loads, sizes, spec)[0]


def _train_reference(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, seed: int) -> tuple[Tensor, Tensor]:
    o, lse = reference.attention(q, k, v, loads, sizes, spec, seed)
    return o, lse.float()


def _differentiate_reference(
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
    return reference.gradients(grad, q, k, v, loads, sizes, spec, seed, needs)


def _differentiate_triton(
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
    from attnopt.kernels.triton import launch_backward

    return launch_backward.gradients(grad, q, k, v, o, lse, loads, sizes, spec, seed, needs)


def _generated(name: str, **more: Any) -> Backend:
    """A backend of generated kernels: what ``attnopt.kernels.NAME.launch`` does, imported when it is asked, since Triton may not be installed."""

    @lru_cache(maxsize=1)
    def launch() -> Any:
        return importlib.import_module(f"attnopt.kernels.{name}.launch")

    def accepts(spec: AttentionSpec, setting: Setting) -> str | None:
        reason: str | None = launch().refusal(spec, setting.device, setting.dtype)
        return reason

    return Backend(
        name,
        available=lambda: "the package triton is not installed" if importlib.util.find_spec("triton") is None else launch().available(),
        accepts=accepts,
        accepts_backward=accepts,
        why=lambda spec, setting: launch().why(spec),
        run=lambda q, k, v, loads, sizes, spec: launch().attention(q, k, v, loads, sizes, spec)[0],
        block_sizes=lambda spec, setting: launch().block_sizes(spec, setting.device, setting.dtype),
        table_margin=lambda spec, setting: launch().table_margin(spec),
        shared=lambda q, k, v, loads, sizes, spec, seed, blocks, tables: launch().attention(q, k, v, loads, sizes, spec, seed, blocks, tables),
        forward=lambda q, k, v, loads, sizes, spec, seed: launch().attention(q, k, v, loads, sizes, spec, seed),
        **more,
    )


register(
    Backend(
        "reference",
        available=lambda: None,
        accepts=lambda spec, setting: None,
        why=lambda spec, setting: "interpreted tile by tile",
        run=_run_reference,
        forward=_train_reference,
        backward=_differentiate_reference,
        recomputes=True,
        generator="torch",
    )
)
register(
    Backend(
        "sdpa",
        available=lambda: None,
        accepts=lambda spec, setting: sdpa.refusal(spec, setting.device),
        why=lambda spec, setting: sdpa.why(spec, setting.device),
        run=sdpa.attention,
        is_torch_call=sdpa.is_one_call,
    )
)
register(_generated("triton", backward=_differentiate_triton, generator="philox"))
register(_generated("gluon"))
register(
    Backend(
        "cudnn",
        available=cudnn.available,
        accepts=cudnn.refusal,
        why=lambda spec, setting: cudnn.why(spec),
        run=cudnn.run,
        forward=cudnn.forward,
        backward=cudnn.backward,
        accepts_backward=cudnn.backward_refusal,
    )
)
register(
    Backend(
        "flash_attn",
        available=flash_attn.available,
        accepts=flash_attn.refusal,
        why=lambda spec, setting: flash_attn.why(spec),
        run=flash_attn.run,
        forward=flash_attn.forward,
        backward=flash_attn.backward,
        accepts_backward=lambda spec, setting: flash_attn.refusal(spec, setting, backward=True),
    )
)
register(
    Backend(
        "flex",
        available=flex.available,
        accepts=flex.refusal,
        why=flex.why,
        run=flex.run,
        forward=flex.forward,
        backward=flex.backward,
        accepts_backward=flex.backward_refusal,
        recomputes=True,
    )
)
