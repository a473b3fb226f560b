"""GroupQueryAttention with a past, by its kernel in ONNX Runtime and by its function of standard operators, against the float64 reference."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from attnopt.emit.onnx.contrib import attach_functions
from attnopt.emit.onnx.model import IR_VERSION, Translation
from attnopt.emit.onnx.past import join
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


class Joined(nn.Module):
    """Keys and values that are no past and new ones of the queries, in the way that ``form`` says."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
        if self.form == "behind":
            keys, values = torch.cat([k, past_k], 2), torch.cat([v, past_v], 2)
        elif self.form == "changed":
            keys, values = torch.cat([past_k * 2, k], 2), torch.cat([past_v, v], 2)
        elif self.form == "longer":
            keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
            q = q[:, :, 1:]
        else:
            keys, values = torch.cat([past_k, k, k], 2), torch.cat([past_v, v, v], 2)
        spec = SPECS["causal"][0]
        return torch.ops.attnopt.attention(q, keys, values, [], [q.shape[2], keys.shape[2]], spec.to_json(), "reference")


@pytest.mark.parametrize("form", ["behind", "changed", "longer", "thrice"])
def test_what_is_no_past_is_not_taken_for_one(form: str) -> None:
    translation = Translation(24, "ort")
    example = inputs(2, 3, 5)[:5]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(Joined(form), example, dynamic_shapes=({2: torch.export.Dim.AUTO},) * 5)
        torch.onnx.export(program, dynamo=True, opset_version=24, custom_translation_table=translation.table(), verbose=False, optimize=False)
    (done,) = translation.done
    assert not done.plan.past and "as many queries as keys is not proven" in done.plan.why and not translation.joins


def test_nothing_is_joined_outside_of_the_operator(tmp_path: Path) -> None:
    """Where all attentions over a past take it."""
    names = [n for n, (_, taken) in SPECS.items() if taken]
    exported(tmp_path / "past.onnx", torch.float32, names)
    nodes = onnx.load(tmp_path / "past.onnx").graph.node
    assert Counter(n.op_type for n in nodes)[GQA] == len(names) - 1  # rows without a key are set beside it: two kinds of these have one call
    assert not [n for n in nodes if n.op_type == "Concat" and {"past_k", "past_v"} & set(n.input)]
