"""Generation before and after: tokens per second of the original model and of the serving model made of it, in turn, on the same prompts."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from attnopt.cli.measure import Measured, peak_memory
from attnopt.errors import AttnoptError
from attnopt.runtime import SamplingParams

if TYPE_CHECKING:
    import torch
    from torch import nn

    from attnopt.serving import ServingModel

Generate = Callable[[list[list[int]], int], list[list[int]]]
RUNS = 3
_BRIEF = 32
"""Tokens of a prompt, and of its continuation."""
_BRIEF_SECONDS = 5.0


@dataclass(frozen=True)
class Decoded:
    """One case: ``batch`` prompts of ``prompt`` tokens are continued greedily by ``new`` tokens each. Times are of all that, the prompts included."""

    batch: int
    prompt: int
    new: int
    original: Measured
    serving: Measured
    same: int
    """How many of the texts are the same, token by token."""

    @property
    def speedup(self) -> float:
        return self.original.seconds / self.serving.seconds

    def rate(self, m: Measured) -> float:
        """Generated tokens per second, of all prompts together."""
        return self.batch * self.new / m.seconds

    def to_dict(self) -> dict[str, Any]:
        rates = {"original_tokens_per_second": self.rate(self.original), "serving_tokens_per_second": self.rate(self.serving)}
        return {**asdict(self), **rates, "speedup": self.speedup}


@dataclass(frozen=True)
class Decoding:
    """All cases of one model, and ``how`` the original generated."""

    how: str
    cases: tuple[Decoded, ...]

    def __str__(self) -> str:
        best = max(self.cases, key=lambda x: x.speedup)
        rates = best.rate(best.serving), best.rate(best.original)
        return f"{rates[0]:.0f} tokens/s where the original has {rates[1]:.0f}, at best ({best.batch} x {best.prompt} tokens)"

    def to_dict(self) -> dict[str, Any]:
        return {"original": self.how, "cases": [x.to_dict() for x in self.cases]}


def decode_briefly(model: nn.Module, serving: ServingModel, progress: Callable[[int, int], None] | None = None) -> Decoding | None:
    """One prompt and four of them, for an impression; None for a model that has too few positions for one, or that reads another sequence."""
    longest = serving.max_positions
    new = _BRIEF if longest is None else min(_BRIEF, longest // 2)
    if new < 1 or serving.context is not None:
        return None
    return decode(model, serving, (1, 4), (new,), new, seconds=_BRIEF_SECONDS, progress=progress)


def decode(
    model: nn.Module,
    serving: ServingModel,
    batches: Sequence[int],
    lengths: Sequence[int],
    new: int,
    *,
    options: dict[str, Any] | None = None,
    runs: int = RUNS,
    seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoding:
    """Every pair of a batch size and a prompt length: medians of ``runs``, after one that is not counted, and of fewer where these would take longer than ``seconds``.

    ``options`` are those of ``ServingModel.engine``. Raises AttnoptError for a length that the model has no positions for.
    """
    longest = serving.max_positions
    if longest is not None and max(lengths) + new - 1 > longest:
        raise AttnoptError(f"A prompt of {max(lengths)} tokens and {new} new ones need {max(lengths) + new - 1} positions, and the model has {longest}.")
    how, before = original_generate(model, serving)
    cases = [(b, n) for b in batches for n in lengths]
    found = []
    for i, (batch, length) in enumerate(cases):
        prompts = random_prompts(batch, length, serving.vocabulary)
        engine_options = {"max_requests": max(batch, 1), "prefix_sharing": False, **(options or {})}

        def after(prompts: list[list[int]], new: int, engine_options: dict[str, Any] = engine_options) -> list[list[int]]:
            results = serving.generate(prompts, SamplingParams(new), **engine_options)
            error = next((r.error for r in results if r.error is not None), None)
            if error is not None:
                raise error
            return [list(r.tokens) for r in results]

        found.append(_compared(batch, length, new, before, after, prompts, _device(model), runs, seconds))
        if progress is not None:
            progress(i + 1, len(cases))
    return Decoding(how, tuple(found))


def random_prompts(batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """The same ones each time."""
    import torch

    generator = torch.Generator().manual_seed(batch * 1_000_003 + length)
    found: list[list[int]] = torch.randint(0, vocabulary, (batch, length), generator=generator).tolist()
    return found


def original_generate(model: nn.Module, serving: ServingModel) -> tuple[str, Generate]:
    """How the original continues prompts of one length, and the words for it: its own ``generate`` with a cache, or the whole text through it for each token."""
    if callable(getattr(model, "generate", None)) and hasattr(model, "generation_config"):
        return "its own generate(), with a cache", lambda prompts, new: _with_its_cache(model, prompts, new)
    return "the whole text through the model for each token", lambda prompts, new: _whole_text(model, serving, prompts, new)


def _with_its_cache(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    import torch

    ids = torch.tensor(prompts, device=_device(model))
    with _without_end(model.generation_config):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0)
    found: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return found


@contextlib.contextmanager
def _without_end(config: Any) -> Iterator[None]:
    """All texts get the same number of tokens."""
    before = config.eos_token_id
    config.eos_token_id = None
    try:
        yield
    finally:
        config.eos_token_id = before


def _whole_text(model: nn.Module, serving: ServingModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    import torch

    assert serving.original is not None
    ids = torch.tensor(prompts, device=_device(model))
    with torch.no_grad():
        for _ in range(new):
            args, kwargs = serving.original.call(ids, serving.plan)
            logits = serving.original.logits(model(*args, **kwargs), serving.plan)
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    found: list[list[int]] = ids[:, len(prompts[0]) :].tolist()
    return found


def _compared(
    batch: int, length: int, new: int, before: Generate, after: Generate, prompts: list[list[int]], device: torch.device, runs: int, seconds: float | None
) -> Decoded:
    start = time.perf_counter()
    texts = [generate(prompts, new) for generate in (before, after)]
    if seconds is not None:
        runs = max(1, min(runs, int(seconds / (time.perf_counter() - start))))
    times: list[list[float]] = [[], []]
    for _ in range(runs):
        for generate, taken in zip((before, after), times, strict=True):
            start = time.perf_counter()
            generate(prompts, new)  # its tokens come back as numbers, so the device is done
            taken.append(time.perf_counter() - start)
    peaks = [peak_memory(lambda g=g: g(prompts, new), device) for g in (before, after)]  # type: ignore[misc]
    one, other = (Measured(statistics.median(t), p) for t, p in zip(times, peaks, strict=True))
    return Decoded(batch, length, new, one, other, sum(a == b for a, b in zip(*texts, strict=True)))


def _device(model: nn.Module) -> torch.device:
    import torch

    from attnopt.capture.run import device_of

    return device_of(model) or torch.device("cpu")
