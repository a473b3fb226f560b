"""AO214 to AO218: why a decoder was not rewritten to packed tokens with a KV cache, or caches more than it might."""

from __future__ import annotations

from attnopt.remarks.page import Page, script

_SERVED = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\nimport attnopt\n\n\n"

SERVING: dict[str, Page] = {
    "AO214": Page(
        title="not served: tokens meet outside of attention",
        text="An operator other than an attention makes a value of more than one token, or could not be shown not to.",
        cause="A serving model runs packed tokens of many requests as one sequence, and keeps nothing of earlier tokens but keys and values. "
        "An operator that looks at other tokens would read those of another request, or miss those that were computed before.",
        supported="operators that treat each token on its own: elementwise ones, products and norms over features, embeddings, and experts that are chosen per token.",
        hint="A convolution or a shift along the sequence has no cache yet; serve such a model with its own generate().",
        example=script(
            """
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

                def forward(self, ids):
                    x = self.embed(ids)[:, None]
                    x = F.scaled_dot_product_attention(x, x, x, is_causal=True)[:, 0]
                    x = x + x.mean(1, keepdim=True)  # <- here
                    return self.head(x)


            config = attnopt.OptimizeConfig(kv_cache="paged")
            report = attnopt.inspect(Model(), torch.arange(14).view(2, 7), config=config)
            """,
            _SERVED,
        ),
    ),
    "AO215": Page(
        title="not served: an attention that a cache cannot serve",
        text="An attention is not one of the tokens to those before them, or its program reads tensors that are others for each token.",
        cause="Keys and values are kept when their token is computed, and later queries read them as they are. So no query may see a key after it that is not computed together with it, keys and values must be "
        "those of the tokens themselves, and score and mask must be functions of head and positions.",
        supported="self-attention that is causal, beside a known number of first keys that all queries see, with any window, chunk, softcap, sink, ALiBi or table of distances; attention to another sequence, such as an encoder's; "
        "masks that an input of padding makes.",
        hint="A model that attends to all tokens at once, such as an encoder alone, generates nothing and needs no cache.",
        example=script(
            """
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

                def forward(self, ids):
                    x = self.embed(ids)[:, None]
                    x = F.scaled_dot_product_attention(x, x, x)  # <- here
                    return self.head(x[:, 0])


            config = attnopt.OptimizeConfig(kv_cache="paged")
            report = attnopt.inspect(Model(), torch.arange(14).view(2, 7), config=config)
            """,
            _SERVED,
        ),
    ),
    "AO216": Page(
        title="not served: the length of the sequence decides a value",
        text="A value depends on how many tokens there are, and not on the position of a token alone.",
        cause="While a request is generated its length grows, and what was computed of earlier tokens is kept. A value that another length would change cannot be kept.",
        supported="functions of a token's own position: learned and rotary tables, positions that are counted from the first token.",
        hint="Scale by position or by a constant; a rotary embedding whose base depends on the length is not supported.",
        example=script(
            """
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

                def forward(self, ids):
                    x = self.embed(ids)[:, None]
                    x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
                    x = x / ids.shape[1]  # <- here
                    return self.head(x[:, 0])


            config = attnopt.OptimizeConfig(kv_cache="paged")
            report = attnopt.inspect(Model(), torch.arange(14).view(2, 7), config=config)
            """,
            _SERVED,
        ),
    ),
    "AO217": Page(
        title="not served: inputs or results of another form",
        text="The model reads an input that is neither token ids, positions nor padding outside of its attentions, was captured with fixed sizes, or gives no logits of each token.",
        cause="A serving model is called with packed tokens and their positions, and must know where they enter and which result holds the logits.",
        supported="ids [B, S] of open sizes, positions [B, S], padding [B, S] that attentions mask keys with, inputs that become keys and values of attentions; logits [B, S, V], or [B, 1, V] or [B, V] of the last token.",
        hint="Wrap the model in one that takes ids and returns logits.",
        example=script(
            """
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

                def forward(self, ids, weights):
                    x = (self.embed(ids) * weights[..., None])[:, None]  # <- here
                    x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
                    return self.head(x[:, 0])


            config = attnopt.OptimizeConfig(kv_cache="paged")
            report = attnopt.inspect(Model(), (torch.arange(14).view(2, 7), torch.rand(2, 7)), config=config)
            """,
            _SERVED,
        ),
    ),
    "AO218": Page(
        title="keys and values cached, and not the latent",
        text="Heads share a part of their keys, as where keys and values are made of a latent of each token, and that could not be shown, or would gain nothing. Keys and values are cached.",
        cause="The product that makes keys and values of a latent moves to the queries only if it is nothing but a product: the same features of the token for all heads, times a matrix of each head.",
        supported="keys and values that are projections, without bias, of the same latent of each token, which is narrower than they are, beside key features that all heads share.",
        hint="The cache holds keys and values of all heads, which is right and takes more memory.",
        example=script(
            """
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.embed, self.q, self.head = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(32, 32)
                    self.down, self.up = nn.Linear(16, 12), nn.Linear(8, 64, bias=True)

                def forward(self, ids):
                    x = self.embed(ids)
                    q = self.q(x).unflatten(-1, (4, 12)).transpose(1, 2)
                    latent, shared = self.down(x).split([8, 4], -1)
                    k, v = self.up(latent).unflatten(-1, (4, 16)).transpose(1, 2).split([8, 8], -1)  # <- here
                    k = torch.cat((k, shared[:, None].expand(-1, 4, -1, -1)), -1)
                    x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    return self.head(x.transpose(1, 2).flatten(2))


            config = attnopt.OptimizeConfig(kv_cache="paged")
            report = attnopt.inspect(Model(), torch.arange(14).view(2, 7), config=config)
            """,
            _SERVED,
        ),
    ),
    "AO219": Page(
        title="KV heads not merged",
        text="`merge_kv_heads` was asked for, and the KV heads of this attention do not fall into so many groups of one size. They stay as they were.",
        cause="Each query head reads the mean of one group of heads; groups of several sizes have no such form.",
        supported="a divisor of the number of KV heads.",
        hint="Choose a number that divides the heads of all layers.",
        example=script(
            """
            class Attention(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.wide, self.narrow = nn.Linear(24, 72), nn.Linear(24, 72)

                def forward(self, x):
                    for qkv, heads in ((self.wide, 4), (self.narrow, 6)):
                        q, k, v = qkv(x).unflatten(-1, (3, heads, 24 // heads)).permute(2, 0, 3, 1, 4)
                        x = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)  # <- here
                    return x


            config = attnopt.OptimizeConfig(merge_kv_heads=3)
            report = attnopt.inspect(Attention(), torch.randn(2, 9, 24), config=config)
            """,
            _SERVED,
        ),
    ),
}
