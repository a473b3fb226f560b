"""The product of queries and keys below a softmax: where it is, and what stands between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from attnopt.analysis import anchors as A
from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.analysis.contraction import Contraction, contraction
from attnopt.analysis.layout import Refusal
from attnopt.analysis.lift import Lifter
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr


@dataclass(frozen=True)
class Scores:
    form: Contraction
    index: views.Index

    def hook(self, lifter: Lifter) -> Callable[[fx.Node, views.Index], Expr | None]:
        form = self.form

        def answer(node: fx.Node, index: views.Index) -> Expr | None:
            if node is not form.node or index != self.index:
                return None
            out = E.mul(form.alpha, E.score())
            return out if form.addend is None else E.add(out, E.mul(form.beta, lifter.at(form.addend, form.addend_index)))

        return answer


def find_scores(lifter: Lifter, anchor: A.Anchor, index: views.Index, key: Expr) -> Scores:
    """The product of queries and keys below an anchor's logits: one side runs along the key axis, the other does not."""
    logits = lifter.lift(anchor.logits, index)
    found: list[Scores] = []
    for x in sorted((x for x in logits.leaves if x.op == "load"), key=lambda e: e.key):
        node = x.value
        form = contraction(node, x.args, "d")
        if form is None:
            continue
        sides = (key in variables(form.left_index), key in variables(form.right_index))
        if sides in ((True, False), (False, True)):
            found.append(Scores(form, x.args))
    if not found:
        opaque = _product_above(logits, key)
        if opaque is not None:
            opaque = of_tuple(opaque)
            raise Refusal("AO212", f"the scores pass through {N.said(opaque)} before the softmax; supported are views and pointwise operators.", opaque)
        raise Refusal(
            "AO202",
            f"below the softmax along axis {anchor.axis} of {N.said(anchor.logits)} is no product of two tensors of which one runs along that axis and the other does not; "
            "supported are scores made of such a product.",
            anchor.logits,
        )
    # Of several, the one in the plainest place: its index names the key axis by itself.
    found.sort(key=lambda s: (not any(i is key for i in s.index), sum(len(i.leaves) for i in s.index)))
    return found[0]


_PROJECTIONS = {"aten::linear", "aten::addmm", "aten::mm", "aten::convolution", "aten::conv1d", "aten::conv2d", "aten::embedding"}


def _product_above(logits: Expr, key: Expr) -> fx.Node | None:
    """A node that no rule lifts and that runs along the key axis, below which stands the product of two computed tensors.

    The product is looked for where the scores are made, among values as long as the key axis, and not in the layers before;
    what a tensor was filled with, slice by slice, may have any shape.
    """
    for x in sorted((x for x in logits.leaves if x.op == "load" and key in x.variables), key=lambda e: e.key):
        stack, seen = [(n, False) for n in (x.value, *(of_tuple(x.value).all_input_nodes if of_tuple(x.value) is not x.value else ()))], set[fx.Node]()
        while stack and len(seen) < _NEAR:
            node, anywhere = stack.pop()
            if node in seen or not N.is_tensor(node) or N.op_name(node) in _PROJECTIONS:
                continue
            seen.add(node)
            form = contraction(node, output_index(node) or (), "d")
            if form is not None and min(len(N.shape(form.left)), len(N.shape(form.right))) > 2:
                return x.value  # type: ignore[no-any-return]
            if anywhere or N.shape(node)[-1:] == N.shape(x.value)[-1:]:
                stack.extend((n, anywhere) for n in node.all_input_nodes)
                stack.extend((n, True) for n in _filled_with(node))
    return None


_NEAR = 200
"""How many values are looked at."""


def _filled_with(node: fx.Node) -> list[fx.Node]:
    """What is copied into slices of ``node``."""
    out: list[fx.Node] = []
    for user in node.users:
        if N.op_name(user) == "aten::copy_" and user.args[0] is node:
            out.append(user.args[1])  # type: ignore[arg-type]
        elif N.op_name(user) in ("aten::slice", "aten::select"):
            out.extend(_filled_with(user))
    return out


def variables(index: views.Index) -> set[Expr]:
    return {v for i in index for v in i.variables}


def of_tuple(node: fx.Node) -> fx.Node:
    """The operator whose results ``node`` takes one of, or ``node`` itself."""
    return node.args[0] if N.op_name(node) == "getitem" else node  # type: ignore[return-value]


def without_scale(node: fx.Node, index: views.Index) -> tuple[tuple[fx.Node, views.Index], float]:
    """An operand before it was multiplied with constants, and their product: a scale belongs to the score.

    The kernel then multiplies in float32, where the original rounds the scaled operand to its own dtype.
    """
    best, factor, total = (node, index), 1.0, 1.0
    while True:
        moved = views.step(node, index)
        if moved is not None:
            node, index = moved
            continue
        name = N.op_name(node)
        args = N.arguments(node)
        by = N.scalar(args.get("other")) if name in ("aten::mul", "aten::div") and args.get("rounding_mode") is None else None
        if by is None or not by.is_const or by.kind == "bool" or by.value == 0 or not N.is_tensor(args["self"]) or N.shape(args["self"]) != N.shape(node) or N.kind(args["self"]) != "float":
            return best, factor
        total *= by.value if name == "aten::mul" else 1.0 / by.value
        node = args["self"]
        best, factor = (node, index), total


def output_index(node: fx.Node) -> views.Index | None:
    """One variable for each axis of a node's output; constant zero for axes of size one."""
    if not N.is_tensor(node):
        return None
    return tuple(E.ZERO if n is E.ONE else E.var(f"o{i}", n) for i, n in enumerate(N.shape(node)))
