"""AO2xx: what was missed."""

from __future__ import annotations

from attnopt.remarks.page import Page

MISSED: dict[str, Page] = {
    "AO201": Page(
        title="not an attention: no product of probabilities and values",
        text="The softmax's result is not multiplied with values over the axis it was taken along.",
        cause="",
        hint="A classifier's softmax needs no attention kernel.",
        example="",
    ),
    "AO202": Page(
        title="not an attention: no product of queries and keys",
        text="The softmax's input holds no contraction of two tensors, one along the softmax axis and one not.",
        cause="",
        hint="",
        example="",
    ),
    "AO203": Page(
        title="the probabilities are used elsewhere",
        text="A value inside the attention (scores or probabilities) has another user, so it has to exist in memory.",
        cause="",
        hint="Do not return attention weights (output_attentions=False, need_weights=False).",
        example="",
    ),
    "AO204": Page(
        title="the probabilities are changed before they meet the values",
        text="Something that is neither a view, a cast nor dropout stands between softmax and the product with the values.",
        cause="",
        hint="",
        example="",
    ),
    "AO205": Page(
        title="the softmax axis is not the key axis",
        text="The probabilities are normalised along another axis than the one that is summed with the values.",
        cause="",
        hint="",
        example="",
    ),
    "AO206": Page(
        title="operands do not factor into batch, head, query and key",
        text="The index maps of the operands could not be brought to the form [batch, head, sequence, feature].",
        cause="",
        hint="",
        example="",
    ),
    "AO207": Page(
        title="a tensor in the region is modified in place",
        text="A value that the attention reads is written by an in-place operation that could not be made functional.",
        cause="",
        hint="",
        example="",
    ),
    "AO208": Page(
        title="the call has an argument that is not supported",
        text="An argument of the existing attention call is outside of what a spec can say.",
        cause="",
        hint="",
        example="",
    ),
    "AO209": Page(
        title="the captured function breaks inside the attention",
        text="torch.compile split the model between the product with the keys and the product with the values.",
        cause="",
        hint="",
        example="",
    ),
    "AO211": Page(
        title="channels are mixed, not positions",
        text="The product has the form of an attention, but its keys are feature channels and its features are positions; attention kernels gain nothing there.",
        cause="",
        hint="",
        example="",
    ),
    "AO212": Page(
        title="the scores pass through an operator that cannot be expressed",
        text="Something between the product with the keys and the softmax is neither pointwise nor a view (talking heads, for instance).",
        cause="",
        hint="",
        example="",
    ),
}
