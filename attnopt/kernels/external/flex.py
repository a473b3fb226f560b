"""PyTorch's FlexAttention, given the spec's own score and mask programs: compiled on a GPU, traced and run eagerly on the CPU.

A mask that reads no tensor becomes a block mask once for its sizes; one that does, whenever those tensors are others or changed.
Compiling takes seconds for each program, and on the CPU all scores are in memory, so ``auto`` does not choose it.
"""

from __future__ import annotations

import linecache
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.printing import render
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference
from attnopt.kernels.external.flex_source import LEAST, FlexSource, generate, unsupported
from attnopt.kernels.external.sinks import with_sink
from attnopt.kernels.materialise import QUERIES, part_tensor
from attnopt.kernels.programs import may_be_huge
from attnopt.kernels.tiling import as_bshd, bind_sizes, may_be_empty

if TYPE_CHECKING:
    from attnopt.kernels.registry import Setting

CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_HEAD_DIM = 16
KEPT_MASKS = 32
MASK_BLOCK = 128  # queries of a block of a block mask, as create_block_mask has it


def available() -> str | None:
    """None, or why it cannot be used on this machine."""
    try:
        from torch.nn.attention import flex_attention  # noqa: F401
    except ImportError as e:
        return f"this torch has no FlexAttention: {e}"
    return None


def refusal(spec: AttentionSpec, setting: Setting) -> str | None:
    """Why it cannot compute ``spec`` there; None when it can."""
    if setting.device not in ("cpu", "cuda"):
        return f"it runs on cuda, and eager on the CPU, and the tensors are on {setting.device}"
    if spec.dropout:
        return f"it has no dropout, and this attention has dropout {spec.dropout:g}"
    if setting.device == "cuda":
        if setting.dtype not in CUDA_DTYPES:
            return f"it computes float16, bfloat16 and float32, and the query is {str(setting.dtype).removeprefix('torch.')}"
        for name, n in (("D", spec.dims.D), ("Dv", spec.dims.Dv)):
            if n.is_const and n.value < LEAST_HEAD_DIM:
                return f"it has head sizes from {LEAST_HEAD_DIM} on, and {name} is {n.value}"
    if may_be_empty(spec) and spec.sink is None:
        if spec.empty_rows == "program":
            return "rows without a visible key have a score program of their own"
        if spec.empty_rows == "uniform" and _may_be_minus_infinity(spec):
            return f"it cannot tell rows that see no key, which are averages here, from rows whose scores {render(spec.score, spec.load_names)} are all -inf, which are NaN"
    return unsupported((spec.score, spec.mask))


def backward_refusal(spec: AttentionSpec, setting: Setting) -> str | None:
    """Why it cannot compute the gradients of ``spec`` there; None when it can."""
    if setting.device != "cuda":
        return f"its backward runs on cuda, and the tensors are on {setting.device}"
    return refusal(spec, setting)


def _may_be_minus_infinity(spec: AttentionSpec) -> bool:
    """Whether a score may be -inf though q and k are finite: it reads a float from a tensor, or holds an infinity."""
    return any((e.op == "load" and e.kind == "float") or (e.is_const and e.value == -float("inf")) for e in E.postorder(spec.score))


def why(spec: AttentionSpec, setting: Setting) -> str:
    compiled = "compiled" if setting.device == "cuda" else "eager, with all scores in memory"
    return f"FlexAttention from the same program, {compiled}"


# ------------------------------------------------------------------------------------------------ functions of a spec


@dataclass(frozen=True, eq=False)
class Functions:
    source: FlexSource
    attention: Callable[..., Any]
    make_mask: Callable[..., Any]
    make_block_mask: Callable[..., Any]

    def reads(self, q: Tensor, k: Tensor, loads: Sequence[Tensor], sizes: dict[str, int]) -> list[Tensor]:
        """What both functions take last."""
        shape = {"b": q.shape[0], "h": q.shape[1], "q": q.shape[2], "k": k.shape[2]}
        tensors = [*loads, *(part_tensor(p, shape, loads, sizes, q.device) for p in self.source.parts)]
        known = sizes | {QUERIES.value[0]: q.shape[2]}
        return [*(tensors[s] for s in self.source.slots), *(_number(known[name], q.device) for name in self.source.sizes)]


@lru_cache(maxsize=1024)
def functions(spec: AttentionSpec, dtype: torch.dtype, grad: bool = False, form: tuple[Any, ...] = ()) -> Functions:
    """The functions of a spec for q, k and v of ``dtype`` and of one ``form_of``, ``grad`` for a call that is differentiated.

    They are code of their own for each: torch.compile recompiles one function a few times only, and lengths and batches take those.
    """
    source = generate(spec)
    scope: dict[str, Any] = {"__name__": __name__}
    # torch.compile wraps a function whose source Python cannot find, all in one and the same wrapper, and counts the recompilations of that
    name = f"<attnopt FlexAttention program {sha256(source.text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source.text), None, source.text.splitlines(keepends=True), name)
    exec(compile(source.text, name, "exec"), scope)
    return Functions(source, scope["attention"], scope["make_mask"], scope["make_block_mask"])


def form_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What a model's attention keeps from call to call: heads, head sizes, the order of the axes in memory, and which of FlexAttention's kernels it takes."""
    sizes = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    orders = tuple(_order(x) for x in (q, k, v))
    return (*sizes, orders, _is_decoding(q, k))


def _order(x: Tensor) -> tuple[int, ...]:
    return tuple(sorted(range(x.dim()), key=lambda d: (-x.stride()[d], d)))


@lru_cache(maxsize=1024)
def _compiled_attention(f: Functions, device: str) -> Callable[..., Any]:
    return torch.compile(f.attention, fullgraph=True, backend="inductor" if device == "cuda" else "eager")


@lru_cache(maxsize=1024)
def _compiled_block_mask(f: Functions) -> Callable[..., Any]:
    return torch.compile(f.make_block_mask)


@lru_cache(maxsize=1024)
def _number(n: int, device: torch.device) -> Tensor:
    """A size as a tensor: FlexAttention's kernels take no numbers that change."""
    return torch.tensor(n, device=device)


@dataclass
class _Kept:
    """A block mask and the tensors that it was made from, with their versions."""

    mask: Any
    made_from: tuple[tuple[weakref.ref[Tensor], int], ...]

    @staticmethod
    def of(mask: Any, tensors: Sequence[Tensor]) -> _Kept:
        return _Kept(mask, tuple((weakref.ref(x), x._version) for x in tensors))

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        return all(ref() is t and version == t._version for (ref, version), t in zip(self.made_from, tensors, strict=True))


_masks: OrderedDict[Any, _Kept] = OrderedDict()


def block_mask(spec: AttentionSpec, q: Tensor, k: Tensor, loads: Sequence[Tensor], sizes: dict[str, int], dtype: torch.dtype) -> Any:
    """The block mask of the spec at these sizes; None where every query sees every key."""
    if spec.mask is E.TRUE:
        return None
    f = functions(spec, q.dtype)
    B = q.shape[0] if f.source.batched else None
    H = q.shape[1] if f.source.per_head else None
    used = tuple(loads[int(x.value)] for x in sorted(spec.mask.leaves, key=lambda x: x.key) if x.op == "load")
    key = (spec, B, H, q.shape[2], k.shape[2], tuple(sorted(sizes.items())), q.device, dtype, tuple(id(x) for x in used))
    tells = not any(x.is_inference() for x in used)  # they do not count what is written to them
    kept = _masks.get(key) if tells else None
    if kept is not None and kept.holds(used):
        _masks.move_to_end(key)
        return kept.mask
    program = f.make_mask(dtype, *f.reads(q, k, loads, sizes))
    make = _compiled_block_mask(f) if q.device.type == "cuda" else f.make_block_mask
    mask = make(program, B, H, q.shape[2], k.shape[2], q.device)
    if tells:
        _masks[key] = _Kept.of(mask, used)
    while len(_masks) > KEPT_MASKS:
        _masks.popitem(last=False)
    return mask


# ------------------------------------------------------------------------------------------------ the calls


def run(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Tensor:
    """``forward`` without lse."""
    return forward(q, k, v, loads, sizes, spec)[0]


def forward(
    q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The spec on q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]: o [B, Hq, Sq, Dv] and lse [B, Hq, Sq].

    lse is float32, natural logarithm, holds the sink, and is -inf on rows without a visible key. See ``refusal``.
    """
    _check(q, k, v, loads, spec)
    if _nothing(q, k, v):
        o, lse = reference.attention(q, k, v, loads, sizes, spec)
        return o, lse.float()
    # FlexAttention refuses operands that require gradients on the CPU, in whatever grad mode
    q, k, v, *loads = (x.detach() if x.requires_grad else x for x in (q, k, v, *loads))
    o, lse = _call(q, k, v, loads, bind_sizes(spec, sizes, q, k, v), spec)
    return as_bshd(o), lse.float().contiguous()


def _call(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], values: dict[str, int], spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """o in any layout, and lse; differentiable in grad mode."""
    *_, decoding = form = form_of(q, k, v)
    f = functions(spec, q.dtype, torch.is_grad_enabled(), form)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask = block_mask(spec, q, k, loads, values, dtype)
    run = _compiled_attention(f, q.device.type)
    o, aux = run(q, k, v, mask, q.shape[1] != k.shape[1], _options(decoding), dtype, *f.reads(q, k, loads, values))
    lse = aux.lse + f.source.shift if f.source.shift else aux.lse
    if may_be_huge(spec.score):
        lse = torch.where((lse > -torch.inf) & (lse < LEAST / 1.01), torch.finfo(torch.float32).min, lse)
    if may_be_empty(spec) or _may_be_minus_infinity(spec):
        o = _set_empty_rows(o, lse, v, spec)
    return (o, lse) if spec.sink is None else with_sink(o, lse, loads, values, spec)


def _is_decoding(q: Tensor, k: Tensor) -> bool:
    """Whether the queries of a group of heads fit in one block of a block mask.

    FlexAttention has a kernel for less than 128 queries that puts the queries of all heads of a group in one block, and there is no such block
    beyond that: Inductor then fails with "No choices to select".
    """
    return q.shape[2] * (q.shape[1] // k.shape[1]) <= MASK_BLOCK


@lru_cache(maxsize=2)
def _options(decoding: bool) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import AuxRequest

    return {"return_aux": AuxRequest(lse=True), "kernel_options": None if decoding else {"FORCE_USE_FLEX_ATTENTION": True}}


def _set_empty_rows(o: Tensor, lse: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
    """FlexAttention gives zeros on rows without weights: the policy of the spec instead."""
    if spec.empty_rows == "zero" or spec.sink is not None:
        return o
    hidden = (lse == -torch.inf).unsqueeze(-1)
    if spec.empty_rows == "uniform" and not _may_be_minus_infinity(spec):
        mean = v.mean(2, keepdim=True, dtype=lse.dtype).to(o.dtype).repeat_interleave(o.shape[1] // v.shape[1], 1)
        return torch.where(hidden, mean, o)
    return torch.where(hidden, torch.nan, o)


def backward(
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
    """Gradients of q, k, v and the loads that ``needs`` asks for. FlexAttention's backward follows its own forward only, so that runs again."""
    _check(q, k, v, loads, spec)
    if _nothing(q, k, v):
        return reference.gradients(grad, q, k, v, loads, sizes, spec, 0, needs)
    values = bind_sizes(spec, sizes, q, k, v)
    # what needs no gradient stays the same object, by which its block mask is known
    leaves = [x.detach().requires_grad_() if need else x.detach() if x.requires_grad else x for x, need in zip((q, k, v, *loads), needs, strict=True)]
    with torch.enable_grad():
        again, _ = _call(leaves[0], leaves[1], leaves[2], leaves[3:], values, spec)
    wanted = [x for x in leaves if x.requires_grad]
    return list(torch.autograd.grad(again, wanted, grad.to(again.dtype), allow_unused=True, materialize_grads=True))


def _check(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], spec: AttentionSpec) -> None:
    reference.check_shapes(q, k, v, loads, spec)


def _nothing(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return 0 in q.shape or 0 in k.shape or 0 in v.shape

