"""Running the generated backward: block sizes, launches, and the sums that reach the loads."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference
from attnopt.kernels.adjoint import add_to_load, pull_back, reduce_to
from attnopt.kernels.evaluate import Env, as_tensor, evaluate
from attnopt.kernels.materialise import Part, load_tensors
from attnopt.kernels.programs import programs_of
from attnopt.kernels.slopes import LoadSlope
from attnopt.kernels.tiling import bind_sizes, may_be_empty
from attnopt.kernels.triton.backward_tiles import BLOCKS, KernelText
from attnopt.kernels.triton.dropout import seed_words
from attnopt.kernels.triton.flash_backward import BackwardSource, generate
from attnopt.kernels.triton.launch import Config, argument_values, import_source, memory_of, power_of_two

ROUND = 128
"""Arrays with an element per query are a multiple of this long; so are blocks of queries, or they divide it."""


@dataclass(frozen=True)
class Kernels:
    source: BackwardSource
    functions: Mapping[str, Any]
    """The jitted kernels by name."""


@lru_cache(maxsize=1024)
def kernels_for(spec: AttentionSpec, needs: frozenset[int]) -> Kernels:
    """The imported kernels for a spec and the load slots that need a gradient."""
    source = generate(spec, needs)
    module = import_source(source.text)
    return Kernels(source, {k.name: getattr(module, k.name) for k in (source.rows, source.keys, source.queries, *(k for _, k in source.scores))})


# ------------------------------------------------------------------------------------------------ block sizes


@dataclass(frozen=True)
class Blocks(Config):
    """Block sizes and launch options of one backward kernel."""

    early: bool = False
    """Whether the product of dO and V starts before the weights are computed."""


@dataclass(frozen=True)
class BackwardConfig:
    """Block sizes of each kernel."""

    rows: Blocks
    keys: Blocks
    queries: Blocks
    scores: Blocks

    def of(self, name: str) -> Blocks:
        return self.scores if name.startswith("backward_scores") else {"backward_rows": self.rows, "backward_keys": self.keys, "backward_queries": self.queries}[name]


def config(source: BackwardSource, D: int, Dv: int, Sq: int, Skv: int, dtype: torch.dtype, shared_memory: int) -> BackwardConfig:
    """Block sizes for heads of D and Dv on a device with ``shared_memory`` bytes per block of threads.

    With no choice does a loop spill on sm_80 or sm_90 (``tests/kernels/test_compile.py``).
    """
    width = max(power_of_two(D), power_of_two(Dv))
    large = shared_memory >= 200 * 1024  # sm_90 has 227 KiB, sm_80 163 KiB
    if dtype == torch.float32:
        both = Blocks(32, 32, 8, 1) if width <= 128 else Blocks(16, 16, 8, 1)
        c = BackwardConfig(Blocks(16, 16, 4, 1), both, both, Blocks(16, 16, 4, 1))
    elif width <= 64:
        keys, queries = (Blocks(64, 128, 8, 3), Blocks(128, 64, 8, 3)) if large and not source.dense else (Blocks(32, 128, 8, 3), Blocks(128, 32, 4, 3))
        c = BackwardConfig(Blocks(64, 64, 4, 1), keys, queries, Blocks(64, 64, 4, 2))
    elif width <= 128:
        keys = Blocks(32, 64, 8, 2) if source.dense else Blocks(64, 128, 8, 2) if large and not source.curved else Blocks(64, 64, 8, 2)
        queries = Blocks(128, 64, 8, 2) if large and not source.dense else Blocks(64, 64, 8, 2)
        c = BackwardConfig(Blocks(64, 64, 4, 1), keys, queries, Blocks(64, 64, 8, 2))
    else:
        keys = Blocks(32, 64, 8, 2) if large and not source.dense else Blocks(32, 32, 8, 2)
        c = BackwardConfig(Blocks(32, 32, 8, 1), keys, Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 1))
    m, n = power_of_two(Sq), power_of_two(Skv)
    square = min(c.scores.BLOCK_M, max(m, n))
    return BackwardConfig(_cut(c.rows, m, n), _cut(c.keys, m, n), _cut(c.queries, m, n), replace(c.scores, BLOCK_M=square, BLOCK_N=square))


def _cut(c: Blocks, m: int, n: int) -> Blocks:
    return replace(c, BLOCK_M=min(c.BLOCK_M, m), BLOCK_N=min(c.BLOCK_N, n))


def constants(D: int, Dv: int, c: Blocks, dtype: torch.dtype) -> dict[str, Any]:
    """The values of a kernel's ``BLOCKS``."""
    values = (D, Dv, power_of_two(D), power_of_two(Dv), c.BLOCK_M, c.BLOCK_N, "ieee" if dtype == torch.float32 else "tf32", c.early)
    return dict(zip(BLOCKS, values, strict=True))


# ------------------------------------------------------------------------------------------------ the call


def gradients(
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
    choice: BackwardConfig | None = None,
) -> list[Tensor]:
    """Gradients of q, k, v and the loads, in this order, for those that ``needs`` (one flag each) asks for, the same from run to run.

    ``grad`` is the gradient of o [B, Hq, Sq, Dv], and o and lse are what a forward gave: lse [B, Hq, Sq] is float32, natural, -inf on rows
    without a visible key. Memory is linear in Sq and Skv, but for a load that is read per query and key. See ``launch.refusal``.
    """
    reference.check_shapes(q, k, v, loads, spec)
    wanted = [x for x, need in zip((q, k, v, *loads), needs, strict=True) if need]
    if grad.numel() == 0 or k.numel() == 0 or v.numel() == 0 or not wanted:
        return [torch.zeros_like(x) for x in wanted]
    slots = frozenset(i for i, (x, need) in enumerate(zip(loads, needs[3:], strict=True)) if need and x.is_floating_point())
    run = _Run(kernels_for(spec, slots), spec, q, k, v, grad.to(v.dtype), loads, bind_sizes(spec, sizes, q, k, v), seed, choice)
    with torch.cuda.device(q.device) if q.device.type == "cuda" else contextlib.nullcontext():
        run.rows(o, lse)
        into = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) if i in slots else None for i, x in enumerate(loads)]
        source = run.kernels.source
        dk, dv = run.keys(source) if needs[1] or needs[2] or source.column_sums else (None, None)
        if dv is not None:
            run.spoil(dv, lse)
        dq = run.queries(source) if needs[0] or source.row_sums else None
        for slope, kernel in source.scores:
            run.add(slope, run.scores(slope, kernel), into)
        for i, slope in enumerate(source.column_sums):
            run.add(slope, run.values[f"C{i}"].unsqueeze(2), into)
        for i, slope in enumerate(source.row_sums):
            run.add(slope, run.values[f"R{i}"].unsqueeze(3), into)
        run.add_sink(lse, into)
    found = [dq, dk, dv, *(None if g is None else g.to(x.dtype) for g, x in zip(into, loads, strict=True))]
    return [torch.zeros_like(x) if g is None else g for g, x, need in zip(found, (q, k, v, *loads), needs, strict=True) if need]


class _Run:
    """The launches of one backward pass, which share their arguments."""

    def __init__(
        self,
        kernels: Kernels,
        spec: AttentionSpec,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grad: Tensor,
        loads: Sequence[Tensor],
        sizes: Mapping[str, int],
        seed: int,
        choice: BackwardConfig | None,
    ) -> None:
        self.kernels, self.spec, self.q, self.k, self.v, self.loads, self.sizes = kernels, spec, q, k, v, loads, sizes
        (self.B, self.Hq, self.Sq, self.D), (self.Skv, self.Dv) = q.shape, (k.shape[2], v.shape[3])
        self.Hkv = k.shape[1]
        limit = memory_of(q.device)
        self.config = choice or config(kernels.source, self.D, self.Dv, self.Sq, self.Skv, q.dtype, limit)
        shape = {"b": self.B, "h": self.Hq, "q": self.Sq, "k": self.Skv}
        read = load_tensors(kernels.source.parts, shape, loads, sizes, q.device)
        self.values = argument_values(spec, {"Q": q, "K": k, "V": v, "DO": grad}, read, q, k, sizes)
        self.values.update(seed_words(seed))
        names = ["BASE", "DELTA", *(["SHIFT"] if kernels.source.shifts else []), *(["EMPTY", "EMPTY_SHIFT"] if kernels.source.retries else [])]
        rows = -(-self.Sq // ROUND) * ROUND
        self.values.update({name: torch.empty((self.B, self.Hq, rows), dtype=torch.float32, device=q.device) for name in names}, ROWS=rows)

    def launch(self, kernel: KernelText, programs: int) -> None:
        c = self.config.of(kernel.name)
        self.values.update({f"size{i}": self.sizes[name] for i, name in enumerate(kernel.sizes)})
        arguments = [self.values[name] for name in kernel.arguments]
        function = self.kernels.functions[kernel.name]
        function[(programs,)](*arguments, **constants(self.D, self.Dv, c, self.q.dtype), num_warps=c.num_warps, num_stages=c.num_stages)

    def give(self, **tensors: Tensor) -> None:
        """Adds tensors with four axes to the arguments."""
        for name, x in tensors.items():
            self.values[name] = x
            self.values.update({f"{name}_s{d}": n for d, n in enumerate(x.stride())})

    def rows(self, o: Tensor, lse: Tensor) -> None:
        self.give(O=o)
        self.values["LSE"] = lse.contiguous()
        self.launch(self.kernels.source.rows, -(-self.values["ROWS"] // self.config.rows.BLOCK_M) * self.B * self.Hq)

    def keys(self, source: BackwardSource) -> tuple[Tensor, Tensor]:
        dk, dv = torch.empty_like(self.k), torch.empty_like(self.v)
        self.give(DK=dk, DV_OUT=dv)
        for i in range(len(source.column_sums)):
            self.values[f"C{i}"] = self.q.new_empty((self.B, self.Hq, self.Skv), dtype=torch.float32)
        self.launch(source.keys, -(-self.Skv // self.config.keys.BLOCK_N) * self.B * self.Hkv)
        return dk, dv

    def spoil(self, dv: Tensor, lse: Tensor) -> None:
        """A row of NaN weights makes dV NaN at every key, also at those that no block of the row reaches."""
        programs = programs_of(self.spec)
        if (programs.left or programs.right) and self.spec.empty_rows == "nan" and self.spec.sink is None and may_be_empty(self.spec):
            some = (lse == -torch.inf).view(self.B, self.Hkv, -1).any(2)
            dv.masked_fill_(some[:, :, None, None], torch.nan)

    def queries(self, source: BackwardSource) -> Tensor:
        dq = torch.empty_like(self.q)
        self.give(DQ=dq)
        for i in range(len(source.row_sums)):
            self.values[f"R{i}"] = self.q.new_empty((self.B, self.Hq, self.Sq), dtype=torch.float32)
        self.launch(source.queries, -(-self.Sq // self.config.queries.BLOCK_M) * self.B * self.Hq)
        return dq

    def scores(self, slope: LoadSlope, kernel: KernelText) -> Tensor:
        """The sum for one load read per query and key, [b, h, q, k] or [b, h, 1, distance], with 1 for an axis that it does not read."""
        c = self.config.scores
        b, h = (self.B if "b" in slope.axes else 1), (self.Hq if "h" in slope.axes else 1)
        m, n = -(-self.Sq // c.BLOCK_M), -(-self.Skv // c.BLOCK_N)
        if slope.sum == "dense":
            out = self.values["G"] = self.q.new_empty((b, h, self.Sq, self.Skv), dtype=torch.float32)
            self.launch(kernel, b * h * m * n)
            return out
        bands = self.values["G"] = self.q.new_empty((b, h, m + n - 1, c.BLOCK_M, c.BLOCK_N), dtype=torch.float32)
        self.launch(kernel, b * h * (m + n - 1))
        first = m * c.BLOCK_M - self.Sq
        return along_diagonals(bands)[:, :, None, first : first + self.Sq + self.Skv - 1]

    # ---- from sums to loads

    def add(self, slope: LoadSlope, total: Tensor, into: Sequence[Tensor | None]) -> None:
        """Adds ``total``, the gradient at the load's index, to the tensors that the index reads."""
        e, first_part = slope.load, len(self.loads)
        part: Part | None = slope.diagonal if slope.sum == "distance" else None
        if e.value >= first_part:
            part = self.kernels.source.parts[e.value - first_part]
        shape = {"b": self.B, "h": self.Hq, "q": self.Sq, "k": self.Skv}
        if part is not None:
            env = part.env(shape, self.loads, self.sizes, self.q.device)
            _, table = evaluate((part.expr,), env, keep=True)
            pull_back(part.expr, total, table, env, into)
            return
        env = Env({a: (0, n) for a, n in shape.items()}, self.loads, self.sizes, torch.float32, self.q.device)
        _, table = evaluate(e.args, env, keep=True)
        target = into[e.value]
        assert target is not None
        value = torch.broadcast_shapes(*(x.shape for x in (table[a] for a in e.args) if isinstance(x, Tensor)))
        add_to_load(e, reduce_to(total, total.new_empty(()).expand(value)), table, env, target)

    def add_sink(self, lse: Tensor, into: Sequence[Tensor | None]) -> None:
        """The sink's value is zero, so that its weight alone counts: d loss / d sink = -weight * delta."""
        sink = self.spec.sink
        if sink is None or not any(x is not None for x in into):
            return
        shape = {"b": self.B, "h": self.Hq, "q": self.Sq, "k": self.Skv}
        env = Env({a: (0, n) for a, n in shape.items()}, self.loads, self.sizes, torch.float32, self.q.device)
        (value,), table = evaluate((sink,), env, keep=True)
        weight = torch.exp(as_tensor(value, "float", env) - lse.unsqueeze(3))
        if self.kernels.source.shifts:
            weight = weight * torch.exp2(-self.values["SHIFT"][:, :, : self.Sq, None])
        pull_back(sink, -weight * self.values["DELTA"][:, :, : self.Sq, None], table, env, into)


def along_diagonals(bands: Tensor) -> Tensor:
    """Sums over the diagonals of square tiles [..., bands, N, N] that follow one another to the right, band after band.

    The result [..., bands * N + N - 1] runs over the distances column - row, from 1 - N in the first band on.
    """
    *_, places, N, _ = bands.shape
    # a row more to the left for each row further down: rows of one more element, read as rows of one less
    skewed = torch.nn.functional.pad(bands.flip(-2), (0, N)).flatten(-2)[..., : N * (2 * N - 1)].unflatten(-1, (N, 2 * N - 1)).sum(-2)
    out = bands.new_zeros((*bands.shape[:-3], (places + 1) * N))
    out[..., : places * N] += skewed[..., :N].flatten(-2)
    out[..., N:] += torch.nn.functional.pad(skewed[..., N:], (0, 1)).flatten(-2)
    return out[..., :-1]
