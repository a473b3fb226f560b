"""Generation by a whole model: tokens per second beside transformers' ``generate``, and what fewer KV heads bring.

A decoder of Llama-8B's shape with random weights, made on the device, continues prompts of uneven lengths greedily, and every way does so from the same prompts to the same
number of tokens: attnopt's serving model (paged cache, continuous batching, CUDA graphs; also with what lies between attentions compiled, and with an fp8 cache), and ``generate`` with its dynamic cache
and with its static cache, which it compiles, both over padded prompts. Tokens per second are generated tokens over the time of the whole call, prompts included; ``step_ms`` is
the time of a step of one token each once all prompts are in. Each way has run before it is timed. Logits of a prompt are compared first; where they differ nothing is timed.

Cells: b1, b16, b64 (requests at once) and heads: MHA, GQA and MQA of equal size (the MLP makes up for the KV heads), a long context, many requests.

    python benchmarks/serving.py [--cells b1,b16,b64,heads] [--ways attnopt,dynamic,static] [--new 128] [--output FILE]
    python benchmarks/serving.py --device cpu --size tiny --dtype float32 --new 6

Rows go to benchmarks/results/serving.json after each cell, and replace those of the same cell and way there.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import RESULTS, provenance, save, show, stored
from running import message, patience
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

import attnopt
from attnopt.runtime import DecodeGraphs, Engine, SamplingParams
from attnopt.runtime.paged_cache import token_bytes
from attnopt.serving import ServingModel

DIFFERENT = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""norm(difference) / norm of logits from which two models compute different things."""
PAGE_SIZE = 16
LONGEST = 1024
"""Of the ragged prompts; the shortest has an eighth of that, and their mean is a little over half."""


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    longest: int = LONGEST

    def of(self, kv_heads: int) -> Size:
        """As many parameters with another number of KV heads: the MLP has what keys and values have not."""
        D = self.width // self.heads
        inner = self.inner + 2 * (self.kv_heads - kv_heads) * D // 3
        return Size(self.layers, self.width, self.heads, kv_heads, inner // 32 * 32, self.vocabulary, self.longest)


SIZES = {
    "8b": Size(32, 4096, 32, 8, 14336, 128256),
    "1b": Size(16, 2048, 32, 8, 8192, 128256),
    "tiny": Size(2, 64, 4, 2, 128, 128, 40),
}
BATCHES = {"b1": 1, "b16": 16, "b64": 64}
TINY_BATCHES = {"b1": 1, "b16": 3, "b64": 5}


def model_of(size: Size, device: torch.device, dtype: torch.dtype) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=8 * size.longest,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    # a stop token would end a text before the others
    model.generation_config.eos_token_id = None
    for p in model.parameters():
        p.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def ragged(count: int, size: Size) -> list[list[int]]:
    """Prompts of uneven lengths, the same in every run; one alone is half as long as the longest may be."""
    g = torch.Generator().manual_seed(1)
    lengths = [size.longest // 2] if count == 1 else torch.randint(size.longest // 8, size.longest + 1, (count,), generator=g).tolist()
    return [torch.randint(3, size.vocabulary, (n,), generator=g).tolist() for n in lengths]


def served(model: nn.Module, size: Size, device: torch.device, dtype: str | None = None) -> ServingModel:
    """The serving model, from an example of two short texts; the model's own weights."""
    ids = torch.randint(3, size.vocabulary, (2, 24), device=device)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    config = attnopt.OptimizeConfig(kv_cache="paged", kv_cache_dtype=dtype, verify=False)
    made = attnopt.optimize(model, (), kwargs={"input_ids": ids, "use_cache": False}, config=config)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    assert isinstance(made, ServingModel)
    return made


# ------------------------------------------------------------------------------------------------ ways to generate


@dataclass
class Run:
    tokens: list[list[int]]
    seconds: float
    step_ms: float | None
    note: str = ""


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def by_attnopt(serving: ServingModel, texts: list[list[int]], new: int, device: torch.device, compiled: bool = False) -> Callable[[], Run]:
    pages = sum(-(-(len(x) + new) // PAGE_SIZE) for x in texts)
    # prefixes are not shared: each run would find the prompts of the one before
    engine = serving.engine(page_size=PAGE_SIZE, pages=pages, token_budget=8192, prefix_sharing=False, compile=compiled)
    params = SamplingParams(max_new_tokens=new)

    def run() -> Run:
        begin = now(device)
        requests = [engine.add(x, params) for x in texts]
        steps: list[float] = []
        while engine.scheduler.busy:
            whole = all(r.output for r in requests)
            start = time.perf_counter()
            engine.step()  # it has read its tokens; the device may be at the next step already, so nothing waits for it here
            if whole:
                steps.append(time.perf_counter() - start)
        seconds = now(device) - begin
        return Run([list(r.output) for r in requests], seconds, statistics.median(steps) * 1e3 if steps else None, graphs_said(engine))

    return run


def graphs_said(engine: Engine) -> str:
    assert isinstance(engine.run, DecodeGraphs)
    return engine.run.reason or f"{engine.run.replays} steps replayed from {engine.run.recorded} graphs"


def by_transformers(model: Any, texts: list[list[int]], new: int, device: torch.device, static: bool) -> Callable[[], Run]:
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for r, text in enumerate(texts):
        ids[r, width - len(text) :] = torch.tensor(text, device=device)
        mask[r, width - len(text) :] = 1
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "use_cache": True, **({"cache_implementation": "static"} if static else {})}

    def run() -> Run:
        clock = Clock()
        start = now(device)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, stopping_criteria=StoppingCriteriaList([clock]), **options)
        seconds = now(device) - start
        steps = [after - before for before, after in itertools.pairwise(clock.times)]
        return Run(out[:, width:].tolist(), seconds, statistics.median(steps) * 1e3 if steps else None)

    return run


class Clock(StoppingCriteria):
    """Notes when each token came. It stops nothing and waits for nothing: generate itself reads after each step whether all requests are done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


WAYS = ("attnopt", "attnopt+compile", "attnopt fp8", "attnopt fp8+compile", "dynamic", "static")


# ------------------------------------------------------------------------------------------------ cells


def measured(run: Callable[[], Run], repeats: int) -> tuple[Run, list[float]]:
    """The median of ``repeats`` runs after one that is not counted."""
    run()
    runs = sorted((run() for _ in range(repeats)), key=lambda r: r.seconds)
    return runs[len(runs) // 2], [r.seconds for r in runs]


def compared(model: Any, serving: ServingModel, text: list[int], device: torch.device, dtype: torch.dtype) -> float:
    """The difference between both models' logits of one prompt. Raises SystemExit where they compute different things."""
    n = len(text)
    caches = serving.new_caches(-(-n // PAGE_SIZE), PAGE_SIZE, device)
    ids, place = torch.tensor(text, device=device), torch.arange(n, device=device)
    table = torch.arange(len(caches[0][0]), dtype=torch.int32, device=device)[None]
    bounds, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, n], [n]))
    with torch.no_grad():
        got = serving.run(ids, place, place, table, bounds, lengths, caches).float()
        want = model(ids[None], use_cache=False).logits[0].float()
    off = float((got - want).norm() / want.norm())
    if not off <= DIFFERENT[dtype]:
        raise SystemExit(f"The serving model's logits differ from the model's by {off:.3g}, more than {DIFFERENT[dtype]:g}; nothing is timed.")
    return off


def batch_cell(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    size: Size = options.shape
    device, dtype = options.place, options.torch_dtype
    texts = ragged((TINY_BATCHES if options.size == "tiny" else BATCHES)[name], size)
    start = now(device)
    model = model_of(size, device, dtype)
    made = now(device) - start
    rows: list[dict[str, Any]] = []
    tokens: dict[str, list[list[int]]] = {}
    made_of: dict[str | None, ServingModel] = {}
    for way in options.ways:
        row: dict[str, Any] = {
            "cell": name,
            "way": way,
            "requests": len(texts),
            "prompt_tokens": sum(map(len, texts)),
            "new": options.new,
            "status": "ok",
            "note": "",
        }
        row |= {"tokens_per_s": None, "step_ms": None, "seconds": None, "peak_gib": None, "size": options.size, "dtype": options.dtype}
        start = now(device)
        try:
            with patience(options.patience):
                if way.startswith("attnopt"):
                    kept_in = "fp8" if "fp8" in way else None
                    if kept_in not in made_of:
                        made_of[kept_in] = served(model, size, device, kept_in)
                        row["optimize_s"] = round(now(device) - start, 1)
                    serving = made_of[kept_in]
                    if way == "attnopt":
                        row["logits_off"] = compared(model, serving, texts[0], device, dtype)
                    run = by_attnopt(serving, texts, options.new, device, way.endswith("+compile"))
                else:
                    run = by_transformers(model, texts, options.new, device, way == "static")
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                found, seconds = measured(run, options.repeats)
        except Exception as e:  # noqa: BLE001 - a way that fails has a row that says why
            rows.append({**row, "status": "failed", "note": message(e)})
            print(f"{name} {way}: {message(e)}", flush=True)
        else:
            tokens[way] = found.tokens
            row |= {
                "tokens_per_s": len(texts) * options.new / found.seconds,
                "step_ms": found.step_ms,
                "seconds": found.seconds,
                "runs": seconds,
                "note": found.note,
            }
            if device.type == "cuda":
                row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            rows.append(row)
            print(f"{name} {way}: {row['tokens_per_s']:.1f} tokens/s ({now(device) - start:.0f} s; model made in {made:.0f} s)", flush=True)
        run = None  # type: ignore[assignment]
        released(device)
    for row in rows:
        if row["way"] in tokens and "dynamic" in tokens:
            row["same_tokens"] = agreement(tokens[row["way"]], tokens["dynamic"])
    return rows


def agreement(ours: list[list[int]], others: list[list[int]]) -> float:
    """How much of each text is the same from its beginning on, on average: after one other token texts differ."""
    parts = []
    for a, b in zip(ours, others, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        parts.append(same / len(a))
    return statistics.mean(parts)


def heads_cell(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of steps of one token each, over caches that are full to ``--context``."""
    device, dtype, rows = options.place, options.torch_dtype, []
    base: Size = options.shape
    tiny = options.size == "tiny"
    layers = base.layers if tiny else min(base.layers, options.layers)
    base = Size(layers, base.width, base.heads, base.kv_heads, base.inner, base.vocabulary if tiny else 32000, base.longest)
    context, requests = (40, 3) if tiny else (options.context, options.requests)
    for name, kv_heads in (("MHA", base.heads), ("GQA", base.kv_heads), ("MQA", 1)):
        size = base.of(kv_heads)
        model = model_of(size, device, dtype)
        serving = served(model, size, device)
        off = compared(model, serving, ragged(1, size)[0], device, dtype)
        g = torch.Generator().manual_seed(2)
        texts = [torch.randint(3, size.vocabulary, (context,), generator=g).tolist() for _ in range(requests)]
        found, _ = measured(by_attnopt(serving, texts, options.new, device), 1)
        assert found.step_ms is not None
        row: dict[str, Any] = {
            "cell": "heads",
            "way": name,
            "kv_heads": kv_heads,
            "layers": size.layers,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        row |= {
            "cache_bytes_per_token": token_bytes(serving.layers),
            "requests": requests,
            "context": context,
            "new": options.new,
        }
        row |= {
            "cache_gib": row["cache_bytes_per_token"] * requests * context / 2**30,
            "step_ms": found.step_ms,
            "tokens_per_s": requests / found.step_ms * 1e3,
        }
        rows.append({**row, "logits_off": off, "status": "ok", "note": found.note, "size": options.size, "dtype": options.dtype})
        print(f"heads {name}: {row['tokens_per_s']:.1f} tokens/s", flush=True)
        del model, serving
        released(device)
    for row in rows:
        row["over_mha"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


def released(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]]) -> None:
    cells = [r for r in rows if r["cell"] != "heads"]
    if cells:
        lines = []
        for r in cells:
            of = {x["way"]: x["tokens_per_s"] for x in cells if x["cell"] == r["cell"] and x["tokens_per_s"]}
            ratios = {f"over {w}": r["tokens_per_s"] / of[w] if r["tokens_per_s"] and w in of and w != r["way"] else None for w in ("dynamic", "static")}
            lines.append({k: r.get(k) for k in ("cell", "way", "tokens_per_s", "step_ms", "peak_gib", "same_tokens", "note")} | ratios)
        show("generated tokens per second, prompts included", lines, lines=False)
    if heads := [r for r in rows if r["cell"] == "heads"]:
        keys = ("way", "kv_heads", "parameters", "cache_bytes_per_token", "cache_gib", "step_ms", "tokens_per_s", "over_mha")
        show(f"KV heads at equal size: {heads[0]['requests']} requests of {heads[0]['context']} tokens", [{k: r[k] for k in keys} for r in heads], lines=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cells = (*BATCHES, "heads")
    parser.add_argument("--cells", default=",".join(cells), help="names, separated by commas")
    parser.add_argument("--ways", default="attnopt,attnopt+compile,dynamic,static", help=f"names, separated by commas, of {', '.join(WAYS)}")
    parser.add_argument("--size", default="8b", choices=list(SIZES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=[str(d).removeprefix("torch.") for d in DIFFERENT])
    parser.add_argument("--new", type=int, default=128, help="tokens to generate for each prompt, at least 2")
    parser.add_argument("--repeats", type=int, default=1, help="runs that are timed, after one that is not")
    parser.add_argument("--layers", type=int, default=8, help="of the models of the cell heads, at most")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each prompt of the cell heads")
    parser.add_argument("--requests", type=int, default=64, help="of the cell heads")
    parser.add_argument("--patience", type=int, default=200, help="seconds for one way of one cell")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.json")
    options = parser.parse_args()
    for name, given, known in (("--cells", options.cells, cells), ("--ways", options.ways, WAYS)):
        if unknown := [x for x in given.split(",") if x not in known]:
            parser.error(f"{name} has {', '.join(unknown)}; there are {', '.join(known)}.")
    if options.new < 2:
        parser.error(f"--new is {options.new}; at least 2 tokens make a step that can be timed.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/serving.py times on a CUDA device, and PyTorch sees none; --device cpu --size tiny --dtype float32 tries the script.")
    options.ways = options.ways.split(",")
    options.place, options.torch_dtype, options.shape = torch.device(options.device), getattr(torch, options.dtype), SIZES[options.size]
    about = provenance()
    done: list[dict[str, Any]] = []
    for cell in options.cells.split(","):
        start = time.perf_counter()
        found = [{**r, **about} for r in (heads_cell(options) if cell == "heads" else batch_cell(cell, options))]
        done += found
        new = {(r["cell"], r["way"]) for r in found}
        save(options.output, [*(r for r in stored(options.output) if (r["cell"], r["way"]) not in new), *found])
        print(f"{cell}: {time.perf_counter() - start:.0f} s", flush=True)
    table(done)


if __name__ == "__main__":
    main()
