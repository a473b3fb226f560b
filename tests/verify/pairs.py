"""Graph pairs made by hand: a captured tiny decoder, and copies of its graph with other attentions in place of its own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from attnopt.verify.bisect import GraphPair

aten = torch.ops.aten
VOCABULARY, WIDTH, HEADS = 61, 32, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = (t.view(B, S, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5 + bias
        p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        p = nn.functional.dropout(p, 0.1, self.training)
        return self.out((p @ v).transpose(1, 2).reshape(B, S, -1))


class Decoder(nn.Module):
    """Causal with key padding; ``hidden`` is what a hidden key's score gets, by default the least finite number."""

    def __init__(self, layers: int = 2, hidden: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.hidden = hidden

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        S = ids.shape[1]
        position = torch.arange(S, device=ids.device)
        visible = (position[None, :] <= position[:, None]) & mask[:, None, None, :].bool()
        x = self.embedding(ids)
        hidden = torch.finfo(x.dtype).min if self.hidden is None else self.hidden
        bias = torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill(~visible, hidden)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), bias)
        return x


def example(B: int = 2, S: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randint(VOCABULARY, (B, S), generator=g), torch.ones(B, S, dtype=torch.long)


def capture(model: nn.Module, args: tuple[Any, ...], dynamic: bool = True) -> GraphModule:
    dims = tuple(dict.fromkeys(range(a.ndim), torch.export.Dim.AUTO) for a in args) if dynamic else None
    gm = torch.export.export(model, args, dynamic_shapes=dims, strict=False).module()
    assert isinstance(gm, GraphModule)
    return gm


@functools.cache
def decoder(layers: int = 2, hidden: float | None = None, dtype: torch.dtype = torch.float32, dynamic: bool = True) -> GraphModule:
    torch.manual_seed(0)
    model = Decoder(layers, hidden).eval().to(dtype)
    for p in model.parameters():  # an untrained model's scores are so small that attention hardly depends on them
        p.data.mul_(3.0 if p.ndim > 1 else 1.0)
    return capture(model, example(), dynamic)


Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Replacement = Callable[[Graph, Node, Node, Node, Node], Node]
"""Adds the nodes of another attention from q, k, v (BHSD) and the bias; returns the one with its output."""


def sdpa(g: Graph, q: Node, k: Node, v: Node, bias: Node, scale: float = (WIDTH // HEADS) ** -0.5) -> Node:
    return g.call_function(aten.scaled_dot_product_attention.default, (q, k, v, bias), {"scale": scale})


_LIBRARY = torch.library.Library("attnopt_verify_test", "DEF")
_COUNT = itertools.count()


def calls(function: Function) -> Replacement:
    """An attention that is an operator with ``function`` of q, k, v and the bias as its implementation."""
    name = f"attention{next(_COUNT)}"
    _LIBRARY.define(f"{name}(Tensor q, Tensor k, Tensor v, Tensor bias) -> Tensor")
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    op = getattr(torch.ops.attnopt_verify_test, name).default
    return lambda g, q, k, v, bias: g.call_function(op, (q, k, v, bias))


def replaced(reference: GraphModule, replacements: dict[int, Replacement] | Replacement) -> GraphPair:
    """The reference with its i-th attention (or all) replaced; sites are called ``site0``, ``site1``."""
    graph = Graph()
    graph.output(graph.graph_copy(reference.graph, {}))
    graph.set_codegen(reference.graph._codegen)
    graph.owning_module = reference
    outputs = {}
    for i, softmax in enumerate([n for n in graph.nodes if n.target is aten.softmax.int]):
        make = replacements if callable(replacements) else replacements.get(i)
        if make is None:
            continue
        scores = softmax.args[0]
        product = scores.args[0].args[0]
        q, k = product.args[0], product.args[1].args[0]
        end = softmax
        while end.target is not aten.matmul.default:
            (end,) = [n for n in end.users if n.target is not aten._assert_tensor_metadata.default]
        with graph.inserting_before(end):
            new = make(graph, q, k, end.args[1], scores.args[1])
        end.replace_all_uses_with(new)
        outputs[f"site{i}"] = (end.name, new.name)
    for n in reversed(list(graph.nodes)):
        if n.target is aten._assert_tensor_metadata.default:
            graph.erase_node(n)
    graph.eliminate_dead_code()
    return GraphPair(reference, GraphModule(reference, graph), outputs)
