"""Just-in-time capture: what torch.compile hands to a backend, brought to the same IR as an export, and what to do with it.

The passes stand above this package, so they are given as a function.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import fx
from torch._guards import detect_fake_mode, tracing
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.remarks import Remark
from attnopt.report import Report, Site

log = logging.getLogger("attnopt")

Rewrite = Callable[[fx.GraphModule], tuple[fx.GraphModule, Report]]
"""The passes: a graph to the rewritten graph and what was done to it."""


@dataclass
class Frames:
    """Reports of the functions that torch.compile cut a model into, in the order in which they were compiled."""

    reports: list[Report] = field(default_factory=list)
    broken: bool = False
    """Whether a function so far ended in a graph break."""

    def merged(self, *remarks: Remark) -> Report:
        """One report over all frames, with ``remarks`` on the model in front."""
        total = Report(remarks=list(remarks))
        seen = set()
        for report in self.reports:
            # A function is compiled again for other sizes or modes: its sites are the same ones.
            fresh = [s for s in report.sites if (s.name, s.source, s.status, str(s.spec)) not in seen]
            seen |= {(s.name, s.source, s.status, str(s.spec)) for s in fresh}
            total.sites += fresh
            total.remarks += report.remarks
            for stage, seconds in report.seconds.items():
                total.seconds[stage] = total.seconds.get(stage, 0.0) + seconds
        return total


def compile_frame(gm: fx.GraphModule, example_inputs: Sequence[Any], rewrite: Rewrite, frames: Frames, inductor: bool, mode: str | None = None) -> Callable[..., Any]:
    """One function of torch.compile: retrace, rewrite, hand on to Inductor (or run as it is).

    ``gm`` and ``example_inputs`` are what Dynamo gives a backend, ``mode`` is torch.compile's, for Inductor. A frame that cannot be retraced is handed on unchanged,
    with remark AO306 in its report.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    ended_in_break = bool(reason is not None and reason.graph_break)
    try:
        graph = retrace(gm)
    except Exception as error:  # noqa: BLE001 - an operator that cannot be traced; said in the report
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        remark = Remark("AO306", f"A function of {len(gm.graph.nodes)} operations was left as it is: {type(error).__name__}: {first}")
        log.warning("%s", remark)
        frames.reports.append(Report(remarks=[remark]))
        result = gm
    else:
        with tracing(None):
            result, report = rewrite(graph)
        report.sites = [_explain_break(site, graph, ended_in_break, frames.broken) for site in report.sites]
        frames.reports.append(report)
    frames.broken |= ended_in_break
    if not inductor:
        return result
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode is not None else None
    return cast(Callable[..., Any], compile_fx(result, list(example_inputs), config_patches=patches))


def retrace(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's graph of torch functions as training IR: ATen before dispatch, with shapes and module paths in the metadata."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [n.meta["example_value"] for n in placeholders]
    # The tracing context of the outer compilation would take our trace for its own, and it names another fake mode.
    with tracing(None), detect_fake_mode(fakes) or contextlib.nullcontext(), fx_traceback.preserve_node_meta():
        traced: fx.GraphModule = make_fx(fx.Interpreter(gm).run, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    for old, new in zip(placeholders, traced.graph.find_nodes(op="placeholder"), strict=True):
        new.target = old.target
        new._rename(old.name)
    traced.recompile()
    return traced


# ---- attentions that a graph break cut in two


def _explain_break(site: Site, graph: fx.GraphModule, ended_in_break: bool, began_after_break: bool) -> Site:
    """The site, with AO209 in place of "no product with the values" (or "with the keys") where a break is the reason."""
    codes = {r.code for r in site.remarks}
    node = _softmax_of(site, graph)
    if site.status == "replaced" or node is None:
        return site
    if "AO201" in codes and ended_in_break and _reaches_output(node):
        code, missing = "AO201", "values"
    elif "AO202" in codes and began_after_break and _comes_from_input(node):
        code, missing = "AO202", "keys"
    else:
        return site
    text = f"The model breaks into two compiled functions at this attention: the product with the {missing} stands in the other one."
    remarks = [Remark("AO209", text, r.site, r.source) if r.code == code else r for r in site.remarks]
    return replace(site, remarks=remarks, why=text)


def _softmax_of(site: Site, graph: fx.GraphModule) -> fx.Node | None:
    path, _, line = site.source.rpartition(":")
    for node in graph.graph.nodes:
        if "softmax" in str(node.target) and f'{path}", line {line}' in node.meta.get("stack_trace", ""):
            found: fx.Node = node
            return found
    return None


_CONTRACTIONS = ("matmul", "mm", "bmm", "baddbmm", "einsum", "linear", "addmm", "conv", "scaled_dot_product_attention")


def _contracts(node: fx.Node) -> bool:
    name = getattr(node.target, "_opname", str(node.target))
    return any(name == c or name.startswith("conv") for c in _CONTRACTIONS)


def _reaches_output(node: fx.Node) -> bool:
    """Whether the probabilities leave the function, by way of operations that contract nothing."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                return True
            if user not in seen and not _contracts(user):
                seen.add(user)
                todo.append(user)
    return False


def _comes_from_input(node: fx.Node) -> bool:
    """Whether the scores enter the function, by way of operations that contract nothing."""
    shape = getattr(node.meta.get("val"), "shape", ())
    seen, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source.op == "placeholder" and len(getattr(source.meta.get("val"), "shape", ())) == len(shape):
                return True
            if source not in seen and not _contracts(source):
                seen.add(source)
                todo.append(source)
    return False
