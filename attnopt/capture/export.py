"""Ahead-of-time capture: ``torch.export`` (non-strict, training IR) with batch and sequence dimensions left open."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal, TextIO

import sympy
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges

from attnopt.capture.call import Args, CallForm, Kwargs, Leaf, leaves_of
from attnopt.capture.captured import Captured, DynamicDim, Example, ModelError
from attnopt.capture.clone import clone_tree
from attnopt.capture.dynamism import Check, resize
from attnopt.capture.guards import SymbolicSizes, compile_guard, expr_of, hint_of, symbolic_sizes, tie_batches
from attnopt.capture.inline import inline_regions
from attnopt.capture.lines import line_of, whole_stacks
from attnopt.capture.relations import relations, tie_lengths
from attnopt.capture.run import tensors_from
from attnopt.capture.shapes import Plan, batch_of_one, name_every_argument, plans, shapes_by_argument
from attnopt.capture.specialised import conditions_remarks, fixed_remark, specialised_remarks
from attnopt.capture.transforms import without_transforms
from attnopt.errors import CaptureError, first_line, named

DynamicShapes = Literal["auto", "static"] | dict[str, Any] | tuple[Any, ...] | None

log = logging.getLogger("attnopt")


def capture(model: nn.Module, args: Args = (), kwargs: Kwargs | None = None, dynamic_shapes: DynamicShapes = "auto", *, check: bool = True) -> Captured:
    """Capture ``model(*args, **kwargs)`` as a graph that holds for other batch sizes and lengths too.

    ``dynamic_shapes``: ``"auto"`` opens every dimension that export and a run at other sizes allow, and remarks on batch
    and sequence dimensions that it could not (AO301); ``"static"`` opens none; anything else is torch.export's own
    ``dynamic_shapes``, by argument name. ``check`` runs model and graph at other sizes. The model is not changed.
    Raises ModelError when the model itself fails with these inputs and CaptureError when export refuses it.
    """
    start = time.perf_counter()
    kwargs = kwargs or {}
    model = clone_tree(model)
    # Hooks of the root run whenever the optimized module is called, so they are no part of the graph.
    model._forward_hooks.clear()
    model._forward_pre_hooks.clear()
    try:
        form = CallForm(model.forward)
        form.signature.bind(*args, **kwargs)
        args, kwargs = form.normalise(args, kwargs)
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} does not take these inputs: {first_line(error)}", error) from error
    name_every_argument(model, form, kwargs)
    leaves, structure = pytree.tree_flatten((args, kwargs))
    leaves = [x.detach() if isinstance(x, torch.Tensor) and x.requires_grad and not x.is_leaf else x for x in leaves]
    # Strides of a slice of something larger would become conditions on its sizes.
    leaves = [x.contiguous() if isinstance(x, torch.Tensor) and not x.requires_grad else x for x in leaves]
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x for x in leaves]
        leaves = _apart(leaves)
        job = _Job(model, structure, [name for name, _ in leaves_of(args, kwargs)])
        if isinstance(dynamic_shapes, str) and dynamic_shapes == "auto":
            captured = job.auto(leaves, check)
        else:
            captured = job.given(leaves, {} if dynamic_shapes is None or isinstance(dynamic_shapes, str) else dynamic_shapes, check)
    captured.seconds = time.perf_counter() - start
    return captured


class _Job:
    """One model and one structure of inputs."""

    def __init__(self, model: nn.Module, structure: pytree.TreeSpec, names: list[str]) -> None:
        self.model = model
        self.structure = structure
        self.names = names
        self.images = any(isinstance(m, nn.Conv2d) for m in model.modules())

    # ---- the two ways

    def auto(self, leaves: list[Any], check: bool) -> Captured:
        single = batch_of_one(leaves)
        if single:
            # Export fixes a dimension whose example has size one, so it sees the example twice.
            repeated = resize(leaves, dict.fromkeys(single, 2))
            captured, failure = self._open(repeated, check, must_hold=leaves)
            if captured is not None:
                return captured
            log.debug("capture with the batch repeated: %s", failure)
        captured, failure = self._open(leaves, check, must_hold=leaves)
        if captured is None:
            assert failure is not None
            raise self._explained(failure, leaves)
        return captured

    def given(self, leaves: list[Any], shapes: dict[str, Any] | tuple[Any, ...], check: bool) -> Captured:
        if isinstance(shapes, tuple | list):
            shapes = dict(zip(inspect.signature(self.model.forward).parameters, shapes, strict=False))
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        empty = shapes_by_argument(self.model, [None] * len(leaves), args, kwargs)
        taken = inspect.signature(self.model.forward).parameters
        unknown = sorted(set(shapes) - set(taken))
        if unknown:
            raise CaptureError(f"dynamic_shapes names {', '.join(unknown)}, which {type(self.model).__name__} does not take; it takes {', '.join(taken)}.")
        wanted = {name: shapes.get(name, none) for name, none in empty.items()}  # torch.export wants every argument named
        try:
            program = _export(self.model, args, kwargs, wanted)
        except Exception as error:
            raise self._explained(error, leaves) from error
        return self._finish(program, leaves, [frozenset()] * len(leaves), check, {}, leaves)

    def _open(self, leaves: list[Any], check: bool, must_hold: list[Any]) -> tuple[Captured | None, Exception | None]:
        """The most open capture that export grants and the check confirms."""
        program, plan, failure = self._widest(leaves)
        if program is None:
            return None, failure
        fixed: dict[tuple[int, int], str] = {}
        captured = self._finish(program, leaves, plan, check, fixed, must_hold)
        if fixed:
            closed = [frozenset(d for d in dims if (i, d) not in fixed) for i, dims in enumerate(plan)]
            again, failure = self._try(leaves, closed)
            if again is None:
                return None, failure
            remarks = [fixed_remark(self.names[i], d, leaves[i].shape[d], why) for (i, d), why in fixed.items()]
            captured = self._finish(again, leaves, closed, False, {}, must_hold)
            captured.remarks[:0] = remarks
        if not captured.example.holds(must_hold):
            return None, CaptureError("The captured graph does not hold for the inputs that were given.")
        return captured, None

    def _widest(self, leaves: list[Any]) -> tuple[ExportedProgram | None, Plan, Exception | None]:
        first, *between, last = plans(leaves, self.images)
        program, failure = self._try(leaves, first)
        if program is not None:
            return program, first, None
        # Is it the open dimensions, or the model? The static capture tells, before more is tried.
        static, why = self._try(leaves, last)
        if static is None:
            return None, last, why
        for plan in between:
            program, _ = self._try(leaves, plan)
            if program is not None:
                return program, plan, None
        return static, last, failure

    def _try(self, leaves: list[Any], plan: Plan) -> tuple[ExportedProgram | None, Exception | None]:
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        specs = [dict.fromkeys(sorted(dims), Dim.AUTO) or None for dims in plan]
        shapes = shapes_by_argument(self.model, specs, args, kwargs)
        try:
            return _export(self.model, args, kwargs, shapes), None
        except Exception as error:  # noqa: BLE001 - export raises errors of every kind; the caller reports the one that counts
            return None, error

    # ---- from a program to what is handed on

    def _finish(self, program: ExportedProgram, leaves: list[Any], plan: Plan, check: bool, fixed: dict[tuple[int, int], str], must_hold: list[Any]) -> Captured:
        """Build the result; ``fixed`` receives the open dimensions that turned out not to be, with the reason."""
        graph = graph_of(program)
        graph.training = self.model.training
        values = [n.meta.get("val") for n in graph.graph.find_nodes(op="placeholder")]
        if any(plan):
            tie_batches(values)
            tie_lengths(values)
        sizes = symbolic_sizes(values, program.range_constraints)
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        if check and sizes.home:
            found = Check(self.model, graph, compile_guard(sizes), sizes, leaves, self.structure).run()
            for symbol, why in found.fixed.items():
                fixed.update(dict.fromkeys(sizes.where(symbol), why))
            _lower_bounds(sizes, found.down_to_one)
        inline_regions(graph)
        asked = [(i, d) for i, dims in enumerate(plans(leaves, self.images)[0]) for d in sorted(dims)] if any(plan) else []
        remarks = specialised_remarks(self.names, leaves, sizes, asked)
        remarks += conditions_remarks(self.names, sizes)
        return Captured(
            graph_module=graph,
            program=program,
            example=Example(
                args=args,
                kwargs=kwargs,
                leaves=tuple(_leaf(name, x, v) for name, x, v in zip(self.names, must_hold, sizes.values, strict=True)),
                dynamic=tuple(DynamicDim(i, self.names[i], d, str(symbol), *sizes.bounds[symbol]) for symbol in sizes.home for i, d in sizes.where(symbol)),
                holds=compile_guard(sizes),
            ),
            remarks=remarks,
            relations=relations(self.names, sizes),
        )

    def _explained(self, failure: Exception, leaves: list[Any]) -> CaptureError:
        """The error to show: the model's own when it fails on these inputs by itself."""
        name = type(self.model).__name__
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        try:
            tensors_from(self.model, args, kwargs)
        except Exception as error:  # noqa: BLE001 - reported as the model's own error
            return ModelError(f"{name} itself fails with these inputs: {named(error)}", error)
        explained = CaptureError(
            f"torch.export cannot capture {name}: {named(failure)}",
            "capture='dynamo' optimizes it when it runs, through torch.compile.",
            line_of(failure),
        )
        explained.__cause__ = failure
        return explained


def graph_of(program: ExportedProgram) -> fx.GraphModule:
    """The program as a graph over the model's own parameters, without the calls that check the inputs."""
    if "check_guards" in inspect.signature(program.module).parameters:
        module = program.module(check_guards=False)
    else:
        module = program.module()
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.find_nodes(op="call_module", target="_guards_fn"):
        module.graph.erase_node(node)
        delattr(module, "_guards_fn")
        module.recompile()
    return module


def _export(model: nn.Module, args: Args, kwargs: Kwargs, shapes: dict[str, Any]) -> ExportedProgram:
    # A forward may keep what it computes (a cached mask): while it is traced that is no real tensor.
    before = {m: (dict(m.__dict__), dict(m._buffers)) for m in model.modules()}
    with quiet(), whole_stacks():
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            made = [(m, n) for m, (_, buffers) in before.items() for n, b in m._buffers.items() if b is not None and buffers.get(n) is None]
            if made:  # torch.export would write what the new buffer holds into an input
                raise CaptureError(f"{type(made[0][0]).__name__} makes its buffer {made[0][1]!r} while it runs; torch.export takes buffers that are there before.")
            return without_transforms(program)
        finally:
            # An exception inside a no_grad region of the model would leave gradients off for the whole process.
            torch.set_grad_enabled(True)
            for module, (attributes, buffers) in before.items():
                module.__dict__.clear()
                module.__dict__.update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Export logs the whole graph when it gives up, and warns of every size it fixes; both come back as our own words."""
    names = ("torch.export", "torch._export", "torch.fx.experimental.symbolic_shapes", "torch.fx.experimental.proxy_tensor", "torch.__trace")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(_OtherThreads(sys.stderr)):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


class _OtherThreads(io.TextIOBase):
    """A stream for what other threads write (a progress bar); export prints the graph on which it fails from this one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._owner = threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._owner else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def _leaf(name: str, given: Any, val: Any) -> Leaf:
    if not isinstance(given, torch.Tensor):
        return Leaf(name, value=given)
    return Leaf(name, given.dtype, given.device, tuple(str(n) if expr_of(n).free_symbols else hint_of(n) for n in val.shape))


def _lower_bounds(sizes: SymbolicSizes, symbols: set[sympy.Symbol]) -> None:
    """Let sizes go down to one, for the guard and for every proof that reads the bounds from the graph."""
    for symbol in symbols:
        sizes.bounds[symbol] = (1, sizes.bounds[symbol][1])
        assert sizes.env is not None
        known = sizes.env.var_to_range.get(symbol)
        if known is not None:
            sizes.env.var_to_range[symbol] = ValueRanges(sympy.Integer(1), known.upper)


def _apart(leaves: list[Any]) -> list[Any]:
    """The leaves with no memory in common: a tensor that is passed twice would be captured as one input."""
    seen: set[int] = set()
    out: list[Any] = []
    for x in leaves:
        if isinstance(x, torch.Tensor) and x.layout is torch.strided:
            memory = x.untyped_storage()._cdata
            if memory in seen:
                x = x.detach().clone().requires_grad_(x.requires_grad)
            seen.add(memory)
        out.append(x)
    return out
