"""Generation on the CPU beside transformers' cached ``generate``: what the host does around small models' kernels.

Random tiny and mid-size gpt2 and llama (float32) continue prompts of one length greedily, in a serving model with a paged cache and by ``generate`` with its dynamic cache
and ``sdpa``. Both give the same number of tokens, in turn, pair by pair; a row has the median of the pairs' ratios (above 1: the serving model is faster), and the milliseconds of a
step of one token each once all prompts are in. Where a token differs, the row says how much of the texts is the same.

    python benchmarks/serving_cpu.py [--models gpt2,llama] [--sizes tiny,mid] [--batches 1,8] [--new 64] [--pairs 7] [--output FILE]
    python benchmarks/serving_cpu.py --profile --models llama --sizes tiny --batches 1

Rows go to benchmarks/results/serving_cpu.json, and replace those of the same model, size and batch there.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS, provenance, save, show, stored
from torch import nn

import attnopt
from attnopt.runtime import Engine, SamplingParams
from attnopt.serving import ServingModel

WIDTHS = {"tiny": (64, 2, 4, 128), "mid": (512, 8, 8, 8192)}
"""Hidden size, layers, heads and vocabulary."""
LONGEST = 1024


def model_of(kind: str, size: str) -> Any:
    hidden, layers, heads, vocabulary = WIDTHS[size]
    common: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(n_positions=LONGEST, n_embd=hidden, n_layer=layers, n_head=heads, **common)
    else:
        config = transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=LONGEST, **common
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # a stop token would end a text before the others
    for p in model.parameters():
        p.requires_grad_(False)
    return model


def served(model: Any, vocabulary: int) -> ServingModel:
    model.set_attn_implementation("eager")
    made = attnopt.optimize(model, (), kwargs={"input_ids": torch.randint(3, vocabulary, (2, 24)), "use_cache": False}, config=attnopt.OptimizeConfig(kv_cache="paged"))
    model.set_attn_implementation("sdpa")
    assert isinstance(made, ServingModel)
    return made


def by_transformers(model: nn.Module, texts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
    """Tokens, seconds of the whole call, and of a step: what is left of it without a call for an eighth of the tokens."""
    ids = torch.tensor(texts)

    def call(n: int) -> tuple[list[list[int]], float]:
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False, use_cache=True)  # type: ignore[operator]
        return out[:, ids.shape[1] :].tolist(), time.perf_counter() - start

    less = max(1, new // 8)
    (tokens, seconds), (_, short) = call(new), call(less)
    return tokens, seconds, (seconds - short) / (new - less)


def by_attnopt(engine: Engine, texts: list[list[int]], new: int) -> tuple[list[list[int]], float, float]:
    start = time.perf_counter()
    requests = [engine.add(x, SamplingParams(max_new_tokens=new)) for x in texts]
    steps = []
    while engine.scheduler.busy:
        whole, begin = all(r.output for r in requests), time.perf_counter()
        engine.step()
        if whole:
            steps.append(time.perf_counter() - begin)
    return [list(r.output) for r in requests], time.perf_counter() - start, statistics.mean(steps)


def cell(kind: str, size: str, batches: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    vocabulary = WIDTHS[size][3]
    model = model_of(kind, size)
    serving = served(model, vocabulary)
    rows = []
    for batch in batches:
        g = torch.Generator().manual_seed(batch)
        texts = torch.randint(3, vocabulary, (batch, options.prompt), generator=g).tolist()
        # prefixes are not shared: each run would find the prompts of the one before
        engine = serving.engine(pages=batch * -(-(options.prompt + options.new) // 16), prefix_sharing=False)
        pairs = [(by_transformers(model, texts, options.new), by_attnopt(engine, texts, options.new)) for _ in range(options.pairs + 1)][1:]
        same = statistics.mean(a == b for a, b in zip(*(chain(*x[0]) for x in pairs[0]), strict=True))
        whole, step = ([a[i] / b[i] for a, b in pairs] for i in (1, 2))
        row: dict[str, Any] = {"model": kind, "size": size, "batch": batch, "prompt": options.prompt, "new": options.new, "pairs": options.pairs}
        row |= {"faster": statistics.median(whole), "faster_least": min(whole), "faster_most": max(whole), "step_faster": statistics.median(step)}
        row |= {f"{name}_step_ms": statistics.median(p[i][2] for p in pairs) * 1e3 for i, name in enumerate(("transformers", "attnopt"))}
        rows.append(row | {"same_tokens": same})
        if options.profile:
            profiled = cProfile.Profile()
            profiled.runcall(by_attnopt, engine, texts, options.new)
            pstats.Stats(profiled).sort_stats("tottime").print_stats(40)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2,llama")
    parser.add_argument("--sizes", default=",".join(WIDTHS))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each prompt, at least 2")
    parser.add_argument("--pairs", type=int, default=7, help="pairs that are timed, after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print where the time of one more run goes")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving_cpu.json")
    options = parser.parse_args()
    for name, given, known in (("--models", options.models, ("gpt2", "llama")), ("--sizes", options.sizes, tuple(WIDTHS))):
        if unknown := [x for x in given.split(",") if x not in known]:
            parser.error(f"{name} has {', '.join(unknown)}; there are {', '.join(known)}.")
    if options.new < 2:
        parser.error(f"--new is {options.new}; at least 2 tokens make a step that can be timed.")
    torch.set_num_threads(options.threads)
    about, done = provenance(), []
    for kind in options.models.split(","):
        for size in options.sizes.split(","):
            found = [{**r, "threads": options.threads, **about} for r in cell(kind, size, [int(x) for x in options.batches.split(",")], options)]
            done += found
            new = {(r["model"], r["size"], r["batch"]) for r in found}
            save(options.output, [*(r for r in stored(options.output) if (r["model"], r["size"], r["batch"]) not in new), *found])
    keys = ("model", "size", "batch", "transformers_step_ms", "attnopt_step_ms", "step_faster", "faster", "faster_least", "faster_most", "same_tokens")
    show(f"generation of {options.new} tokens on the CPU, {options.threads} threads", [{k: r[k] for k in keys} for r in done], lines=False)


if __name__ == "__main__":
    main()
