"""The reference: any spec, interpreted in plain PyTorch, tile by tile, so that memory is linear in the number of keys.

Sums and softmax run in float32, or in float64 for float64 inputs. ``attention`` is made of differentiable operations;
``gradients`` computes the same derivatives tile by tile, in linear memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.errors import AttnoptError
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.adjoint import pull_back
from attnopt.kernels.evaluate import Env, Value, as_tensor, evaluate
from attnopt.kernels.tiling import Bounds, Tile, bind_sizes, bounds, empty_output, may_be_empty, tiles

BUDGET = 1 << 19
"""Scores held at a time. 2 MiB in float32: larger tiles fall out of a CPU's cache and are slower."""


def check_shapes(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], spec: AttentionSpec) -> None:
    """Raises where q, k, v and loads do not fit together or not the spec."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise AttnoptError(f"q, k and v must have 4 axes [B, H, S, D]; they have {q.dim()}, {k.dim()} and {v.dim()}.")
    (B, Hq, _, D), (Bk, Hkv, Skv, Dk), (Bv, Hv, Sv, _) = q.shape, k.shape, v.shape
    if not (B == Bk == Bv and Hkv == Hv and Skv == Sv and Dk == D) or Hkv == 0 or Hq % Hkv:
        raise AttnoptError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together as [B, Hq, Sq, D], [B, Hkv, Skv, D] and [B, Hkv, Skv, Dv]."
        )
    if len(loads) != len(spec.loads):
        raise AttnoptError(f"This attention reads {len(spec.loads)} tensors beside q, k and v, and was given {len(loads)}.")


def attention(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The spec on q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]: o [B, Hq, Sq, Dv] and lse [B, Hq, Sq].

    lse is the natural logarithm of the sum of exp(score) over visible keys, in the accumulation dtype, and -inf on rows
    without any. With ``spec.dropout``, the same ``seed`` drops the same probabilities.
    Differentiable when grad mode is on, at the price of keeping every tile; see ``gradients``.
    """
    problem = _Problem.of(q, k, v, loads, sizes, spec)
    recording = torch.is_grad_enabled()
    outs: list[Tensor] = []
    o = empty_output(q, v)
    lse = q.new_empty(q.shape[:3], dtype=problem.dtype)
    for n, tile in enumerate(problem.tiles()):
        t = problem.tile(tile)
        p = problem.dropped(t.p, seed, n)
        part = problem.times_values(p, tile, t.k0, t.k1).to(v.dtype)
        if recording:
            outs.append(part)
        else:
            o[tile.b0 : tile.b1, :, tile.q0 : tile.q1] = part
        lse[tile.b0 : tile.b1, :, tile.q0 : tile.q1] = t.lse.detach()
    if recording and outs:
        o = _assemble(outs, list(problem.tiles()), o)
    return o, lse


def attention_at(
    q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Mapping[str, int], spec: AttentionSpec, row: int, first: int
) -> Tensor:
    """The spec for one batch row in its place: q [1, Hq, n, D] are the queries from index ``first`` on of batch ``row``, k and v
    [1, Hkv, Skv, D or Dv] its keys and values from index 0 on. ``sizes`` holds all sizes by name. o is [1, Hq, n, Dv].
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    problem = _Problem(q.to(dtype), k.to(dtype), v.to(dtype), loads, sizes, spec, dtype, row, first)
    o = empty_output(q, v, q.dtype)
    for tile in problem.tiles():
        t = problem.tile(tile)
        o[:, :, tile.q0 : tile.q1] = problem.times_values(t.p, tile, t.k0, t.k1)
    return o


def _assemble(parts: Sequence[Tensor], where: Sequence[Tile], like: Tensor) -> Tensor:
    """Tiles put together out of place, for autograd."""
    rows: dict[int, list[Tensor]] = {}
    for part, tile in zip(parts, where, strict=True):
        rows.setdefault(tile.b0, []).append(part)
    o = torch.cat([torch.cat(r, 2) for r in rows.values()], 0)
    return o.transpose(1, 2).contiguous().transpose(1, 2)


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, seed: int, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of q, k, v and the loads, in this order, for those that ``needs`` (one flag each) asks for.

    ``grad`` is the gradient of o [B, Hq, Sq, Dv]. Each tile's probabilities are computed again, so memory is linear in Skv.
    """
    problem = _Problem.of(q, k, v, loads, sizes, spec)
    dq = torch.zeros(q.shape, dtype=problem.dtype, device=q.device)
    dk = torch.zeros(k.shape, dtype=problem.dtype, device=k.device)
    dv = torch.zeros(v.shape, dtype=problem.dtype, device=v.device)
    into = [torch.zeros(x.shape, dtype=problem.dtype, device=x.device) if n else None for x, n in zip(loads, needs[3:], strict=True)]
    for n, tile in enumerate(problem.tiles()):
        t = problem.tile(tile, keep=True)
        b, ks = slice(tile.b0, tile.b1), slice(t.k0, t.k1)
        do = problem.grouped(grad[b, :, tile.q0 : tile.q1].to(problem.dtype))  # [b, Hkv, G * q, Dv]
        p = problem.dropped(t.p, seed, n)
        dv[b, :, ks] += problem.grouped(p).transpose(-1, -2) @ do
        dp = problem.dropped((do @ problem.v[b, :, ks].transpose(-1, -2)).view(t.p.shape), seed, n)
        mean = (t.p * dp).sum(-1, keepdim=True)
        raw = problem.into_programs(t, t.p * (dp - mean), into)
        problem.into_sink(t, mean, into)
        if raw is not None:
            raw = problem.grouped(raw.expand(t.p.shape))
            dq[b, :, tile.q0 : tile.q1] = (raw @ problem.k[b, :, ks]).view(dq[b, :, tile.q0 : tile.q1].shape)
            dk[b, :, ks] += raw.transpose(-1, -2) @ problem.grouped(problem.q[b, :, tile.q0 : tile.q1])
    all_ = [(dq, q), (dk, k), (dv, v), *zip(into, loads, strict=True)]
    return [g.to(x.dtype) for (g, x), need in zip(all_, needs, strict=True) if need and g is not None]


def softmax_with_sink(score: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of ``score`` [b, Hq, q, k] beside a logit without value [b, Hq, q, 1], and lse [b, Hq, q].

    Not exp(score - lse): lse is rounded, which is an error of eps * lse in every probability of a row.
    """
    peak = torch.maximum(score.amax(-1, keepdim=True), sink).detach() if score.shape[-1] else sink.detach()
    weights = torch.exp(score - peak)
    total = weights.sum(-1, keepdim=True) + torch.exp(sink - peak)
    return weights / total, (peak + total.log()).squeeze(-1)


@dataclass
class _Scored:
    """One tile after the softmax: probabilities [b, Hq, q, k] over keys [k0, k1), and what a gradient needs."""

    p: Tensor
    lse: Tensor
    k0: int
    k1: int
    env: Env
    table: Mapping[Expr, Value]
    visible: Tensor | None
    """None when every key is."""
    empty: Tensor | None
    """[.., q, 1], rows on which the policy for empty rows was applied; None when there is none."""


@dataclass
class _Problem:
    """Tensors in the accumulation dtype, and the spec with its sizes."""

    q: Tensor
    k: Tensor
    v: Tensor
    loads: Sequence[Tensor]
    sizes: Mapping[str, int]
    spec: AttentionSpec
    dtype: torch.dtype
    row: int = 0
    """The batch index of the first row of q, k and v."""
    first: int = 0
    """The query index of the first query of q."""

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> _Problem:
        check_shapes(q, k, v, loads, spec)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return _Problem(q.to(dtype), k.to(dtype), v.to(dtype), loads, bind_sizes(spec, sizes, q, k, v), spec, dtype)

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def tiles(self) -> Iterator[Tile]:
        B, Hq, Sq, _ = self.q.shape
        Skv = self.k.shape[2]
        limits: Bounds | None = bounds(self.spec, self.sizes).shifted(self.first)
        if self.q.device.type != "cpu" and self.spec.empty_rows in ("uniform", "program") and may_be_empty(self.spec):
            # To look for empty rows would wait for the device, and they need every key: take all keys from the start.
            limits = None
        return tiles(B, Hq * Skv, Sq, Skv, limits, BUDGET)

    def grouped(self, x: Tensor) -> Tensor:
        """[b, Hq, q, n] as [b, Hkv, G * q, n]: query heads that share keys stand together in one product."""
        b, _, n, m = x.shape
        return x.reshape(b, self.k.shape[1], self.groups * n, m)

    def raw_scores(self, tile: Tile) -> Tensor:
        queries = self.grouped(self.q[tile.b0 : tile.b1, :, tile.q0 : tile.q1])
        s = queries @ self.k[tile.b0 : tile.b1, :, tile.k0 : tile.k1].transpose(-1, -2)
        return s.view(tile.b1 - tile.b0, self.q.shape[1], tile.q1 - tile.q0, tile.k1 - tile.k0)

    def times_values(self, p: Tensor, tile: Tile, k0: int, k1: int) -> Tensor:
        o = self.grouped(p) @ self.v[tile.b0 : tile.b1, :, k0:k1]
        return o.view(*p.shape[:3], self.v.shape[3])

    def tile(self, tile: Tile, keep: bool = False) -> _Scored:
        """Scores, masks and normalises one tile."""
        spec = self.spec
        env = Env(tile.ranges(self.q.shape[1], self.row, self.first), self.loads, self.sizes, self.dtype, self.q.device, self.raw_scores(tile))
        some_may_be_empty = may_be_empty(spec)
        second = some_may_be_empty and spec.empty_rows == "program" and spec.empty_score is not None
        (score_value, mask_value), table = evaluate((spec.score, spec.mask), env, keep)
        score = as_tensor(score_value, "float", env)
        shape = env.score.shape if env.score is not None else score.shape
        visible: Tensor | None = None
        if mask_value is not True:
            visible = as_tensor(mask_value, "bool", env)
            score = torch.where(visible, score, -torch.inf)
        score = score.expand(shape)
        empty: Tensor | None = None
        if spec.sink is not None:
            (sink,), more = evaluate((spec.sink,), env, keep)
            p, lse = softmax_with_sink(score, as_tensor(sink, "float", env).expand(*shape[:3], 1))
            return _Scored(p, lse, *env.ranges["k"], env, {**table, **more}, visible, None)
        if spec.empty_rows == "zero":
            empty = score.amax(-1, keepdim=True) == -torch.inf if shape[-1] else score.new_ones((*shape[:3], 1), dtype=torch.bool)
        elif visible is not None and some_may_be_empty and spec.empty_rows in ("uniform", "program"):
            empty = ~visible.any(-1, keepdim=True)
            if self.q.device.type == "cpu" and not bool(empty.any()):
                empty = None
            elif (tile.k0, tile.k1) != (0, self.k.shape[2]):
                return self.tile(Tile(tile.b0, tile.b1, tile.q0, tile.q1, 0, self.k.shape[2]), keep)
        lse = torch.logsumexp(score, -1)
        if empty is not None:
            instead = score.new_zeros(())
            if second and spec.empty_score is not None:
                (value,), more = evaluate((spec.empty_score,), env, keep)
                table = {**table, **more}
                instead = as_tensor(value, "float", env)
            score = torch.where(empty, instead, score)
        zero = empty if spec.empty_rows == "zero" else None
        if zero is None and spec.zero_without_weight and shape[-1]:  # a row that sees keys has no weight either where their scores overflow
            zero = score.amax(-1, keepdim=True) == -torch.inf
            score = torch.where(zero, 0.0, score)
        p = torch.softmax(score, -1)
        if zero is not None:
            p = torch.where(zero, 0.0, p)
        return _Scored(p, lse, *env.ranges["k"], env, table, visible, empty)

    def into_programs(self, t: _Scored, ds: Tensor, into: Sequence[Tensor | None]) -> Tensor | None:
        """Gradient of the raw scores from that of the scores; adds the gradients of loads to ``into``."""
        spec = self.spec
        kept = ds if t.empty is None else torch.where(t.empty, 0.0, ds)
        if t.visible is not None:
            kept = torch.where(t.visible, kept, 0.0)
        raw = pull_back(spec.score, kept, t.table, t.env, into)
        if t.empty is not None and spec.empty_rows == "program" and spec.empty_score is not None:
            more = pull_back(spec.empty_score, torch.where(t.empty, ds, 0.0), t.table, t.env, into)
            if more is not None:
                raw = more if raw is None else raw + more
        return raw

    def into_sink(self, t: _Scored, mean: Tensor, into: Sequence[Tensor | None]) -> None:
        """Adds the gradient that reaches loads through the sink; its value is zero, so only the normalisation counts. ``mean`` is [b, Hq, q, 1]."""
        sink = self.spec.sink
        if sink is not None:
            weight = torch.exp(as_tensor(t.table[sink], "float", t.env) - t.lse.unsqueeze(-1))
            pull_back(sink, -weight * mean, t.table, t.env, into)

    def dropped(self, p: Tensor, seed: int, tile: int) -> Tensor:
        """``p`` with dropout applied: tile ``tile`` of a run with ``seed`` always drops the same elements."""
        rate = self.spec.dropout
        if rate == 0.0:
            return p
        generator = torch.Generator(device=p.device).manual_seed((seed + 0x9E3779B97F4A7C15 * (tile + 1)) % (1 << 63))
        keep = torch.rand(p.shape, generator=generator, device=p.device) >= rate
        return torch.where(keep, p / (1.0 - rate), 0.0) if rate < 1.0 else torch.zeros_like(p)
