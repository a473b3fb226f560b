"""A decoder as a user's file holds it, for the command line."""

DECODER = '''
import torch
from torch import nn


class Decoder(nn.Module):
    """Two causal attentions; ``averages`` makes one that no cache can serve."""

    def __init__(self, averages=False):
        super().__init__()
        self.averages = averages
        self.tokens, self.places = nn.Embedding(64, 16), nn.Embedding(48, 16)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.head = nn.Linear(16, 64)

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.qkv:
            q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in layer(x).chunk(3, -1))
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        if self.averages:
            x = x + x.mean(1, keepdim=True)
        return self.head(x)


def model():
    torch.manual_seed(0)
    return Decoder().eval()


def averaging():
    return Decoder(averages=True).eval()


def example_inputs():
    return torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(0))
'''
