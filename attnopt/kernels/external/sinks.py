"""Attention sinks around a kernel that has none: its output and lse say all that is needed.

With lse over the keys alone, a sink of logit z takes the part exp(z) of the sum, so ``o`` shrinks by exp(lse - lse') and lse' is
log(exp(lse) + exp(z)). A flash backward reads probabilities as exp(score - lse) and the mean as sum(grad * o), so given the new
o and lse' it computes the gradients of q, k and v with the sink in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.adjoint import pull_back
from attnopt.kernels.evaluate import Env, as_tensor, evaluate


def with_sink(o: Tensor, lse: Tensor, loads: Sequence[Tensor], sizes: Mapping[str, int], spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """``o`` [B, Hq, Sq, Dv] and lse [B, Hq, Sq] with the sink of ``spec``, which has one. A row without a key, zero in ``o``, stays zero.

    Differentiable in grad mode; otherwise ``o`` is changed in place.
    """
    env = _env(o, loads, sizes)
    (value,), _ = evaluate((_sink(spec),), env)
    sink = as_tensor(value, "float", env).expand(*lse.shape, 1).squeeze(-1)
    total = torch.logaddexp(lse, sink)
    part = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - total))
    part = part.unsqueeze(-1)
    return (o * part).to(o.dtype) if torch.is_grad_enabled() else o.mul_(part), total


def sink_gradients(
    grad: Tensor, o: Tensor, lse: Tensor, loads: Sequence[Tensor], sizes: Mapping[str, int], spec: AttentionSpec, into: Sequence[Tensor | None]
) -> None:
    """Adds to ``into[slot]``, where there is one, the gradient that reaches load ``slot`` through the sink, given that of o."""
    if not any(x is not None for x in into):
        return
    sink = _sink(spec)
    env = _env(o, loads, sizes)
    (value,), table = evaluate((sink,), env, keep=True)
    weight = torch.exp(as_tensor(value, "float", env) - lse.unsqueeze(-1))
    mean = (grad.to(env.dtype) * o.to(env.dtype)).sum(-1, keepdim=True)
    # the sink's value is zero, so only its part of the sum counts
    pull_back(sink, -weight * mean, table, env, into)


def _sink(spec: AttentionSpec) -> Expr:
    assert spec.sink is not None
    return spec.sink


def _env(o: Tensor, loads: Sequence[Tensor], sizes: Mapping[str, int]) -> Env:
    B, Hq, Sq, _ = o.shape
    dtype = torch.float64 if o.dtype == torch.float64 else torch.float32
    return Env({"b": (0, B), "h": (0, Hq), "q": (0, Sq), "k": (0, 1)}, loads, sizes, dtype, o.device)
