"""How far from an ordinary number an expression may go: what a proof that a key is hidden stands on.

An *ordinary* number is one that a trained model computes: a score, a weight, a position, a bias. Of those it is only known that they
are no masks, so a range counts them as zero, and says how far constants may move the value from there. Two things are not
ordinary: a constant, whose value is known, and a float that the caller or a buffer gives for each query or key, which may be a
mask and as low as -inf. What is added to scores may hide; that it is huge and reveals what was hidden is not considered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.alias import is_view
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

Range = tuple[float, float]
ORDINARY: Range = (0.0, 0.0)
HIDING: Range = (-math.inf, 0.0)
UNKNOWN: Range = (-math.inf, math.inf)
USUAL = 1e3
"""Constants up to this size leave an ordinary number ordinary when they multiply it."""


@dataclass
class Magnitudes:
    """Ranges of the expressions of one attention, each computed once."""

    _known: dict[Expr, Range] = field(default_factory=dict)
    _nodes: dict[fx.Node, bool] = field(default_factory=dict)

    def __call__(self, x: Expr) -> Range:
        """The least and the greatest value of ``x``, up to an ordinary number."""
        for e in E.postorder(x):
            if e not in self._known:
                self._known[e] = self._of(e, [self._known[a] for a in e.args])
        return self._known[x]

    def _of(self, e: Expr, args: list[Range]) -> Range:
        if e.is_const:
            return float(e.value), float(e.value)
        if e.op in ("var", "sym", "score") or e.kind == "bool" or e.op in _BOUNDED:
            return ORDINARY
        if e.op == "load":
            return HIDING if self.may_hide(e) else ORDINARY
        if e.op == "add":
            # A constant beside indices shifts a position.
            return total([r for a, r in zip(e.args, args, strict=True) if not (a.is_const and e.kind == "int")])
        if e.op == "mul":
            return _product(e, args)
        if e.op == "where":
            return min(args[1][0], args[2][0]), max(args[1][1], args[2][1])
        if e.op in ("min", "max"):
            by = min if e.op == "min" else max
            return by(a[0] for a in args), by(a[1] for a in args)
        if e.op in _ROUNDED:
            return args[0]
        if e.op == "log" and any(x.op == "load" for x in e.leaves):
            return HIDING  # the logarithm of a mask
        if e.op == "div" and _is_temperature(e.args[1]):
            args = args[:1]
        return ORDINARY if all(_is_usual(a) for a in args) else UNKNOWN

    def may_hide(self, load: Expr) -> bool:
        """Whether a tensor's element may be a mask: a float for each query or key, of which it is not known that a model computes or learns it."""
        moves = any(v.value in ("q", "k") for v in load.variables)
        return load.kind == "float" and moves and not (isinstance(load.value, fx.Node) and self._is_ordinary(load.value))

    def _is_ordinary(self, node: fx.Node) -> bool:
        """Whether the node is a parameter, what products and normalisations compute, or made of such by views, sums, gathers and activations."""
        found = self._nodes.get(node)
        if found is None:
            name = N.op_name(node)
            self._nodes[node] = False  # until its operands are known
            found = N.is_parameter(node) or name in _COMPUTES
            if not found and (name in _KEEPS or is_view(node)):
                found = all(self._is_ordinary(a) for a in node.all_input_nodes if N.is_tensor(a) and N.kind(a) == "float")
            self._nodes[node] = found
        return found


_BOUNDED = {"tanh", "sigmoid", "sin", "cos", "erf"}
_ROUNDED = {"float", "floor", "ceil", "round", "trunc"}
_COMPUTES = {
    f"aten::{n}"
    for n in (
        *("linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "einsum", "convolution", "conv1d", "conv2d", "conv3d", "embedding"),
        *("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "batch_norm", "softmax", "_softmax", "sigmoid", "tanh", "scaled_dot_product_attention"),
    )
}
_KEEPS = {"getitem"} | {
    f"aten::{n}"
    for n in (
        *("add", "sub", "mul", "div", "neg", "cumsum", "cat", "stack", "index", "index_select", "gather", "clone"),
        *("relu", "gelu", "silu", "softplus", "log_sigmoid", "dropout"),
    )
}


def total(ranges: list[Range]) -> Range:
    """The range of a sum. Beside a part that hides, constants are no bound from above: ``min * (1 - m)`` may be written ``min - min * m``."""
    low, high = sum(r[0] for r in ranges), sum(r[1] for r in ranges)
    if math.isnan(low) or math.isnan(high):
        return UNKNOWN
    return low, max(high, 0.0) if low == -math.inf and len(ranges) > 1 else high


def _is_usual(r: Range) -> bool:
    return r[0] >= -USUAL and r[1] <= USUAL


def _times(c: float, r: Range) -> Range:
    """A constant times a range. What may hide does so in either sign: a mask may be subtracted. A large one makes a mask of an ordinary number."""
    if (r == HIDING and c) or (r == ORDINARY and abs(c) > USUAL):
        return HIDING
    ends = [c * x if x else 0.0 for x in r] if c else [0.0]
    return min(ends), max(ends)


def _is_temperature(factor: Expr) -> bool:
    """Whether a factor or divisor is a tensor that is the same for all keys of a row, whoever gives it."""
    return factor.op == "load" and not any(v.value == "k" for v in factor.variables)


def _product(e: Expr, args: list[Range]) -> Range:
    c = float(e.args[0].value) if e.args[0].is_const else 1.0
    rest = [(a, r) for a, r in zip(e.args, args, strict=True) if not a.is_const]
    if len(rest) > 1:
        rest = [(a, ORDINARY if _is_temperature(a) else r) for a, r in rest]
    if all(r == ORDINARY for _, r in rest):
        is_position = e.kind == "int" and not any(x.op == "load" for x in e.leaves)
        return ORDINARY if is_position else _times(c, ORDINARY)
    if len(rest) == 1:
        return _times(c, rest[0][1])
    choices = [a for a, _ in rest if a.op == "where" and a.args[1].is_const and a.args[2].is_const]
    if len(rest) == 2 and choices:  # one of two numbers times the other factor
        (other,) = [r for a, r in rest if a is not choices[0]] or [ORDINARY]
        ends = [_times(c * float(v.value), other) for v in choices[0].args[1:]]
        return min(r[0] for r in ends), max(r[1] for r in ends)
    return ORDINARY if abs(c) <= USUAL and all(_is_usual(r) for _, r in rest) else UNKNOWN
