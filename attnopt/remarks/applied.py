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
    "AO104": Page(
        title="keys and values cached",
        text="The attention writes the keys and values of its tokens to a paged cache, and reads those of its request from there.",
        cause="The attention is causal and its program is a function of head and positions, so what it computes of a token never changes when more tokens follow.",
        hint="",
        example=script("""
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

                def forward(self, ids):
                    x = self.embed(ids)[:, None]
                    x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)  # <- here
                    return self.head(x[:, 0])


            config = attnopt.OptimizeConfig(kv_cache="paged")
            report = attnopt.inspect(Model(), torch.arange(14).view(2, 7), config=config)
        """),
    ),
    "AO105": Page(
        title="padding input removed",
        text="An input that says which tokens are padding is no input of the serving model: it is replaced by ones.",
        cause="Packed tokens of many requests have no padding between them. In the mask of each attention the input does nothing but hide keys, and a one shows them.",
        hint="",
        example=script("""
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

                def forward(self, ids, mask):
                    x, i = self.embed(ids)[:, None], torch.arange(ids.shape[1])
                    seen = (i[:, None] >= i) & mask[:, None, None].bool()
                    x = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=seen)
                    return self.head(x[:, 0])


            config = attnopt.OptimizeConfig(kv_cache="paged")
            report = attnopt.inspect(Model(), (torch.arange(14).view(2, 7), torch.ones(2, 7)), config=config)
        """),
    ),
    "AO106": Page(
        title="positions read from an input",
        text="A value that the model computes from the place of a token in its sequence is computed from the positions of the packed tokens instead.",
        cause="In a batch of packed tokens the place in the batch says nothing: each token stands at the position that it has in its own request.",
        hint="",
        example=script("""
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.places, self.head = nn.Embedding(32, 16), nn.Embedding(64, 16), nn.Linear(16, 32)

                def forward(self, ids):
                    i = torch.arange(ids.shape[1])  # <- here
                    x = (self.embed(ids) + self.places(i))[:, None]
                    x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
                    return self.head(x[:, 0])


            config = attnopt.OptimizeConfig(kv_cache="paged")
            report = attnopt.inspect(Model(), torch.arange(14).view(2, 7), config=config)
        """),
    ),
    "AO107": Page(
        title="latents cached in place of keys and values",
        text="Keys and values of all heads are made of one latent of each token; the latent is what is kept in the cache, and the attention reads it as its one KV head.",
        cause="A product with the matrix of each head makes keys and values of the latent. It moves to the queries, and behind the attention, which is the same function: "
        "the attention then reads the latent and the key features that all heads share, which are far fewer numbers than keys and values of all heads.",
        hint="",
        example=script("""
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.q, self.head = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(32, 32)
                    self.down, self.up = nn.Linear(16, 12), nn.Linear(8, 64, bias=False)

                def forward(self, ids):
                    x = self.embed(ids)
                    q = self.q(x).unflatten(-1, (4, 12)).transpose(1, 2)
                    latent, shared = self.down(x).split([8, 4], -1)
                    k, v = self.up(latent).unflatten(-1, (4, 16)).transpose(1, 2).split([8, 8], -1)
                    k = torch.cat((k, shared[:, None].expand(-1, 4, -1, -1)), -1)
                    x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # <- here
                    return self.head(x.transpose(1, 2).flatten(2))


            config = attnopt.OptimizeConfig(kv_cache="paged")
            report = attnopt.inspect(Model(), torch.arange(14).view(2, 7), config=config)
        """),
    ),
    "AO108": Page(
        title="keys and values kept in 8 bits",
        text="The cache of a serving model holds keys and values in int8 or fp8 (e4m3), and a scale for each token and head: half the memory, and half of what a "
        "generated token has to read. Its numbers are rounded, so this is only done where it is asked for.",
        cause="kv_cache_dtype asks for it. The serving model may be as far from the truth as the model whose keys and values are rounded so; a cache that is off by more is not handed out.",
        hint="Leave kv_cache_dtype out for a cache of the model's own dtype.",
        example=script("""
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

                def forward(self, ids):
                    x = self.embed(ids)[:, None]
                    x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
                    return self.head(x[:, 0])


            config = attnopt.OptimizeConfig(kv_cache="paged", kv_cache_dtype="int8")
            report = attnopt.inspect(Model(), torch.arange(14).view(2, 7), config=config)
        """),
    ),
    "AO109": Page(
        title="what merged KV heads change",
        text="How far the results with merged KV heads are from those of the original, on the example. The verdict compares the rest with the original, and the kernels with the merged model.",
        cause="`merge_kv_heads` was asked for, which makes another model; how good that is only an evaluation of the model can tell.",
        hint="",
        example=script("""
            class Attention(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.qkv = nn.Linear(16, 48)

                def forward(self, x):
                    q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
                    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


            config = attnopt.OptimizeConfig(merge_kv_heads=2)
            report = attnopt.optimize(Attention(), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)), config=config).attnopt_report
        """),
    ),
    "AO110": Page(
        title="KV heads merged",
        text="Keys and values of a group of KV heads are replaced by their mean, because `merge_kv_heads` asks for it. The model computes something else than before. Where it is the same, the mean is taken of the rows of the layer that makes them; a further line says so, or why not.",
        cause="A cache with fewer heads is smaller, and generating reads less; the mean of the heads is where training such a model starts from (arXiv:2305.13245).",
        hint="Train the model further with the merged heads: gradients reach the original projections through the mean.",
        example=script("""
            class Attention(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.qkv = nn.Linear(16, 48)

                def forward(self, x):
                    q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
                    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # <- here


            config = attnopt.OptimizeConfig(merge_kv_heads=2)
            report = attnopt.optimize(Attention(), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)), config=config).attnopt_report
        """),
    ),
}
