"""Complex tensors as two real expressions, and products that sum over nothing: what a lift to real expressions leaves as a load.

``reader(lifter, stop)`` is a hook for ``Lifter.lift`` that knows both and that ends at the node ``stop``.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.analysis.contraction import contraction
from attnopt.analysis.lift import RULES, Hook, Lifter
from attnopt.analysis.views import Index, broadcast
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

Pair = tuple[Expr, Expr]
"""The real and the imaginary part."""


def reader(lifter: Lifter, stop: fx.Node | None) -> Hook:
    """A hook for ``lifter`` that gives an element of ``stop`` as a load."""

    def hook(node: fx.Node, index: Index) -> Expr | None:
        if node is stop:
            return E.load(node, index, N.kind(node))
        name = N.op_name(node)
        if name == "aten::view_as_real":
            real, imaginary = _pair(lifter, N.arguments(node)["self"], index[:-1])
            return E.where(E.eq(index[-1], E.ZERO), real, imaginary)
        if name in ("aten::real", "aten::imag"):
            parts = _pair(lifter, N.arguments(node)["self"], index)
            return parts[name == "aten::imag"]
        return _outer(lifter, node, index)

    return hook


def _outer(lifter: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """An outer product: written as one, as an einsum that sums no letter, or as a product over an axis of size one."""
    name = N.op_name(node)
    if name == "aten::outer":
        args = N.arguments(node)
        return E.mul(lifter.at(args["self"], index[:1]), lifter.at(args["vec2"], index[1:]))
    if name == "aten::einsum":
        args = N.arguments(node)
        inputs, arrow, out = args["equation"].replace(" ", "").partition("->")
        letters = inputs.split(",")
        if arrow and "." not in inputs and len(letters) == 2 and set(out) == set(inputs) - {","} and all(len(set(x)) == len(x) for x in (*letters, out)):
            at = dict(zip(out, index, strict=True))
            return E.mul(*(lifter.operand(t, tuple(at[x] for x in word)) or E.ZERO for word, t in zip(letters, args["tensors"], strict=True)))
        return None
    if name not in ("aten::matmul", "aten::bmm", "aten::mm"):
        return None
    form = contraction(node, index, "one")
    if form is None or form.summed.extent is not E.ONE:
        return None
    left, right = (tuple(E.substitute(i, {form.summed: E.ZERO}) for i in at) for at in (form.left_index, form.right_index))
    return E.mul(lifter.at(form.left, left), lifter.at(form.right, right))


# ------------------------------------------------------------------------------------------------ complex numbers


def _is_complex(x: Any) -> bool:
    return N.is_tensor(x) and N.value(x).dtype.is_complex


def _pair(lifter: Lifter, node: fx.Node, index: Index) -> Pair:
    """An element of a complex tensor; of what has no rule, as loads of its real view."""
    moved = views.step(node, index)
    if moved is not None:
        return _pair(lifter, *moved)
    args, name = N.arguments(node), N.op_name(node).removeprefix("aten::")
    if name == "view_as_complex":
        return lifter.at(args["self"], (*index, E.ZERO)), lifter.at(args["self"], (*index, E.ONE))
    if name == "polar":
        size, angle = lifter.operand(args["abs"], index), lifter.operand(args["angle"], index)
        if size is not None and angle is not None:
            return E.mul(size, E.function("cos", angle)), E.mul(size, E.function("sin", angle))
    if name == "complex":
        real, imaginary = lifter.operand(args["real"], index), lifter.operand(args["imag"], index)
        if real is not None and imaginary is not None:
            return real, imaginary
    if name in ("to", "_to_copy", "_conj", "conj", "resolve_conj", "conj_physical"):
        x = _operand(lifter, args["self"], index)
        if x is not None:
            return (x[0], E.neg(x[1])) if "conj" in name and name != "resolve_conj" else x
    if name in ("mul", "multiply"):
        a, b = _operand(lifter, args["self"], index), _operand(lifter, args["other"], index)
        if a is not None and b is not None:
            return E.sub(E.mul(a[0], b[0]), E.mul(a[1], b[1])), E.add(E.mul(a[0], b[1]), E.mul(a[1], b[0]))
    if name == "exp":
        a = _operand(lifter, args["self"], index)
        if a is not None:
            size = E.function("exp", a[0])
            return E.mul(size, E.function("cos", a[1])), E.mul(size, E.function("sin", a[1]))
    if name in ("index", "embedding", "index_select", "gather"):
        followed = _Follow(lifter).follow(node, args, index)
        if followed is not None:
            return _pair(lifter, *followed)
    at = tuple(E.ZERO if n is E.ONE else i for i, n in zip(index, N.shape(node), strict=True))
    return E.load(node, (*at, E.ZERO), "float"), E.load(node, (*at, E.ONE), "float")


def _operand(lifter: Lifter, x: Any, index: Index) -> Pair | None:
    """An operand, complex or real, at the broadcast index."""
    if _is_complex(x):
        return _pair(lifter, x, broadcast(index, N.shape(x)))
    if isinstance(x, complex):
        return E.const(x.real), E.const(x.imag)
    real = lifter.operand(x, index)
    return None if real is None else (E.as_float(real), E.FZERO)


class _Follow(Lifter):
    """Finds where a gather from a complex tensor reads: its rule asks for one element of it, at the index to find."""

    def __init__(self, lifter: Lifter) -> None:
        super().__init__(lifter.constants, lifter.written)
        self.lifter = lifter
        self.found: tuple[fx.Node, Index] | None = None

    def follow(self, node: fx.Node, args: dict[str, Any], index: Index) -> tuple[fx.Node, Index] | None:
        RULES[N.op_name(node)](self, node, args, index)
        return self.found

    def at(self, node: fx.Node, index: Index) -> Expr:
        if _is_complex(node):
            self.found = (node, index)
            return E.FZERO
        return self.lifter.at(node, index)
