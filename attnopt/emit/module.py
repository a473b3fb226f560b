"""The optimized module: a second tree of modules over the same parameters, with another forward.

It is an instance of a subclass of the original's class, so everything that holds on to the original keeps working
(``isinstance``, ``config``, methods, parameter names, ``state_dict``); what is new is ``forward``, which picks a variant by
mode, dtype, device and arguments, and captures the model again when it meets a combination for the first time.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnopt.capture.call import Args, CallForm, Kwargs
from attnopt.capture.captured import ModelError
from attnopt.capture.clone import clone_tree, tensors_of
from attnopt.emit.changes import other_sizes, other_way
from attnopt.emit.variant import Builder, GraphVariant, Variant
from attnopt.errors import AttnoptError, CaptureError
from attnopt.kernels.linear import adjacent, pack
from attnopt.remarks import Remark
from attnopt.report import Report

if TYPE_CHECKING:
    from attnopt.emit.onnx import WithPastForm
    from attnopt.emit.onnx.report import OnnxReport

log = logging.getLogger("attnopt")
Self = TypeVar("Self", bound="OptimizedModule")
Key = tuple[Any, ...]
_SCALARS = (int, float, bool, str, type(None), torch.dtype, torch.device)


class State:
    """What an optimized module knows beside the original's attributes; one per module, under ``_attnopt``."""

    def __init__(self, reference: nn.Module, builder: Builder, max_variants: int, shared: bool) -> None:
        self.reference = reference
        """The original class over the same ``__dict__``: the model as it was written, always in step with the module."""
        self.builder = builder
        self.max_variants = max_variants
        self.shared = shared
        """Whether the parameters are the original's own objects."""
        self.form = CallForm(reference.forward)
        self.modules = list(reference.modules())
        self.placement = _placement(reference)
        self.variants: dict[Key, tuple[Variant, ...]] = {}
        self.latest: Variant | None = None
        self.compiled: dict[Variant, Callable[..., Any]] = {}
        self.folded: dict[tuple[Variant, str], tuple[torch.Tensor, int]] = {}
        """Folded buffers that were seen to hold their values, at which version."""
        self.own: dict[str, int] = {}
        """Parameters whose memory this module allocated itself, by name, and where that memory is: nobody else reads it."""
        self.positional = 0
        """How many arguments the example was given by position: a saved program is called in the same way."""

    def for_copy(self, reference: nn.Module) -> State:
        new = State(reference, self.builder, self.max_variants, shared=False)
        new.variants, new.latest, new.positional = dict(self.variants), self.latest, self.positional
        return new


class OptimizedModule(nn.Module):
    """Base of the classes made by ``optimized_module``. Never constructed directly."""

    # Stored in __dict__, past nn.Module.__setattr__, so that nothing of it shows up in state_dict or modules().
    _attnopt: State

    @property
    def attnopt_report(self) -> Report:
        """The report of the variant that was captured last; empty before the first."""
        latest = self._attnopt.latest
        return Report() if latest is None else latest.report

    @property
    def attnopt_variants(self) -> list[Variant]:
        """All variants captured so far, oldest first."""
        return [v for found in self._attnopt.variants.values() for v in found]

    @property
    def attnopt_reference(self) -> nn.Module:
        """The model as it was written, over the same parameters, buffers and mode."""
        return self._attnopt.reference

    def attnopt_capture(self, args: Args, kwargs: Kwargs) -> Variant:
        """The variant for this call, built now when there is none, as the first such call would. Raises CaptureError."""
        state = self._attnopt
        state.positional = len(args)
        try:
            args, kwargs = state.form.normalise(args, kwargs)
        except TypeError as error:
            raise ModelError(f"{_original_class(self).__name__} does not take these inputs: {error}.", error) from error
        leaves, key = _key(state, args, kwargs)
        return next((v for v in state.variants.get(key, ()) if v.holds(leaves) and v.current(self)), None) or _build(self, key, args, kwargs)

    def export_onnx(
        self, path: str | os.PathLike[str], *, opset: int = 24, target: str = "onnx", with_past: WithPastForm = False, max_length: int | None = None, strip_metadata: bool = False
    ) -> OnnxReport:
        """Write the model as ONNX, each attention as a fused node, and compare the file with the original in ONNX Runtime.

        The call that was captured last is exported, with the same dimensions open. ``opset`` is 23 or 24; ``target`` is ``onnx``
        (the standard operator ``Attention`` where it is exact), ``ort`` (operators of ONNX Runtime where they are) or ``decomposed``. ``with_past``: a decoder
        with keys and values of earlier tokens as inputs, and those of all as outputs, under the names that onnxruntime-genai expects, and its
        ``genai_config.json`` beside the file; ``"static"``: with caches of ``max_length`` tokens in their place, written at an index for each row. ``strip_metadata``: without specs, names of modules and versions in it. Nothing is written when the comparison fails
        (VerificationError) or the request cannot be met (AttnoptError). See docs/onnx.md.
        """
        return self._attnopt.builder.export_onnx(self, path, opset, target, with_past, max_length, strip_metadata)

    # ---- nn.Module's own life

    def _apply(self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        state = self._attnopt
        if state.shared and any(_changes(fn, t) for t in {(t.dtype, t.device, t.dim()): t for t in tensors_of(self)}.values()):
            _unshare(self)
        before = _places(self)
        super()._apply(fn, recurse)
        state.own = {name: at for name, at in _places(self).items() if before.get(name) != at or state.own.get(name) == at}
        state.placement = _placement(self)
        _lay_together(self)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        if kwargs.get("assign") or len(args) > 2:
            self._attnopt.own.clear()  # the memory is that of the given dict
        self._attnopt.placement = _placement(self)
        return result

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        new = object.__new__(type(self))
        memo[id(self)] = memo[id(self._attnopt.reference)] = new
        old = {k: v for k, v in self.__dict__.items() if k != "_attnopt"}
        new.__dict__.update(copy.deepcopy(old, memo))
        new.__dict__["_attnopt"] = self._attnopt.for_copy(over_same_state(new, _original_class(self), copy.deepcopy(_own_forward(self), memo)))
        return new

    def __copy__(self: Self) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled as the original model with the way to optimize it: variants are made anew on first use."""
        plain = object.__new__(_original_class(self))
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k != "_attnopt"})
        return optimized_module, (plain, self._attnopt.builder, self._attnopt.max_variants, False, True)


def optimized_module(model: nn.Module, builder: Builder, max_variants: int = 8, copy_parameters: bool = False, own: bool = False) -> OptimizedModule:
    """A module with ``model``'s state and another forward. ``model`` is not changed.

    ``builder`` makes the variants. Parameters are shared unless ``copy_parameters``; ``own`` takes the tree of ``model``
    over instead of making a second one.
    """
    if isinstance(model, OptimizedModule):
        raise AttnoptError(f"{type(model).__name__} is already optimized; pass the original model.")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(f"{type(model).__name__} is a TorchScript module, which cannot be captured; pass the nn.Module it was made from.")
    tree = model if own else clone_tree(model, clone_parameter=_copied if copy_parameters else None)
    optimized = object.__new__(_class_for(cast(Any, type(tree))))
    optimized.__dict__.update(tree.__dict__)
    own_forward = optimized.__dict__.pop("forward", None)
    optimized.__dict__["_attnopt"] = State(over_same_state(optimized, type(tree), own_forward), builder, max_variants, shared=not (copy_parameters or own))
    if copy_parameters:
        optimized._attnopt.own = _places(optimized)
    return optimized


@functools.lru_cache(maxsize=256)
def _class_for(cls: Any) -> type[OptimizedModule]:
    def forward(self: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
        state = self._attnopt
        args, kwargs = state.form.normalise(args, kwargs)
        leaves, key = _key(state, args, kwargs)
        for variant in state.variants.get(key, ()):
            if variant.holds(leaves) and variant.current(self):
                return variant(self, args, kwargs, leaves)
        return _build(self, key, args, kwargs)(self, args, kwargs, leaves)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__
    body = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return cast(type[OptimizedModule], _subclass(f"Optimized{cls.__name__}", (OptimizedModule, cls), body))


def _subclass(name: str, bases: tuple[type[nn.Module], ...], body: dict[str, Any]) -> type[nn.Module]:
    return cast(type[nn.Module], types.new_class(name, bases, exec_body=lambda space: space.update(body)))


def _original_class(module: OptimizedModule) -> type[nn.Module]:
    return cast(type[nn.Module], type(module).__mro__[2])


def over_same_state(module: nn.Module, cls: type[nn.Module], own_forward: Callable[..., Any] | None) -> nn.Module:
    """Another object over the state of ``module``, of class ``cls``; ``own_forward`` is a forward as set on an instance."""
    if own_forward is not None:
        cls = _subclass(cls.__name__, (cls,), {"forward": staticmethod(own_forward), "__module__": cls.__module__})
    reference = object.__new__(cls)
    object.__setattr__(reference, "__dict__", module.__dict__)
    return reference


def _own_forward(module: OptimizedModule) -> Callable[..., Any] | None:
    found = type(module._attnopt.reference).__dict__.get("forward")
    return found.__func__ if isinstance(found, staticmethod) else None


# ---- which variant


def _key(state: State, args: Args, kwargs: Kwargs) -> tuple[list[Any], Key]:
    """The leaves of a call, and everything by which variants differ besides sizes."""
    leaves: list[Any] = []
    forms: list[Any] = list(kwargs)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            leaves.append(value)
            forms.append((value.dtype, value.device, value.dim()))
        elif isinstance(value, _SCALARS):
            leaves.append(value)
            forms.append((type(value), value))
        else:
            inner, spec = pytree.tree_flatten(value)
            leaves.extend(inner)
            forms.append(spec)
            forms.extend((x.dtype, x.device, x.dim()) if isinstance(x, torch.Tensor) else (type(x), x if isinstance(x, _SCALARS) else None) for x in inner)
    flags = [m.training for m in state.modules]
    training = True if all(flags) else tuple(flags) if any(flags) else False
    return leaves, (training, state.placement, _autocast(leaves), len(args), *forms)


def _autocast(leaves: list[Any]) -> tuple[Any, ...] | None:
    for x in leaves:
        if isinstance(x, torch.Tensor):
            kind = x.device.type
            return (kind, torch.get_autocast_dtype(kind)) if kind != "meta" and torch.is_autocast_enabled(kind) else None
    return None


def _build(module: OptimizedModule, key: Key, args: Args, kwargs: Kwargs) -> Variant:
    """Capture the model for a call that no variant takes; never a part of what torch.compile traces."""
    compiler = sys.modules.get("torch._dynamo")
    build: Callable[..., Variant] = _build_now if compiler is None else compiler.disable(_build_now)
    return build(module, key, args, kwargs)


def _build_now(module: OptimizedModule, key: Key, args: Args, kwargs: Kwargs) -> Variant:
    state = module._attnopt
    known = state.variants
    count = len(graph_variants(module))
    name = _original_class(module).__name__
    if torch.compiler.is_exporting():
        raise CaptureError(f"{name} has no variant for these inputs, and none can be captured while it is being exported; call it once with such inputs first.")
    if count >= state.max_variants:
        raise CaptureError(
            f"{name} was captured {count} times (max_variants={state.max_variants}) and was now called in yet another way: {_what_changed(state, key, args, kwargs)}.",
            "Pass more varied example inputs or dynamic_shapes to optimize(), or raise OptimizeConfig.max_variants.",
        )
    why = None
    if count:
        why = Remark("AO305", f"Captured again for {_what_changed(state, key, args, kwargs)}.")
        log.info("%s: %s", name, why.message)
    try:
        variant = state.builder(module, args, kwargs, why)
    except ModelError as error:
        if not count:
            raise
        raise error.original from None  # the user's call is wrong, and the model's own words say how
    known[key] = (*known.get(key, ()), variant)
    state.latest = variant
    _lay_together(module)
    return variant


_build._torchdynamo_disable = True  # type: ignore[attr-defined]


def _what_changed(state: State, key: Key, args: Args, kwargs: Kwargs) -> str:
    """In words: in what this call differs from the nearest one that was captured."""
    if key not in state.variants:
        return other_way(state.variants, key)
    leaves = _key(state, args, kwargs)[0]
    captured = [v for v in state.variants[key] if isinstance(v, GraphVariant)]
    stale = next((v for v in captured if v.holds(leaves)), None)
    return other_sizes([v.example for v in captured], leaves) if stale is None else f"other values in the buffers {', '.join(stale.folded)}"


# ---- parameters


def _placement(module: nn.Module) -> tuple[Any, ...]:
    """Dtypes and devices of parameters and buffers, in order, runs of the same taken together."""
    runs: list[tuple[torch.dtype, torch.device]] = []
    for t in tensors_of(module):
        if not runs or runs[-1] != (t.dtype, t.device):
            runs.append((t.dtype, t.device))
    return tuple(runs)


def _changes(fn: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor) -> bool:
    """Whether ``fn`` gives a new tensor for a tensor of this dtype, device and rank."""
    probe = torch.empty((2,) * like.dim(), dtype=like.dtype, device=like.device)
    return fn(probe) is not probe


def _copied(p: nn.Parameter) -> nn.Parameter:
    return copy.deepcopy(p)


def _unshare(module: OptimizedModule) -> None:
    """Give the module Parameter objects of its own, over the same memory: moving them then leaves the original's alone."""
    fresh: dict[int, nn.Parameter] = {}
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                if id(p) not in fresh:
                    fresh[id(p)] = new = nn.Parameter(p.data, requires_grad=p.requires_grad)
                    new.__dict__.update(p.__dict__)
                m._parameters[name] = fresh[id(p)]
    module._attnopt.shared = False


def _places(module: nn.Module) -> dict[str, int]:
    """Where each plain parameter's memory is."""
    return {name: p.untyped_storage().data_ptr() for name, p in module.named_parameters(remove_duplicate=False) if type(p) is nn.Parameter and not p.is_meta}


def _lay_together(module: OptimizedModule) -> None:
    """Move parameters that a graph reads at once back to back in memory: those whose memory is the module's own, and of no one else."""
    state = module._attnopt
    for names in dict.fromkeys(group for v in graph_variants(module) for group in v.function.together):
        held = [module.get_parameter(name) for name in names]
        if all(type(p) is nn.Parameter and state.own.get(name) == p.untyped_storage().data_ptr() for name, p in zip(names, held, strict=True)) and not adjacent(held) and pack(held):
            state.own |= {name: p.untyped_storage().data_ptr() for name, p in zip(names, held, strict=True)}


def graph_variants(module: OptimizedModule) -> list[GraphVariant]:
    """The variants that run a captured graph."""
    return [v for v in module.attnopt_variants if isinstance(v, GraphVariant)]
