"""Attention over latents: what is cached of a token is the latent that its keys and values are made of, once for all heads (MLA).

With ``k[h] = [shared, latent @ W_k[h].T]`` and ``v[h] = latent @ W_v[h].T`` (``analysis/latent.py`` proves it) the products move to the side of the query::

    q[h] . k[h]      = q_shared[h] . shared + (q_own[h] @ W_k[h]) . latent
    sum_s p[s] v[h]  = (sum_s p[s] latent[s]) @ W_v[h].T

so the attention has one KV head, whose key is [latent, shared] and whose value is the latent, the first features of that key. It multiplies more
and reads far less, which is what counts where each token reads all that came before it.
Source: arXiv:2405.04434 (2024), section 2.1, multi-head latent attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.latent import Latent, latent_of
from attnopt.analysis.layout import Refusal
from attnopt.analysis.lift import Lifter
from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.passes.attention_nodes import attentions, spec_of
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.describe import describe
from attnopt.passes.edit import ORIGINAL, Editor, aten
from attnopt.passes.group_heads import site_name
from attnopt.passes.raise_attention import SITE, constant_of
from attnopt.remarks import Remark


@dataclass(frozen=True)
class AbsorbLatent:
    """``widest`` and ``widest_latent``: how long the one key and its value may become; the generated kernels hold no longer ones."""

    widest: int = 576
    widest_latent: int = 512
    name: str = "absorb-latent"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        result = PassResult(False)
        lifter = Lifter(constant_of(module))
        for node in attentions(module.graph):
            spec = spec_of(node)
            site, source = site_name(node), N.source(node)
            try:
                found = self._worthwhile(node, spec, lifter)
            except Refusal as r:
                if spec.traits.shared_key_features is not None:  # otherwise nothing hints at a latent
                    assert r.node is not None
                    result.remarks.append(Remark(r.code, r.message, site, source, node=describe(r.node)))
                continue
            k, v = (N.value(x) for x in node.args[1:3])  # type: ignore[arg-type]
            row = _absorbed(module.graph, node, spec, found)
            before, after = int(k.shape[1] * (k.shape[3] + v.shape[3])), int(N.value(row).shape[3])
            size = k.dtype.itemsize
            text = f"keys [{k.shape[1]}, {k.shape[3]}] and values [{v.shape[1]}, {v.shape[3]}] are made of a latent of {found.width} features"
            text += f" and {after - found.width} key features that all heads share; a token takes {after * size} bytes of cache in place of {before * size}."
            result.remarks.append(Remark("AO107", text, site, source))
            result.modified = True
        if result.modified:
            module.graph.eliminate_dead_code()
        return result

    def _worthwhile(self, node: fx.Node, spec: AttentionSpec, lifter: Lifter) -> Latent:
        """What keys and values are made of. Raises Refusal where that is not known, and where the attention is none of tokens to themselves or gains nothing."""
        k, v = node.args[1:3]
        assert isinstance(k, fx.Node) and isinstance(v, fx.Node)
        d = spec.dims
        if d.Sq is not d.Skv:
            raise Refusal(
                "AO218",
                f"this attention ({spec}) reads another sequence, whose keys and values are made once; supported is an attention of tokens to themselves.",
                node,
            )
        if d.Hq is not d.Hkv or not all(n.is_const for n in (d.Hq, d.D, d.Dv)):
            raise Refusal(
                "AO218",
                f"this attention has {d.Hq} query heads and {d.Hkv} KV heads; supported is a known number of heads, as many of one as of the other.",
                node,
            )
        found = latent_of(k, v, spec.traits.shared_key_features, lifter)
        own = sum(run.count for run in found.keys)
        row = found.width + int(d.D.value) - own
        if found.width >= min(own, int(d.Dv.value)) * d.Hq.value:
            text = f"the latent of {found.width} features is no narrower than what it makes, {own} key features and {d.Dv} value features of {d.Hq} heads"
            raise Refusal("AO218", f"{text}; supported is a narrower one.", node)
        if row > self.widest or found.width > self.widest_latent:
            text = f"latent and shared key have {row} features, {found.width} of them the latent's; supported are up to {self.widest} and {self.widest_latent}."
            raise Refusal("AO218", text, node)
        return found


def _absorbed(graph: fx.Graph, node: fx.Node, spec: AttentionSpec, found: Latent) -> fx.Node:
    """Put the attention over latents in the place of ``node``; the keys [B, 1, S, C + R] that it reads."""
    edit = Editor(graph, node)
    q = node.args[0]
    assert isinstance(q, fx.Node)
    latent = edit.call(aten.unsqueeze.default, edit.views(*found.latent), 1)
    own = None
    for run in found.keys:
        part = edit.call(aten.slice.Tensor, q, 3, run.first, run.first + run.count)
        term = edit.einsum("bhsn,hnc->bhsc", part, edit.views(*run.weight))
        own = term if own is None else edit.call(aten.add.Tensor, own, term)
    assert own is not None
    row, query = latent, own
    if found.shared is not None:
        shared = spec.traits.shared_key_features
        assert shared is not None
        row = edit.call(aten.cat.default, [latent, edit.views(*found.shared)], 3)
        query = edit.call(aten.cat.default, [own, edit.call(aten.slice.Tensor, q, 3, shared[0], sum(shared))], 3)
    value = edit.call(aten.slice.Tensor, row, 3, 0, found.width) if row is not latent else row
    dims = replace(spec.dims, Hkv=E.ONE, D=E.const(int(N.value(row).shape[3])), Dv=E.const(found.width))
    spec = spec.replace(dims=dims, traits=replace(spec.traits, shared_key_features=None, rotary=None))
    attended = edit.call(torch.ops.attnopt.attention.default, query, row, value, *node.args[3:5], spec.to_json(), *node.args[6:])
    out = edit.einsum("bhsc,hec->bhse", attended, edit.views(*found.values.weight))
    out.meta |= {key: node.meta[key] for key in (SITE, ORIGINAL) if key in node.meta}
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return row
