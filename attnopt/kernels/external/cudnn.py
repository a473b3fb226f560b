"""cuDNN's fused attention, through torch's own operators for it (``aten::_scaled_dot_product_cudnn_attention`` and its backward).

For scores scale * s, full or causal, with GQA; and, forward only, for scale * s + bias where the bias is read from a tensor of
the query's dtype. What this build, driver and device can do beyond that is asked of torch itself, on tensors of the same form.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.printing import render
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference
from attnopt.kernels.affine import capped
from attnopt.kernels.evaluate import Env, access, evaluate
from attnopt.kernels.external.sinks import sink_gradients, with_sink
from attnopt.kernels.tiling import as_bshd, bind_sizes

if TYPE_CHECKING:
    from attnopt.kernels.registry import Setting

aten = torch.ops.aten
DTYPES = (torch.float16, torch.bfloat16)
PROBE_LENGTH = 128
LEAST = -2e38  # times log2(e) it is finite in float32


@dataclass(frozen=True)
class Form:
    """What of a spec goes to cuDNN: ``scale * s``, the causal flag, and the load that holds the bias."""

    scale: float
    shift: float
    causal: bool
    bias: Expr | None


@lru_cache(maxsize=1024)
def form(spec: AttentionSpec) -> Form | str:
    """The spec in cuDNN's words, or why it has none for it."""
    if spec.dropout:
        return f"its dropout cannot be replayed by seed, and this attention has dropout {spec.dropout:g}"
    score = capped(spec.score)
    if score is None:
        return f"it computes scale * s + bias, and the score is {render(spec.score, spec.load_names)}"
    if score.softcap is not None:
        return f"it has no softcap, and the score has softcap {score.softcap:g}"
    d = spec.dims
    if spec.mask is not E.TRUE and not (spec.mask is E.le(d.k, d.q) and d.Sq is d.Skv):
        return f"it computes full and causal attention over as many queries as keys, without a mask tensor, and this one is {spec}"
    if score.bias is None:
        return Form(score.scale, score.shift, spec.mask is not E.TRUE, None)
    if not _is_dense(score.bias):
        return f"it adds a bias that is a tensor over keys, and this one is {render(score.bias, spec.load_names)}"
    if spec.mask is not E.TRUE or spec.sinks:
        return f"beside a bias tensor it has neither a causal mask nor sinks, and this attention is {spec}"
    return Form(score.scale, 0.0, False, score.bias)


def _is_dense(bias: Expr) -> bool:
    """Whether it is an element of a tensor, indexed by some of b, h and q, in their order, and by k."""
    if bias.op != "load" or bias.kind != "float" or not bias.args:
        return False
    names = [a.value for a in bias.args if a.op == "var"]
    plain = all(a.op == "var" or a.is_const for a in bias.args)
    return plain and "k" in names and names == [n for n in "bhqk" if n in names]


def refusal(spec: AttentionSpec, setting: Setting) -> str | None:
    """Why its forward cannot compute ``spec`` there; None when it can."""
    found = form(spec)
    if isinstance(found, str):
        return found
    reason = _place(spec, setting)
    if reason is None and found.bias is not None:
        reason = _bias_dtype(found.bias, setting)
    return reason or _asked(spec, setting, found, training=False)


def backward_refusal(spec: AttentionSpec, setting: Setting) -> str | None:
    """Why its backward cannot follow a forward of ``spec`` there; None when it can."""
    found = form(spec)
    if isinstance(found, str):
        return found
    if found.bias is not None:
        return f"it has no gradient of the bias {spec.loads[found.bias.value].name}"
    return _place(spec, setting) or _asked(spec, setting, found, training=True)


def _place(spec: AttentionSpec, setting: Setting) -> str | None:
    if setting.device != "cuda":
        return f"it runs on cuda, and the tensors are on {setting.device}"
    if setting.dtype not in DTYPES:
        return f"it computes float16 and bfloat16, and the query is {str(setting.dtype).removeprefix('torch.')}"
    return next((f"it is chosen by head size, and {name} is {render(n)}" for name, n in (("D", spec.dims.D), ("Dv", spec.dims.Dv)) if not n.is_const), None)


def _bias_dtype(bias: Expr, setting: Setting) -> str | None:
    if setting.loads is None:
        return "it reads a bias of the query's dtype, and that of this bias is not known"
    dtype = setting.loads[bias.value]
    if dtype != setting.dtype:
        names = [str(x).removeprefix("torch.") for x in (setting.dtype, dtype)]
        return f"it reads a bias of the query's dtype {names[0]}, and this one is {names[1]}"
    return None


def _asked(spec: AttentionSpec, setting: Setting, found: Form, training: bool) -> str | None:
    D, Dv = int(spec.dims.D.value), int(spec.dims.Dv.value)
    heads = (spec.groups, 1)  # only their ratio matters to the check
    switches = (torch.backends.cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled())
    return probe(setting.dtype, D, Dv, heads, found.causal, found.bias is not None, training, switches)


@lru_cache(maxsize=1024)
def probe(dtype: torch.dtype, D: int, Dv: int, heads: tuple[int, int], causal: bool, bias: bool, training: bool, switches: tuple[bool, bool]) -> str | None:
    """What torch says of such an attention on the current device; None when cuDNN takes it. ``switches`` are torch's own, for the cache."""
    # a graph is compiled with fake tensors, and torch must be asked with real ones
    with unset_fake_temporarily(), torch.enable_grad():
        q, k, v = (
            torch.empty(1, n, PROBE_LENGTH, size, dtype=dtype, device="cuda", requires_grad=training)
            for n, size in ((heads[0], D), (heads[1], D), (heads[1], Dv))
        )
        mask = torch.empty(1, 1, PROBE_LENGTH, PROBE_LENGTH, dtype=dtype, device="cuda") if bias else None
        parameters = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, causal, heads[0] != heads[1])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if torch.backends.cuda.can_use_cudnn_attention(parameters, debug=True):
                return None
    reasons = [str(w.message).split(" (Triggered internally")[0].strip().rstrip(".") for w in said]
    return f"torch says of {'the backward of ' if training else ''}head sizes D {D}, Dv {Dv}: {'; '.join(reasons) or 'no, without a reason'}"


def available() -> str | None:
    """None, or why it cannot be used on this machine."""
    if not torch.cuda.is_available():
        return "cuDNN's attention needs a CUDA GPU, and there is none"
    if not torch.backends.cudnn.is_available():
        return "this build of torch has no cuDNN"
    return None


def why(spec: AttentionSpec) -> str:
    found = form(spec)
    assert isinstance(found, Form)
    return "cuDNN " + ("causal, no mask tensor" if found.causal else "with the bias as a tensor" if found.bias is not None else "full, no mask tensor")


# ------------------------------------------------------------------------------------------------ the calls


def run(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec) -> Tensor:
    """The spec on q [B, Hq, Sq, D], k [B, Hkv, Skv, D], v [B, Hkv, Skv, Dv]: o [B, Hq, Sq, Dv]. See ``refusal``."""
    return _attention(q, k, v, loads, sizes, spec, needs_lse=False)[0]


def forward(
    q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """As ``run``, and lse [B, Hq, Sq] in float32: natural logarithm, with the sink in it."""
    o, lse = _attention(q, k, v, loads, sizes, spec, needs_lse=True)
    assert lse is not None
    return o, lse


def _attention(
    q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], sizes: Sequence[int], spec: AttentionSpec, needs_lse: bool
) -> tuple[Tensor, Tensor | None]:
    found = _checked(q, k, v, loads, spec)
    if _is_degenerate(q, k, v):
        interpreted = reference.attention(q, k, v, loads, sizes, spec)
        return interpreted[0], interpreted[1].float()
    q, k, v = _rows(q), _rows(k), _rows(v)
    bias = most = part = None
    if found.bias is not None:
        bias = dense(found.bias, q, k, loads, bind_sizes(spec, sizes, q, k, v))
        most = bias.amax(-1, keepdim=True)
        part = _least(most)
        bias = bias if part is None else bias - part
    with_lse = needs_lse or spec.sinks
    o, stats, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, bias, with_lse, 0.0, found.causal, False, scale=found.scale)
    lse: Tensor | None = stats.reshape(stats.shape[0], stats.shape[1], -1) if with_lse else None
    if lse is not None and found.shift:
        lse = lse + found.shift
    if lse is not None and part is not None:
        lse = lse + part.float().squeeze(-1)
    if most is not None:
        o, lse = _set_rows_without_weight(o, lse, most, spec)
    if spec.sinks:
        assert lse is not None
        o, lse = with_sink(o, lse, loads, bind_sizes(spec, sizes, q, k, v), spec)
    return as_bshd(o), lse


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
    """Gradients of q, k, v and the loads that ``needs`` asks for, given o and lse of any forward. See ``backward_refusal``."""
    found = _checked(q, k, v, loads, spec)
    if _is_degenerate(q, k, v):
        return reference.gradients(grad, q, k, v, loads, sizes, spec, 0, needs)
    q, k, v = _rows(q), _rows(k), _rows(v)
    # without dropout neither is read
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    stats = (lse - found.shift if found.shift else lse).unsqueeze(-1).contiguous()
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        grad.to(o.dtype), q, k, v, o, stats, unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0, found.causal, scale=found.scale
    )
    into = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) if n else None for x, n in zip(loads, needs[3:], strict=True)]
    if spec.sinks:
        sink_gradients(grad, o, lse, loads, bind_sizes(spec, sizes, q, k, v), spec, into)
    pairs = zip((dq, dk, dv, *into), (q, k, v, *loads), needs, strict=True)
    return [g.to(x.dtype) for g, x, need in pairs if need and g is not None]


def _checked(q: Tensor, k: Tensor, v: Tensor, loads: Sequence[Tensor], spec: AttentionSpec) -> Form:
    reference.check_shapes(q, k, v, loads, spec)
    found = form(spec)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _is_degenerate(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Sizes that cuDNN has no plan for and that are no work: nothing to compute, or one key."""
    return 0 in q.shape or 0 in v.shape or k.shape[2] <= 1


def _rows(x: Tensor) -> Tensor:
    """``x`` with its features side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(bias: Expr, q: Tensor, k: Tensor, loads: Sequence[Tensor], sizes: dict[str, int]) -> Tensor:
    """The bias as a tensor [B or 1, Hq or 1, Sq, Skv], a view of the load."""
    B, Hq, Sq, _ = q.shape
    env = Env({"b": (0, B), "h": (0, Hq), "q": (0, Sq), "k": (0, k.shape[2])}, loads, sizes, torch.float32, q.device)
    _, table = evaluate(bias.args, env, keep=True)
    there = access(bias, table, env)
    assert there.gather is None, "a dense bias is read by plain indices"
    shape = [1, 1, 1, 1]
    for d, axis in enumerate(there.axes):
        shape[axis] = there.view.shape[d]
    return there.view.reshape(shape).expand(shape[0], shape[1], Sq, k.shape[2])


def _least(most: Tensor) -> Tensor | None:
    """What to take off the rows of a bias whose maxima are ``most`` [B or 1, Hq or 1, Sq, 1]; None for nothing.

    cuDNN takes powers of two of score * log2(e), so it finds no weight in a row where no key has more than -2.36e38, as masks of bfloat16's
    least number have it. Half of the row's maximum is finite there, and still so large that the scores beside it round away.
    """
    if torch.finfo(most.dtype).min >= LEAST:
        return None
    return torch.where((most < LEAST) & (most > -torch.inf), most / 2, 0.0)


def _set_rows_without_weight(o: Tensor, lse: Tensor | None, most: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """A bias of -inf on every key, of which ``most`` is the maximum, leaves a row without weights: NaN, as softmax has it, or zero where the policy says so."""
    hidden = most == -torch.inf
    o = torch.where(hidden, 0.0 if spec.empty_rows == "zero" else torch.nan, o)
    return o, None if lse is None else torch.where(hidden.squeeze(-1), -torch.inf, lse)
