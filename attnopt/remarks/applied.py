"""AO1xx: what was applied."""

from __future__ import annotations

from attnopt.remarks.page import Page, script

APPLIED: dict[str, Page] = {
    "AO101": Page(
        title="attention replaced",
        text="The attention was lifted to a spec and runs as one fused operation. The remark says in words what it computes.",
        cause="Everything from the product of queries and keys to the product with the values was understood, and nothing else reads what lies in between, "
        "so scores and probabilities never have to exist in memory.",
        hint="",
        example=script("""
            class Attention(nn.Module):
                def forward(self, q, k, v):
                    return (q @ k.mT * 0.25).softmax(-1) @ v  # <- here


            q, k, v = torch.randn(3, 2, 9, 16)
            report = attnopt.optimize(Attention(), (q, k, v)).attnopt_report
        """),
    ),
    "AO102": Page(
        title="KV heads un-expanded",
        text="Keys and values were repeated for each query head of a group; the kernel now reads the shared heads, and the repeated ones are never made.",
        cause="The index map of keys and values reads them at `head // group`, so every query head of a group reads the same head.",
        hint="",
        example=script("""
            class Attention(nn.Module):
                def forward(self, q, k, v):
                    k, v = k.repeat_interleave(4, dim=1), v.repeat_interleave(4, dim=1)
                    return (q @ k.mT * 0.25).softmax(-1) @ v  # <- here


            q, (k, v) = torch.randn(2, 8, 9, 16), torch.randn(2, 2, 2, 9, 16)
            report = attnopt.optimize(Attention(), (q, k, v)).attnopt_report
        """),
    ),
    "AO103": Page(
        title="mask lifted",
        text="An existing attention call had a dense mask; the mask is now computed inside the kernel from its formula, and keys that no query sees are skipped.",
        cause="The code that makes the mask is part of the captured graph, and was lifted to a formula in batch, head, query and key.",
        hint="",
        example=script(
            """
            class Attention(nn.Module):
                def forward(self, q, k, v):
                    i = torch.arange(q.shape[-2])
                    mask = i[:, None] >= i[None, :]
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25)  # <- here


            q, k, v = torch.randn(3, 2, 4, 9, 16)
            report = attnopt.optimize(Attention(), (q, k, v)).attnopt_report
            """,
            "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\nimport attnopt\n\n\n",
        ),
    ),
}
