"""Matrix products and convolutions."""

from __future__ import annotations

import onnx_ir as ir
import torch

from attnopt.capture.onnx.translate import Result, Translator, attribute, rule

aten = torch.ops.aten


@rule("MatMul")
def _matmul(t: Translator, node: ir.Node) -> Result | None:
    a, b = node.inputs
    return t.builder.matmul(t.tensor(a), t.tensor(b))


@rule("Gemm")
def _gemm(t: Translator, node: ir.Node) -> Result | None:
    a, b, c = (*node.inputs, None)[:3]
    call = t.builder.call
    left, right = t.tensor(a), t.tensor(b)
    if attribute(node, "transA", 0):
        left = call(aten.transpose.int, left, 0, 1)
    if attribute(node, "transB", 0):
        right = call(aten.transpose.int, right, 0, 1)
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    if c is None:
        product = t.builder.matmul(left, right)
        return product if alpha == 1.0 else call(aten.mul.Tensor, product, alpha)
    return call(aten.addmm.default, t.tensor(c), left, right, beta=beta, alpha=alpha)


@rule("Einsum")
def _einsum(t: Translator, node: ir.Node) -> Result | None:
    equation = str(attribute(node, "equation"))
    if "." in equation:
        return None
    return t.builder.call(aten.einsum.default, equation, [t.tensor(v) for v in node.inputs])


@rule("Conv")
def _conv(t: Translator, node: ir.Node) -> Result | None:
    x, weight, bias = (*node.inputs, None)[:3]
    operand, kernel = t.tensor(x), t.tensor(weight)
    n = kernel.meta["val"].dim() - 2
    pads = attribute(node, "pads", [0] * (2 * n))
    if attribute(node, "auto_pad", "NOTSET") != "NOTSET" or pads[:n] != pads[n:]:
        return None
    strides, dilations = attribute(node, "strides", [1] * n), attribute(node, "dilations", [1] * n)
    given = None if bias is None else t.tensor(bias)
    return t.builder.call(aten.convolution.default, operand, kernel, given, strides, pads[:n], dilations, False, [0] * n, attribute(node, "group", 1))
