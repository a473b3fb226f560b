"""Attention over caches of a fixed length in ONNX: TensorScatter writes, and ``Attention`` is told by ``nonpad_kv_seqlen`` how many keys are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from attnopt.capture.export import quiet
from attnopt.emit.onnx.decoder import name_past
from attnopt.emit.onnx.lower import Lowering
from attnopt.emit.onnx.model import Draft, Layer, Lowered, Translation, record, translated, weights_of
from attnopt.emit.onnx.plan import Plan, Target, plan
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec, Dims, Load
from attnopt.kernels.affine import affine
from attnopt.passes.insert_kv_cache import PackedPlan

_PROMPT = 4
"""Tokens of the example, before which stand as many."""


class StaticDecoder(nn.Module):
    """``input_ids`` [B, S], ``write_indices`` int64 [B] and ``past_key_values``, a cache of keys and one of values [B, Hkv, M, D or Dv] of each layer: a dict of ``logits`` [B, S, V] and the
    caches behind the call, as ``present.N.key`` and ``present.N.value``.
    """

    def __init__(self, graph: fx.GraphModule, plan: PackedPlan, max_length: int) -> None:
        super().__init__()
        self.decoder = graph
        self.plan, self.max_length = plan, max_length
        self.training = False

    def forward(self, input_ids: Tensor, write_indices: Tensor, past_key_values: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        logits, *present = self.decoder(input_ids, write_indices, *past_key_values)
        return {"logits": logits} | {f"present.{i // 2}.{'value' if i % 2 else 'key'}": x for i, x in enumerate(present)}

    def empty(self, batch: int, fill: float = 0.0) -> list[Tensor]:
        sizes = [(x.Hkv, d, x.dtype) for x in self.plan.layers for d in (x.D, x.Dv)]
        return [torch.full((batch, heads, self.max_length, d), fill, dtype=dtype) for heads, d, dtype in sizes]

    def example(self, ids: Tensor) -> dict[str, Any]:
        """A call of two rows that stand at different places, with tokens of ``ids`` int64 [B, n]."""
        n = max(1, min(_PROMPT, self.max_length // 2))
        tokens = ids.flatten().repeat(-(-4 * n // ids.numel()))[: 4 * n].view(2, 2 * n)
        first = self(tokens[:, :n], torch.tensor([0, 0]), self.empty(2))
        return {"input_ids": tokens[:, n:] if self.max_length > 1 else tokens[:, :1], "write_indices": torch.tensor([n, n - 1]) * (self.max_length > 1), "past_key_values": list(first.values())[1:]}


def static_model(decoder: StaticDecoder, ids: Tensor, opset: int, target: Target, strip_metadata: bool) -> Draft:
    """The decoder in ONNX, for any batch and number of tokens; ``ids`` int64 [B, n] are tokens of an example."""
    auto = torch.export.Dim.AUTO
    with torch.no_grad(), quiet():
        call = decoder.example(ids)
        shapes = {"input_ids": {0: auto, 1: auto}, "write_indices": {0: auto}, "past_key_values": [{0: auto} for _ in call["past_key_values"]]}
        program = torch.export.export(decoder, (), call, dynamic_shapes=shapes, strict=False)
        results = decoder(**call)
    translation = StaticTranslation(opset, target, weights_of(program))
    model = translated(program, translation, results)
    name_past(model)
    layers = [
        Layer(c.name, str(x.spec), x.spec, x.plan.lowered_to, x.plan.why, value=x.value) for c, x in zip(decoder.plan.layers, translation.done, strict=True)
    ]
    if not strip_metadata:
        record(model, layers, target)
    return Draft(model, layers, decoder, (), call)


@dataclass
class StaticTranslation(Translation):
    """The table's entries for ``attnopt::static_attention`` and ``attnopt::cache_update``."""

    def table(self) -> dict[Any, Any]:
        op = self.op

        def attention(q, k, v, write_indices, loads, spec: str):  # type: ignore[no-untyped-def]
            parsed = AttentionSpec.from_json(spec)
            dtype = str(ir.DataType(q.dtype).numpy())
            form = static_plan(parsed, self.target, dtype)
            weights = [*(self._greatest(x) for x in loads or ()), None]
            result = StaticLowering(op, q, k, v, [*(loads or ()), write_indices], (), shifted(parsed), dtype, weights, write_indices, parsed.rows_may_be_empty()).build(form)
            self.done.append(Lowered(parsed, form, result, None))
            return result

        def update(cache, new, write_indices):  # type: ignore[no-untyped-def]
            return op.TensorScatter(cache, new, write_indices, axis=2) if self.target != "decomposed" else _scattered(op, cache, new, write_indices)

        return super().table() | {torch.ops.attnopt.static_attention.default: attention, torch.ops.attnopt.cache_update.default: update}


def _scattered(op: Any, cache: Any, new: Any, write_indices: Any) -> Any:
    """TensorScatter in operators of every opset."""
    zero, one, first, others = (op.Constant(value=ir.tensor(np.array(x, dtype=np.int64))) for x in (0, 1, [1], [1, 2, 3]))
    steps = op.Range(zero, op.Squeeze(op.Shape(new, start=2, end=3)), one)
    at = op.Add(op.Unsqueeze(write_indices, others), op.Unsqueeze(steps, first))  # [B, 1, S, 1]
    return op.ScatterElements(cache, op.Expand(at, op.Shape(new)), new, axis=2)


def static_plan(spec: AttentionSpec, target: Target, dtype: str) -> Plan:
    """The form of ``spec``, which holds at absolute positions, over a cache."""
    form = plan(spec, "decomposed" if target == "decomposed" else "onnx", dtype)
    if not form.fused:
        return form
    causal, parts = E.le(spec.dims.k, spec.dims.q), E.conjuncts(spec.mask)
    if spec.sinks or causal not in parts:
        return replace(form, causal=False, rest=None)
    rest = E.all_of(*(p for p in parts if p is not causal))
    score = affine(spec.score)
    assert score is not None
    more = ", additive mask" if score.bias is not None else "" if rest is E.TRUE else ", boolean mask"
    return Plan("Attention", f"is_causal and nonpad_kv_seqlen{more}", causal=True, rest=_shifted(rest, spec))


def shifted(spec: AttentionSpec) -> AttentionSpec:
    """``spec`` over the queries of a call and the slots of a cache: query i of row b stands at the position ``write_indices[b] + i``. These are its last load."""
    programs = {name: None if x is None else _shifted(x, spec) for name, x in (("mask", spec.mask), ("score", spec.score), ("sink", spec.sink))}
    empty = spec.empty_rows if spec.empty_rows in ("nan", "zero") else "nan"  # of no row where it is another
    return spec.replace(dims=_dims(spec), loads=(*spec.loads, Load("write_indices", "int")), empty_rows=empty, empty_score=None, **programs)


def _dims(spec: AttentionSpec) -> Dims:
    return replace(spec.dims, Sq=E.sym("S"), Skv=E.sym("M"))


def _shifted(x: E.Expr, spec: AttentionSpec) -> E.Expr:
    old, new = spec.dims, _dims(spec)
    return E.substitute(x, {old.q: E.add(new.q, E.load(len(spec.loads), (new.b,), "int")), old.k: new.k})


@dataclass
class StaticLowering(Lowering):
    """k and v are caches."""

    write_indices: Any = None
    empty: bool = False
    """Whether a row may have no visible key, which the shifted spec says less of."""

    def _may_be_empty(self) -> bool:
        return self.spec.mask is not E.TRUE and self.empty

    def _attention(self, q: Any, k: Any, v: Any, mask: Any, scale: float, is_causal: int) -> Any:
        if not is_causal:
            return super()._attention(q, k, v, mask, scale, 0)
        o = self.op.Attention(q, k, v, mask, None, None, self.op.Add(self.write_indices, self.Sq), scale=scale, is_causal=1)
        return o[0] if isinstance(o, Sequence) else o
