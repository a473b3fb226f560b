"""attnopt's kernels as an attention implementation of the library transformers, without any capture.

::

    attnopt.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="attnopt")
    model.generate(...)

    with attnopt.integrations.transformers.continuous_batching(model):
        model.generate_batch(...)

Nothing registers on import. What an attention computes (window, softcap, sinks, bias, dropout) comes from what the model's own code hands to the
implementation; what is handed over and not known is refused in one sentence, never left out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import AttnoptError
from attnopt.integrations import calls, packed

NAME = "attnopt"
PAGED = "paged|attnopt"
"""The form for continuous batching, by the name that versions such as 5.17 ask for: ``paged|`` and the model's own."""
_PAGED_LATER = "attnopt_flash"
"""Versions such as 5.23 take the names of the library's own implementations, and any that has "flash" in it."""
LEAST = (5, 17)
_IGNORED = ("position_ids", "cache_position")
"""Floating-point keywords that are known to change nothing; every other one might be a part of the scores."""


def register() -> None:
    """Make ``attn_implementation="attnopt"`` known to transformers, its mask, and its form for continuous batching. May be called again.

    Raises AttnoptError where transformers is not installed, or is a version whose interfaces are other ones.
    """
    attentions, masks, sdpa_mask = _interfaces()
    attentions.register(NAME, attention)
    masks.register(NAME, functools.partial(mask, sdpa_mask))
    for name in (PAGED, _PAGED_LATER):
        attentions.register(name, paged_attention)


@contextlib.contextmanager
def continuous_batching(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` with the form of attnopt's attention that transformers' continuous batching (``generate_batch``) drives, and as it was afterwards.

    ``register`` must have been called. Raises AttnoptError for a model that is none of transformers'.
    """
    attentions = _interfaces()[0]
    if not callable(getattr(model, "set_attn_implementation", None)):
        raise AttnoptError(f"{type(model).__name__} is no model of transformers: it has no set_attn_implementation.")
    if NAME not in attentions:
        raise AttnoptError("The attention 'attnopt' is not registered.", "Call attnopt.integrations.transformers.register() first.")
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = list({id(c): c for c in found if hasattr(c, "_attn_implementation")}.values())
    before = [c._attn_implementation for c in configs]
    name = PAGED if "paged|sdpa" in attentions else _PAGED_LATER
    try:
        for c in configs:
            # The public setter looks for a package of this name first. It is the same attention for every sub-model, as with the library's own switch.
            c._attn_implementation_internal = name
        yield model
    finally:
        for c, old in zip(configs, before, strict=True):
            c._attn_implementation_internal = old


def mask(sdpa_mask: Callable[..., Tensor | None], *args: Any, config: Any = None, **kwargs: Any) -> Tensor | None:
    """The mask of one kind of layer, as the library makes it for ``sdpa``: bool [B, 1, Sq, Skv] where one is needed, None where the attention is causal or sees all.

    Raises AttnoptError for a model whose attentions the library runs without asking which implementation: their masks are others.
    """
    name = None if config is None else _of_its_own(type(config))
    if name is not None:
        raise AttnoptError(
            f"{name} has attentions of its own, which take no implementation from outside; attnopt.optimize(model, inputs) replaces them.",
            'attn_implementation="eager" builds it.',
        )
    return sdpa_mask(*args, config=config, **kwargs)


def _of_its_own(config: type) -> str | None:
    """The name of a configuration's model where its code does not go through the table of attentions."""
    return _looked_up(config)


torch.compiler.assume_constant_result(_of_its_own)


@functools.lru_cache
def _looked_up(config: type) -> str | None:
    from transformers import MODEL_MAPPING

    try:
        model = MODEL_MAPPING[config]
    except KeyError:  # code from elsewhere
        return None
    return None if model._can_set_attn_implementation() else str(model.__name__)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, Sq, D], key [B, Hkv, Skv, D], value [B, Hkv, Skv, Dv] -> ([B, Sq, Hq, Dv], None: the probabilities are never made).

    attention_mask: bool (True: seen) or floating point (added to the scores), [B or 1, Hq or 1, Sq or 1, Skv]; None: causal where ``is_causal`` says so
    and there is more than one query, with query i at key i. ``sliding_window`` is part of the mask already. ``s_aux`` [Hq]: logits of a key
    without a value. ``position_bias`` [B or 1, Hq or 1, Sq, Skv] is added to the scores.

    Raises AttnoptError for keywords that might change what is computed and are not known here.
    """
    if kwargs.get("cache") is not None:
        paged: tuple[Tensor, None] = paged_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux, **kwargs
        )
        return paged
    _refuse_unknown(kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # one query sees all keys, which are those before it and its own
    o = calls.attention(
        query,
        key,
        value,
        attention_mask,
        causal=bool(causal) and attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        bias=position_bias,
        dropout=dropout,
    )
    return o.transpose(1, 2).contiguous(), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler would copy the whole cache that the library's update writes to
def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cache: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The form for continuous batching: query [1, Hq, T, D], key and value [1, Hkv, T, D] of packed tokens -> ([1, T, Hq, Dv], None).

    They are written to ``cache`` (the library's paged cache), and each request reads its own: ``cu_seq_lens_q`` and ``cu_seq_lens_k`` say where they lie.
    """
    if cache is None:
        raise AttnoptError(
            f"The attention {_name_of(module)!r} was called without a paged cache; it is for continuous batching alone.",
            f"attn_implementation={NAME!r} is for everything else.",
        )
    if kwargs.get("block_table") is not None:
        raise AttnoptError("Continuous batching gave a block table, which attnopt's attention does not take; set max_blocks_per_request=0.")
    if dropout:
        raise AttnoptError(f"Attention over a cache has no dropout, and dropout is {dropout:g}.")
    _refuse_unknown({k: v for k, v in kwargs.items() if k != "block_table"})
    window = sliding_window or getattr(module, "sliding_window", None)
    key, value, cu_seq_lens_k = _written(cache, key, value, module, kwargs, window)
    o = packed.attention(
        query[0].transpose(0, 1), key, value, kwargs["cu_seq_lens_q"], cu_seq_lens_k, scale=scaling, window=window, softcap=softcap, sinks=s_aux
    )
    return o.unsqueeze(0), None


def _written(cache: Any, key: Tensor, value: Tensor, module: nn.Module, kwargs: dict[str, Any], window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [Tk, Hkv, D] of all requests, those of this step written to the cache, and where each request's begin."""
    kind: Any = type(cache)
    if _takes_keywords(kind):
        lengths = dict(kwargs)
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=lengths)
        return key[0].transpose(0, 1), value[0].transpose(0, 1), lengths["cu_seq_lens_k"]
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, read_index=kwargs["read_index"], write_index=kwargs["write_index"]
    )
    ends = kwargs["cu_seq_lens_k"]
    return key, value, ends["sliding_attention" if window else "full_attention"] if isinstance(ends, dict) else ends


@functools.lru_cache
def _takes_keywords(cache: type) -> bool:
    """Whether this version's cache finds its own indices and lengths among the call's keywords."""
    return "kwargs" in inspect.signature(cache.update).parameters  # type: ignore[attr-defined]


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Numbers that this code does not know might be a part of the scores."""
    if kwargs.get("output_attentions"):
        raise AttnoptError("attnopt's attention never makes the probabilities that output_attentions asks for.", 'attn_implementation="eager" makes them.')
    for name, x in kwargs.items():
        if isinstance(x, Tensor) and x.is_floating_point() and name not in _IGNORED:
            shape = ", ".join(map(str, x.shape))
            raise AttnoptError(
                f"attnopt's attention was given {name!r} ({str(x.dtype).removeprefix('torch.')}[{shape}]), which it does not know; "
                "supported are scaling, dropout, softcap, sliding_window, is_causal, s_aux and position_bias."
            )


def _name_of(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "_attn_implementation", PAGED))


def _version() -> tuple[int, int]:
    try:
        text = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise AttnoptError("The package transformers is not installed.", "pip install 'attnopt[hf]'") from error
    found = re.match(r"(\d+)\.(\d+)", text)
    if found is None or (int(found[1]), int(found[2])) < LEAST:
        raise AttnoptError(f"transformers is version {text}; its attention interface is supported from {LEAST[0]}.{LEAST[1]} on.")
    return int(found[1]), int(found[2])


def _interfaces() -> tuple[Any, Any, Any]:
    """The table of attentions, that of masks, and the mask of ``sdpa``."""
    version = _version()
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise AttnoptError(f"transformers {version[0]}.{version[1]} has another attention interface than versions 5.17 to 5.23: {error}.") from error
    return AttentionInterface(), AttentionMaskInterface(), sdpa_mask
