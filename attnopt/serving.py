"""From a captured decoder to one that generates: ``optimize(model, inputs, config=OptimizeConfig(kv_cache="paged"))``.

The serving model runs packed tokens of many requests, prompts and generated tokens in one batch, and keeps keys and values in a paged cache that
the caller owns, or that ``generate`` and ``stream`` make for it (docs/serving.md). It is verified against the original on ragged requests before it is handed out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnopt.capture.call import Args, Kwargs
from attnopt.capture.clone import clone_tree, tensors_of
from attnopt.capture.export import DynamicShapes, capture
from attnopt.capture.run import device_of
from attnopt.config import OptimizeConfig
from attnopt.emit.function import GraphFunction, graph_function
from attnopt.emit.means import Mean, fold_means, refresh
from attnopt.emit.pieces import Compiler, in_pieces
from attnopt.errors import ServingError, VerificationError
from attnopt.original_call import LONGEST, ExampleCall, OriginalCall
from attnopt.passes.context import context_length
from attnopt.passes.insert_kv_cache import CONTEXT, PLAN, CacheLayer, InsertKVCache, PackedPlan
from attnopt.passes.pipeline import PipelineResult, lowered, run_pipeline
from attnopt.passes.quantize_kv_cache import QuantizeKVCache, rounded_writes
from attnopt.remarks import Remark
from attnopt.report import Report, Verdict
from attnopt.runtime import DecodeGraphs, Engine, Event, Result, SamplingParams
from attnopt.runtime.model_caches import ModelCaches, pages_for
from attnopt.runtime.paged_cache import layer_tensors
from attnopt.runtime.watched import ModuleTensors
from attnopt.verify.merged import change
from attnopt.verify.packed import Stated, verify_packed

Progress = Callable[[str, int, int], None]
Params = SamplingParams | Sequence[SamplingParams] | None
Contexts = Sequence[Tensor | Sequence[Tensor]] | None
_CACHE_BYTES = 4 << 30
"""The most that the cache of ``generate`` takes where nothing else is said."""
_PAGE_SIZE = 16


class ServingModel(nn.Module):
    """A decoder over packed tokens, with the parameters, buffers and ``state_dict`` keys of the original, which it shares.

    ``layers`` says what each attention caches of a token, ``vocabulary`` how many logits there are, and ``max_positions`` how many tokens a request may
    have (None: as many as the cache holds). It stays in the dtype and on the device that it was made for.
    """

    _held: nn.Module

    def __init__(
        self,
        model: nn.Module,
        function: GraphFunction,
        plan: PackedPlan,
        report: Report,
        context: GraphFunction | None = None,
        length: Callable[..., int] | None = None,
        pieces: Callable[[Compiler], GraphFunction] | None = None,
        means: Sequence[Mean] = (),
        original: OriginalCall | None = None,
    ) -> None:
        super().__init__()
        self.function = function
        self.context = context
        self._length = length
        self._pieces = pieces
        self._means = list(means)
        self._compiled: dict[bool, GraphFunction] = {}
        self.plan = plan
        self.attnopt_report = report
        self.original = original
        """How the model that this one was made of is called, for whoever compares the two."""
        # A model's modules may have the names of this class's own attributes (layers, plan): the graphs find them in a module that has nothing else
        held = nn.Module()
        self.__dict__["_held"] = held
        for module in (held, self):
            module._modules, module._parameters, module._buffers = model._modules, model._parameters, model._buffers
            module._non_persistent_buffers_set = model._non_persistent_buffers_set
            module.training = False

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
        caches: Sequence[tuple[Tensor, ...]],
        rows: Tensor | None = None,
        cross: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One step: logits [N, V] of the tokens whose places in the batch ``rows`` int64 [N] names, of all T tokens without it.

        tokens, positions and slots int64 [T] are packed, those of request r at ``cu_seqlens_q[r] .. cu_seqlens_q[r + 1]``; its keys and values, these tokens' included,
        are the first ``seqlens_k[r]`` in the pages ``block_table[r]``. A token is written at slot page * page_size + offset of each layer's
        ``(k_cache [pages, page_size, Hkv, D], v_cache [pages, page_size, Hkv, Dv])``, which are changed in place; at slot -1 it is not written. Caches of int8 and fp8
        have their scales behind them, ``k_scale`` and ``v_scale`` [pages, page_size, Hkv].
        The first ``plan.prefix`` tokens of a request come in one call.
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
        self.context_length(*inputs)
        assert self.context is not None
        with torch.no_grad():
            found = self.context.run(self._held, *inputs, *self.context.constants)[0]
        return list(zip(found[0::2], found[1::2], strict=True))

    def context_length(self, *inputs: Tensor) -> int:
        """How many tokens ``encode`` gives of these inputs. Raises ServingError where they do not fit the model."""
        if self._length is None:
            raise ServingError("This model reads no other sequence; encode is for those that do.")
        if len(inputs) != len(self.plan.context) or any(x.shape[:1] != (1,) for x in inputs):
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs) or "none"
            raise ServingError(f"encode takes {', '.join(self.plan.context)}, each a batch of one; it was given tensors of shape {shapes}.")
        return self._length(*inputs)

    def _compiled_function(self, one_token: bool) -> GraphFunction:
        """The graph with what lies between its attentions compiled, on the first call with sizes of its kind."""
        if one_token not in self._compiled:
            if self._pieces is None:
                raise ServingError("This serving model was made without its graph, so compile=True has nothing to compile; leave it out.")
            # a linear layer of one token is a sum over a matrix that is read once; Inductor writes it as such where it may tune it, and calls a library else
            options: dict[str, Any] | None = {"coordinate_descent_tuning": True} if one_token else None
            # sizes are constants at first, and open from the second on: that of a batch, and no other
            self._compiled[one_token] = self._pieces(lambda gm: torch.compile(gm, fullgraph=True, options=options))
        return self._compiled[one_token]

    def _call(self, *inputs: Tensor) -> Tensor:
        """The graph, on its inputs in their order."""
        refresh(self._means, self._held)
        found: Tensor = self.function.run(self._held, *inputs, *self.function.constants)[0]
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ServingModel:
        raise ServingError(
            "A serving model stays in the dtype and on the device that it was made for.", "Move the original model, and make a serving model of it there."
        )

    run = forward

    def engine(
        self,
        *,
        page_size: int | None = None,
        pages: int | None = None,
        context_pages: int | None = None,
        size_bytes: int | None = None,
        graphs: bool = True,
        compile: bool = False,  # noqa: A002 - as torch calls it
        **options: Any,
    ) -> Engine:
        """An engine for this model with a cache of its own, of ``pages`` pages or ``size_bytes`` bytes. ``options`` are ``Engine``'s: token_budget, chunk, ...

        ``page_size`` is 16 tokens where nothing is said. In a contiguous cache it is how many tokens a request may have, by default as many as the model has positions for.
        A model that reads another sequence keeps its keys and values in ``context_pages`` further pages (None: as many as ``pages``); ``size_bytes`` is for both.
        With ``graphs`` steps of one token a request are replayed from CUDA graphs where that can be; ``engine.run`` counts them, and says why not. With ``compile`` what lies
        between the attentions is compiled by torch.compile when the first steps run, which takes a while, and longer for a step of one token; its roundings may differ.
        """
        windows = [x.window for x in self.layers if not x.cross]
        window = None if None in windows else max(x for x in windows if x is not None)
        if self.plan.layout == "contiguous":
            page_size = self.max_positions if page_size is None else page_size
            if page_size is None:
                raise ServingError("The model computes its positions, so it does not say how long a request may become; a contiguous cache needs page_size, in tokens.")
            # a page that ends with its request holds nothing of the next, and is never dead before it ends
            options, window = {"prefix_sharing": False, **options, "contiguous": True}, None
        place = device_of(self)
        size = _PAGE_SIZE if page_size is None else page_size
        caches = ModelCaches.of(self.layers, size, pages, size_bytes, place, self.encode, self.context_length, context_pages, self._context_page_size(size))

        def run(tokens: Tensor, positions: Tensor, slots: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, rows: Tensor, *cross: Tensor) -> Tensor:
            return self.run(tokens, positions, slots, block_table, cu_seqlens_q, seqlens_k, caches.tensors, rows, (cross[0], cross[1]) if cross else None)

        weights = ModuleTensors(self._held)
        constants = [x for x in self.function.constants if isinstance(x, Tensor)]

        def state() -> list[Tensor]:
            refresh(self._means, self._held)
            return [*weights(), *constants, *(x for pair in caches.tensors for x in pair)]

        if compile:
            self._compiled_function(one_token=False)  # refuses now what it cannot do later

        def compiled(tokens: Tensor, positions: Tensor, slots: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, rows: Tensor, *cross: Tensor) -> Tensor:
            function = self._compiled_function(one_token=tokens.shape[0] == 1)
            refresh(self._means, self._held)
            leaves = (tokens, positions, rows, slots, block_table, cu_seqlens_q, seqlens_k, *cross, *(x for tensors in caches.tensors for x in tensors))
            logits: Tensor = function.run(self._held, *leaves, *function.constants)[0]
            return logits

        step: Callable[..., Tensor] = compiled if compile else run
        if graphs:
            step = DecodeGraphs(step, state, caches.own.device)
        plan, contexts = self.plan, caches.contexts
        return Engine(step, caches.own, vocabulary=plan.vocabulary, max_positions=plan.max_positions, window=window, prefix=plan.prefix, contexts=contexts, **options)

    def generate(self, prompts: Sequence[Sequence[int]], params: Params = None, *, contexts: Contexts = None, progress: bool = False, **options: Any) -> list[Result]:
        """Continue each prompt (token ids), all in one engine. See ``Engine.generate``; ``options`` are those of ``engine``.

        ``contexts``: for a model that reads another sequence, the inputs of ``encode`` for each prompt; a tensor where that is one.
        """
        return self.engine_for(prompts, params, contexts=contexts, **options).generate(prompts, params, progress, as_tuples(contexts))

    def stream(self, prompts: Sequence[Sequence[int]], params: Params = None, *, contexts: Contexts = None, **options: Any) -> Iterator[Event]:
        """Tokens as they come. See ``Engine.stream``, and ``generate`` for ``contexts`` and ``options``."""
        return self.engine_for(prompts, params, contexts=contexts, **options).stream(prompts, params, as_tuples(contexts))

    def engine_for(self, prompts: Sequence[Sequence[int]], params: Params = None, *, contexts: Contexts = None, **options: Any) -> Engine:
        """An engine for these prompts, which are not added to it. ``contexts`` as in ``generate``; ``options`` are those of ``engine``.

        Without ``pages`` and ``size_bytes`` the cache holds all that those of them that run at once may come to, or takes 4 GiB where that would be more.
        """
        rules = [params or SamplingParams()] * len(prompts) if params is None or isinstance(params, SamplingParams) else params
        ends = [min(len(p) + r.max_new_tokens, self.max_positions or LONGEST) for p, r in zip(prompts, rules, strict=False)]
        if self.plan.layout == "contiguous":
            options = {"page_size": max(ends, default=1), **options}
        if options.get("pages") is not None or options.get("size_bytes") is not None:
            return self.engine(**options)
        at_once = options.get("max_requests")
        others = sorted((self.context_length(*x) for x in as_tuples(contexts) or ()), reverse=True)[:at_once]
        page_size = max(1, options.get("page_size", _PAGE_SIZE))
        pages, context_pages = pages_for(self.layers, page_size, sorted(ends, reverse=True)[:at_once], others, _CACHE_BYTES, self._context_page_size(page_size))
        return self.engine(**{"context_pages": context_pages, **options, "pages": pages})

    def _context_page_size(self, page_size: int) -> int:
        """Other sequences are in pages also where each request has one page of its own: how long they are says nothing of a request."""
        return _PAGE_SIZE if self.plan.layout == "contiguous" else page_size

    def new_caches(self, pages: int, page_size: int, device: torch.device | str | None = None) -> list[tuple[Tensor, ...]]:
        """Empty caches for ``run``, those of each layer, of ``pages`` pages of ``page_size`` tokens."""
        place = next(self.parameters()).device if device is None else device
        return [tuple(x.zero_() for x in layer_tensors(layer, pages, page_size, place)) for layer in self.layers]


def as_tuples(contexts: Contexts) -> list[tuple[Tensor, ...]] | None:
    return None if contexts is None else [(x,) if isinstance(x, Tensor) else tuple(x) for x in contexts]


def rewrite(model: nn.Module, args: Args, kwargs: Kwargs, dynamic_shapes: DynamicShapes, config: OptimizeConfig, check: bool = True) -> tuple[ExampleCall, PipelineResult, Report]:
    """Capture a decoder and rewrite it to packed tokens. Where that is refused the result's graph has no plan, and the report says why."""
    captured = capture(model, args, kwargs, dynamic_shapes, check=check)
    call = ExampleCall.of(captured)
    start = time.perf_counter()
    result = run_pipeline(captured.graph_module, config, cache=InsertKVCache(call.form.positions(), call.form.output, config.backend, config.kv_cache or "paged"))
    seconds = {"capture": captured.seconds, "passes": time.perf_counter() - start}
    return call, result, Report(result.sites, [*captured.remarks, *result.remarks], seconds=seconds)


def serve(model: nn.Module, args: Args, kwargs: Kwargs, dynamic_shapes: DynamicShapes, config: OptimizeConfig, progress: Progress | None = None) -> ServingModel:
    """A serving model of ``model``, verified. Raises ServingError where it cannot be served, and VerificationError where the result differs."""
    if config.merge_kv_heads and config.verify:
        serve(model, args, kwargs, dynamic_shapes, replace(config, merge_kv_heads=None), progress)  # all but the merge, against the original
    call, result, report = rewrite(model, args, kwargs, dynamic_shapes, config)
    plan = result.graph_module.meta.get(PLAN)
    if plan is None:
        raise _refused(model, report)
    plan = replace(plan, max_positions=call.longest(plan))
    module = result.graph_module.meta.get(CONTEXT)
    length = None if module is None else context_length(module)
    context = None if module is None else graph_function(lowered(module, config), model)
    means = fold_means(result.graph_module, model)
    pieces = partial(_in_pieces, result.graph_module, model)
    serving = ServingModel(clone_tree(model), graph_function(result.graph_module, model), plan, report, context, length, pieces, means, call.form)
    if not config.verify:
        report.remarks.append(Remark("AO304", "Not compared with the original: verify=False."))
        return serving
    start = time.perf_counter()
    same = clone_tree(model) if result.merged is None else result.merged
    stated = None if config.kv_cache_dtype is None else _rounded(model, call, config)
    report.verdict = _verdict(same, serving, call, progress, stated)
    if result.merged is not None:
        example = call.captured.example
        words = change(model, same, example.args, example.kwargs) if report.verdict.passed is not None else "how far the results change was not computed: nothing was verified"
        report.remarks.append(Remark("AO109", f"{words}."))
    report.seconds["verify"] = time.perf_counter() - start
    if report.verdict.passed is None:
        report.remarks.append(Remark("AO304", "Not compared with the original: the weights are on the meta device."))
    elif not report.verdict.passed:
        worst = report.verdict.worst
        assert worst is not None
        raise VerificationError(f"The serving model differs from {type(model).__name__}: {worst.name}: error {worst.error:.2e}, budget {worst.budget:.2e}.")
    return serving


def _in_pieces(gm: fx.GraphModule, model: nn.Module, compiler: Compiler) -> GraphFunction:
    return graph_function(in_pieces(gm, compiler), model)


def _rounded(model: nn.Module, call: ExampleCall, config: OptimizeConfig) -> Stated:
    """The serving model with caches of its own dtype, whose keys and values are rounded as the caches that ``config`` asks for are stated to round them."""
    assert config.kv_cache_dtype is not None
    plain = replace(config, kv_cache_dtype=None, disable_passes=tuple(x for x in config.disable_passes if x != QuantizeKVCache.name), print_ir_after=())
    found = run_pipeline(call.captured.graph_module, plain, cache=InsertKVCache(call.form.positions(), call.form.output, config.backend, config.kv_cache or "paged")).graph_module
    rounded_writes(found, config.kv_cache_dtype)
    function = graph_function(found, model)
    same = clone_tree(model)

    def run(*inputs: Tensor) -> Tensor:
        logits: Tensor = function.run(same, *inputs, *function.constants)[0]
        return logits

    return Stated(run, found.meta[PLAN], f"beside the model whose keys and values are rounded to {config.kv_cache_dtype}")


def _verdict(model: nn.Module, serving: ServingModel, call: ExampleCall, progress: Progress | None, stated: Stated | None) -> Verdict:
    plan = serving.plan
    if any(t.is_meta for t in tensors_of(serving)):
        return Verdict()
    example = next(x for name, x in zip(call.form.names, call.form.leaves, strict=True) if name == plan.ids)
    return verify_packed(
        model,
        serving._call,
        plan,
        example,
        lambda ids, request: call.form.call(ids, plan, request),
        lambda result: call.form.logits(result, plan),
        None if serving.context is None else lambda request: serving.encode(*(call.form.row(name, request) for name in plan.context)),
        progress,
        stated,
    )


def _refused(model: nn.Module, report: Report) -> ServingError:
    why = next(r for r in report.remarks if r.level == "missed")
    missed = "".join(f" {s.name} was not understood: {s.why}" for s in report.missed[:1])
    where = f" ({why.source})" if why.source else ""
    return ServingError(f"{type(model).__name__} cannot be served from a KV cache: {why.message.rstrip('.')}{where}.{missed}", why.advice)
