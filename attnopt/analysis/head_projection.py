"""Keys or values that one linear layer makes, each head from its own rows, and all heads in the same way.

An operand [B, H, S, D] is read as a function of batch, head, token and feature. Of its projection P [..., H * n] it is claimed::

    x[b, h, s, d] = sum_j c_j(b, s, d) * P[.., h * n + f_j(b, s, d)]        with 0 <= f_j < n, and neither c_j nor f_j made of P

The coefficients know nothing of the head: a rotary embedding turns all heads of a token alike. Then the mean of some heads of x is what the same layer gives
whose rows are the mean of those of these heads. A norm of each head, or of all, divides by what is made of P, and is not claimed.
"""

from __future__ import annotations

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.complex import reader
from attnopt.analysis.layout import Refusal
from attnopt.analysis.lift import Lifter
from attnopt.analysis.linear import Cell, affine, cells, combination
from attnopt.analysis.rotary import operand_variables
from attnopt.analysis.site import Operand
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

CODE = "AO110"


def head_projection(x: fx.Node, lifter: Lifter) -> fx.Node:
    """The ``linear`` whose rows are the heads of ``x`` [B, H, S, D], as above. Raises Refusal with the reason where that is not proven."""
    behind = _nearest(x)
    if len(behind) != 1:
        raise _refused(x, f"{N.said(x)} is made of {len(behind)} linear layers")
    (made,) = behind
    weight = N.arguments(made)["weight"]
    if weight.op != "get_attr" or len(N.shape(weight)) != 2:
        raise _refused(made, f"the weight of {N.said(made)} is no parameter of two axes")
    out, index = operand_variables(Operand(x, ()))
    value = lifter.lift(x, index, reader(lifter, made))
    for strided in (True, False):
        parts = cells(value, out[3], strided)
        if parts is not None and all(_is_alike(c, made, out[1]) for c in parts):
            return made
    raise _refused(x, f"{N.said(x)} is not proven to be {N.said(made)}, each head from rows of its own and all heads alike")


def _nearest(x: fx.Node) -> set[fx.Node]:
    """The linear layers that an operand is made of, those behind others left out."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [x]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if N.op_name(node) == "aten::linear":
            found.add(node)
        elif N.op_name(node) != "aten::sym_size":
            stack += node.all_input_nodes
    return found


def _is_alike(cell: Cell, made: fx.Node, head: Expr) -> bool:
    """Whether some features of an operand are a combination of a head's own rows, with coefficients that are the same for all heads and not made of the layer.

    A row at ``h * n + f`` is one of the head's own n, since those of the first and the last head are rows of the layer too.
    """
    assert head.extent is not None
    parts = combination(cell.value, made)
    if parts is None:
        return False
    for element, coefficient in parts.items():
        *others, row = element.args
        line = affine(row, head)
        if line is None or E.mul(E.const(line[0]), head.extent) is not N.shape(made)[-1]:
            return False
        rest = {leaf for x in (coefficient, line[1], *others) for leaf in x.leaves}
        if head in rest:
            return False
        if any(_is_made_of(leaf.value, made) for leaf in rest if leaf.op == "load"):
            return False
    return True


def _is_made_of(node: object, source: fx.Node) -> bool:
    stack, seen = [node], set()
    while stack:
        n = stack.pop()
        if n is source:
            return True
        if isinstance(n, fx.Node) and n not in seen:
            seen.add(n)
            stack += n.all_input_nodes
    return False


def _refused(node: fx.Node, what: str) -> Refusal:
    return Refusal(CODE, what, node)
