"""One way in which an optimized module runs: for one mode, dtype, device and structure of the arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnopt.capture.call import Args, Kwargs
from attnopt.capture.captured import Example
from attnopt.emit.function import GraphFunction
from attnopt.remarks import Remark
from attnopt.report import Report, Verdict

if TYPE_CHECKING:
    from attnopt.emit.onnx import WithPastForm
    from attnopt.emit.onnx.report import OnnxReport


@dataclass(frozen=True, eq=False)
class GraphVariant:
    """Runs a captured and rewritten graph on the module's own parameters. Immutable: copies of a module share it."""

    function: GraphFunction
    holds: Callable[[list[Any]], bool]
    report: Report
    example: Example
    """Not the captured graph itself: that would keep parameters alive that the module has long left."""
    folded: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Buffers whose values became part of the graph, as they were then (a registered triangle that was proven to be causal)."""

    def current(self, module: nn.Module) -> bool:
        """Whether the folded buffers still hold those values. Compared again only when one was written to or replaced."""
        if not self.folded or torch.compiler.is_compiling():
            return True
        seen = module.__dict__["_attnopt"].folded
        for name, value in self.folded.items():
            buffer = module.get_buffer(name)
            version = -1 if buffer.is_inference() else buffer._version
            before = seen.get((self, name))
            if before is None or before[0] is not buffer or before[1] != version or version < 0:
                if buffer.shape != value.shape or not torch.equal(buffer, value.to(buffer)):
                    return False
                seen[self, name] = (buffer, version)
        return True

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs, leaves: list[Any]) -> Any:
        return pytree.tree_unflatten(self.function.run(module, *leaves, *self.function.constants), self.function.out_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphVariant:
        return self


_MODULES = 256
"""How many modules of one class, in how many forms, torch.compile may hold."""


@dataclass(frozen=True, eq=False)
class CompiledVariant:
    """Runs the original forward under torch.compile, with the passes as its backend."""

    backend: Callable[..., Any]
    make_report: Callable[[], Report]
    verdict: Verdict
    """Filled in when the result was compared."""

    @property
    def report(self) -> Report:
        return self.make_report()

    def holds(self, leaves: list[Any]) -> bool:
        return True

    def current(self, module: nn.Module) -> bool:
        return True

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs, leaves: list[Any]) -> Any:
        state = module.__dict__["_attnopt"]
        if torch.compiler.is_compiling():
            return state.reference.forward(*args, **kwargs)  # the compiler around us traces the model as it is
        compiled = state.compiled.get(self)
        if compiled is None:
            compiled = state.compiled[self] = torch.compile(state.reference.forward, backend=self.backend)
        # The compiler's limit counts all modules of a class together, and beyond it runs them as they are without a word.
        with torch._dynamo.config.patch(recompile_limit=_MODULES, accumulated_recompile_limit=32 * _MODULES):
            return compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledVariant:
        return self


Variant = GraphVariant | CompiledVariant


class Builder(Protocol):
    """Makes the variant for one call. ``why`` is the remark on why it is needed, None for the first."""

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs, why: Remark | None) -> Variant: ...

    def export_onnx(self, module: nn.Module, path: str | os.PathLike[str], opset: int, target: str, with_past: WithPastForm, max_length: int | None, strip_metadata: bool) -> OnnxReport:
        """Write ``module`` as a verified ONNX file; see ``OptimizedModule.export_onnx``."""
        ...
