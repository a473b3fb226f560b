"""A kernel for each raised attention, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.errors import AttnoptError
from attnopt.kernels import registry
from attnopt.passes.attention_nodes import attentions, spec_of
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.group_heads import site_name

KERNEL = "attnopt_kernel"
"""Key in an attention node's meta: (kernel's name, why)."""


@dataclass(frozen=True)
class SelectKernel:
    """``backend`` is ``auto`` or the name of the one to use."""

    backend: str = "auto"
    name: str = "select-kernel"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        for node in attentions(module.graph):
            q = N.value(node.args[0])  # type: ignore[arg-type]
            try:
                node.meta[KERNEL] = registry.choose(spec_of(node), device=q.device, dtype=q.dtype, training=module.training, backend=self.backend)
            except registry.BackendRefusal as refusal:
                raise AttnoptError(f"{refusal.message.rstrip('.')} (site {site_name(node)}).", refusal.hint) from refusal
        return PassResult(False)
