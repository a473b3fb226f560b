"""Which attentions can read their keys from a cache: causal ones of the tokens to themselves, and those to another sequence.

Their programs know nothing but head and positions.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from attnopt.analysis import classify
from attnopt.analysis import nodes as N
from attnopt.analysis.layout import Refusal
from attnopt.analysis.linear import affine
from attnopt.analysis.rows import Row, has_symbols, index_of
from attnopt.analysis.token_flow import TokenFlow
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import diagonal
from attnopt.ir.spec import AttentionSpec


def row_of_attention(flow: TokenFlow, node: fx.Node, args: dict[str, Any]) -> Row:
    """The result of ``attnopt::attention`` [B, Hq, S, Dv] belongs to its queries; raises Refusal where a cache cannot serve it."""
    spec = without_shifts(AttentionSpec.from_json(str(args["spec"])))
    index = index_of(node)
    crosses = reads_context(flow, node)
    for what, x in (("queries", args["q"]), *(() if crosses else (("keys", args["k"]), ("values", args["v"])))):
        at = index_of(x)
        if x in flow.context or flow.rows[x].token is not E.add(E.mul(at[0], flow.S), at[2]):
            raise _refused(node, f"the {what} of this attention, {N.said(x)}, are not those of the tokens in their order")
    if crosses and any(spec.dims.q in p.variables for p in spec.programs):
        raise _refused(node, f"this attention ({spec}) to keys of another sequence depends on the place of the query")
    if not crosses and (seen_by_all(spec) is None or spec.dims.Sq is not spec.dims.Skv):
        raise _refused(node, f"this attention ({spec}) may see keys after the query, which are not there yet when a token is generated")
    if spec.dropout:
        raise _refused(node, f"this attention drops probabilities ({spec.dropout:g}), because the model is in training mode")
    if spec.sizes:
        raise Refusal("AO216", f"the score or mask of this attention ({spec}) depends on the length of the whole sequence; supported are functions of query and key positions.", node)
    for load, x in zip(spec.loads, args["loads"], strict=True):
        if x in flow.context or not flow.rows[x].is_static or has_symbols(x):
            raise _refused(node, f"the score or mask of this attention ({spec}) reads {load.name}, {N.said(x)}, which is another one for each token or length")
    return Row(E.add(E.mul(index[0], flow.S), index[2]))


def seen_by_all(spec: AttentionSpec) -> int | None:
    """How many of the first keys every query sees, those before them too, beside the keys up to its own place: 0 where it is causal. None where more may be seen."""
    if spec.causal is not None:
        return 0
    found = [n for c in E.conjuncts(spec.mask) if (n := _first_keys(c, spec.dims.k)) is not None]
    return min(found, default=None)


def _first_keys(c: Expr, k: Expr) -> int | None:
    """The greatest n of ``k <= q or k < n or ...``; None where a condition is of another form."""
    ends = [0]
    for a in c.args if c.op == "or" else [c]:
        if diagonal(a) == (1, E.ZERO):
            continue
        line = affine(a.args[0], k) if a.op == "ge0" else None
        if line is None or line[0] != -1 or not line[1].is_const:
            return None
        ends.append(int(line[1].value) + 1)
    return max(ends)


def reads_context(flow: TokenFlow, node: fx.Node) -> bool:
    """Whether an attention's keys and values are those of another sequence, which no token changes."""
    k, v = node.args[1:3]
    return k in flow.context and v in flow.context


def without_shifts(spec: AttentionSpec) -> AttentionSpec:
    """The same attention without what a score adds to all keys of a row alike, which softmax does not see; a sink does, and the spec then stays."""
    if spec.sink is not None or not spec.sizes:
        return spec
    score = _moving(spec.score, spec.dims.k)
    loads = {x.value for p in (score, spec.mask) for x in p.leaves if x.op == "load"}
    if loads != set(range(len(spec.loads))):
        return spec
    spec = spec.replace(score=score, empty_score=None, empty_rows="nan", traits=classify.traits(score, spec.mask, spec.dims, spec.loads))
    return spec.replace(sizes=tuple(n for n in spec.sizes if any(x.op == "sym" and x.value[0] == n for p in spec.programs for x in p.leaves)))


def _moving(x: Expr, k: Expr) -> Expr:
    """The part of a sum that depends on the key, factors in front of it taken along."""
    if not any(v is k or v.op == "score" for v in x.leaves):
        return E.FZERO if x.kind == "float" else E.ZERO
    if x.op == "add":
        return E.add(*(_moving(a, k) for a in x.args))
    if x.op == "float":
        return E.as_float(_moving(x.args[0], k))
    moving = [a for a in x.args if any(v is k or v.op == "score" for v in a.leaves)]
    if x.op == "mul" and len(moving) == 1:
        return E.mul(*(a for a in x.args if a is not moving[0]), _moving(moving[0], k))
    return x


def _refused(node: fx.Node, what: str) -> Refusal:
    return Refusal("AO215", f"{what}; supported are self-attention that is causal beside a known number of first keys, and attention to another sequence, by any program of head and positions.", node)
