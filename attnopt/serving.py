"""From a captured decoder to one that generates: ``optimize(model, inputs, config=OptimizeConfig(kv_cache="paged"))``.

The serving model runs packed tokens of many requests, prompts and generated tokens in one batch, and keeps keys and values in a paged cache that
the caller owns, or that ``generate`` and ``stream`` make for it (docs/serving.md). It is verified against the original on ragged requests before it is handed out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.capture.call import Args, Kwargs
from attnopt.capture.captured import Captured
from attnopt.capture.clone import clone_tree, tensors_of
from attnopt.capture.export import DynamicShapes, capture
from attnopt.config import OptimizeConfig
from attnopt.emit.function import GraphFunction, graph_function
from attnopt.errors import ServingError, VerificationError
from attnopt.passes.insert_kv_cache import CONTEXT, PLAN, CacheLayer, InsertKVCache, PackedPlan
from attnopt.passes.pipeline import PipelineResult, lowered, run_pipeline
from attnopt.remarks import Remark
from attnopt.report import Report, Verdict
from attnopt.runtime import Engine, Event, PagedCache, Result, SamplingParams
from attnopt.verify.packed import verify_packed

Progress = Callable[[str, int, int], None]
Params = SamplingParams | Sequence[SamplingParams] | None
_CACHE_BYTES = 4 << 30
"""The most that the cache of ``generate`` takes where nothing else is said."""
_PAGE_SIZE = 16
_LONGEST = 1 << 20
"""A capture that holds for this many tokens is taken to hold for more."""


class ServingModel(nn.Module):
    """A decoder over packed tokens, with the parameters, buffers and ``state_dict`` keys of the original, which it shares.

    ``layers`` says what each attention caches of a token, ``vocabulary`` how many logits there are, and ``max_positions`` how many tokens a request may
    have (None: as many as the cache holds). It stays in the dtype and on the device that it was made for.
    """

    def __init__(self, model: nn.Module, function: GraphFunction, plan: PackedPlan, report: Report, context: GraphFunction | None = None) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = False
        self.function = function
        self.context = context
        self.plan = plan
        self.attnopt_report = report
        self.original: OriginalCall | None = None
        """How the model that this one was made of is called, for whoever compares the two."""

    @property
    def layers(self) -> tuple[CacheLayer, ...]:
        return self.plan.layers

    @property
    def vocabulary(self) -> int:
        return self.plan.vocabulary

    @property
    def max_positions(self) -> int | None:
        return self.plan.max_positions

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        block_table: Tensor,
        cu_seqlens_q: Tensor,
        seqlens_k: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        rows: Tensor | None = None,
        cross: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One step: logits [N, V] of the tokens whose places in the batch ``rows`` int64 [N] names, of all T tokens without it.

        tokens, positions and slots int64 [T] are packed, those of request r at ``cu_seqlens_q[r] .. cu_seqlens_q[r + 1]``; its keys and values, these tokens' included,
        are the first ``seqlens_k[r]`` in the pages ``block_table[r]``. A token is written at slot page * page_size + offset of each layer's
        ``(k_cache [pages, page_size, Hkv, D], v_cache [pages, page_size, Hkv, Dv])``, which are changed in place; at slot -1 it is not written.
        ``cross`` is (block table [R, max_pages], lengths [R]) of the other sequences, whose keys and values, those of ``encode``, stand in the caches of layers that are ``cross``.
        """
        if (cross is None) != (self.context is None):
            raise ServingError(f"This model {'reads another sequence, and cross was not given' if cross is None else 'reads no other sequence, and cross was given'}.")
        rows = torch.arange(tokens.shape[0], device=tokens.device) if rows is None else rows
        with torch.no_grad():
            out: Tensor = self._call(tokens, positions, rows, slots, block_table, cu_seqlens_q, seqlens_k, *(cross or ()), *(x for pair in caches for x in pair))
        return out

    def encode(self, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys [S, Hkv, D] and values [S, Hkv, Dv] of one request's other sequence, for each layer that is ``cross``.

        ``inputs`` are those that ``plan.context`` names, each a batch of one, without padding.
        """
        if self.context is None:
            raise ServingError("This model reads no other sequence; encode is for those that do.")
        if len(inputs) != len(self.plan.context) or any(x.shape[:1] != (1,) for x in inputs):
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs) or "none"
            raise ServingError(f"encode takes {', '.join(self.plan.context)}, each a batch of one; it was given tensors of shape {shapes}.")
        with torch.no_grad():
            found = self.context.run(self, *inputs, *self.context.constants)[0]
        return list(zip(found[0::2], found[1::2], strict=True))

    def _call(self, *inputs: Tensor) -> Tensor:
        """The graph, on its inputs in their order."""
        found: Tensor = self.function.run(self, *inputs, *self.function.constants)[0]
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ServingModel:
        raise ServingError(
            "A serving model stays in the dtype and on the device that it was made for.", "Move the original model, and make a serving model of it there."
        )

    run = forward

    def engine(self, *, page_size: int | None = None, pages: int | None = None, size_bytes: int | None = None, **options: Any) -> Engine:
        """An engine for this model with a cache of its own, of ``pages`` pages or ``size_bytes`` bytes. ``options`` are ``Engine``'s: token_budget, chunk, ...

        ``page_size`` is 16 tokens where nothing is said. In a contiguous cache it is how many tokens a request may have, by default as many as the model has positions for.
        """
        if self.context is not None:
            raise ServingError("This model reads another sequence, which the engine does not hold yet; call encode and run instead.")
        windows = [x.window for x in self.layers]
        window = None if None in windows else max(x for x in windows if x is not None)
        if self.plan.layout == "contiguous":
            page_size = self.max_positions if page_size is None else page_size
            if page_size is None:
                raise ServingError("The model computes its positions, so it does not say how long a request may become; a contiguous cache needs page_size, in tokens.")
            # a page that ends with its request holds nothing of the next, and is never dead before it ends
            options, window = {"prefix_sharing": False, **options, "contiguous": True}, None
        place = next((x.device for x in (*self.parameters(), *self.buffers())), None)
        cache = PagedCache(self.layers, _PAGE_SIZE if page_size is None else page_size, pages, size_bytes, place)

        def run(tokens: Tensor, positions: Tensor, slots: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, rows: Tensor) -> Tensor:
            return self.run(tokens, positions, slots, block_table, cu_seqlens_q, seqlens_k, cache.tensors, rows)

        return Engine(run, cache, vocabulary=self.vocabulary, max_positions=self.max_positions, window=window, **options)

    def generate(self, prompts: Sequence[Sequence[int]], params: Params = None, *, progress: bool = False, **options: Any) -> list[Result]:
        """Continue each prompt (token ids), all in one engine. See ``Engine.generate``; ``options`` are those of ``engine``.

        """
        return self.engine_for(prompts, params, **options).generate(prompts, params, progress)

    def stream(self, prompts: Sequence[Sequence[int]], params: Params = None, **options: Any) -> Iterator[Event]:
        """Tokens as they come. See ``Engine.stream``, and ``generate`` for ``options``."""
        return self.engine_for(prompts, params, **options).stream(prompts, params)

    def engine_for(self, prompts: Sequence[Sequence[int]], params: Params = None, **options: Any) -> Engine:
        """An engine for these prompts, which are not added to it. ``options`` are those of ``engine``.

        Without ``pages`` and ``size_bytes`` the cache holds all that those of them that run at once may come to, or takes 4 GiB where that would be more.
        """
        rules = [params or SamplingParams()] * len(prompts) if params is None or isinstance(params, SamplingParams) else params
        ends = [min(len(p) + r.max_new_tokens, self.max_positions or _LONGEST) for p, r in zip(prompts, rules, strict=False)]
        if self.plan.layout == "contiguous":
            options = {"page_size": max(ends, default=1), **options}
        if options.get("pages") is not None or options.get("size_bytes") is not None:
            return self.engine(**options)
        page_size = max(1, options.get("page_size", _PAGE_SIZE))
        page_bytes = page_size * sum(x.Hkv * (x.D + x.Dv) * x.dtype.itemsize for x in self.layers)
        wanted = sorted((-(-n // page_size) for n in ends), reverse=True)
        at_once = sum(wanted[: options.get("max_requests")])
        return self.engine(**options, pages=max(1, min(at_once, _CACHE_BYTES // page_bytes)))

    def new_caches(self, pages: int, page_size: int, device: torch.device | str | None = None) -> list[tuple[Tensor, Tensor]]:
        """Empty caches for ``run``: (k_cache, v_cache) of each layer, of ``pages`` pages of ``page_size`` tokens."""
        place = next(self.parameters()).device if device is None else device
        return [
            (torch.zeros(pages, page_size, x.Hkv, x.D, dtype=x.dtype, device=place), torch.zeros(pages, page_size, x.Hkv, x.Dv, dtype=x.dtype, device=place)) for x in self.layers
        ]


@dataclass(frozen=True)
class OriginalCall:
    """How the original is called, and what it gives: the leaves of its example call, by the names that its graph has for them."""

    names: tuple[str, ...]
    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec
    output: int | None = None
    """The place among its results of what it calls its logits; None where it has no such name, or one result only."""

    def positions(self) -> tuple[str, ...]:
        """Inputs that count 0, 1, 2, ... in the example, where another one can hold the ids: integers [B, S] that are no mask of zeros and ones."""
        found = tuple(n for n, x in zip(self.names, self.leaves, strict=True) if _counts(x))
        others = [x for n, x in zip(self.names, self.leaves, strict=True) if n not in found and isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point()]
        return found if any(not x.is_meta and bool((x > 1).any()) for x in others) else ()

    def row(self, name: str, request: int) -> Tensor:
        """One row of an input of the example."""
        x: Tensor = self.leaves[self.names.index(name)]
        return x[request % x.shape[0]][None]

    def call(self, ids: Tensor, plan: PackedPlan, request: int = 0) -> tuple[Args, Kwargs]:
        """The call for requests ids [B, n] of one length, without padding. What another sequence is made of is a row of the example, for one request."""
        tokens, positions = plan.ids, self.positions()
        size = next(x.shape for name, x in zip(self.names, self.leaves, strict=True) if name == tokens)
        out: list[Any] = []
        for name, x in zip(self.names, self.leaves, strict=True):
            if name in plan.context:
                x = self.row(name, request)
            elif plan.context and isinstance(x, Tensor) and name != tokens and x.shape[:1] == size[:1] and x.shape != size:
                x = torch.ones_like(x[:1])
            elif name == tokens:
                x = ids.to(x.dtype)
            elif name in positions:
                x = torch.arange(ids.shape[1], dtype=x.dtype, device=x.device).expand(ids.shape if x.dim() == 2 else ids.shape[1:])
            elif isinstance(x, Tensor) and x.shape == size:
                x = torch.ones(ids.shape, dtype=x.dtype, device=x.device)
            out.append(x)
        args, kwargs = pytree.tree_unflatten(out, self.structure)
        return args, kwargs

    def logits(self, result: Any, plan: PackedPlan) -> Tensor:
        """[B, n, V], or [B, 1, V] of the last token, out of the original's result."""
        found = pytree.tree_leaves(result)
        x: Tensor = found[self.output] if self.output is not None else next(x for x in found if isinstance(x, Tensor) and x.is_floating_point())
        return x[:, None] if plan.last_only and x.dim() == 2 else x


@dataclass(frozen=True)
class _Call:
    """The example call by its roles: which leaf holds the ids, which the positions, and where the logits stand among the results."""

    captured: Captured
    form: OriginalCall

    @staticmethod
    def of(captured: Captured) -> _Call:
        leaves, structure = pytree.tree_flatten((captured.example.args, captured.example.kwargs))
        names = tuple(str(n.target) for n in captured.graph_module.graph.find_nodes(op="placeholder"))
        return _Call(captured, OriginalCall(names, tuple(leaves), structure, _logits_place(captured)))

    def longest(self, plan: PackedPlan) -> int | None:
        """How many tokens a request may have: as many as the tables of the model and its capture admit; None where nothing limits them.

        Raises ServingError where the capture does not hold for all shorter requests.
        """
        bounds = [d.upper for d in self.captured.example.dynamic if self.form.names[d.leaf] == plan.ids and d.dim == 1]
        known = min((n for n in (*bounds, plan.max_positions) if n is not None), default=None)
        low, high = 1, known or _LONGEST
        if self._holds(high, plan):
            low = high
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if self._holds(middle, plan) else (low, middle)
        gap = next((n for n in (*range(1, min(low, 64) + 1), low) if not self._holds(n, plan)), None)
        if gap is not None:
            raise ServingError(f"The capture of the model does not hold for a single request of {gap} tokens.", "Its report says for which sizes it holds (AO301).")
        return known if low in (known, _LONGEST) else low

    def _holds(self, length: int, plan: PackedPlan) -> bool:
        """Whether the captured graph may be used for one request of this length."""
        args, kwargs = self.form.call(torch.empty((1, length), dtype=torch.int64, device="meta"), plan)
        return self.captured.example.holds(pytree.tree_leaves((args, kwargs)))


def _logits_place(captured: Captured) -> int | None:
    info = captured.graph_module.graph._codegen.pytree_info  # type: ignore[attr-defined]
    result = pytree.tree_unflatten(list(range(info.out_spec.num_leaves)), info.out_spec)
    named = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    return named if isinstance(named, int) else None


def _counts(x: Any) -> bool:
    return (
        isinstance(x, Tensor) and not x.is_floating_point() and not x.is_meta and x.dim() in (1, 2) and x.shape[-1] > 1
        and bool((x == torch.arange(x.shape[-1], device=x.device)).all())
    )  # fmt: skip


def rewrite(model: nn.Module, args: Args, kwargs: Kwargs, dynamic_shapes: DynamicShapes, config: OptimizeConfig, check: bool = True) -> tuple[_Call, PipelineResult, Report]:
    """Capture a decoder and rewrite it to packed tokens. Where that is refused the result's graph has no plan, and the report says why."""
    captured = capture(model, args, kwargs, dynamic_shapes, check=check)
    call = _Call.of(captured)
    start = time.perf_counter()
    result = run_pipeline(captured.graph_module, config, cache=InsertKVCache(call.form.positions(), call.form.output, config.backend, config.kv_cache or "paged"))
    seconds = {"capture": captured.seconds, "passes": time.perf_counter() - start}
    return call, result, Report(result.sites, [*captured.remarks, *result.remarks], seconds=seconds)


def serve(model: nn.Module, args: Args, kwargs: Kwargs, dynamic_shapes: DynamicShapes, config: OptimizeConfig, progress: Progress | None = None) -> ServingModel:
    """A serving model of ``model``, verified. Raises ServingError where it cannot be served, and VerificationError where the result differs."""
    call, result, report = rewrite(model, args, kwargs, dynamic_shapes, config)
    plan = result.graph_module.meta.get(PLAN)
    if plan is None:
        raise _refused(model, report)
    plan = replace(plan, max_positions=call.longest(plan))
    module = result.graph_module.meta.get(CONTEXT)
    context = None if module is None else graph_function(lowered(module, config), model)
    serving = ServingModel(clone_tree(model), graph_function(result.graph_module, model), plan, report, context)
    serving.original = call.form
    if not config.verify:
        report.remarks.append(Remark("AO304", "Not compared with the original: verify=False."))
        return serving
    start = time.perf_counter()
    report.verdict = _verdict(model, serving, call, progress)
    report.seconds["verify"] = time.perf_counter() - start
    if report.verdict.passed is None:
        report.remarks.append(Remark("AO304", "Not compared with the original: the weights are on the meta device."))
    elif not report.verdict.passed:
        worst = report.verdict.worst
        assert worst is not None
        raise VerificationError(f"The serving model differs from {type(model).__name__}: {worst.name}: error {worst.error:.2e}, budget {worst.budget:.2e}.")
    return serving


def _verdict(model: nn.Module, serving: ServingModel, call: _Call, progress: Progress | None) -> Verdict:
    plan = serving.plan
    if any(t.is_meta for t in tensors_of(serving)):
        return Verdict()
    example = next(x for name, x in zip(call.form.names, call.form.leaves, strict=True) if name == plan.ids)
    return verify_packed(
        clone_tree(model),
        serving._call,
        plan,
        example,
        lambda ids, request: call.form.call(ids, plan, request),
        lambda result: call.form.logits(result, plan),
        None if serving.context is None else lambda request: serving.encode(*(call.form.row(name, request) for name in plan.context)),
        progress,
    )


def _refused(model: nn.Module, report: Report) -> ServingError:
    why = next(r for r in report.remarks if r.level == "missed")
    missed = "".join(f" {s.name} was not understood: {s.why}" for s in report.missed[:1])
    where = f" ({why.source})" if why.source else ""
    return ServingError(f"{type(model).__name__} cannot be served from a KV cache: {why.message.rstrip('.')}{where}.{missed}", why.advice)
