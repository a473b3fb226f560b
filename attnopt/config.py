"""The options of one optimization."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

from attnopt.errors import AttnoptError

BACKENDS = ("auto", "cudnn", "flash_attn", "flex", "gluon", "reference", "sdpa", "triton")
"""Names that ``backend`` may have; others can be registered. Held here too, where nothing heavy is imported."""

KV_CACHE_DTYPES = ("int8", "fp8")
KV_CACHES = ("paged", "contiguous")
"""The layouts of a KV cache that ``kv_cache`` may name."""


@dataclass(frozen=True)
class OptimizeConfig:
    """What to do and how. Every field has a command-line option of the same name."""

    backend: str = "auto"
    """Kernel for every site: ``auto`` or a registered backend's name. A named backend never falls back in silence."""
    autotune: bool = False
    """With backend ``auto``: measure the backends that can on the example's shapes, instead of going by a table. Times are kept on disk."""
    disable_passes: tuple[str, ...] = ()
    """Names of passes to leave out."""
    print_ir_after: tuple[str, ...] = ()
    """Names of passes after which the graph is printed to standard error; ``all`` for each."""
    verify: bool = True
    """Compare with the original. Without it the report says ``unverified``."""
    require_all: bool = False
    """Raise when an attention was found and not replaced."""
    capture: str = "auto"
    """``export``, ``dynamo`` (torch.compile), or ``auto``: export first."""
    inductor: bool = True
    """With dynamo capture: hand the rewritten graph to Inductor; otherwise it runs eagerly."""
    kv_cache: str | None = None
    """``paged`` or ``contiguous``: make a serving model of a decoder that was written without a cache. It runs packed tokens of many requests; see
    ``attnopt.serving``. With ``contiguous`` each request has one page, as long as the longest request may become."""
    merge_kv_heads: int | None = None
    """Merge the KV heads of each attention into so many, by the mean: another, smaller model, as a first step of uptraining. Never done by itself."""
    kv_cache_dtype: str | None = None
    """With ``kv_cache``: keep keys and values in ``int8`` or ``fp8`` (e4m3), with a scale for each token and head. Approximate, so only where it is asked for; verified
    against the model whose keys and values are rounded so."""
    max_variants: int = 8
    """How many (mode, dtype, device, argument structure) variants of one module are captured before it raises."""

    def __post_init__(self) -> None:
        if self.autotune and self.backend != "auto":
            raise AttnoptError(f"autotune chooses the backend, and backend is {self.backend!r}; supported beside autotune is 'auto'.")
        if self.kv_cache not in (None, *KV_CACHES):
            raise AttnoptError(f"kv_cache is {self.kv_cache!r}; supported are None, 'paged' and 'contiguous'.")
        if self.max_variants < 1:
            raise AttnoptError(f"max_variants is {self.max_variants}; it must be at least 1.")
        if self.merge_kv_heads is not None and self.merge_kv_heads < 1:
            raise AttnoptError(f"merge_kv_heads is {self.merge_kv_heads}; supported are None and numbers from 1 on.")
        if self.merge_kv_heads and self.capture == "dynamo":
            raise AttnoptError("merge_kv_heads needs a capture of the whole model, and capture is 'dynamo'; supported are 'auto' and 'export'.")
        if self.kv_cache_dtype not in (None, *KV_CACHE_DTYPES):
            raise AttnoptError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; supported are None, {' and '.join(map(repr, KV_CACHE_DTYPES))}.")
        if self.kv_cache_dtype and not self.kv_cache:
            raise AttnoptError(f"kv_cache_dtype is {self.kv_cache_dtype!r} and kv_cache is None: there is no cache to keep in it; supported beside it is kv_cache='paged'.")
        if self.kv_cache and self.capture == "dynamo":
            raise AttnoptError("kv_cache needs a capture of the whole model, and capture is 'dynamo'; supported are 'auto' and 'export'.")
        if self.capture not in ("auto", "export", "dynamo"):
            raise AttnoptError(f"capture is {self.capture!r}; supported are 'auto', 'export' and 'dynamo'.")


def disabled_backends() -> frozenset[str]:
    """Backends that the environment switches off: ``ATTNOPT_DISABLE=triton,sdpa``."""
    return _names(os.environ.get("ATTNOPT_DISABLE", ""))


@lru_cache(maxsize=16)
def _names(text: str) -> frozenset[str]:
    return frozenset(x.strip() for x in text.split(",") if x.strip())
