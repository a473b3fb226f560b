"""Inputs that do nothing but say which tokens are padding."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from attnopt.analysis.site import AttentionSite
from attnopt.ir import expr as E


def padding_inputs(sites: Iterable[AttentionSite]) -> list[fx.Node]:
    """The inputs [B, S] of which a one shows a key to all queries, by the masks of ``sites``, in the order of first use.

    Proven of each mask: one of its conditions reads the input at (b, k) alone, and holds where that element is one.
    """
    found: list[fx.Node] = []
    for site in sites:
        spec = site.spec
        for c in E.conjuncts(spec.mask):
            reads = {x for x in c.leaves if x.op == "load"}
            for read in reads if len(reads) == 1 else ():
                node = site.loads[read.value]
                if node.op == "placeholder" and read.args == (spec.dims.b, spec.dims.k) and _shown(c, read) and node not in found:
                    found.append(node)
    return found


def _shown(condition: E.Expr, read: E.Expr) -> bool:
    one = {"int": E.ONE, "float": E.FONE, "bool": E.TRUE}[read.kind]
    return E.substitute(condition, {read: one}) is E.TRUE
