"""Decoding in ONNX Runtime on a CPU by the forms of file that attnopt exports: a past that grows, in both targets, and a static cache, copied or in place.

Two layers of each model, as in benchmarks/onnx_export.py. A prompt and then single tokens run in turn in one process, a round after the other, and medians are
taken, since other work may run on the machine. Ratios are medians of the rounds' own.

    python benchmarks/onnx_decode.py [llama gpt2] [--past 2000] [--max-length 2048] [--batch 1] [--rounds 9]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from common import RESULTS, provenance, save, show, stored
from onnx_models import MODELS, tokens

import attnopt
from attnopt.config import OptimizeConfig

RESULT = RESULTS / "onnx_decode.json"
BASE = "growing, onnx"
FORMS: dict[str, dict[str, Any]] = {
    BASE: {"with_past": True},
    "growing, ort": {"with_past": True, "target": "ort"},
    "static": {"with_past": "static"},
    "static, in place": {"with_past": "static"},
}
Step = Callable[[np.ndarray[Any, Any], int], np.ndarray[Any, Any]]
"""``step(tokens, past) -> logits``: keys and values of that many earlier tokens are there already."""


def growing(session: onnxruntime.InferenceSession) -> Step:
    names = [o.name for o in session.get_outputs()]
    held: dict[str, Any] = {}

    def step(ids: np.ndarray[Any, Any], past: int) -> np.ndarray[Any, Any]:
        b, n = ids.shape
        if past == 0:
            held.clear()
            held.update({i.name: np.zeros((b, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs() if i.name.startswith("past_key_values.")})
        before = {name: x[:, :, :past] for name, x in held.items()}
        feed = {"input_ids": ids, "attention_mask": np.ones((b, past + n), np.int64), "position_ids": np.tile(np.arange(past, past + n), (b, 1)), **before}
        found = dict(zip(names, session.run(None, {i.name: feed[i.name] for i in session.get_inputs()}), strict=True))
        held.update({name: found[name.replace("past_key_values", "present")] for name in held})
        return found["logits"]  # type: ignore[no-any-return]

    return step


def static(session: onnxruntime.InferenceSession, in_place: bool) -> Step:
    caches: dict[str, Any] = {}

    def step(ids: np.ndarray[Any, Any], past: int) -> np.ndarray[Any, Any]:
        b = len(ids)
        shapes = {i.name: (b, *i.shape[1:]) for i in session.get_inputs()[2:]}
        if past == 0:
            caches.update({name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name, shape in shapes.items()})
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("write_indices", np.full(b, past))
        binding.bind_output("logits")
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, cache)
            present = name.replace("past_key_values", "present")
            if in_place:
                binding.bind_ortvalue_output(present, cache)
            else:
                binding.bind_output(present)
        session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        caches.update(zip(caches, caches.values() if in_place else present, strict=True))
        return logits.numpy()  # type: ignore[no-any-return]

    return step


def measure(name: str, batch: int, past: int, max_length: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    model = MODELS[name]
    steps: dict[str, Step] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form, options in FORMS.items():
            path = Path(folder) / f"{len(steps)}.onnx"
            inputs = {**model.example(2, 40), "use_cache": False}
            config = OptimizeConfig(backend="reference", verify=False, capture="export")
            sized = {**options, "max_length": max_length} if options["with_past"] == "static" else options
            attnopt.optimize(model.build("eager"), kwargs=inputs, config=config).export_onnx(path, **sized)
            settings = onnxruntime.SessionOptions()
            settings.log_severity_level, settings.intra_op_num_threads = 3, threads
            session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
            steps[form] = static(session, "in place" in form) if options["with_past"] == "static" else growing(session)
    prompt, token = tokens(batch, past).numpy(), tokens(batch, 1).numpy()
    times: dict[str, dict[str, list[float]]] = {form: {"prompt": [], "token": []} for form in FORMS}
    results: dict[str, np.ndarray[Any, Any]] = {}
    for i in range(rounds):
        turns = list(FORMS)
        for form in turns[i % len(turns) :] + turns[: i % len(turns)]:  # nobody is always first
            for what, ids, before in (("prompt", prompt, 0), ("token", token, past)):
                start = time.perf_counter()
                results[form] = steps[form](ids, before)
                times[form][what].append(time.perf_counter() - start)
    rows = []
    for form, found in times.items():
        row: dict[str, Any] = {"model": name, "B": batch, "past": past, "max_length": max_length, "form": form}
        row["error"] = float(np.linalg.norm(results[form] - results[BASE]) / np.linalg.norm(results[BASE]))
        for what, t in found.items():
            row[f"{what} ms"] = statistics.median(t) * 1e3
            row[f"{what} time"] = statistics.median(a / b for a, b in zip(t, times[BASE][what], strict=True))
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=["llama", "gpt2"])
    parser.add_argument("--past", type=int, default=2000)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    for name in options.models:
        rows = [{**r, "threads": options.threads, "onnxruntime": onnxruntime.__version__, **provenance()} for r in measure(name, options.batch, options.past, options.max_length, options.rounds, options.threads)]
        case = {k: rows[0][k] for k in ("model", "B", "past", "max_length")}
        show(f"{name}: times relative to {BASE}", [{k: r[k] for k in ("form", "prompt ms", "prompt time", "token ms", "token time", "error")} for r in rows])
        save(RESULT, [*(r for r in stored(RESULT) if any(r[k] != v for k, v in case.items())), *rows])


if __name__ == "__main__":
    main()
