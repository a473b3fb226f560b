"""The part of each graph that computes one site, cut at the values that both graphs share."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from attnopt.verify.memory import changing

Outputs = Mapping[str, tuple[str, str]]
"""Site name -> (node of the reference graph, node of the optimized graph that has the same value)."""


@dataclass(frozen=True)
class Region:
    """What a value is computed by: ``nodes`` in order, up to ``output``, from ``leaves``.

    ``source`` maps each leaf to the reference node that stands for its value; equal values have one.
    """

    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]
    output: Node
    source: Mapping[Node, Node]


@dataclass(frozen=True)
class SiteRegions:
    """One site in both graphs."""

    name: str
    reference: Region
    optimized: Region

    @property
    def form(self) -> Hashable:
        """Equal for sites that compute the same function of their leaves, as the layers of one model do."""
        places = {leaf: i for i, leaf in enumerate(self.leaves)}
        return tuple(_form(r, {n: places[s] for n, s in r.source.items()}) for r in (self.reference, self.optimized))

    @property
    def leaves(self) -> tuple[Node, ...]:
        """The reference nodes whose values either region starts from."""
        return tuple(dict.fromkeys((*self.reference.source.values(), *self.optimized.source.values())))


def _form(region: Region, places: Mapping[Node, int]) -> Hashable:
    names = {n: f"leaf {i}" for n, i in places.items()}
    leaves = tuple((names[n], str(getattr(n.meta.get("val"), "shape", None)), str(getattr(n.meta.get("val"), "dtype", None))) for n in region.leaves)
    steps = []
    for i, n in enumerate(region.nodes):
        steps.append((n.op, str(n.target), repr(map_arg((n.args, n.kwargs), lambda a: names.get(a, a.name)))))
        names[n] = f"value {i}"
    return leaves, tuple(steps)


def site_regions(reference: GraphModule, optimized: GraphModule, outputs: Outputs) -> list[SiteRegions]:
    """The regions of every site, in the order of ``outputs``.

    The frontier of a site is the set of the nearest nodes above its optimized output whose values the reference graph has too.
    The optimized region starts there; the reference region starts there or, where it does not pass by them, at the
    graph's inputs, parameters and buffers. Memory that is written in place is not computed again: the reference region starts from the
    views of it as well. Raises KeyError when ``outputs`` names a node that does not exist.
    """
    ref = {n.name: n for n in reference.graph.nodes}
    opt = {n.name: n for n in optimized.graph.nodes}
    pairs = {name: (ref[a], opt[b]) for name, (a, b) in outputs.items()}
    same, number = shared_nodes(reference, optimized, pairs)
    fixed = changing(reference.graph)
    equal: dict[int, list[Node]] = {}
    for n in reference.graph.nodes:
        equal.setdefault(number[n], []).append(n)
    result = []
    for name, (r, o) in pairs.items():
        inner = _slice(o, {n: m for n, m in same.items() if n is not o})
        stop = {twin: m for m in inner.source.values() for twin in equal[number[m]]}
        stop |= {n: n for n in fixed if n not in stop}
        stop.pop(r, None)
        result.append(SiteRegions(name, _slice(r, stop), inner))
    return result


def shared_nodes(reference: GraphModule, optimized: GraphModule, sites: Mapping[str, tuple[Node, Node]]) -> tuple[dict[Node, Node], dict[Node, int]]:
    """Optimized node -> reference node with the same value, given that the sites' outputs agree; and the reference's value numbers.

    Two nodes agree when they are the same function of agreeing operands, whatever they are called (so merged and
    renamed nodes are found); failing that, when name and function are the same, which is what passes promise for nodes they do not touch.
    """
    numbers: dict[Hashable, int] = {}
    first: dict[int, Node] = {}
    ref_number: dict[Node, int] = {}
    time_dependent = changing(reference.graph) | changing(optimized.graph)
    for n in reference.graph.nodes:
        ref_number[n] = _number(n, ref_number, numbers, time_dependent)
        first.setdefault(ref_number[n], n)
    by_name = {n.name: n for n in reference.graph.nodes}
    site_of = {o: r for r, o in sites.values()}
    same: dict[Node, Node] = {}
    opt_number: dict[Node, int] = {}
    for n in optimized.graph.nodes:
        opt_number[n] = _number(n, opt_number, numbers, time_dependent)
        match = site_of.get(n) or first.get(opt_number[n])
        if match is None:
            namesake = by_name.get(n.name)
            match = namesake if namesake is not None and (namesake.op, namesake.target) == (n.op, n.target) else None
        if match is not None and n.op != "output":
            opt_number[n] = ref_number[match]
            same[n] = match
    return same, ref_number


def _number(n: Node, known: Mapping[Node, int], numbers: dict[Hashable, int], time_dependent: set[Node]) -> int:
    """The number of the function that ``n`` computes. What depends on time, effects or random numbers is equal to no other node."""
    key: Hashable = n
    if n.op in ("placeholder", "get_attr"):
        key = (n.op, n.target)
    elif n.op == "call_function" and n not in time_dependent and not _has_effect(n):
        key = (n.op, n.target, repr(map_arg((n.args, n.kwargs), lambda a: f"value {known[a]}")))
    return numbers.setdefault(key, len(numbers))


def _has_effect(n: Node) -> bool:
    if isinstance(n.target, torch._ops.OpOverload):
        return bool(n.target._schema.is_mutable) or torch.Tag.nondeterministic_seeded in n.target.tags
    return n.is_impure()


def _slice(root: Node, stop: Mapping[Node, Node]) -> Region:
    """The backward slice of ``root``, ending at the nodes of ``stop`` (mapped to their sources) and at the graph's inputs and tensors."""
    seen: set[Node] = set()
    leaves: dict[Node, Node] = {}
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        n, done = stack.pop()
        if done:
            order.append(n)
            continue
        if n in seen:
            continue
        seen.add(n)
        if n is not root and (n in stop or n.op == "placeholder" or (n.op == "get_attr" and not _is_graph(n))):
            leaves[n] = stop.get(n, n)
            continue
        stack.append((n, True))
        stack.extend((a, False) for a in n.all_input_nodes)
    return Region(tuple(order), tuple(leaves), root, leaves)


def _is_graph(n: Node) -> bool:
    """Whether a get_attr fetches the body of a higher-order op rather than a tensor."""
    owner = n.graph.owning_module
    try:
        return owner is not None and isinstance(owner.get_submodule(str(n.target)), torch.nn.Module)
    except AttributeError:
        return False


@dataclass(frozen=True)
class Operands:
    """The leaves that a site's queries, keys and values come from; those of q and k without the ones that they share, where they differ."""

    q: frozenset[Node] = frozenset()
    k: frozenset[Node] = frozenset()
    v: frozenset[Node] = frozenset()


def operands(region: Region) -> Operands:
    """Read from the first op that has operands called ``q, k, v`` or ``query, key, value``; empty where none has."""
    for n in region.nodes:
        names = [a.name for a in n.target._schema.arguments[:3]] if isinstance(n.target, torch._ops.OpOverload) else []
        if names in (["q", "k", "v"], ["query", "key", "value"]):
            q, k, v = (_leaves_of(a, region) for a in n.args[:3])
            return Operands(frozenset(q - k or q), frozenset(k - q or k), frozenset(v))
    return Operands()


def _leaves_of(value: Argument, region: Region) -> set[Node]:
    if not isinstance(value, Node):
        return set()
    if value in region.leaves:
        return {value}
    return set(_slice(value, region.source).leaves)
