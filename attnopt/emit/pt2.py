"""The optimized model as a ``.pt2`` file: an exported program that needs only torch and ``import attnopt``."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.value_ranges import ValueRanges

import attnopt.kernels.ops  # noqa: F401 - registers the operator that a file refers to
from attnopt.capture.call import Args, CallForm, Kwargs
from attnopt.capture.captured import Example
from attnopt.capture.export import DynamicShapes, quiet
from attnopt.capture.guards import expr_of
from attnopt.capture.shapes import shapes_by_argument
from attnopt.emit.module import OptimizedModule, graph_variants, over_same_state
from attnopt.emit.variant import GraphVariant
from attnopt.errors import AttnoptError, CaptureError, LoadError, first_line


def save_pt2(
    optimized: nn.Module,
    path: str | os.PathLike[str],
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: DynamicShapes = "auto",
) -> ExportedProgram:
    """Export an optimized module again and save it; returns the program.

    Without ``args`` and ``kwargs`` it is exported for the call that was captured last, and the same dimensions stay
    open. The program is called as the example was, by position or by name. Results that are objects of a library's class (``ModelOutput``) come back as dicts, so that reading the file takes no
    other package. ``dynamic_shapes`` is ``"auto"`` or torch.export's own. Read it with ``torch.export.load(path).module()`` after ``import attnopt``.
    Raises CaptureError for a module that holds no captured graph (one that goes through torch.compile) and
    AttnoptError when the file cannot be written.
    """
    program = export_optimized(optimized, args, kwargs, dynamic_shapes)
    try:
        torch.export.save(program, path)
    except (OSError, RuntimeError) as error:
        raise AttnoptError(f"{path} cannot be written: {error}.") from error
    return program


def load_pt2(path: str | os.PathLike[str]) -> nn.Module:
    """The module of a ``.pt2`` file, with tied parameters tied. Raises LoadError when it is none."""
    if not Path(path).is_file():
        raise LoadError(f"{path} does not exist.")
    try:
        module = torch.export.load(path).module()
    except Exception as error:
        raise LoadError(f"{path} cannot be read as an exported program: {first_line(error)}") from error
    same: dict[Any, nn.Parameter] = {}
    for m in module.modules():
        m.training = False  # its mode is fixed, and eval() of an exported module raises
        for name, p in m._parameters.items():
            if p is not None and p.numel():
                # A file keeps the memory of tied parameters shared, and loses that they are one.
                m._parameters[name] = same.setdefault((p.data_ptr(), p.dtype, p.shape, p.stride()), p)
    return module


def export_optimized(
    optimized: nn.Module, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None, dynamic_shapes: DynamicShapes = "auto"
) -> ExportedProgram:
    """The exported program of an optimized module: training IR with ``attnopt::attention`` in it. See ``save_pt2``."""
    if not isinstance(optimized, OptimizedModule):
        raise AttnoptError(f"save_pt2 takes a module that attnopt.optimize returned, got {type(optimized).__name__}.")
    given = args is not None or kwargs is not None
    variant = optimized.attnopt_capture(args or (), kwargs or {}) if given else next(reversed(graph_variants(optimized)), None)
    if not isinstance(variant, GraphVariant):
        raise CaptureError(f"{type(optimized).__name__} goes through torch.compile and holds no graph to save; torch.export has to take the model for that.")
    example = variant.example
    auto = dynamic_shapes == "auto"
    form = CallForm(optimized.forward)
    spread = form.spread(example.args, example.kwargs, optimized._attnopt.positional)
    if auto or not given:
        args, kwargs = spread
    shapes: Any = _open_shapes(optimized, example, *spread) if auto else None if dynamic_shapes == "static" else dynamic_shapes
    with torch.enable_grad(), quiet():
        program = torch.export.export(_with_plain_results(optimized), args or (), kwargs or {}, dynamic_shapes=shapes, strict=False)
    if auto:
        _lower_bounds(program, example)
    return program


def _with_plain_results(optimized: OptimizedModule) -> nn.Module:
    """The same module over the same state, with results that every process knows."""
    run = optimized.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _plain(run(*args, **kwargs))

    forward.__signature__ = inspect.signature(run)  # type: ignore[attr-defined]
    return over_same_state(optimized, type(optimized), forward)


def _plain(value: Any) -> Any:
    """Library classes that hold results (mappings, dataclasses) as dicts."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if type(value) in (list, tuple):
        return type(value)(_plain(x) for x in value)
    return value


def _open_shapes(optimized: nn.Module, example: Example, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    specs: list[dict[int, Any] | None] = [None] * len(example.leaves)
    for i, leaf in enumerate(example.leaves):
        # a name is a symbol's, or an expression of some, such as the sum of two lengths
        specs[i] = {d: Dim.AUTO for d, size in enumerate(leaf.sizes) if isinstance(size, str)} or None
    found = shapes_by_argument(optimized, specs, example.args, example.kwargs)
    return {name: found.get(name) for name in inspect.signature(optimized.forward).bind(*args, **kwargs).arguments}


def _lower_bounds(program: ExportedProgram, example: Example) -> None:
    """Export assumes at least two of everything that varies; the capture has seen which sizes may be one."""
    inputs = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in program.graph_signature.user_inputs]
    tensors = [v for v in inputs if isinstance(v, torch.Tensor)]  # in the order of the captured ones, whatever stands between
    one = {(d.leaf, d.dim) for d in example.dynamic if d.lower == 1}
    for value, leaf in zip(tensors, (i for i, x in enumerate(example.leaves) if x.is_tensor), strict=True):
        for dim, size in enumerate(value.shape):
            symbol = expr_of(size)
            known = program.range_constraints.get(symbol) if isinstance(symbol, sympy.Symbol) else None
            if known is not None and (leaf, dim) in one and known.lower == 2:
                program.range_constraints[symbol] = ValueRanges(sympy.Integer(1), known.upper)
