"""Means of parameters over heads, taken once where a graph is not trained, and again when a parameter has changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from attnopt.passes.cleanup import drop_unread
from attnopt.passes.merge_kv_projections import MEAN


@dataclass
class Mean:
    """``held`` [groups * n, ...] is the mean of a parameter [groups * each * n, ...], and ``seen`` which parameter, and which state of it."""

    name: str
    groups: int
    each: int
    held: Tensor
    seen: tuple[int, int]


def fold_means(gm: fx.GraphModule, model: nn.Module) -> list[Mean]:
    """Put tensors in place of the means that merge-kv-projections wrote into a graph; those of weights without values stay as they are."""
    found: list[Mean] = []
    for node in [n for n in gm.graph.nodes if MEAN in n.meta]:
        name, groups, each = node.meta[MEAN]
        parameter = _get(model, name)
        if parameter.is_meta:
            continue
        mean = Mean(name, groups, each, _mean(parameter, groups, each), _state(parameter))
        target = f"attnopt_mean_{len(found)}"
        gm.register_buffer(target, mean.held, persistent=False)
        with gm.graph.inserting_before(node):
            held = gm.graph.get_attr(target)
        held.meta = dict(node.meta)
        node.replace_all_uses_with(held)
        found.append(mean)
    if found:
        drop_unread(gm.graph)
        gm.recompile()
    return found


def refresh(means: list[Mean], model: nn.Module) -> None:
    """Take those means again, in place, whose parameters in ``model`` are others or were written to."""
    for mean in means:
        parameter = _get(model, mean.name)
        if _state(parameter) != mean.seen:
            mean.held.copy_(_mean(parameter, mean.groups, mean.each))
            mean.seen = _state(parameter)


def _mean(parameter: Tensor, groups: int, each: int) -> Tensor:
    apart: Tensor = parameter.detach().unflatten(0, (groups, each, -1))
    return apart.mean(1).flatten(0, 1)


def _state(parameter: Tensor) -> tuple[int, int]:
    return parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version


def _get(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), last)
    return found
