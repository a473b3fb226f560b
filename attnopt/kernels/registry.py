"""The backends: what each can compute, and which one computes a given attention.

A new kernel is one file in this package and one ``register`` line below.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.config import disabled_backends
from attnopt.errors import BackendError
from attnopt.ir.spec import AttentionSpec


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


Forward = Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[int], AttentionSpec, int], tuple[Tensor, Tensor]]
"""q, k, v, loads, sizes, spec, seed -> (o, lse). lse is float32 [B, Hq, Sq]: the natural logarithm of the sum of exp(score) over the
visible keys (and the sink), -inf on rows without any. ``seed``, in [0, 2**62), decides what dropout drops."""
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[int], AttentionSpec, int, Sequence[bool]], list[Tensor]
]
"""grad [B, Hq, Sq, Dv], q, k, v, o, lse, loads, sizes, spec, seed, needs -> gradients of q, k, v and the loads, in this order, for
those that ``needs`` (one flag each) asks for, each in its tensor's dtype."""


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
    recomputes: bool = False
    """Whether ``backward`` reads neither o nor lse, so that it can follow a backend without ``forward``."""
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


def choose(spec: AttentionSpec, *, device: torch.device | str, dtype: torch.dtype, training: bool = False, backend: str = "auto") -> tuple[str, str]:
    """The backend for one attention, and why, as one phrase: ``("sdpa", "CPU flash, causal without a mask tensor")``.

    A backend that is named is taken or refused, never replaced: ``BackendError`` where it is unknown or not usable here,
    ``BackendRefusal`` where it cannot compute this attention.
    """
    setting = Setting(torch.device(device).type, dtype, training)
    if backend != "auto":
        chosen = find(backend)
        reason = chosen.accepts(spec, setting)
        if reason is not None:
            raise BackendRefusal(backend, reason)
        return backend, _why(chosen, spec, setting)
    passed: list[str] = []
    for name in _preference(spec, setting):
        one = _BACKENDS[name]
        reason = "switched off by ATTNOPT_DISABLE" if name in disabled_backends() else one.available() or one.accepts(spec, setting)
        if reason is None:
            phrase = _why(one, spec, setting)
            return name, phrase if not passed else f"{phrase} ({'; '.join(passed)})"
        passed.append(f"not {name}: {reason}")
    raise BackendError(f"No backend can compute this attention on {setting.device}: {'; '.join(passed)}.")


def _why(chosen: Backend, spec: AttentionSpec, setting: Setting) -> str:
    """What it does, and in training who computes the gradients."""
    phrase = chosen.why(spec, setting)
    if not setting.training:
        return phrase
    try:
        return f"{phrase}, backward by {choose_backward(chosen.name, spec, setting)}"
    except BackendError as e:
        return f"{phrase}, without a backward ({e.message.rstrip('.')})"


def choose_backward(forward: str, spec: AttentionSpec, setting: Setting) -> str:
    """The backend whose ``backward`` follows the forward of backend ``forward``. ``BackendError`` where there is none."""
    passed: list[str] = []
    for name in _backward_preference(forward, spec, setting):
        reason = _backward_refusal(_BACKENDS[name], _BACKENDS[forward], spec, setting)
        if reason is None:
            return name
        passed.append(f"{name}: {reason}")
    raise BackendError(f"No backend can compute the gradients of this attention on {setting.device} ({'; '.join(passed)}).")


def _backward_refusal(one: Backend, forward: Backend, spec: AttentionSpec, setting: Setting) -> str | None:
    if one.name in disabled_backends():
        return "switched off by ATTNOPT_DISABLE"
    if one.backward is None:
        return "it has no backward"
    if forward.forward is None and not one.recomputes:
        return f"it reads lse, and {forward.name} gives none"
    if spec.dropout and one.generator != forward.generator:
        return f"its dropout goes by other random numbers than that of {forward.name}"
    return one.available() or one.accepts_backward(spec, setting)


def _backward_preference(forward: str, spec: AttentionSpec, setting: Setting) -> tuple[str, ...]:
    """Backends from the fastest backward; a forward's own stands first, and ``reference``, which follows any, last."""
    return tuple(dict.fromkeys((forward, "reference")))


def _preference(spec: AttentionSpec, setting: Setting) -> tuple[str, ...]:
    """Backends from the fastest. Measured: torch's fused kernels win on what they take whole, on every device; on a CPU they
    win with a mask as well (see ``benchmarks/``); on a GPU their mask is a dense tensor, and a generated kernel has none."""
    if setting.device == "cuda" and not sdpa.takes_whole(spec):
        return ("triton", "sdpa", "reference")
    if setting.device == "cuda":
        return ("sdpa", "triton", "reference")
    return ("sdpa", "reference")


def resolve(kernel: str, spec: AttentionSpec, device: str, dtype: torch.dtype) -> Backend:
    """The backend that runs a call. As ``choose``, which a graph's author asked before; the tensors may have moved since."""
    name, _ = choose(spec, device=device, dtype=dtype, backend=kernel)
    return _BACKENDS[name]


def resolve_backward(kernel: str, spec: AttentionSpec, device: str, dtype: torch.dtype) -> Backward:
    """The backward pass that follows a call."""
    forward = resolve(kernel, spec, device, dtype)
    found = _BACKENDS[choose_backward(forward.name, spec, Setting(device, dtype, training=True))].backward
    assert found is not None
    return found


# ------------------------------------------------------------------------------------------------ the backends

from attnopt.kernels import reference, sdpa  # noqa: E402  (they stand below the table that they enter)


def _run_reference(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Tensor:
    return reference.attention(q, k, v, loads, sizes, spec)[0]


def _train_reference(
    q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, seed: int
) -> tuple[Tensor, Tensor]:
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


def _triton_available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from attnopt.kernels.triton import launch

    return launch.available()


def _triton_accepts(spec: AttentionSpec, setting: Setting) -> str | None:
    from attnopt.kernels.triton import launch

    return launch.refusal(spec, setting.device, setting.dtype)


def _triton_why(spec: AttentionSpec, setting: Setting) -> str:
    from attnopt.kernels.triton import launch

    return launch.why(spec)


def _run_triton(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Tensor:
    from attnopt.kernels.triton import launch

    return launch.attention(q, k, v, loads, sizes, spec)[0]


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
    )
)
register(Backend("triton", available=_triton_available, accepts=_triton_accepts, why=_triton_why, run=_run_triton))
