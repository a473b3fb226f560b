"""A kernel for each raised attention, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.errors import AttnoptError, BackendError
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels import autotune, registry
from attnopt.kernels.autotune import Example, TensorForm
from attnopt.kernels.registry import Setting
from attnopt.passes.attention_nodes import attentions, spec_of
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.group_heads import site_name

KERNEL = "attnopt_kernel"
"""Key in an attention node's meta: (kernel's name, why)."""
BACKWARD = "attnopt_backward"
"""Key in its meta, in training: the name of the backend that computes its gradients."""


@dataclass(frozen=True)
class SelectKernel:
    """``backend`` is ``auto`` or the name of the one to use; with ``autotune``, ``auto`` measures those that can."""

    backend: str = "auto"
    autotune: bool = False
    name: str = "select-kernel"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        for node in attentions(module.graph):
            try:
                self.select(node, spec_of(node), module.training)
            except registry.BackendRefusal as refusal:
                raise AttnoptError(f"{refusal.message.rstrip('.')} (site {site_name(node)}).", refusal.hint) from refusal
        return PassResult(False)

    def select(self, node: fx.Node, spec: AttentionSpec, training: bool) -> None:
        q, k, _ = operands = [N.value(x) for x in node.args[:3]]  # type: ignore[arg-type]
        loads = [N.value(x) for x in node.args[3]]  # type: ignore[arg-type, union-attr]
        lengths = _numbers((q.shape[2], k.shape[2]))
        setting = Setting(q.device.type, q.dtype, training, tuple(x.dtype for x in loads), None if lengths is None else (lengths[0], lengths[1]))
        note = ""
        if self.autotune and self.backend == "auto":
            example = _example(operands, loads, node.args[4])  # type: ignore[arg-type]
            if example is not None and setting.device in ("cpu", "cuda"):
                name, backward, why = autotune.choose(spec, setting, example)
                node.meta[KERNEL] = (name, why)
                if backward is not None:
                    node.meta[BACKWARD] = backward
                return
            note = f" (not measured: {'the tensors are on ' + setting.device if example is not None else 'a size is known only when it runs'})"
        name, why = registry.choose(
            spec, device=q.device, dtype=q.dtype, training=training, backend=self.backend, loads=setting.loads, lengths=setting.lengths
        )
        node.meta[KERNEL] = (name, why + note)
        if training and not registry.backends()[name].is_torch_call(spec):
            try:
                node.meta[BACKWARD] = registry.choose_backward(name, spec, setting)
            except BackendError:  # the phrase says so
                node.meta.pop(BACKWARD, None)


def _example(operands: Sequence[torch.Tensor], loads: Sequence[torch.Tensor], sizes: Sequence[Any]) -> Example | None:
    """The operands as they were in the example; None where a size is not known before the graph runs."""
    forms = []
    for x in (*operands, *loads):
        shape, stride = _numbers(x.shape), _numbers(x.stride())
        if shape is None or stride is None:
            return None
        forms.append(TensorForm.of(shape, stride, x.dtype))
    numbers = _numbers([N.value(n) if isinstance(n, fx.Node) else n for n in sizes])
    return None if numbers is None else Example(forms[0], forms[1], forms[2], tuple(forms[3:]), numbers)


def _numbers(sizes: Sequence[Any]) -> tuple[int, ...] | None:
    """Sizes in the example."""
    symbolic = [n.node for n in sizes if isinstance(n, torch.SymInt)]
    return tuple(n.node.hint if isinstance(n, torch.SymInt) else int(n) for n in sizes) if all(n.has_hint() for n in symbolic) else None
