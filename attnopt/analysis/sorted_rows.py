"""Rows that are sorted into groups, computed group by group, and put back, as a mixture of experts does: each still is its token's own.

The order depends on all tokens, and no value does. Row i in sorted order belongs to the element ``order[i]``, which an
expression says with a load of the order; putting the rows back where they came from undoes it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis import views
from attnopt.analysis.rows import STATIC, Row, has_symbols, index_of
from attnopt.analysis.token_flow import TokenFlow, rule
from attnopt.analysis.token_rules import part, scan
from attnopt.ir import expr as E


@rule("aten::sort")
def _sort(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """A list of all rows' keys put in order; along any other axis it is like a softmax."""
    x = args["self"]
    if len(N.shape(x)) != 1 or N.shape(x)[0].is_const or flow.rows[x].token is None:
        return scan(flow, node, args)
    order = next((u for u in node.users if N.op_name(u) == "getitem" and u.args[1] == 1), None)
    if order is None or args["descending"]:
        return None
    flow.orders[order] = node
    flow.numbering.add(order)
    (i,) = index_of(x)
    return flow.moved(flow.rows[x], {i: E.load(order, (i,), "int")})


@rule("getitem")
def _item(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    return STATIC if node in flow.orders else part(flow, node, args)


@rule("aten::index_put")
def _index_put(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """Row numbers written where an order says: the order's inverse."""
    x, which, values = args["self"], args["indices"], args["values"]
    if len(which) != 1 or which[0] not in flow.orders or values not in flow.numbering or args.get("accumulate") or not flow.rows[x].is_static:
        return None
    index = index_of(node)
    if N.shape(x) != N.shape(which[0]) or N.shape(values) != N.shape(x) or flow.lifter.lift(values, index) is not index[0]:
        return None
    flow.inverse[node] = which[0]
    flow.numbering.add(node)
    return STATIC


@rule("aten::histc", "aten::bincount")
def _counts(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """How many rows of a sort have each key."""
    keys = _uncast(args["self"])
    sort = keys.args[0] if N.op_name(keys) == "getitem" and keys.args[1] == 0 else None
    if not isinstance(sort, fx.Node) or sort not in flow.orders.values():
        return None
    bins = N.shape(node)[0]
    if N.op_name(node) == "aten::histc" and (args["bins"], args["min"], args["max"]) != (bins.value, 0, bins.value - 1):
        return None
    if not bins.is_const or _choices(sort.args[0]) != bins.value:
        return None
    flow.counts[node] = sort
    return STATIC


@rule("aten::cumsum")
def _ends(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """Where each group ends."""
    x = args["self"]
    if x not in flow.counts:
        return scan(flow, node, args)
    flow.counts[node] = flow.counts[x]
    return STATIC


@rule("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
def _grouped(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row | None:
    """Rows in sorted order times the matrix of their group, the groups' ends given: each row meets the matrix that its own key names."""
    tensors = [x for x in node.all_input_nodes if N.is_tensor(x)]
    if len(tensors) != 3 or tensors[2] not in flow.counts or N.op_name(_uncast(tensors[2])) != "aten::cumsum":
        return None
    x, weight, ends = tensors
    if not flow.rows[weight].is_static or has_symbols(weight) or len(N.shape(x)) != 2 or len(N.shape(weight)) != 3:
        return None
    index = index_of(node)
    keys = flow.rows[flow.counts[ends]]
    mine = flow.row(x, (index[0], E.ZERO))
    return flow.joined(node, [mine]) if mine.token is keys.token else None


def _uncast(x: Any) -> Any:
    while isinstance(x, fx.Node) and N.op_name(x) in ("aten::to", "aten::_to_copy", "aten::float"):
        x = N.arguments(x)["self"]
    return x


def _choices(x: Any) -> int:
    """Of how many entries numbers were chosen by a topk; 0 where they were not."""
    while isinstance(x, fx.Node):
        index = index_of(x)
        moved = views.step(x, index)
        if moved is not None:
            x = moved[0]
        elif N.op_name(x) == "getitem" and x.args[1] == 1 and N.op_name(x.args[0]) == "aten::topk":  # type: ignore[arg-type]
            args = N.arguments(x.args[0])  # type: ignore[arg-type]
            extent = N.shape(args["self"])[N.axis(args["dim"], len(N.shape(args["self"])))]
            return int(extent.value) if extent.is_const else 0
        else:
            return 0
    return 0

