"""Where KV heads were merged into their mean, the layer that makes them gets the mean of its rows, and makes no more heads than are left.

The mean of the heads of keys is a sum over what the heads' rows give, so it can be taken of the rows once and not of the keys of each token, where each head is the same linear function of its own
rows (``analysis/head_projection``). What stands between, such as a rotary embedding, stays: it reads each merged head once for every head it stands for. Parameters stay what and where they are: the mean is
taken of them in the graph, so gradients reach them as before, and ``fold_means`` takes it once where a graph is not trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from attnopt.analysis import nodes as N
from attnopt.analysis.head_projection import head_projection
from attnopt.analysis.layout import Refusal
from attnopt.analysis.lift import Lifter
from attnopt.passes.attention_nodes import attentions
from attnopt.passes.base import PassResult, Tier
from attnopt.passes.edit import Editor, aten
from attnopt.passes.group_heads import site_name
from attnopt.passes.raise_attention import constant_of
from attnopt.remarks import Remark

MEAN = "attnopt_mean_of_heads"
"""Key in the meta of a node that is a parameter's mean over heads: (the parameter's name, groups, heads in each)."""


@dataclass(frozen=True)
class MergeKVProjections:
    name: str = "merge-kv-projections"
    tier: Tier = "exact"

    def run(self, module: fx.GraphModule) -> PassResult:
        result = PassResult(False)
        for node in attentions(module.graph):
            for what, x in (("keys", node.args[1]), ("values", node.args[2])):
                if not isinstance(x, fx.Node) or not _is_merged(x):
                    continue
                text, modified = self._merged(module, x, what)
                result.remarks.append(Remark("AO110", text, site_name(node), N.source(node)))
                result.modified |= modified
        if result.modified:
            module.graph.eliminate_dead_code()
        return result

    def _merged(self, module: fx.GraphModule, mean: fx.Node, what: str) -> tuple[str, bool]:
        split = mean.args[0]
        assert isinstance(split, fx.Node) and isinstance(split.args[0], fx.Node)
        groups, each = _sizes(split)
        try:
            made = head_projection(split.args[0], Lifter(constant_of(module)))
            other = next(iter(_other_readers(made, mean)), None)
            if other is not None:
                raise Refusal("AO110", f"{N.said(made)} is also read by {N.said(other)}", other)
        except Refusal as r:
            return f"the mean is taken of the {what} of each token, not of the weights: {r.message}.", False
        args, edit = N.arguments(made), Editor(module.graph, made)
        rows = int(N.shape(made)[-1].value)
        weight = _mean_of_rows(edit, args["weight"], groups, each)
        bias = None if args["bias"] is None else _mean_of_rows(edit, args["bias"], groups, each)
        few = edit.call(aten.linear.default, args["input"], weight, bias)
        apart = edit.call(aten.unflatten.int, few, -1, [groups, rows // (groups * each)])
        many = edit.call(aten.flatten.using_ints, edit.call(aten.repeat_interleave.self_int, apart, each, -2), -2, -1)
        made.replace_all_uses_with(many)
        # the heads of a group are equal now, so the first is their mean
        mean.replace_all_uses_with(Editor(module.graph, mean).call(aten.select.int, split, 2, 0))
        return f"the projection of the {what} has the mean of its rows, {rows // each} of {rows}.", True


def _mean_of_rows(edit: Editor, held: fx.Node, groups: int, each: int) -> fx.Node:
    """[groups * n, ...] of a parameter [groups * each * n, ...]: the mean over the heads of each group."""
    rows = int(N.shape(held)[0].value) // (groups * each)
    mean = edit.call(aten.mean.dim, edit.call(aten.unflatten.int, held, 0, [groups, each, rows]), [1])
    found = edit.call(aten.flatten.using_ints, mean, 0, 1)
    found.meta[MEAN] = (str(held.target), groups, each)
    return found


def _is_merged(x: fx.Node) -> bool:
    """Whether an operand is what merge-kv-heads makes of one."""
    split = x.args[0] if N.op_name(x) == "aten::mean" else None
    return isinstance(split, fx.Node) and N.op_name(split) == "aten::unflatten" and N.arguments(x)["dim"] == [2] and N.arguments(split)["dim"] == 1


def _sizes(split: fx.Node) -> tuple[int, int]:
    groups, each = N.arguments(split)["sizes"]
    return int(groups), int(each)


def _other_readers(made: fx.Node, mean: fx.Node) -> Iterator[fx.Node]:
    """What reads a layer's result on another way than through ``mean``, sizes aside."""
    stack, seen = [made], {made}
    while stack:
        node = stack.pop()
        for user in node.users:
            if user is mean or user in seen or N.op_name(user) == "aten::sym_size":
                continue
            if user.op == "output" or not N.is_tensor(user):
                yield node
                continue
            seen.add(user)
            stack.append(user)
