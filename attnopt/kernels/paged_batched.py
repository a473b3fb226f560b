"""Attention over a paged cache on the CPU: the requests with one query each in one product, the others one by one through PyTorch's attention.

What a step's lengths and pages give (which slots to read, which keys count, masks that read no tensor) is worked out once and kept for the step's other layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec, Dims
from attnopt.kernels import reference, sdpa
from attnopt.kernels.affine import affine
from attnopt.kernels.evaluate import Env, Value, as_tensor, evaluate
from attnopt.kernels.paged_reference import check_positions, chunk_start, one_request, request_sizes
from attnopt.kernels.tiling import Bounds, bounds, cached_key_range, may_be_empty

UNEVEN = 2
"""Requests are read side by side as far as the longest has at most so many times the keys of the shortest: the rest is waste."""


def refusal(spec: AttentionSpec, device: str) -> str | None:
    """Why this kernel cannot compute ``spec`` on a device of type ``device``, as a phrase; None when it can."""
    if device != "cpu":
        return f"it reads lengths on the host, and the tensors are on {device}"
    if may_be_empty(spec):
        return "a query may see no key"
    return None


@dataclass(eq=False)
class _Group:
    """n requests with one query each, whose keys are read side by side, L of each."""

    requests: list[int]
    ends: list[int]
    """How many keys each has."""
    begins: list[int]
    """The first key of each that counts."""
    dims: Dims
    heads: int
    tokens: Tensor
    """int64 [n]: where their queries stand in the call."""
    slots: Tensor
    """int64 [n * L]: of their keys; one that a request does not have stands for its last."""
    counted: Tensor | None
    """bool [n, 1, 1, L]: which keys a request has; None where each has all."""
    visible: Tensor | None = None
    """bool [n, 1 or Hq, 1, L]: ``counted``, and what the mask lets through; None where that is all. A mask that reads a tensor is not in it."""

    @cached_property
    def known(self) -> Mapping[Expr, Value]:
        """b, h, q, k, Sq and Skv of the spec's programs, each along its axis of [n, Hq, 1, L]."""
        d, ends = self.dims, column(self.ends)
        L = len(self.slots) // len(self.ends)
        known: dict[Expr, Value] = {d.b: column(self.requests), d.h: torch.arange(self.heads).view(1, -1, 1, 1), d.q: ends - 1}
        known[d.k] = torch.minimum(column(self.begins) + torch.arange(L), ends - 1)
        return known | {x: ends for x in (d.Sq, d.Skv) if x.op == "sym"}


def column(values: Sequence[int]) -> Tensor:
    """int64 [n, 1, 1, 1]"""
    return torch.tensor(values).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class _Plan:
    """What follows from the lengths and pages of one step."""

    starts: list[int]
    lengths: list[int]
    block_table: Tensor
    groups: tuple[_Group, ...]
    others: tuple[int, ...]
    """Requests with several queries."""
    whole: bool
    """Whether all tokens are those of one group, in their order."""
    covered: bool
    """Whether each token is one of a request with keys."""

    def fits(self, starts: list[int], lengths: list[int], block_table: Tensor) -> bool:
        return starts == self.starts and lengths == self.lengths and torch.equal(block_table, self.block_table)


class Memo:
    """The plan of the last call among those that look alike (spec, sizes, shapes): the layers of a step share it. The last ``MOST`` of all are kept."""

    MOST = 8
    _recent: ClassVar[deque[Memo]] = deque()

    def __init__(self) -> None:
        self.plan: _Plan | None = None

    def keep(self, plan: _Plan) -> None:
        if self.plan is None:
            self._recent.append(self)
            if len(self._recent) > self.MOST:
                self._recent.popleft().plan = None
        self.plan = plan


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    memo: Memo | None = None,
) -> Tensor:
    """``attnopt::paged_attention`` on the CPU, for the specs that ``refusal`` takes: o [T, Hq, Dv]. In float32, or in float64 for float64 queries, as the reference."""
    starts, lengths = cu_seqlens_q.tolist(), seqlens_k.tolist()
    plan = None if memo is None else memo.plan
    if plan is None or not plan.fits(starts, lengths, block_table):
        check_positions(spec, loads, lengths)
        plan = _planned(q, k_cache, v_cache, block_table, starts, lengths, loads, sizes, spec)
        if memo is not None:
            memo.keep(plan)
    if plan.whole:
        return _group(q, k_cache, v_cache, loads, sizes, spec, k_scale, v_scale, plan.groups[0]).to(q.dtype)
    shape = (*q.shape[:2], v_cache.shape[3])
    o = q.new_empty(shape) if plan.covered else q.new_zeros(shape)
    for group in plan.groups:
        o[group.tokens] = _group(q[group.tokens], k_cache, v_cache, loads, sizes, spec, k_scale, v_scale, group).to(q.dtype)
    through = reference.attention_at if sdpa.refusal(spec, "cpu") else sdpa.attention_at
    for r in plan.others:
        mine = slice(starts[r], starts[r + 1])
        o[mine] = one_request(through, q[mine], k_cache, v_cache, block_table[r], len(lengths), lengths[r], loads, sizes, spec, r, k_scale, v_scale)
    return o


def _planned(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    starts: list[int],
    lengths: list[int],
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
) -> _Plan:
    counts = [b - a for a, b in pairwise(starts)]
    alive = [r for r, (m, n) in enumerate(zip(counts, lengths, strict=True)) if m and n]
    single = [r for r in alive if counts[r] == 1]
    first: dict[int, int] = {}
    open_: set[int] = set()
    """Requests that see all their keys from the first on, as the bounds of the mask say."""
    fixed = _fixed_bounds(spec.mask)
    for r in single:
        n = lengths[r]
        limits = fixed or bounds(spec, request_sizes(spec, sizes, q, k_cache, v_cache, len(lengths), n))
        first[r] = max(limits.keys(n - 1, n, n)[0], chunk_start(spec, n - 1))
        if limits.all_visible(n - 1, n, first[r], n):
            open_.add(r)
    groups: list[list[int]] = []
    for r in sorted(single, key=lambda r: first[r] - lengths[r]):
        longest = lengths[groups[-1][0]] - first[groups[-1][0]] if groups else 0
        if groups and (lengths[r] - first[r]) * UNEVEN >= longest:
            groups[-1].append(r)
        else:
            groups.append([r])
    made = []
    for members in groups:
        members.sort()
        group = _grouped(members, first, q, k_cache, block_table, starts, lengths, spec)
        if not _reads(spec.mask):
            seen = group.counted if open_.issuperset(members) else _visible(_env(group, q, k_cache, v_cache, loads, sizes, spec), spec, group.counted)
            group.visible = None if seen is None or bool(seen.all()) else seen
        made.append(group)
    T = q.shape[0]
    whole = len(groups) == 1 and len(groups[0]) == T
    return _Plan(starts, lengths, block_table.clone(), tuple(made), tuple(r for r in alive if counts[r] > 1), whole, sum(counts[r] for r in alive) == T)


def _grouped(
    requests: list[int], first: Mapping[int, int], q: Tensor, k_cache: Tensor, block_table: Tensor, starts: list[int], lengths: list[int], spec: AttentionSpec
) -> _Group:
    page_size = k_cache.shape[1]
    ends, begins = [lengths[r] for r in requests], [first[r] for r in requests]
    L = max(b - a for a, b in zip(begins, ends, strict=True))
    last = torch.tensor(ends).unsqueeze(1) - 1
    place = torch.arange(L).expand(len(ends), L) if not any(begins) else torch.tensor(begins).unsqueeze(1) + torch.arange(L)
    counted = None if all(b - a == L for a, b in zip(begins, ends, strict=True)) else (place <= last).view(-1, 1, 1, L)
    if counted is not None:
        place = torch.minimum(place, last)
    pages = block_table if len(requests) == len(block_table) else block_table[torch.tensor(requests)]
    slots = pages.long().gather(1, place // page_size) * page_size + place % page_size
    return _Group(requests, ends, begins, spec.dims, q.shape[1], torch.tensor([starts[r] for r in requests]), slots.flatten(), counted)


@lru_cache(maxsize=1024)
def _fixed_bounds(mask: Expr) -> Bounds | None:
    """The bounds of a mask that are the same for all sizes; None where they are not."""
    r = cached_key_range(mask)
    if not all(x.is_const for x in (*r.left, *r.right)):
        return None
    left, right = (min((int(x.value) for x in side), default=None) for side in (r.left, r.right))
    return Bounds(left, right, r.rest)


@lru_cache(maxsize=1024)
def _reads(e: Expr) -> bool:
    """Whether a program reads a tensor."""
    return any(x.op == "load" for x in E.postorder(e))


def _env(group: _Group, q: Tensor, k_cache: Tensor, v_cache: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Env:
    """All variables are known values here, so no range is asked for; sizes that differ from request to request are known too."""
    values = request_sizes(spec, sizes, q, k_cache, v_cache, 0, 0)
    return Env({}, loads, values, torch.float64 if q.dtype == torch.float64 else torch.float32, q.device, known=group.known)


def _visible(env: Env, spec: AttentionSpec, counted: Tensor | None) -> Tensor | None:
    """bool [n, 1 or Hq, 1, 1 or L] of what the mask lets through and of ``counted``; None where that is all."""
    (mask,), _ = evaluate((spec.mask,), env)
    if mask is True:
        return counted
    visible = as_tensor(mask, "bool", env)
    return visible if counted is None else visible & counted


def _group(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    loads: Sequence[Tensor],
    sizes: Sequence[int],
    spec: AttentionSpec,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    group: _Group,
) -> Tensor:
    """o [n, Hq, Dv] of the queries q [n, Hq, D] of a group. Heads that share keys stand together, as the rows of one product: [n, Hkv, G, ...]."""
    n, Hq, D = q.shape
    Hkv = k_cache.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.reshape(n, Hkv, Hq // Hkv, D).to(wide)
    k, v = (_read(x, scale, group.slots, wide).view(n, -1, *x.shape[2:]).transpose(1, 2) for x, scale in ((k_cache, k_scale), (v_cache, v_scale)))
    form = affine(spec.score)
    if form is not None and form.bias is None and spec.sink is None and not _reads(spec.mask):
        return F.scaled_dot_product_attention(queries, k, v, attn_mask=_by_group(group.visible, Hkv), scale=form.scale).reshape(n, Hq, -1)
    env = _env(group, q, k_cache, v_cache, loads, sizes, spec)
    env.score = (queries @ k.transpose(-1, -2)).view(n, Hq, 1, -1)
    (value,), _ = evaluate((spec.score,), env)
    score = as_tensor(value, "float", env).expand(env.score.shape)
    visible = _visible(env, spec, group.counted) if _reads(spec.mask) else group.visible
    if visible is not None:
        score = torch.where(visible, score, -torch.inf)
    if spec.sink is not None:
        (sink,), _ = evaluate((spec.sink,), env)
        p, _ = reference.softmax_with_sink(score, as_tensor(sink, "float", env).expand(n, Hq, 1, 1))
    else:
        p = torch.softmax(score, -1)
        if spec.zero_without_weight:
            p = torch.where(score.amax(-1, keepdim=True) == -torch.inf, 0.0, p)
    return (p.view(n, Hkv, Hq // Hkv, -1) @ v).view(n, Hq, -1)


def _by_group(mask: Tensor | None, Hkv: int) -> Tensor | None:
    """A mask [n, 1 or Hq, 1, L] as [n, 1 or Hkv, 1 or G, L]."""
    return mask if mask is None or mask.shape[1] == 1 else mask.view(mask.shape[0], Hkv, -1, mask.shape[3])


def _read(cache: Tensor, scale: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [slots, Hkv, D] of a cache. Slots are counted through all pages, which is one axis where the cache's strides allow it."""
    page_size = cache.shape[1]
    if scale is not None:
        at = slots // page_size, slots % page_size
        return cache[at].to(dtype) * scale[at].to(dtype).unsqueeze(-1)
    if cache.stride(0) == page_size * cache.stride(1):
        return cache.flatten(0, 1).index_select(0, slots).to(dtype)
    return cache[slots // page_size, slots % page_size].to(dtype)
