"""Choosing backends by measuring them on an attention's own shapes, layouts and dtypes. Times are kept on disk.

Tensors are random: floats normal, integers zero (any index is in range), booleans true (nothing is hidden by what is loaded). In
training, forward and backward passes are timed apart, and the fastest pair that goes together is taken.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from attnopt.errors import AttnoptError, BackendError, named
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import choice, device, registry
from attnopt.kernels.registry import Setting

SECONDS = 0.02
"""For how long a backend is timed, after its first run,"""
RUNS = (3, 50)
"""in no fewer and no more runs than these."""
HOPELESS = 20.0
"""How many times slower than the best the first timed run of a backend may be for it to be run again."""


@dataclass(frozen=True)
class TensorForm:
    """Sizes, order of axes in memory (outermost first) and dtype of one tensor."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> TensorForm:
        return TensorForm(tuple(shape), tuple(sorted(range(len(shape)), key=lambda d: -stride[d])), dtype)

    def random(self, where: torch.device) -> Tensor:
        shape = [self.shape[d] for d in self.order]
        if self.dtype == torch.bool:
            x = torch.ones(shape, dtype=self.dtype, device=where)
        elif self.dtype.is_floating_point:
            x = torch.randn(shape, device=where).to(self.dtype)
        else:
            x = torch.zeros(shape, dtype=self.dtype, device=where)
        return x.permute([self.order.index(d) for d in range(len(shape))])


@dataclass(frozen=True)
class Example:
    """An attention's operands in the example: q, k, v, its loads, and the sizes that it reads."""

    q: TensorForm
    k: TensorForm
    v: TensorForm
    loads: tuple[TensorForm, ...]
    sizes: tuple[int, ...]

    def shape_class(self) -> list[Any]:
        """What times are kept for: lengths and batch up to a power of two, all else as it is."""
        up = lambda n: 1 << max(n - 1, 0).bit_length()  # noqa: E731
        (B, Hq, Sq, D), (_, Hkv, Skv, _), Dv = self.q.shape, self.k.shape, self.v.shape[3]
        layouts = [x.order for x in (self.q, self.k, self.v)]
        loads = [[x.order, str(x.dtype), [n > 1 for n in x.shape]] for x in self.loads]
        return [up(B), Hq, Hkv, up(Sq), up(Skv), D, Dv, layouts, loads]


@dataclass
class Times:
    """Milliseconds by backend. ``left_out``: backends that could, and why they have no time."""

    forward: dict[str, float] = field(default_factory=dict)
    backward: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    kept: bool = False
    """Whether they came from the disk."""

    def to_dict(self) -> dict[str, Any]:
        return {"forward": self.forward, "backward": self.backward, "left_out": self.left_out}


def choose(spec: AttentionSpec, setting: Setting, example: Example) -> tuple[str, str | None, str]:
    """The fastest backend for ``spec`` here, in training the backend of its backward pass too, and why, as one phrase.

    The second name is None out of training and where PyTorch's own call brings its gradients. ``BackendError`` where none can compute it.
    """
    candidates = [n for n in choice.forward_order(spec, setting) if n in registry.backends() and registry.forward_refusal(n, spec, setting) is None]
    if not candidates:
        name, why = registry.choose(spec, device=setting.device, dtype=setting.dtype, loads=setting.loads)  # raises, and says why of each
        return name, None, why
    times = measured(spec, setting, example, candidates)
    forwards = {n: t for n, t in times.forward.items() if n in candidates}
    if not forwards:
        raise BackendError(f"No backend could be measured: {_said(times.left_out)}.")
    backends = registry.backends()
    if not setting.training:
        name = min(forwards, key=lambda n: forwards[n])
        return name, None, f"{backends[name].why(spec, setting)}, {_compared(forwards, name, times)}"
    totals: dict[tuple[str, str | None], float] = {}
    for f, t in forwards.items():
        if backends[f].is_torch_call(spec):
            totals |= {(f, None): t + times.backward[f]} if f in times.backward else {}
            continue
        for b, u in times.backward.items():
            if b in backends and registry.backward_refusal(b, f, spec, setting) is None:
                totals[f, b] = t + u
    if not totals:
        raise BackendError(f"No pair of forward and backward could be measured: {_said(times.left_out)}.")
    first, second = min(totals, key=lambda p: totals[p])
    after = "" if second is None else f", backward by {second}"
    words = {_pair(*p): t for p, t in totals.items()}
    return first, second, f"{backends[first].why(spec, setting)}{after}, {_compared(words, _pair(first, second), times)}"


def _pair(forward: str, backward: str | None) -> str:
    return forward if backward is None else f"{forward}/{backward}"


def _compared(times: dict[str, float], name: str, all_times: Times) -> str:
    """As in "measured here: 0.42 ms, 1.21x over cudnn"."""
    others = {n: t for n, t in times.items() if n != name}
    second = min(others, key=lambda n: others[n]) if others else None
    over = "" if second is None else f", {others[second] / times[name]:.2f}x over {second}"
    left_out = f" (not measured: {_said(all_times.left_out)})" if all_times.left_out else ""
    return f"measured here: {times[name]:.3g} ms{over}{left_out}"


def _said(reasons: dict[str, str]) -> str:
    return "; ".join(f"{n}: {r}" for n, r in reasons.items())


# ------------------------------------------------------------------------------------------------ kept times


def measured(spec: AttentionSpec, setting: Setting, example: Example, candidates: Sequence[str]) -> Times:
    """Times of ``candidates`` (and, in training, of the backward passes that can follow), from the disk or measured now."""
    key = _key(spec, setting, example, candidates)
    path = device.cache_folder() / "autotune" / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        found = None
    if found is not None and found.get("of") == key:
        return Times(**found["times"], kept=True)
    times = _measure(spec, setting, example, candidates)
    try:
        device.write(path, json.dumps({"of": key, "times": times.to_dict()}, indent=1))
    except OSError as e:
        times.left_out["the file of these times"] = f"{path.parent} cannot be written ({e.strerror})"
    return times


def _key(spec: AttentionSpec, setting: Setting, example: Example, candidates: Sequence[str]) -> dict[str, Any]:
    """Everything that times depend on. Compared whole when a file is read, so two that share a hash are told apart."""
    return json.loads(  # type: ignore[no-any-return]
        json.dumps(
            {
                "format": 1,
                "device": device.device_name(setting.device),
                "versions": device.versions(),
                "spec": spec.to_json(),
                "shape": example.shape_class(),
                "dtype": str(setting.dtype),
                "training": setting.training,
                "candidates": [*candidates],
                "deterministic": torch.are_deterministic_algorithms_enabled(),
            }
        )
    )


def _measure(spec: AttentionSpec, setting: Setting, example: Example, candidates: Sequence[str]) -> Times:
    where = torch.device(setting.device)
    times = Times()
    cuda = [torch.cuda.current_device()] if where.type == "cuda" else []
    # a graph is compiled with fake tensors, and these must be real
    with unset_fake_temporarily(), torch.random.fork_rng(devices=cuda), torch.no_grad():
        q, k, v = (x.random(where) for x in (example.q, example.k, example.v))
        call = _Call(q, k, v, [x.random(where) for x in example.loads], example.sizes, spec)
        for name in candidates:
            one = registry.backends()[name]
            with_lse = setting.training or spec.dropout  # dropout is drawn by ``forward`` only
            run = partial(one.forward, *call, 0) if with_lse and one.forward is not None else partial(one.run, *call)
            _time(name, run, where, times.forward, times.left_out)
        if setting.training:
            _measure_backward(call, setting, where, times)
    return times


class _Call(NamedTuple):
    """What every backend's ``run`` takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    loads: list[Tensor]
    sizes: tuple[int, ...]
    spec: AttentionSpec


def _measure_backward(call: _Call, setting: Setting, where: torch.device, times: Times) -> None:
    """Every backward pass on o and lse of a forward that gives them; and of forwards that are PyTorch's own call, that call's."""
    q, k, v, loads, sizes, spec = call
    backends = registry.backends()
    needs = [True, True, True, *(x.is_floating_point() for x in loads)]
    giver = next((f for n in times.forward if (f := backends[n].forward) is not None), None)
    o, lse = giver(*call, 0) if giver is not None else (torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], torch.nan))
    grad = torch.randn(o.shape, dtype=o.dtype, device=where)
    for name, one in backends.items():
        follows = any(
            registry.backward_refusal(name, f, spec, setting) is None and name in choice.backward_order(f, spec, setting) for f in times.forward
        )
        if one.backward is not None and follows and (giver is not None or one.recomputes):
            _time(name, partial(one.backward, grad, q, k, v, o, lse, loads, sizes, spec, 0, needs), where, times.backward, times.left_out)
    for name in times.forward:
        if backends[name].is_torch_call(spec):
            _time(name, _torch_backward(call, grad), where, times.backward, times.left_out)


def _torch_backward(call: _Call, grad: Tensor) -> Callable[[], object]:
    """The backward pass of PyTorch's own call for ``spec``."""
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in call[:3])
        causal = call.spec.mask is not E.TRUE
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=call.spec.scale, enable_gqa=call.spec.groups > 1)
    return partial(torch.autograd.grad, o, (q, k, v), grad, retain_graph=True)


def _time(name: str, call: Callable[[], object], where: torch.device, into: dict[str, float], left_out: dict[str, str]) -> None:
    """Adds the median of several runs in milliseconds; one that raises is left out, with its message."""
    try:
        call()  # compiles
        once = _timed(call, where)
        best = min(into.values(), default=once)
        runs = 1 if once > HOPELESS * best else max(RUNS[0], min(RUNS[1], int(1000 * SECONDS / max(once, 1e-6))))
        into[name] = statistics.median([once, *(_timed(call, where) for _ in range(runs - 1))])
    except (RuntimeError, AttnoptError) as e:
        left_out[name] = f"it raised {named(e)}"


def _timed(call: Callable[[], object], where: torch.device) -> float:
    """Milliseconds of one run."""
    if where.type != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(where)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
