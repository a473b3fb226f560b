"""Attentions that torch.compile cut in two: told apart from softmaxes that never were one."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from attnopt.remarks import Remark
from attnopt.report import Site

_PRODUCTS = ("matmul", "mm", "bmm", "baddbmm", "einsum")
_CONTRACTIONS = (*_PRODUCTS, "linear", "addmm", "scaled_dot_product_attention")


def explain_break(site: Site, graph: fx.GraphModule, ended_in_break: bool, began_after_break: bool) -> Site:
    """The site, with AO209 in place of "no product with the values" (or "with the keys") where a graph break is the reason."""
    if site.status == "replaced":
        return site
    codes = {r.code for r in site.remarks}
    node = _softmax_of(site, graph)
    if node is None:
        return site
    if ended_in_break and codes & {"AO201", "AO203"} and _leaves_unmultiplied(node) and _is_of_two_activations(node):
        missing = "values"
    elif began_after_break and "AO202" in codes and _comes_from_input(node):
        missing = "keys"
    else:
        return site
    text = f"The model breaks into two compiled functions at this attention: the product with the {missing} stands in the other one; supported is an attention in one graph."
    remarks = [Remark("AO209", text, r.site, r.source, node=r.node) if r.code in ("AO201", "AO202", "AO203") else r for r in site.remarks]
    return replace(site, remarks=remarks, why=text)


def _softmax_of(site: Site, graph: fx.GraphModule) -> fx.Node | None:
    path, _, line = site.source.rpartition(":")
    for node in graph.graph.nodes:
        if "softmax" in str(node.target) and f'{path}", line {line}' in (node.meta.get("stack_trace") or ""):
            found: fx.Node = node
            return found
    return None


def _opname(node: fx.Node) -> str:
    return str(getattr(node.target, "_opname", node.target))


def _contracts(node: fx.Node) -> bool:
    return _opname(node) in _CONTRACTIONS or _opname(node).startswith("conv")


def _leaves_unmultiplied(node: fx.Node) -> bool:
    """Whether the probabilities leave the function and meet no product in it."""
    seen, todo, leaves = {node}, [node], False
    while todo:
        for user in todo.pop().users:
            if user.op == "output":
                leaves = True
            elif _contracts(user):
                return False
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return leaves


def _is_of_two_activations(node: fx.Node) -> bool:
    """Whether a product of two tensors, neither of them a parameter, stands behind the softmax: scores, not logits."""
    seen, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if _opname(source) in _PRODUCTS and not any(_is_parameter(x) for x in source.all_input_nodes):
                return True
            if source not in seen and not _contracts(source):
                seen.add(source)
                todo.append(source)
    return False


def _is_parameter(node: fx.Node) -> bool:
    """Whether a node is a parameter or a view of one; Dynamo names the inputs that are."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr" or (node.op == "placeholder" and "parameters" in str(node.target))


def _comes_from_input(node: fx.Node) -> bool:
    """Whether the scores enter the function, by way of operations that contract nothing."""
    rank = len(getattr(node.meta.get("val"), "shape", ()))
    seen, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source.op == "placeholder" and len(getattr(source.meta.get("val"), "shape", ())) == rank:
                return True
            if source not in seen and not _contracts(source):
                seen.add(source)
                todo.append(source)
    return False
