"""Just-in-time capture: what torch.compile hands to a backend, brought to the same IR as an export, and what to do with it.

The passes stand above this package, so they are given as a function.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx
from torch._guards import detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from attnopt.capture.breaks import explain_break
from attnopt.capture.transforms import odd_operators
from attnopt.errors import CaptureError, named
from attnopt.remarks import Remark
from attnopt.report import Report

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
        odd, line = odd_operators(gm)
        text = f"A function of {len(gm.graph.nodes)} operations{f' with {odd}' if odd else ''} was left as it is: {named(error).rstrip('.')}; supported are ATen operators."
        remark = Remark("AO306", text, source=line)
        log.warning("%s", remark)
        frames.reports.append(Report(remarks=[remark]))
        result = gm
    else:
        with tracing(None):
            result, report = rewrite(graph)
        report.sites = [explain_break(site, graph, ended_in_break, frames.broken) for site in report.sites]
        frames.reports.append(report)
    frames.broken |= ended_in_break
    if not inductor:
        return result
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode is not None else None
    return cast(Callable[..., Any], compile_fx(result, list(example_inputs), config_patches=patches))


def retrace(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's graph of torch functions as training IR: ATen before dispatch, with shapes and module paths in the metadata.

    Bodies of activation checkpoints are inlined; their nodes say in ``meta["recompute"]``, as torch.compile's own do, that the backward computes them again.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    fakes = [n.meta["example_value"] for n in placeholders]
    # The tracing context of the outer compilation would take our trace for its own, and it names another fake mode.
    with tracing(None), detect_fake_mode(fakes) or contextlib.nullcontext(), fx_traceback.preserve_node_meta():
        traced: fx.GraphModule = make_fx(_Inliner(gm).run, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    # An operator that the tracer does not see leaves its result behind as a constant, and that is no value but a fake one.
    if any(isinstance(getattr(traced, str(n.target), None), FakeTensor) for n in traced.graph.find_nodes(op="get_attr")):
        raise CaptureError("the tracer does not record the result of an operator")
    for old, new in zip(placeholders, traced.graph.find_nodes(op="placeholder"), strict=True):
        new.target = old.target
        new._rename(old.name)
    traced.recompile()
    return traced


class _Inliner(fx.Interpreter):
    """Runs the bodies of regions that compute what their bodies do in place, so that they become part of the graph."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = target.name() if isinstance(target, torch._ops.HigherOrderOperator) else ""
        if name not in INLINED or not isinstance(args[0], fx.GraphModule) or "_checkpoint_context_fn" in args[0].meta:
            return super().call_function(target, args, kwargs)
        body, *operands = args
        if name == CHECKPOINT:
            region = next(_regions)
            for node in body.graph.nodes:
                node.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": region}
        return type(self)(body).run(*operands)


CHECKPOINT = "tag_activation_checkpoint"
INLINED = frozenset({CHECKPOINT, "wrap"})
_regions = itertools.count(1_000_000)
"""Numbers of checkpointed regions, beside those that torch gives to its own."""
