"""AO2xx: what was missed."""

from __future__ import annotations

from attnopt.remarks.page import Page, script

_FUNCTIONAL = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\nimport attnopt\n\n\n"

MISSED: dict[str, Page] = {
    "AO201": Page(
        title="not an attention: no product of probabilities and values",
        text="The softmax's result is not multiplied with values over the axis it was taken along. It is listed, and not counted as an attention.",
        cause="An attention is an average of values, weighted by the probabilities. A classifier or a router stops at the probabilities, or scales with them, "
        "and an attention kernel has nothing to gain there.",
        supported="a product (matmul, bmm, einsum, or multiply and sum) that sums over the softmax's axis.",
        hint="Nothing, where it is a classifier or a router.",
        example=script("""
            class Classifier(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.head = nn.Linear(16, 4)

                def forward(self, x):
                    return self.head(x).softmax(-1)  # <- here


            report = attnopt.optimize(Classifier(), torch.randn(2, 16)).attnopt_report
        """),
    ),
    "AO202": Page(
        title="not an attention: no product of queries and keys",
        text="The softmax's input holds no product of two tensors of which one runs along the softmax's axis and the other does not. "
        "It is listed, and not counted as an attention.",
        cause="Without queries there is one row of scores for all of them, as in pooling by a learned weight: no matrix of queries and keys is made that a kernel could avoid.",
        supported="scores that are a product of queries and keys, with any pointwise function of it and of the indices behind it.",
        hint="Nothing, where it is a pooling by weights or a router.",
        example=script("""
            class Pooling(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.score = nn.Linear(16, 1)

                def forward(self, x):
                    weights = self.score(x).softmax(1)  # <- here
                    return (weights.mT @ x).squeeze(1)


            report = attnopt.optimize(Pooling(), torch.randn(2, 9, 16)).attnopt_report
        """),
    ),
    "AO203": Page(
        title="the probabilities are used elsewhere",
        text="A value inside the attention (the scores, the probabilities, or something between them) has another reader, so it has to exist in memory.",
        cause="The fused operation computes the output tile by tile and never holds the whole matrix of probabilities; whoever reads it would find nothing.",
        supported="scores and probabilities that only the product with the values reads.",
        hint="Do not return or keep attention weights (output_attentions=False, need_weights=False); what is needed of them, compute apart.",
        example=script("""
            class Attention(nn.Module):
                def forward(self, q, k, v):
                    p = (q @ k.mT * 0.25).softmax(-1)  # <- here
                    return p @ v, p


            q, k, v = torch.randn(3, 2, 9, 16)
            report = attnopt.optimize(Attention(), (q, k, v)).attnopt_report
        """),
    ),
    "AO204": Page(
        title="the probabilities are changed before they meet the values",
        text="Something that is neither a view, a cast nor dropout stands between the softmax and the product with the values.",
        cause="The fused operation keeps a running sum of exponentials and of weighted values, and divides one by the other at the end. "
        "A function of the finished probabilities does not fit in there.",
        supported="views, casts, dropout and nan_to_num between softmax and product.",
        hint="Apply the change to the scores before the softmax, or to the output after the product, where the function allows it.",
        example=script("""
            class Attention(nn.Module):
                def forward(self, q, k, v):
                    p = (q @ k.mT * 0.25).softmax(-1)
                    p = p + 0.01  # <- here
                    return p @ v


            q, k, v = torch.randn(3, 2, 9, 16)
            report = attnopt.optimize(Attention(), (q, k, v)).attnopt_report
        """),
    ),
    "AO205": Page(
        title="the softmax axis is not the key axis",
        text="The probabilities are normalised along one axis, and the product with the values sums along another.",
        cause="A softmax over the queries (slot attention) is another function than a softmax over the keys: each key's weights sum to one, not each query's.",
        supported="a softmax along the axis that the product with the values sums over.",
        hint="If the model means to normalise over keys, take the softmax along the last axis of [..., queries, keys].",
        example=script("""
            class Slots(nn.Module):
                def forward(self, q, k, v):
                    p = (q @ k.mT * 0.25).softmax(-2)
                    return p @ v  # <- here


            q, k, v = torch.randn(3, 2, 9, 16)
            report = attnopt.optimize(Slots(), (q, k, v)).attnopt_report
        """),
    ),
    "AO206": Page(
        title="operands do not factor into batch, head, query and key",
        text="The index maps of queries, keys, values or output could not be brought to the form [batch, head, sequence, feature] by views.",
        cause="The kernels take strided tensors of that form. An operand that is read at every second position, or along a diagonal, is none, "
        "unless a copy of it is made first.",
        supported="operands that selecting, narrowing, reshaping, permuting and expanding bring to [batch, head, sequence, feature].",
        hint="Select the positions from queries, keys or values before their product, not from the scores or probabilities after it.",
        example=script("""
            class EverySecondQuery(nn.Module):
                def forward(self, q, k, v):
                    p = (q @ k.mT * 0.25).softmax(-1)  # <- here
                    return p[:, ::2] @ v


            q, k, v = torch.randn(3, 2, 9, 16)
            report = attnopt.optimize(EverySecondQuery(), (q, k, v)).attnopt_report
        """),
    ),
    "AO207": Page(
        title="a tensor in the region is modified in place",
        text="A tensor that the attention reads is written in place after something else has read it.",
        cause="A replaced attention reads its operands at another place of the program than the original did, and there the tensor may hold other values.",
        supported="tensors that are complete before anything reads them, or that are changed by functions that return a new tensor.",
        hint="Write mask = mask.masked_fill(...) or torch.where(...) instead of mask[...] = ..., masked_fill_(...) and the like.",
        example=script("""
            class Attention(nn.Module):
                def forward(self, q, k, v):
                    n = q.shape[1]
                    mask = torch.ones(n, n, dtype=torch.bool).tril(-1)
                    q = q * mask.sum(-1, keepdim=True)
                    mask[:, 0] = True  # <- here
                    scores = (q @ k.mT * 0.25).masked_fill(~mask, float("-inf"))
                    return scores.softmax(-1) @ v


            q, k, v = torch.randn(3, 2, 9, 16)
            report = attnopt.optimize(Attention(), (q, k, v)).attnopt_report
        """),
    ),
    "AO208": Page(
        title="the call has an argument that is not supported",
        text="An argument of the existing attention call is outside of what a spec can say.",
        cause="Scale and dropout are constants of the compiled kernel; a number that is only known when the graph runs would need another kernel for each call.",
        supported="operands of at least two axes, a constant scale (or a constant head size, from which the default follows) and a constant dropout.",
        hint="Give scale= and dropout_p= as Python numbers, or leave the head size fixed in dynamic_shapes.",
        example=script(
            """
            class Attention(nn.Module):
                def forward(self, q, k, v):
                    return F.scaled_dot_product_attention(q, k, v)  # <- here


            q, k, v = torch.randn(3, 2, 4, 9, 16)
            any_size = {3: torch.export.Dim.AUTO}
            report = attnopt.optimize(Attention(), (q, k, v), dynamic_shapes={"q": any_size, "k": any_size, "v": any_size}).attnopt_report
            """,
            _FUNCTIONAL,
        ),
    ),
    "AO209": Page(
        title="the captured function breaks inside the attention",
        text="torch.compile split the model between the product with the keys and the product with the values, so no graph holds the whole attention.",
        cause="Python has to look at a value there (an `if` on a tensor, `.item()`, a print), and what stands on the two sides of it is compiled apart.",
        supported="an attention that is captured in one graph, from the product with the keys to the product with the values.",
        hint="Move what looks at values out of the attention, or write it with torch.where or torch.cond.",
        example=script("""
            class Attention(nn.Module):
                def forward(self, q, k, v):
                    p = (q @ k.mT * 0.25).softmax(-1)  # <- here
                    if p.max() > 0.99:
                        q = q * 2
                    return p @ v + q


            q, k, v = torch.randn(3, 2, 9, 16)
            report = attnopt.optimize(Attention(), (q, k, v)).attnopt_report
        """),
    ),
    "AO211": Page(
        title="channels are mixed, not positions",
        text="The product has the form of an attention, but its keys are feature channels and its features are positions. It is listed, and not counted as an attention.",
        cause="The matrix of probabilities is as large as the number of channels, whatever the length of the sequence, so an attention kernel gains nothing there.",
        supported="keys that run along positions: the axis of the sequence, not that of a projection's features.",
        hint="Nothing, where channels are meant to be mixed.",
        example=script("""
            class ChannelAttention(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

                def forward(self, x):
                    q, k, v = self.q(x).mT, self.k(x).mT, self.v(x).mT
                    return ((q @ k.mT).softmax(-1) @ v).mT  # <- here


            report = attnopt.optimize(ChannelAttention(), torch.randn(2, 9, 16)).attnopt_report
        """),
    ),
    "AO212": Page(
        title="the scores pass through an operator that cannot be expressed",
        text="Something between the product with the keys and the softmax is neither pointwise nor a view: it mixes the scores of several heads, queries or keys.",
        cause="A kernel sees a tile of the scores of one head at a time, and computes each score from its own raw product and its indices. "
        "What reads other scores as well (talking heads, sorting, a norm over a row) needs the whole matrix.",
        supported="pointwise functions of the raw score, of the indices, and of tensors that are read by index.",
        hint="Mix heads after the product with the values, or before it in queries and keys, where the model allows it.",
        example=script("""
            class TalkingHeads(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.mix = nn.Parameter(torch.randn(4, 4))

                def forward(self, q, k, v):
                    scores = q @ k.mT * 0.25
                    scores = torch.einsum("bhqk,hg->bgqk", scores, self.mix)  # <- here
                    return scores.softmax(-1) @ v


            q, k, v = torch.randn(3, 2, 4, 9, 16)
            report = attnopt.optimize(TalkingHeads(), (q, k, v)).attnopt_report
        """),
    ),
    "AO213": Page(
        title="the attention stands in a function that an operator runs",
        text="The attention is complete, in the function of a conditional, a loop, a scan or a selective checkpoint. It was found there, and stays as it was.",
        cause="Such a function is a graph of its own, which the operator runs when and as often as the values say; its sizes and tensors are not those of the main graph, "
        "so nothing is proven of them there.",
        supported="attentions outside of such functions, and in those of torch.no_grad, of an autocast that is switched off and of torch.utils.checkpoint without context_fn.",
        hint="Compute the attention before the conditional and choose by torch.where, write a loop of a fixed number of steps as a Python loop, or optimize the function as a module of its own.",
        example=script("""
            class Either(nn.Module):
                def forward(self, q, k, v):
                    def attend(q, k, v):
                        return (q @ k.mT * 0.25).softmax(-1) @ v

                    return torch.cond(q.sum() > 0, attend, lambda q, k, v: v * 2, (q, k, v))  # <- here


            q, k, v = torch.randn(2, 9, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
            report = attnopt.optimize(Either(), (q, k, v)).attnopt_report
        """),
    ),
}
