"""Training through ``torch.compile(model, backend="attnopt")``: the attentions are replaced when the model first runs.

    python examples/train.py [steps]
"""

from __future__ import annotations

import sys

import nanogpt
import torch
from torch.nn import functional as F


def main(steps: int = 10) -> None:
    torch.manual_seed(0)
    model = nanogpt.model().train()
    compiled = torch.compile(model, backend="attnopt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # A sequence that can be learned: each token is the one before it plus three.
    start = torch.randint(0, nanogpt.VOCABULARY, (4, 1))
    tokens = (start + 3 * torch.arange(129)) % nanogpt.VOCABULARY
    for step in range(steps):
        logits = compiled(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:3d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main(*(int(x) for x in sys.argv[1:2]))
