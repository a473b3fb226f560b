"""Gradients through a score program: reverse mode over an expression's nodes, at their smallest shapes.

Written out by hand rather than left to autograd, since it runs inside an operator's backward, below autograd, and so that
nothing of a tile outlives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.kernels.evaluate import Env, Value, access, as_tensor

_X = Callable[[Tensor, Tensor], Tensor]

_UNARY: dict[str, _X] = {
    "exp": lambda x, y: y,
    "log": lambda x, y: 1 / x,
    "sqrt": lambda x, y: 0.5 / y,
    "rsqrt": lambda x, y: -0.5 * y / x,
    "tanh": lambda x, y: 1 - y * y,
    "sigmoid": lambda x, y: y * (1 - y),
    "sin": lambda x, y: torch.cos(x),
    "cos": lambda x, y: -torch.sin(x),
    "erf": lambda x, y: (2 / math.sqrt(math.pi)) * torch.exp(-x * x),
    "abs": lambda x, y: torch.sign(x),
}
"""The derivative of each function, from its argument and its value."""


def pull_back(root: Expr, grad: Tensor, table: Mapping[Expr, Value], env: Env, into: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient with respect to the raw score (None where it does not reach ``root``), given ``grad`` at ``root``.

    ``table`` holds the values of all nodes below ``root``. Gradients of loads are added to ``into[slot]``, where there is one.
    """
    active = _active(root, into)
    if root not in active:
        return None
    pending: dict[Expr, Tensor] = {root: reduce_to(grad, table[root])}
    for e in reversed(list(E.postorder(root))):
        if e.op == "score" or e not in pending:
            continue
        g = pending.pop(e)
        if e.op == "load":
            target = into[e.value]
            if target is not None:
                add_to_load(e, g, table, env, target)
            continue
        for i, a in enumerate(e.args):
            if a in active:
                part = reduce_to(_partial(e, i, g, table, env), table[a])
                pending[a] = pending[a] + part if a in pending else part
    return pending.get(E.score())


def _active(root: Expr, into: Sequence[Tensor | None]) -> set[Expr]:
    """Nodes through which a gradient flows: floats that read the score or a load with a gradient."""
    out: set[Expr] = set()
    for e in E.postorder(root):
        leaf = e.op == "score" or (e.op == "load" and e.kind == "float" and isinstance(e.value, int) and into[e.value] is not None)
        # an integer index below a load, and steps (floor, comparisons, truncation), end the flow
        if leaf or (e.kind == "float" and e.op not in ("load", "floor", "ceil", "round") and any(a in out for a in e.args)):
            out.add(e)
    return out


def _partial(e: Expr, i: int, g: Tensor, table: Mapping[Expr, Value], env: Env) -> Tensor:
    """The gradient that reaches operand ``i`` of ``e``, at any shape that broadcasts to the operand's."""
    if e.op == "add":
        return g
    if e.op == "mul":
        for j, a in enumerate(e.args):
            if j != i:
                g = g * table[a]
        return g
    xs = [as_tensor(table[a], a.kind, env) for a in e.args]
    y = as_tensor(table[e], e.kind, env)
    if e.op == "where":
        return torch.where(xs[0] if i == 1 else ~xs[0], g, 0.0)
    if e.op == "div":
        return g / xs[1] if i == 0 else -g * y / xs[1]
    if e.op in ("min", "max"):
        if any(a.is_const for a in e.args):  # a clamp, which passes on the whole gradient at its bound
            return g * (xs[i] == y).to(g.dtype)
        # as torch does: two equal operands share
        return g * ((xs[i] == y).to(g.dtype) / (1 + (xs[0] == xs[1]).to(g.dtype)))
    if e.op == "pow":
        return g * xs[1] * xs[0] ** (xs[1] - 1) if i == 0 else g * y * torch.log(xs[0])
    return g * _UNARY[e.op](xs[0], y)


def reduce_to(g: Tensor, like: Value) -> Tensor:
    """``g`` summed over the axes along which ``like`` was broadcast."""
    shape = like.shape if isinstance(like, Tensor) else torch.Size(())
    if g.shape == shape:
        return g
    lead = g.dim() - len(shape)
    axes = [d for d in range(g.dim()) if d < lead or (shape[d - lead] == 1 and g.shape[d] != 1)]
    out = g.sum(axes, keepdim=True) if axes else g
    # a gradient smaller than its operand is the same everywhere along the missing axes
    return out.reshape(out.shape[lead:]).expand(shape)


def add_to_load(e: Expr, g: Tensor, table: Mapping[Expr, Value], env: Env, target: Tensor) -> None:
    """Adds ``g``, which has the shape of the load's value, to the elements of ``target`` that it reads. ``table`` holds the values of its indices."""
    there = access(e, table, Env(env.ranges, [target if i == e.value else x for i, x in enumerate(env.loads)], env.sizes, env.dtype, env.device))
    g = g.to(target.dtype)
    if there.gather is None:
        if there.axes:
            order = sorted(range(len(there.axes)), key=lambda d: there.axes[d])
            part = g.reshape([there.view.shape[d] for d in order])
            # back from the order b, h, q, k to the tensor's own
            there.view.add_(part.permute([order.index(d) for d in range(len(order))]))
        else:
            there.view.add_(g.reshape(()))
        return
    index = torch.broadcast_tensors(*there.gather)
    there.view.index_put_(index, g.expand(index[0].shape), accumulate=True)
