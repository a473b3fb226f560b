"""KV heads are merged: each group of them becomes one, the mean of their keys and of their values (opt-in: another function).

With fewer heads a cache of keys and values is smaller by the same factor, and generating reads so much less. The model computes something else afterwards, so
this is the first step of uptraining: gradients reach the original projections through the mean, which is the projection with the mean of their weights wherever nothing but
linear operators and a rotary embedding stand between a projection and the attention.
Source: Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, 2023 (arXiv:2305.13245), section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.errors import AttnoptError
from attnopt.ir import expr as E
from attnopt.passes.attention_nodes import attentions, spec_of
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.describe import describe
from attnopt.passes.edit import Editor, aten
from attnopt.passes.group_heads import site_name
from attnopt.remarks import Remark


@dataclass(frozen=True)
class MergeKVHeads:
    """``groups`` KV heads remain of each attention whose keys a cache can hold: causal ones, and those to another sequence.

    Attentions in which all tokens of one sequence see each other keep their heads: their keys and values are made and read once.
    """

    groups: int
    name: str = "merge-kv-heads"
    tier: Tier = "approximate"

    def run(self, module: fx.GraphModule) -> PassResult:
        """Raises AttnoptError where no attention can be merged."""
        result = PassResult(False)
        found = list(attentions(module.graph))
        for node in found:
            spec = spec_of(node)
            if (spec.causal is None and spec.dims.Sq is spec.dims.Skv) or (spec.dims.Hkv.is_const and spec.dims.Hkv.value <= self.groups):
                continue
            if not spec.dims.Hkv.is_const or int(spec.dims.Hkv.value) % self.groups:
                text = f"{spec.dims.Hkv} KV heads do not fall into {self.groups} groups of one size; supported is a divisor of their number."
                result.remarks.append(Remark("AO219", text, site_name(node), N.source(node), node=describe(node)))
                continue
            heads, edit = int(spec.dims.Hkv.value), Editor(module.graph, node)
            k, v = (self._merged(edit, x, heads) for x in node.args[1:3])  # type: ignore[arg-type]
            spec = spec.replace(dims=replace(spec.dims, Hkv=E.const(self.groups)), traits=replace(spec.traits, shared_key_features=None))
            node.args = (node.args[0], k, v, *node.args[3:5], spec.to_json(), *node.args[6:])
            text = f"{heads} KV heads are merged into {self.groups}, each the mean of {heads // self.groups}; this changes what the model computes."
            result.remarks.append(Remark("AO110", text, site_name(node), N.source(node)))
            result.modified = True
        if not result.modified:
            have = ", ".join(dict.fromkeys(str(spec_of(n).dims.Hkv) for n in found)) or "none"
            text = f"merge_kv_heads is {self.groups}, and no attention can be merged into so many KV heads: theirs are {have}"
            raise AttnoptError(f"{text}; supported are proper divisors of the number of KV heads of causal attentions and of those to another sequence.")
        return result

    def _merged(self, edit: Editor, x: fx.Node, heads: int) -> fx.Node:
        """[B, groups, S, D] of [B, heads, S, D]."""
        return edit.call(aten.mean.dim, edit.call(aten.unflatten.int, x, 1, [self.groups, heads // self.groups]), [2])
