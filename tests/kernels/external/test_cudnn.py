"""How specs are said to torch's cuDNN operators, on stand-ins with their signatures that compute in float64."""

from __future__ import annotations

import math
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import reference
from attnopt.kernels.external import cudnn
from attnopt.kernels.registry import Setting
from tests.kernels.cases import BY_NAME, CASES, Case, causal, dense, dims, naive_causal

CUDA = Setting("cuda", torch.bfloat16, loads=(torch.bfloat16,))


class StandIn:
    """``aten``'s two operators: causal at the top left, lse [B, H, Sq, 1] when asked for, o in the layout of q."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def _parts(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = q.double(), k.double(), v.double()
        groups = q.shape[1] // k.shape[1]
        s = scale * (q @ k.repeat_interleave(groups, 1).transpose(-1, -2))
        s = s if bias is None else s + bias.double()
        s = s.masked_fill(s * math.log2(math.e) < torch.finfo(torch.float32).min, -math.inf)  # it computes powers of two in float32
        if is_causal:
            s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        return s, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    def _scaled_dot_product_cudnn_attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool, dropout_p: float = 0.0, is_causal: bool = False,
        return_debug_mask: bool = False, *, scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append({"causal": is_causal, "lse": compute_log_sumexp, "bias": None if attn_bias is None else tuple(attn_bias.shape)})
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and k.shape[2] > 1 and dropout_p == 0.0
        s, _, values = self._parts(q, k, v, attn_bias, is_causal, scale)
        o = torch.empty_like(q[..., :1].expand(*q.shape[:3], v.shape[3]).contiguous()).copy_(torch.softmax(s, -1) @ values)
        lse = torch.logsumexp(s, -1, keepdim=True).float() if compute_log_sumexp else torch.empty(0)
        return o, lse, None, None, q.shape[2], k.shape[2], torch.empty(()), torch.empty(()), None

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: Tensor, offset: Tensor, attn_bias: None, cum_seq_q: None,
        cum_seq_k: None, max_q: int, max_k: int, dropout_p: float, is_causal: bool, *, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert lse.shape == (*q.shape[:3], 1) and lse.dtype == torch.float32 and (max_q, max_k) == (q.shape[2], k.shape[2])
        s, keys, values = self._parts(q, k, v, None, is_causal, scale)
        p = torch.exp(s - lse.double())
        g = grad.double()
        ds = p * (g @ values.transpose(-1, -2) - (g * out.double()).sum(-1, keepdim=True))
        shared = lambda x: x.unflatten(1, (k.shape[1], -1)).sum(2)  # noqa: E731
        found = scale * ds @ keys, shared(scale * ds.transpose(-1, -2) @ q.double()), shared(p.transpose(-1, -2) @ g)
        return tuple(x.to(q.dtype) for x in found)  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setattr(cudnn, "aten", made)
    monkeypatch.setattr(cudnn, "probe", lambda *form: None)
    return made


def dense_case(index: str, shape: tuple[int, ...] = (2, 4, 2, 37, 45, 16, 16), empty: str = "nan") -> Case:
    """A bias tensor over the axes of ``index``, in float32 as the query here; row 3 holds nothing but -inf, row 5 but the least number."""

    def load(d: Any) -> Any:
        return E.load(0, tuple({"b": d.b, "h": d.h, "q": d.q, "k": d.k, "0": E.ZERO}[x] for x in index), "float")

    def tensors(sh: tuple[int, ...]) -> list[Tensor]:
        extent = {"b": sh[0], "h": sh[1], "q": sh[3], "k": sh[4], "0": 1}
        x = torch.randn([extent[a] for a in index])
        if "q" in index:
            x[..., 3, :] = -math.inf
            x[..., 5, :] = torch.finfo(torch.float32).min
        return [x]

    def naive(s: Tensor, i: Tensor, j: Tensor, L: list[Tensor]) -> Tensor:
        names = "".join(a for a in index if a != "0")
        return 0.25 * s + torch.einsum(f"{index.replace('0', 'z')}->{names}", L[0])[tuple(slice(None) if a in names else None for a in "bhqk")]

    score = lambda d, s: E.add(E.mul(E.const(0.25), s), load(d))  # noqa: E731
    return Case(f"bias-{index}-{empty}", shape=shape, score=score, naive_score=naive, loads=tensors, empty_rows=empty)  # type: ignore[arg-type]


BIASED = [dense_case("bhqk"), dense_case("0hqk"), dense_case("b0qk", empty="zero"), dense_case("qk", empty="zero"), dense_case("b0k"), dense_case("k")]
SHIFTED = Case("shift", score=lambda d, s: E.add(E.mul(E.const(0.25), s), E.const(3.0)), naive_score=lambda s, i, j, L: 0.25 * s + 3.0)
TAKEN = [*(BY_NAME[n] for n in ("full", "full-Dv-less", "full-Dv-more", "full-MQA-cross", "causal-GQA", "sinks-causal-GQA", "softmax-plus-one")), SHIFTED]


@pytest.mark.parametrize("case", [*TAKEN, *BIASED], ids=lambda c: c.name)
def test_forward(case: Case, stand_in: StandIn) -> None:
    spec = case.spec()
    q, k, v, loads = case.tensors(torch.float32)
    want, want_lse = case.naive(q, k, v, loads)
    with torch.no_grad():
        o, lse = cudnn.forward(q, k, v, loads, [], spec)
        again = cudnn.run(q, k, v, loads, [], spec)
    assert o.transpose(1, 2).is_contiguous() and torch.equal(o.nan_to_num(7.0), again.nan_to_num(7.0))
    torch.testing.assert_close(o.double(), want, atol=3e-6, rtol=3e-6, equal_nan=True)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    assert [c["lse"] for c in stand_in.calls] == [True, spec.sinks]
    assert stand_in.calls[0]["causal"] == ("causal" in case.name)


def test_a_bias_is_handed_on_as_a_view(stand_in: StandIn) -> None:
    for case in BIASED:
        q, k, _v, loads = case.tensors(torch.float32)
        found = cudnn.form(case.spec())
        assert isinstance(found, cudnn.Form) and found.bias is not None
        bias = cudnn.dense(found.bias, q, k, loads, {})
        assert bias.data_ptr() == loads[0].data_ptr() and bias.shape[2:] == (37, 45)


@pytest.mark.parametrize("case", TAKEN, ids=lambda c: c.name)
def test_backward_after_another_forward(case: Case) -> None:
    spec = case.spec()
    assert cudnn.backward_refusal(spec, CUDA) is None
    q, k, v, loads = case.tensors(torch.float32)
    leaves = [x.double().requires_grad_() for x in (q, k, v, *loads)]
    out, _ = case.naive(leaves[0], leaves[1], leaves[2], leaves[3:])
    grad = torch.randn(out.shape)
    want = torch.autograd.grad(out, leaves, grad.double())
    with torch.no_grad():
        o, lse = reference.attention(q, k, v, loads, [], spec)
        got = cudnn.backward(grad, q, k, v, o, lse.float(), loads, [], spec, 0, [True] * len(leaves))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)


def test_one_key_and_none(stand_in: StandIn) -> None:
    spec = BY_NAME["full-MQA-cross"].spec()
    for keys in (0, 1):
        q, k, v = torch.randn(2, 4, 3, 16), torch.randn(2, 1, keys, 16), torch.randn(2, 1, keys, 16)
        with torch.no_grad():
            o, lse = cudnn.forward(q, k, v, [], [], spec)
            cudnn.backward(o, q, k, v, o, lse, [], [], spec, 0, [True, True, True])
        torch.testing.assert_close(o, v.expand(2, 4, 1, 16).expand_as(o) if keys else torch.zeros_like(o))
    assert not stand_in.calls


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("causal-top-left-Sq-less", "full and causal attention over as many queries as keys"),
        ("causal-bottom-right-Sq-less", "full and causal attention over as many queries as keys"),
        ("window-causal", "without a mask tensor, and this one is"),
        ("padding-zero", "without a mask tensor"),
        ("softcap-causal", "no softcap, and the score has softcap 5"),
        ("per-head-scale", "it computes scale \\* s \\+ bias"),
        ("alibi-causal", "a bias that is a tensor over keys, and this one is"),
        ("relative-buckets", "a bias that is a tensor over keys"),
    ],
)
def test_it_refuses_what_it_cannot_say(name: str, want: str) -> None:
    assert re.search(want, cudnn.refusal(BY_NAME[name].spec(), CUDA) or "")


def test_every_case_is_computed_right_or_refused() -> None:
    taken = [c for c in CASES if isinstance(cudnn.form(c.spec()), cudnn.Form)]
    assert len(taken) >= 8
    for c in taken:
        if c.name == "dense-bias-finfo-min":  # rounding in float32 is part of its meaning, and the stand-in has float64
            continue
        q, k, v, loads = c.tensors(torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(cudnn.run(q, k, v, loads, [], c.spec()).double(), c.naive(q, k, v, loads)[0], atol=3e-6, rtol=3e-6, equal_nan=True)


def test_a_bias_must_have_the_querys_dtype() -> None:
    spec = BY_NAME["dense-bias"].spec()
    assert cudnn.refusal(spec, CUDA) is None
    assert "dtype bfloat16, and this one is float32" in (cudnn.refusal(spec, Setting("cuda", torch.bfloat16, loads=(torch.float32,))) or "")
    assert "is not known" in (cudnn.refusal(spec, Setting("cuda", torch.bfloat16)) or "")
    assert "no gradient of the bias load0" in (cudnn.backward_refusal(spec, CUDA) or "")
    assert "neither a causal mask nor sinks" in str(cudnn.form(Case("", score=dense, mask=causal, naive_mask=naive_causal, loads=lambda sh: [torch.zeros(1)]).spec()))


def test_it_refuses_dtypes_devices_and_dropout() -> None:
    full = BY_NAME["full"].spec()
    assert "the query is float32" in (cudnn.refusal(full, Setting("cuda", torch.float32)) or "")
    assert "the tensors are on cpu" in (cudnn.refusal(full, Setting("cpu", torch.float16)) or "")
    assert "dropout 0.2" in (cudnn.refusal(full.replace(dropout=0.2), CUDA) or "")


def test_torch_is_asked_with_tensors_of_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is torch's own sentence, without where in its source it was said."""
    monkeypatch.undo()
    asked: list[Any] = []

    def can(parameters: Any, debug: bool = False) -> bool:
        asked.append(parameters)
        if parameters.query.shape[-1] > 128 and parameters.query.requires_grad:
            warnings.warn("head_dim should be no more than 128 (Triggered internally at sdp_utils.cpp:500.)", stacklevel=1)
            return False
        return True

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **more: empty(*size, **more))
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda q, k, v, mask, p, causal, gqa: SimpleNamespace(query=q, key=k, mask=mask, causal=causal, gqa=gqa))
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", can)
    cudnn.probe.cache_clear()
    wide = AttentionSpec(dims((2, 4, 2, 37, 37, 256, 256)), BY_NAME["full"].spec().score, mask=causal(dims((2, 4, 2, 37, 37, 256, 256))))
    assert cudnn.refusal(wide, CUDA) is None
    assert cudnn.backward_refusal(wide, CUDA) == "torch says of the backward of head sizes D 256, Dv 256: head_dim should be no more than 128"
    assert [(x.query.requires_grad, x.gqa, x.causal, x.query.shape[1], x.key.shape[1]) for x in asked] == [(False, True, True, 2, 1), (True, True, True, 2, 1)]
    cudnn.refusal(wide, CUDA)
    assert len(asked) == 2
    cudnn.probe.cache_clear()
