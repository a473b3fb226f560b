"""Products that sum over one axis: matmul, bmm, einsum, baddbmm, linear, or multiply and sum, all in one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.views import Index, broadcast
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr


@dataclass(frozen=True)
class Contraction:
    """``node[index] = alpha * sum_c left[left_index] * right[right_index] + beta * addend[addend_index]``."""

    node: fx.Node
    left: fx.Node
    left_index: Index
    right: fx.Node
    right_index: Index
    summed: Expr
    """The variable that is summed over."""
    alpha: Expr = E.FONE
    beta: Expr = E.FZERO
    addend: fx.Node | None = None
    addend_index: Index = ()


def contraction(node: fx.Node, index: Index, name: str) -> Contraction | None:
    """``node`` at ``index`` as a contraction whose summed variable is called ``name``; None when it is none."""
    op = N.op_name(node)
    if op not in _FORMS or not N.is_tensor(node):
        return None
    return _FORMS[op](node, N.arguments(node), index, name)


def _matmul(node: fx.Node, args: dict[str, Any], index: Index, name: str) -> Contraction | None:
    a, b = args["self"], args["other"]
    sa, sb = N.shape(a), N.shape(b)
    if len(sa) < 2 or len(sb) < 2:
        return None
    c = E.var(name, sa[-1])
    batch = index[:-2]
    left = (*broadcast(batch, sa[:-2]), E.ZERO if sa[-2] is E.ONE else index[-2], c)
    right = (*broadcast(batch, sb[:-2]), c, E.ZERO if sb[-1] is E.ONE else index[-1])
    return Contraction(node, a, left, b, right, c)


def _bmm(node: fx.Node, args: dict[str, Any], index: Index, name: str) -> Contraction | None:
    return _matmul(node, {"self": args["self"], "other": args.get("mat2", args.get("other"))}, index, name)


def _with_addend(node: fx.Node, args: dict[str, Any], index: Index, name: str) -> Contraction | None:
    a, b = args.get("batch1", args.get("mat1")), args.get("batch2", args.get("mat2"))
    product = _matmul(node, {"self": a, "other": b}, index, name)
    alpha, beta = N.scalar(args["alpha"]), N.scalar(args["beta"])
    if product is None or alpha is None or beta is None:
        return None
    alpha, beta = E.as_float(alpha), E.as_float(beta)
    if beta is E.FZERO:  # the addend is ignored then, even if it holds NaN
        return Contraction(node, product.left, product.left_index, product.right, product.right_index, product.summed, alpha)
    addend = args["self"]
    return Contraction(node, product.left, product.left_index, product.right, product.right_index, product.summed, alpha, beta, addend, broadcast(index, N.shape(addend)))


def _einsum(node: fx.Node, args: dict[str, Any], index: Index, name: str) -> Contraction | None:
    operands = args["tensors"]
    equation = args["equation"].replace(" ", "")
    if len(operands) != 2 or "." in equation:
        return None
    if "->" in equation:
        inputs, out = equation.split("->")
    else:
        inputs = equation
        out = "".join(sorted(ch for ch in set(inputs) - {","} if inputs.count(ch) == 1))
    first, second = inputs.split(",")
    if len(set(first)) != len(first) or len(set(second)) != len(second) or len(set(out)) != len(out):
        return None
    summed = [ch for ch in dict.fromkeys(first + second) if ch not in out]
    if len(summed) != 1 or summed[0] not in first or summed[0] not in second:
        return None
    sizes: dict[str, Expr] = {}
    for letters, t in ((first, operands[0]), (second, operands[1])):
        for ch, n in zip(letters, N.shape(t), strict=True):
            if sizes.get(ch, E.ONE) is E.ONE:
                sizes[ch] = n
    c = E.var(name, sizes[summed[0]])
    at = {**dict(zip(out, index, strict=True)), summed[0]: c}

    def operand(letters: str, t: fx.Node) -> Index:
        return tuple(E.ZERO if n is E.ONE else at[ch] for ch, n in zip(letters, N.shape(t), strict=True))

    return Contraction(node, operands[0], operand(first, operands[0]), operands[1], operand(second, operands[1]), c)


def _sum_of_products(node: fx.Node, args: dict[str, Any], index: Index, name: str) -> Contraction | None:
    """(a * b).sum(dim)"""
    x, dim = args["self"], args.get("dim")
    if N.op_name(x) != "aten::mul" or dim is None:
        return None
    d_list = [dim] if isinstance(dim, int) else list(dim)
    factors = N.arguments(x)
    a, b = factors["self"], factors["other"]
    if len(d_list) != 1 or not N.is_tensor(a) or not N.is_tensor(b):
        return None
    extents = N.shape(x)
    d = N.axis(d_list[0], len(extents))
    c = E.var(name, extents[d])
    full = (*index[:d], c, *(index[d + 1 :] if args.get("keepdim") else index[d:]))
    left, right = broadcast(full, N.shape(a)), broadcast(full, N.shape(b))
    if c not in left or c not in right:
        return None
    return Contraction(node, a, left, b, right, c)


_FORMS = {
    "aten::matmul": _matmul,
    "aten::bmm": _bmm,
    "aten::mm": _bmm,
    "aten::baddbmm": _with_addend,
    "aten::addmm": _with_addend,
    "aten::einsum": _einsum,
    "aten::sum": _sum_of_products,
}
