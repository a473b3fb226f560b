"""The proof that a graph treats each token on its own, but for its attentions, and where it reads positions.

Every live node is visited once, operands first, and gets its ``Row``: whose token its elements belong to. An operator that could
mix tokens has a rule that proves it does not, or the graph is refused with that node. What depends on no token is either
the same everywhere or a function of the position; the places where a position enters (an ``arange``, a running count of ones, a
slice of a table) are noted as ``Source``: there a packed batch reads its own positions instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.analysis.alias import written
from attnopt.analysis.layout import Refusal
from attnopt.analysis.lift import Lifter
from attnopt.analysis.linear import affine
from attnopt.analysis.rows import STATIC, Row, has_symbols, index_of, table
from attnopt.analysis.sites import Constants
from attnopt.analysis.views import Index
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

Rule = Callable[["TokenFlow", fx.Node, dict[str, Any]], "Row | None"]
RULES: dict[str, Rule] = {}
"""By operator, without its namespace where a rule is for all of that name. None: the rule does not apply here."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return register


@dataclass(frozen=True)
class Source:
    """A node whose elements along ``axis`` are ``slope * position + offset``, or the entries ``position + offset`` of a table."""

    axis: int
    slope: int
    offset: int
    table: fx.Node | None = None
    table_axis: int = 0


@dataclass
class TokenFlow:
    """What was found out of one graph. ``tokens`` is the node that holds the ids, [B, S]."""

    tokens: fx.Node
    lifter: Lifter
    attention: Rule
    """The rule of ``attnopt::attention``, which alone may look at other tokens."""
    context: frozenset[fx.Node] = frozenset()
    """What depends on other inputs and on no token: an encoder's states. Only attentions may read it, as keys and values."""
    needed: frozenset[fx.Node] = frozenset()
    """What the results are made of, without the context."""
    rows: dict[fx.Node, Row] = field(default_factory=dict)
    sources: dict[fx.Node, Source] = field(default_factory=dict)
    numbering: set[fx.Node] = field(default_factory=set)
    """Nodes that hold row numbers, and may be used to pick rows and for nothing else."""
    orders: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Row numbers in sorted order -> the sort; each of its rows belongs to the element that stands there."""
    inverse: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Row numbers that undo an order -> that order."""
    counts: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Numbers of rows in each group of a sort, and their running sums -> that sort."""
    last: set[fx.Node] = field(default_factory=set)
    """Nodes that pick the last token of each sequence."""
    limits: list[tuple[int, fx.Node]] = field(default_factory=list)
    """(how many positions a table has, the node that reads it)."""

    def __post_init__(self) -> None:
        self.B, self.S = N.shape(self.tokens)

    # ---- what the rules use

    def row(self, x: Any, index: Index) -> Row:
        """The row of an operand at an index into it; a number has none."""
        if not N.is_tensor(x):
            return STATIC
        if x in self.numbering or x in self.counts:
            raise self.mixed(x, f"{N.said(x)} counts or numbers the rows of all tokens together, and is read as a value")
        return self.moved(self.rows[x], table(x, index))

    def moved(self, row: Row, to: dict[Expr, Expr]) -> Row:
        """A row at other places, where an order and what undoes it cancel."""
        row = row.at(to)
        return row if row.token is None else Row(self.undone(row.token), row.position)

    def undone(self, x: Expr) -> Expr:
        changes = {}
        for e in E.postorder(x):
            if e.op == "load" and len(e.args) == 1 and e.args[0].op == "load":
                inner = e.args[0]
                if self.inverse.get(inner.value) is e.value or self.inverse.get(e.value) is inner.value:
                    changes[e] = inner.args[0]
        return E.substitute(x, changes) if changes else x

    def joined(self, node: fx.Node, rows: list[Row]) -> Row:
        """The one row of a value that is made of elements with these rows."""
        tokens = list(dict.fromkeys(r.token for r in rows if r.token is not None))
        positions = list(dict.fromkeys(r.position for r in rows if r.position is not None))
        if len(tokens) > 1 or len(positions) > 1:
            raise self.mixed(node, f"{N.said(node)} combines values of different {'tokens' if len(tokens) > 1 else 'positions'}")
        if tokens and positions and E.mod(tokens[0], self.S) is not positions[0]:
            raise self.mixed(node, f"{N.said(node)} combines a token with the position of another one")
        return Row(tokens[0] if tokens else None, None if tokens or not positions else positions[0])

    def mixed(self, node: fx.Node, what: str) -> Refusal:
        return Refusal("AO214", f"{what}; supported outside of attention are operators that treat each token on its own.", node)

    def by_length(self, node: fx.Node, what: str) -> Refusal:
        return Refusal("AO216", f"{what}; supported are functions of a token's own position.", node)

    # ---- the walk

    def run(self, graph: fx.Graph) -> None:
        """Visit every node; raises Refusal."""
        writes, _ = written(graph)
        for node in graph.nodes:
            if node in writes and node in self.needed and node.op == "call_function":
                raise self.mixed(node, f"{N.said(node)} is written in place")
            if node in self.needed and node not in self.rows:
                self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self.rows[node] = STATIC
            return
        if not _has_tensor(N.value(node)):
            tensors = [x for x in node.all_input_nodes if N.is_tensor(x)]
            if tensors and N.op_name(node) != "aten::sym_size":
                raise self.by_length(node, f"{N.said(node)} makes a number of {N.said(tensors[0])}")
            return
        operands = [x for x in node.all_input_nodes if N.is_tensor(x)]
        strange = next((x for x in operands if x in self.context), None)
        if strange is not None and N.op_name(node) != "attnopt::attention":
            text = f"{N.said(node)} reads {N.said(strange)}, made of an input that holds no token ids"
            raise Refusal("AO217", f"{text}; supported are inputs of token ids, positions, padding, and what attentions alone read.", node)
        operands = [x for x in operands if x not in self.context]
        if all(self.rows[x].is_static and not has_symbols(x) and x not in self.counts for x in operands) and _is_fixed(node):
            self.rows[node] = STATIC
            return
        row = self._by_rule(node)
        if row is None and all(self.rows[x].token is None for x in operands):
            row = self._lifted(node)
        if row is None:
            raise self.mixed(node, f"{N.said(node)} is not known to treat each token on its own")
        self.rows[node] = row

    def _by_rule(self, node: fx.Node) -> Row | None:
        name = N.op_name(node)
        if name == "attnopt::attention":
            return self.attention(self, node, N.arguments(node))
        if N.is_tensor(node):
            moved = views.step(node, index_of(node))
            if moved is not None:
                return self._view(node, *moved)
        found = RULES.get(name) or RULES.get(name.rpartition("::")[2])
        if found is not None:
            return found(self, node, N.arguments(node) if name != "getitem" else {})
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            return self.pointwise(node)
        return None

    def pointwise(self, node: fx.Node) -> Row | None:
        """Every element of elements at its own place."""
        for x in node.all_input_nodes:
            if not N.is_tensor(x):
                raise self.by_length(node, f"{N.said(node)} computes with {N.value(x)}, which the sizes of the whole batch decide")
        operands = [x for x in node.all_input_nodes if N.is_tensor(x)]
        if any(x in self.numbering for x in operands):
            if any(self.rows[x].token is not None for x in operands if x not in self.numbering) or N.kind(node) != "int":
                return None
            self.numbering.add(node)
            return STATIC
        index, extents = index_of(node), N.shape(node)
        return self.joined(node, [self.row(x, views.broadcast(index, N.shape(x), extents)) for x in operands])

    def _view(self, node: fx.Node, x: fx.Node, index: Index) -> Row | None:
        if x in self.counts:
            return None
        if x in self.numbering:
            self.numbering.add(node)
            return STATIC
        row = self.rows[x]
        if row.is_static and not has_symbols(x):
            moving = [(d, i) for d, i in enumerate(index) if any(not v.extent.is_const for v in i.variables if v.extent is not None)]
            if moving:
                return self._table(node, x, index, moving)
        row = self.moved(row, table(x, index))
        if row.token is not None and self.picks_last(row.token):
            self.last.add(node)
        return row

    def is_last(self, x: fx.Node) -> bool:
        """Whether a value holds nothing but last tokens."""
        token = self.rows[x].token
        return token is not None and self.picks_last(token)

    def picks_last(self, token: Expr) -> bool:
        """Whether it is the last token of a sequence, whichever that is."""
        return E.mod(E.add(token, E.ONE), self.S) is E.ZERO

    def _table(self, node: fx.Node, x: fx.Node, index: Index, moving: list[tuple[int, Expr]]) -> Row | None:
        """A part of a constant as long as the sequence: its entries belong to positions."""
        own = index_of(node)
        if len(moving) != 1 or N.op_name(node) not in ("aten::slice", "aten::narrow"):
            return None
        d, i = moving[0]
        axis = own[d] if d < len(own) else E.ZERO
        line = None if axis.is_const else affine(i, axis)
        if line is None or line[0] != 1 or not line[1].is_const or axis.extent is not self.S:
            return None
        offset = int(line[1].value)
        self.sources[node] = Source(d, 1, offset, x, d)
        self.limits.append((int(N.shape(x)[d].value) - offset, node))
        return Row(position=axis)

    def _lifted(self, node: fx.Node) -> Row | None:
        """What depends on no token, as a formula of its index: a constant, a position, or the number of a row."""
        if not N.is_tensor(node):
            return None
        index = index_of(node)
        x = self.lifter.lift(node, index)
        if x.is_const:
            return STATIC
        if len(x.variables) != 1 or x.leaves != x.variables:
            return None
        (axis,) = x.variables
        line = affine(x if x.kind == "int" else x.args[0] if x.op == "float" else x, axis)
        if line is None or not line[1].is_const or axis not in index:
            return None
        if axis.extent is self.S:
            self.sources[node] = Source(index.index(axis), line[0], int(line[1].value))
            return Row(position=axis)
        if line == (1, E.ZERO) and len(index) == 1 and N.kind(node) == "int":
            self.numbering.add(node)
            return STATIC
        return None


def _has_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value))


def _is_fixed(node: fx.Node) -> bool:
    """Whether no size takes part in a node, and no random number."""
    target, value = node.target, N.value(node)
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
        return False
    if any(isinstance(N.value(x), (torch.SymInt, torch.SymFloat)) for x in node.all_input_nodes):
        return False
    return not any(isinstance(n, torch.SymInt) for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor) for n in v.shape)


def flow_of(graph: fx.Graph, tokens: fx.Node, constants: Constants, attention: Rule) -> TokenFlow:
    """The proof for a graph whose ids are ``tokens``; raises Refusal where there is none."""
    import attnopt.analysis.sorted_rows
    import attnopt.analysis.token_rules  # noqa: F401 - the rules register themselves

    others = [n for n in graph.find_nodes(op="placeholder") if N.is_tensor(n) and n is not tokens]
    mine = _made_of([tokens])
    context = _made_of(others) - mine
    results = graph.output_node().all_input_nodes
    flow = TokenFlow(tokens, Lifter(constants), attention, frozenset(context), frozenset(_above([r for r in results if r in mine], context)))
    flow.rows[tokens] = Row(E.add(E.mul(index_of(tokens)[0], flow.S), index_of(tokens)[1]))
    flow.run(graph)
    return flow


def _made_of(inputs: list[fx.Node]) -> set[fx.Node]:
    """Inputs and all values that depend on theirs, not on their sizes alone."""
    found, stack = set(inputs), list(inputs)
    while stack:
        for user in stack.pop().users:
            if user not in found and user.op != "output" and N.op_name(user) != "aten::sym_size":
                found.add(user)
                stack.append(user)
    return found


def _above(results: list[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    found, stack = set(results), list(results)
    while stack:
        for x in stack.pop().all_input_nodes:
            if x not in found and x not in stop:
                found.add(x)
                stack.append(x)
    return found
