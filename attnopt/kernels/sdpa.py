"""torch's scaled_dot_product_attention, for scores of the form scale * s + bias.

Plain and top-left causal attention go to it whole, without a mask tensor. Everything else goes tile by tile: the mask of
a tile is built at its smallest shape and for the keys that the tile can see, so memory is linear and a causal mask halves
the work. What torch computes on rows without a visible key depends on its kernel and version; these rows are set here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference
from attnopt.kernels.affine import Affine, affine
from attnopt.kernels.evaluate import Env, as_tensor, evaluate
from attnopt.kernels.tiling import Bounds, Tile, bind_sizes, bounds, empty_output, may_be_empty, tiles

BUDGET = 1 << 19
"""Elements of a mask held at a time."""


def refusal(spec: AttentionSpec, device: str) -> str | None:
    """Why this kernel cannot compute ``spec`` on a device of type ``device``; None when it can."""
    if spec.dropout:
        return f"dropout {spec.dropout:g} would not be replayed in the backward pass"
    if spec.sinks:
        return "it has no attention sinks"
    if spec.softcap is not None:
        return f"it has no softcap, and the score has softcap {spec.softcap:g}"
    if affine(spec.score) is None:
        return f"it computes scale * s + bias, and the score is {spec.score}"
    if spec.empty_rows == "program" and may_be_empty(spec) and device != "cpu":
        return "rows without a visible key have a score program of their own"
    return None


def takes_whole(spec: AttentionSpec) -> bool:
    """Whether torch's kernels need no mask tensor for it, whatever the sizes."""
    form = affine(spec.score)
    return form is not None and form.bias is None and (spec.mask is E.TRUE or _is_top_left(spec.mask)) and not spec.dropout and not spec.sinks


def is_one_call(spec: AttentionSpec) -> bool:
    """Whether PyTorch's operator with at most ``is_causal`` computes the spec, on every row: it then stands in the graph as that
    call, with PyTorch's own gradients."""
    causal = spec.mask is E.le(spec.dims.k, spec.dims.q)
    return spec.is_plain and (spec.mask is E.TRUE or causal) and spec.dims.D is spec.dims.Dv


def why(spec: AttentionSpec, device: str) -> str:
    """What of torch's will run, in a few words."""
    name = {"cpu": "CPU flash", "cuda": "the fused kernel that PyTorch picks"}.get(device, "torch's own kernel")
    if not takes_whole(spec):
        return f"{name}, mask built tile by tile"
    return f"{name}, no mask tensor" if spec.mask is E.TRUE else f"{name}, causal without a mask tensor"


def _is_top_left(mask: Expr) -> bool:
    """Whether the mask is k <= q and nothing else."""
    if mask.op != "ge0":
        return False
    found = {a.value: c for c, a in E.terms(mask.args[0]) if a is not None and a.op == "var"}
    return found == {"q": 1, "k": -1} and len(E.terms(mask.args[0])) == 2


def attention(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Tensor:
    """The spec on q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]: o [B, Hq, Sq, Dv]. See ``refusal``."""
    reference.check_shapes(q, k, v, loads, spec)
    return attention_at(q, k, v, loads, bind_sizes(spec, sizes, q, k, v), spec, 0, 0)


def attention_at(
    q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Mapping[str, int], spec: AttentionSpec, row: int, first: int
) -> Tensor:
    """The spec for a part of the batch in its place: q [B, Hq, n, D] are the queries from index ``first`` on of the batches from ``row`` on, k and v
    [B, Hkv, Skv, D or Dv] their keys and values from index 0 on. ``sizes`` holds all sizes by name. o is [B, Hq, n, Dv]. See ``refusal``.
    """
    form = affine(spec.score)
    if form is None:
        raise ValueError(refusal(spec, q.device.type))
    Sq, Skv = q.shape[2], k.shape[2]
    limits = bounds(spec, sizes).shifted(first)
    out = empty_output(q, v)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return out.zero_()
    call = _Call(q, k, v, loads, sizes, spec, form, limits, row, first)
    if form.bias is None and limits.all_visible(0, Sq, 0, Skv):
        return out.copy_(call.kernel(q, k, v, None, False))
    if form.bias is None and limits.rest is E.TRUE and limits.right == 0 and (limits.left is None or limits.left >= Sq - 1):
        return out.copy_(call.kernel(q, k, v, None, True))
    for tile in tiles(q.shape[0], call.mask_row(), Sq, Skv, limits, BUDGET, at_least=128):
        out[tile.b0 : tile.b1, :, tile.q0 : tile.q1] = call.tile(tile)
    return out


@dataclass
class _Call:
    q: Tensor
    k: Tensor
    v: Tensor
    loads: Sequence[Tensor]
    sizes: Mapping[str, int]
    spec: AttentionSpec
    form: Affine
    limits: Bounds
    row: int
    first: int
    """The indices of the first batch and the first query."""

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """torch's kernel, on heads padded to one size where D and Dv differ (its fused kernels want one size)."""
        D, Dv = q.shape[3], v.shape[3]
        if Dv > D:
            q, k = F.pad(q, (0, Dv - D)), F.pad(k, (0, Dv - D))
        elif Dv < D:
            v = F.pad(v, (0, D - Dv))
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.form.scale, enable_gqa=q.shape[1] != k.shape[1])
        return o[..., :Dv]

    def mask_row(self) -> int:
        """Elements of the mask for one query of one batch."""
        leaves = self.spec.mask.leaves if self.form.bias is None else self.spec.mask.leaves | self.form.bias.leaves
        per_head = any(x.op == "var" and x.value == "h" for x in leaves)
        return self.k.shape[2] * (self.q.shape[1] if per_head else 1)

    def tile(self, tile: Tile) -> Tensor:
        """One tile [b, Hq, q, Dv]."""
        q = self.q[tile.b0 : tile.b1, :, tile.q0 : tile.q1]
        k, v = (x[tile.b0 : tile.b1, :, tile.k0 : tile.k1] for x in (self.k, self.v))
        if self.form.bias is None and self.limits.all_visible(tile.q0, tile.q1, tile.k0, tile.k1):
            return self.kernel(q, k, v, None, False)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        env = Env(tile.ranges(q.shape[1], self.row, self.first), self.loads, self.sizes, dtype, q.device)
        roots = (self.spec.mask,) if self.form.bias is None else (self.spec.mask, self.form.bias)
        values, _ = evaluate(roots, env)
        visible = None if values[0] is True else _four_axes(as_tensor(values[0], "bool", env))
        mask = visible
        if len(values) == 2:
            bias = _four_axes(as_tensor(values[1], "float", env))
            mask = bias if visible is None else torch.where(visible, bias, -torch.inf)
        assert mask is not None
        o = self.masked(q, k, v, mask)
        return self.set_empty_rows(o, tile, visible, mask)

    def masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        shape = (*mask.shape[:2], q.shape[2], k.shape[2])
        if mask.dtype == torch.bool or mask.dtype == q.dtype:
            return self.kernel(q, k, v, mask.expand(shape), False)
        if q.device.type != "cpu" and not self.bias_is_exact(q.dtype):
            # Elsewhere the bias must have the query's dtype, and rounding it there can cost whole units.
            return self.kernel(q.float(), k.float(), v.float(), mask.expand(shape), False).to(v.dtype)
        return self.kernel(q, k, v, (mask if q.device.type == "cpu" else mask.to(q.dtype)).expand(shape), False)

    def bias_is_exact(self, dtype: torch.dtype) -> bool:
        """Whether the bias is read from a tensor of this dtype, so that nothing is lost by keeping it."""
        b = self.form.bias
        return b is not None and b.op == "load" and self.loads[b.value].dtype == dtype

    def set_empty_rows(self, o: Tensor, tile: Tile, visible: Tensor | None, mask: Tensor) -> Tensor:
        """``o`` with the policy of the spec on rows without a visible key."""
        spec = self.spec
        some_may_be_empty = visible is not None and may_be_empty(spec)
        if not some_may_be_empty and (self.form.bias is None or not any(x.op == "load" for x in self.form.bias.leaves)):
            return o
        # A bias of -inf on every visible key leaves a row without weights, as softmax has it: NaN, or zero where the policy says so.
        hidden = ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else mask.amax(-1, keepdim=True) == -torch.inf
        cpu = o.device.type == "cpu"
        if cpu and not bool(hidden.any()):
            return o
        if spec.empty_rows in ("nan", "zero"):
            return torch.where(hidden, torch.nan if spec.empty_rows == "nan" else 0.0, o)
        o = torch.where(hidden, 0.0 if spec.zero_without_weight else torch.nan, o)
        if visible is None:
            return o
        empty = ~visible.any(-1, keepdim=True)
        if spec.empty_rows == "uniform":
            mean = self.v[tile.b0 : tile.b1].mean(2, keepdim=True, dtype=torch.float64 if o.dtype == torch.float64 else torch.float32).to(o.dtype)
            return torch.where(empty, mean.repeat_interleave(o.shape[1] // mean.shape[1], 1), o)
        return torch.where(empty, self.by_program(tile), o)

    def by_program(self, tile: Tile) -> Tensor:
        """The tile under the score program for empty rows, over all keys."""
        spec = self.spec
        assert spec.empty_score is not None
        env = Env(
            {**tile.ranges(self.q.shape[1], self.row, self.first), "k": (0, self.k.shape[2])},
            self.loads,
            self.sizes,
            torch.float64 if self.q.dtype == torch.float64 else torch.float32,
            self.q.device,
        )
        q, k, v = (x[tile.b0 : tile.b1].to(env.dtype) for x in (self.q[:, :, tile.q0 : tile.q1], self.k, self.v))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        env.score = q @ k.transpose(-1, -2)
        (score,), _ = evaluate((spec.empty_score,), env)
        logits = as_tensor(score, "float", env).expand(env.score.shape)
        p = torch.softmax(logits, -1)
        if spec.zero_without_weight:
            p = torch.where(logits.amax(-1, keepdim=True) == -torch.inf, 0.0, p)
        return (p @ v).to(self.v.dtype)


def _four_axes(x: Tensor) -> Tensor:
    return x.view((1,) * (4 - x.dim()) + tuple(x.shape))
