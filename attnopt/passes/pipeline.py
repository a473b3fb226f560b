"""The passes in their order, with the graph checked after each."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from attnopt.config import OptimizeConfig
from attnopt.errors import AttnoptError, PassError
from attnopt.ir.check import check
from attnopt.ir.spec import AttentionSpec
from attnopt.passes.absorb_latent import AbsorbLatent
from attnopt.passes.attention_nodes import attentions, spec_of
from attnopt.passes.base import Pass
from attnopt.passes.canonicalize import Canonicalize
from attnopt.passes.cleanup import Cleanup
from attnopt.passes.edit import ORIGINAL
from attnopt.passes.group_heads import GroupHeads, site_name
from attnopt.passes.insert_kv_cache import InsertKVCache
from attnopt.passes.insert_static_cache import InsertStaticCache
from attnopt.passes.join_products import JoinProducts
from attnopt.passes.known_inputs import KnownInputs
from attnopt.passes.lower import Lower
from attnopt.passes.merge_kv_heads import MergeKVHeads
from attnopt.passes.merge_kv_projections import MergeKVProjections
from attnopt.passes.merge_projections import MergeProjections
from attnopt.passes.quantize_kv_cache import QuantizeKVCache
from attnopt.passes.raise_attention import SITE, RaiseAttention
from attnopt.passes.select_kernel import KERNEL, SelectKernel
from attnopt.passes.share_block_maps import ShareBlockMaps
from attnopt.passes.share_distance_tables import ShareDistanceTables
from attnopt.passes.skip_idle_steps import SkipIdleSteps
from attnopt.remarks import Remark
from attnopt.report import Site

CachePass = InsertKVCache | InsertStaticCache
NAMES = ("canonicalize", "join-products", "raise-attention", "group-heads", "merge-projections", "select-kernel", "share-block-maps", "share-distance-tables", "lower", "cleanup")
"""Every pass, in order."""
SERVING_NAMES = ("canonicalize", "join-products", "known-inputs", "raise-attention", "group-heads", "absorb-latent", "merge-projections", "insert-kv-cache", "skip-idle-steps", "cleanup")
"""Every pass with ``kv_cache``, in order."""
APPROXIMATE_NAMES = ("merge-kv-heads", "merge-kv-projections", "quantize-kv-cache")
"""Passes that are only there when an option asks for them: the first two behind group-heads, the last behind insert-kv-cache."""
_REQUIRED = ("canonicalize",)
_REQUIRED_TO_SERVE = ("canonicalize", "raise-attention", "insert-kv-cache")


@dataclass
class PipelineResult:
    graph_module: fx.GraphModule
    """The optimized graph, with the calling convention of the captured one."""
    reference: fx.GraphModule
    """The same graph before anything was replaced; untouched nodes have the same names in both."""
    merged: fx.GraphModule | None = None
    """With ``merge_kv_heads``: the graph with merged heads, each attention as its spec says; what the optimized one has to compute."""
    sites: list[Site] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    outputs: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Site -> (node in ``reference`` whose value it computes, node of ``graph_module`` with the same value)."""
    folded: tuple[str, ...] = ()
    """Buffers whose values became part of a spec: the graph holds only as long as they keep them."""


def passes(config: OptimizeConfig, skip_sites: frozenset[str] = frozenset(), cache: CachePass | None = None) -> list[Pass]:
    """The passes that ``config`` asks for, in order. ``cache`` is the pass that ``kv_cache`` asks for, with what it knows of the model's call."""
    names, required = (SERVING_NAMES, _REQUIRED_TO_SERVE) if config.kv_cache else (NAMES, _REQUIRED)
    approximate: list[Pass] = [] if config.merge_kv_heads is None else [MergeKVHeads(config.merge_kv_heads), MergeKVProjections()]
    unknown = [n for n in (*config.disable_passes, *config.print_ir_after) if n not in (*names, *APPROXIMATE_NAMES, "all")]
    if unknown:
        raise AttnoptError(f"there is no pass {unknown[0]!r}; the passes are {', '.join(names)}.")
    for n in config.disable_passes:
        if n in required:
            raise AttnoptError(f"the pass {n!r} cannot be disabled: every other one needs its form; those that can are {', '.join(x for x in names if x not in required)}.")
    if config.kv_cache:
        known = KnownInputs(cache.positions if cache else ())
        rewrites: list[Pass] = [known, RaiseAttention(skip_sites), GroupHeads(), *approximate, AbsorbLatent(), MergeProjections(), cache or InsertKVCache()]
        if config.kv_cache_dtype:
            rewrites.append(QuantizeKVCache(config.kv_cache_dtype))
        rewrites.append(SkipIdleSteps())
    else:
        select = SelectKernel(config.backend, config.autotune)
        rewrites = [RaiseAttention(skip_sites), GroupHeads(), *approximate, MergeProjections(), select, ShareBlockMaps(), ShareDistanceTables(), Lower()]
    everything: list[Pass] = [Canonicalize(), JoinProducts(), *rewrites, Cleanup()]
    return [p for p in everything if p.name not in config.disable_passes]


def run_pipeline(gm: fx.GraphModule, config: OptimizeConfig, *, skip_sites: frozenset[str] = frozenset(), cache: CachePass | None = None) -> PipelineResult:
    """Rewrite a captured graph. ``gm`` itself is not changed; ``skip_sites`` are left in their original form.

    Raises PassError, naming the pass, when one raises or leaves an invalid graph, and AttnoptError for a bad option.
    """
    with _no_new_guards(gm):
        return _run(duplicate(gm), config, skip_sites, cache)


def lowered(gm: fx.GraphModule, config: OptimizeConfig) -> fx.GraphModule:
    """A graph of raised attentions, with a kernel chosen for each, in place."""
    with _no_new_guards(gm):
        for p in (SelectKernel(config.backend, config.autotune), ShareBlockMaps(), ShareDistanceTables(), Lower(), Cleanup()):
            p.run(gm)
    gm.recompile()
    return gm


@contextlib.contextmanager
def _no_new_guards(gm: fx.GraphModule) -> Iterator[None]:
    """Inside, shapes may be computed on the graph's symbols without narrowing what the graph holds for."""
    modes = [getattr(n.meta.get("val"), "fake_mode", None) for n in gm.graph.find_nodes(op="placeholder")]
    env = next((m.shape_env for m in modes if m is not None), None)
    with contextlib.nullcontext() if env is None else env.suppress_guards():
        yield


def _run(module: fx.GraphModule, config: OptimizeConfig, skip_sites: frozenset[str], cache: CachePass | None) -> PipelineResult:
    reference, merged = module, None
    sites: list[Site] = []
    remarks: list[Remark] = []
    folded: list[str] = []
    done: list[str] = []
    for p in passes(config, skip_sites, cache):
        try:
            result = p.run(module)
        except AttnoptError:
            raise
        except Exception as e:
            raise PassError(f"pass {p.name} raised {type(e).__name__}: {e} (before it ran: {', '.join(done) or 'none'})") from e
        problems = check(module)
        if problems:
            raise PassError(f"pass {p.name} left an invalid graph: {'; '.join(problems[:3])} (before it ran: {', '.join(done) or 'none'})")
        done.append(p.name)
        sites += result.sites
        folded += result.folded
        for r in result.remarks:
            owner = next((s for s in sites if s.name == r.site), None)
            (remarks if owner is None else owner.remarks).append(r)
        if p.name in config.print_ir_after or "all" in config.print_ir_after:
            sys.stderr.write(f"--- after {p.name}\n{module.graph}\n")
        if p.name == "canonicalize":
            reference = duplicate(module)
        if p.name == "merge-kv-heads":
            merged = duplicate(module)
            merged.recompile()
    module.recompile()
    outputs = {}
    kernels = _kernels(module)
    for node in module.graph.nodes:
        name = node.meta.get(SITE)
        if name is not None:
            outputs[name] = (str(node.meta[ORIGINAL]), node.name)
    for s in sites:
        if s.name in kernels:
            s.spec, s.kernel, s.why = kernels[s.name]
    return PipelineResult(module, reference, merged, sites, remarks, outputs, tuple(dict.fromkeys(folded)))


def duplicate(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with a graph of its own that shares all parameters, buffers and submodules."""
    graph = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    out = graph.graph_copy(gm.graph, table)
    graph.output(out)
    for old, new in table.items():
        new.meta = dict(old.meta)
        new.name = old.name
    graph._codegen = gm.graph._codegen  # the calling convention, which no pass changes
    new_gm = fx.GraphModule(gm, graph)
    new_gm.training = gm.training
    return new_gm


def _kernels(module: fx.GraphModule) -> dict[str, tuple[AttentionSpec, str, str]]:
    """Site -> (final spec, kernel, why)."""
    out: dict[str, tuple[AttentionSpec, str, str]] = {}
    for node in module.graph.nodes:
        if KERNEL in node.meta:
            spec = node.meta["attnopt_spec"] if "attnopt_spec" in node.meta else spec_of(node)
            out[site_name(node)] = (spec, *node.meta[KERNEL])
    for node in attentions(module.graph):
        out.setdefault(site_name(node), (spec_of(node), "reference", "no kernel was selected"))
    return out
