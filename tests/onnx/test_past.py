"""GroupQueryAttention with a past, by its kernel in ONNX Runtime and by its function of standard operators, against the float64 reference."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from attnopt.emit.onnx.contrib import attach_functions
from attnopt.emit.onnx.model import IR_VERSION, Translation
from attnopt.emit.onnx.past import Past, join
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Dims, Load
from attnopt.kernels import reference

GQA = "GroupQueryAttention"
_B, _S, _T = E.sym("B"), E.sym("S"), E.sym("T")
D = Dims(_B, E.const(4), E.const(2), _S, _T, E.const(8), E.const(8))
P = E.sub(_T, _S)
SIZES = ("S", "T")
X = E.mul(E.const(0.3), E.score())
CAUSAL = E.le(D.k, E.add(D.q, P))
THERE, PADDING = E.load(0, (D.b, D.k), "bool"), (Load("padding", "bool"),)
WINDOW = E.lt(E.sub(E.add(D.q, P), D.k), E.const(3))
SPECS: dict[str, tuple[AttentionSpec, bool]] = {
    "causal": (AttentionSpec(D, X, CAUSAL, sizes=SIZES), True),
    "window": (AttentionSpec(D, X, E.all_of(CAUSAL, WINDOW), sizes=SIZES), True),
    "padding, NaN": (AttentionSpec(D, X, E.all_of(CAUSAL, THERE), "nan", loads=PADDING, sizes=SIZES), True),
    "padding, zero": (AttentionSpec(D, X, E.all_of(CAUSAL, THERE), "zero", loads=PADDING, sizes=SIZES), True),
    "padding, window, average": (AttentionSpec(D, X, E.all_of(CAUSAL, THERE, WINDOW), "uniform", loads=PADDING, sizes=SIZES), True),
    "slopes": (AttentionSpec(D, E.add(X, E.mul(E.load(0, (D.h,), "float"), E.as_float(E.sub(D.k, D.q)))), CAUSAL, loads=(Load("slopes", "float"),), sizes=SIZES), True),
    "sinks": (AttentionSpec(D, X, E.all_of(CAUSAL, WINDOW), sink=E.load(0, (D.h,), "float"), loads=(Load("slopes", "float"),), sizes=SIZES), True),
    "counted from the first key": (AttentionSpec(D, X, E.le(D.k, D.q)), False),
    "one key ahead": (AttentionSpec(D, X, E.le(D.k, E.add(D.q, P, E.ONE)), sizes=SIZES), False),
    "all keys": (AttentionSpec(D, X), False),
}


class Model(nn.Module):
    """Specs by name on the same operands, and keys and values of all tokens."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, padding: Tensor, slopes: Tensor) -> tuple[Tensor, ...]:
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        named, sizes = {"padding": padding, "slopes": slopes}, {"S": q.shape[2], "T": keys.shape[2]}
        specs = [SPECS[n][0] for n in self.names]
        outs = [
            torch.ops.attnopt.attention(q, keys, values, [named[x.name] for x in s.loads], [sizes[n] for n in s.sizes], s.to_json(), "reference") for s in specs
        ]
        return (*outs, keys, values)


def inputs(B: int, S: int, past: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(B * 100 + S * 10 + past)
    q, k, v, pk, pv = (torch.randn(B, h, n, 8, generator=g, dtype=torch.float64).to(dtype) for h, n in ((4, S), (2, S), (2, S), (2, past), (2, past)))
    padding = torch.ones(B, past + S, dtype=torch.bool)
    padding[0, :2] = False
    if B > 2:
        padding[1, -1:] = padding[2] = False
    return q, k, v, pk, pv, padding, torch.rand(4, generator=g, dtype=torch.float64).to(dtype)


def exported(path: Path, dtype: torch.dtype, names: list[str]) -> Translation:
    translation = Translation(24, "ort")
    batch, new, past = (torch.export.Dim(n) for n in ("batch", "new", "past"))
    of_new, of_past = {0: batch, 2: new}, {0: batch, 2: past}
    shapes = (of_new, of_new, of_new, of_past, of_past, {0: batch, 1: torch.export.Dim.AUTO}, {})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(Model(names), inputs(2, 3, 5, dtype), dynamic_shapes=shapes)
        made = torch.onnx.export(program, dynamo=True, opset_version=24, custom_translation_table=translation.table(), verbose=False, optimize=True)
    assert made is not None
    attach_functions(made.model, 24)
    join(made.model, translation.joins)
    made.model.ir_version = IR_VERSION
    made.save(path)
    return translation


def assert_true(path: Path, sizes: list[tuple[int, int, int]], dtype: torch.dtype, tolerance: float) -> None:
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for B, S, past in sizes:
        given = inputs(B, S, past, dtype)
        *found, keys, values = (torch.from_numpy(np.asarray(x)) for x in session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}))
        q, k, v, pk, pv, padding, slopes = given
        assert torch.equal(keys, torch.cat([pk, k], 2)) and torch.equal(values, torch.cat([pv, v], 2))
        named, lengths = {"padding": padding, "slopes": slopes.double()}, {"S": S, "T": past + S}
        for (name, (spec, _)), o in zip(SPECS.items(), found, strict=True):
            with torch.no_grad():
                truth = reference.attention(q.double(), keys.double(), values.double(), [named[x.name] for x in spec.loads], [lengths[n] for n in spec.sizes], spec)[0]
            torch.testing.assert_close(
                o.double(), truth, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, at=f"{name} at {(B, S, past)}": f"{at}: {m}"
            )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float16, 4e-3)], ids=str)
def test_every_spec_computes_what_the_reference_does(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    path = tmp_path / "past.onnx"
    translation = exported(path, dtype, list(SPECS))
    for (name, (_, taken)), done in zip(SPECS.items(), translation.done, strict=True):
        taken = taken and not (name == "slopes" and dtype == torch.float16)
        assert (done.plan.operator == GQA, done.plan.past) == (taken, taken), name
        assert ("causal from the end of the past" in done.plan.why) == taken and (taken or "no GroupQueryAttention: " in done.plan.why)
    assert ("its bias is added in float32, and the past is float16" in translation.done[5].plan.why) == (dtype == torch.float16)
    runnable = [(1, 4, 5), (1, 1, 7), (3, 1, 6), (3, 6, 0), (1, 5, 0), (2, 1, 0)]
    assert_true(path, runnable, dtype, tolerance)
    model = onnx.inliner.inline_local_functions(onnx.load(path))
    assert {n.domain for n in model.graph.node} == {""}
    onnx.save(model, tmp_path / "inlined.onnx")
    assert_true(tmp_path / "inlined.onnx", [*runnable, (3, 4, 5)], dtype, tolerance)
    given = dict(zip(("q", "k", "v", "past_k", "past_v", "padding", "slopes"), (x.numpy() for x in inputs(2, 4, 5, dtype)), strict=True))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="batch_size must be 1 when sequence_length > 1 and past context is given"):
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, given)


_HEAD = '<ir_version: 10, opset_import: ["": 24]> g (float[B, 4, S, 8] q, float[B, {h}, P, 8] past, float[B, {h}, {n}, 8] new) => (float[B, {h}, T, 8] k) <{shapes}> {{ {body} }}'
JOINED = {
    "as it is": (2, "S", "", "k = Concat<axis = 2>(past, new)"),
    "axis from the end": (2, "S", "", "k = Concat<axis = -2>(past, new)"),
    "the same again": (2, "S", "float[B, 2, P, 8] p, float[B, 2, T, 8] c", "p = Identity(past) c = Concat<axis = 2>(p, new) k = Identity(c)"),
    "there and back": (2, "S", "float[B, 2, T, 8] c, float[B, 2, 8, T] t", "c = Concat<axis = 2>(past, new) t = Transpose<perm = [0, 1, 3, 2]>(c) k = Transpose<perm = [0, 1, 3, 2]>(t)"),
    "one head, taken out and put back": (
        1, "S", "float[B, 1, T, 8] c, float[B, 1, 8, T] t, float[B, 8, T] s, float[B, T, 8] u",
        "c = Concat<axis = 2>(past, new) t = Transpose<perm = [0, 1, 3, 2]>(c) zero = Constant<value = int64 {0}>() s = Gather<axis = 1>(t, zero) u = Transpose<perm = [0, 2, 1]>(s) "
        "shape = Shape(c) k = Reshape(u, shape)",
    ),
}  # fmt: skip
APART = {
    "new tokens first": (2, "S", "", "k = Concat<axis = 2>(new, past)"),
    "a past that is changed": (2, "S", "float[B, 2, P, 8] p", "p = Neg(past) k = Concat<axis = 2>(p, new)"),
    "three parts": (2, "S", "", "k = Concat<axis = 2>(past, new, new)"),
    "other features": (2, "S", "", "k = Concat<axis = 3>(past, new)"),
    "more keys than queries": (2, "N", "", "k = Concat<axis = 2>(past, new)"),
    "keys of unknown number": (2, "", "", "k = Concat<axis = 2>(past, new)"),
    "changed afterwards": (2, "S", "float[B, 2, T, 8] c", "c = Concat<axis = 2>(past, new) k = Neg(c)"),
    "turned": (2, "S", "float[B, T, 2, 8] c", "p = Transpose<perm = [0, 2, 1, 3]>(past) n = Transpose<perm = [0, 2, 1, 3]>(new) c = Concat<axis = 1>(p, n) k = Transpose<perm = [0, 2, 1, 3]>(c)"),
    "turned once": (2, "S", "float[B, 2, T, 8] c", "c = Concat<axis = 2>(past, new) k = Transpose<perm = [0, 1, 3, 2]>(c)"),
    "one of two heads": (2, "S", "float[B, 2, T, 8] c, float[B, T, 8] s", "c = Concat<axis = 2>(past, new) zero = Constant<value = int64 {0}>() s = Gather<axis = 1>(c, zero) two = Shape(c) k = Reshape(s, two)"),
    "read in another order": (2, "S", "float[B, 2, T, 8] c, float[B, T, 2, 8] t", "c = Concat<axis = 2>(past, new) t = Transpose<perm = [0, 2, 1, 3]>(c) shape = Shape(c) k = Reshape(t, shape)"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*JOINED, *APART])
def test_a_past_is_an_input_with_one_new_key_for_each_query_behind_it(name: str) -> None:
    heads, new, shapes, body = {**JOINED, **APART}[name]
    text = _HEAD.format(h=heads, n=new or "?", shapes=shapes, body=body)
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    q, past, _ = model.graph.inputs
    (k,) = model.graph.outputs
    found = Past.of(q, k, k)
    assert (found is not None) == (name in JOINED)
    if found is not None:
        producer = found.keys.producer()
        assert found.key is past and found.new_key.name == "new" and producer is not None and producer.op_type == "Concat"


def test_nothing_is_joined_outside_of_the_operator(tmp_path: Path) -> None:
    """Where all attentions over a past take it."""
    names = [n for n, (_, taken) in SPECS.items() if taken]
    exported(tmp_path / "past.onnx", torch.float32, names)
    nodes = onnx.load(tmp_path / "past.onnx").graph.node
    assert Counter(n.op_type for n in nodes)[GQA] == len(names) - 1  # rows without a key are set beside it: two kinds of these have one call
    assert not [n for n in nodes if n.op_type == "Concat" and {"past_k", "past_v"} & set(n.input)]
