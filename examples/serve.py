"""A decoder captured without a cache generates from a paged one, many requests at once: ``python examples/serve.py``."""

from __future__ import annotations

import nanogpt
import torch

import attnopt
from attnopt.runtime import SamplingParams

model = nanogpt.model()
serving = attnopt.optimize(model, nanogpt.example_inputs()[:, :100], config=attnopt.OptimizeConfig(kv_cache="paged"))
prompts = [[1, 2, 3], list(range(40)), [7] * 9]
results = serving.generate(prompts, SamplingParams(max_new_tokens=20))
for prompt, result in zip(prompts, results, strict=True):
    alone = torch.tensor([prompt])
    with torch.no_grad():
        for _ in result.tokens:
            alone = torch.cat([alone, model(alone)[:, -1].argmax(-1, keepdim=True)], 1)
    assert alone[0, len(prompt) :].tolist() == list(result.tokens), "greedy tokens differ from those of the model alone"
    print(f"{len(prompt)} tokens, then {list(result.tokens)}")
