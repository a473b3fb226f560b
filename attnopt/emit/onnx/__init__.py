"""ONNX files whose attentions are fused nodes. Needs the extra ``onnx``."""

from __future__ import annotations

import os
from typing import Literal

from torch import nn

from attnopt.errors import AttnoptError

WithPastForm = bool | Literal["static"]
"""Whether a decoder gets keys and values of earlier tokens as inputs, as a past that grows or as ``static`` caches of a fixed length."""
SCATTER_SINCE = 24
"""The opset that brought TensorScatter, and ``nonpad_kv_seqlen`` to ``Attention``."""


def check_past(with_past: object, max_length: object, opset: int, target: str) -> None:
    """Refuse a form of the past that cannot be written. Raises AttnoptError."""
    if with_past not in (False, True, "static"):
        raise AttnoptError(f"with_past is {with_past!r}; supported are False, True (a past that grows) and 'static' (caches of max_length tokens).")
    if with_past != "static":
        if max_length is not None:
            raise AttnoptError(f"max_length is {max_length!r}, and only with_past='static' has caches of a fixed length.")
        return
    if max_length is None:
        raise AttnoptError("with_past='static' needs max_length, the number of tokens that a cache holds, and none was given.")
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise AttnoptError(f"max_length is {max_length!r}; supported are integers from 1 on.")
    if opset < SCATTER_SINCE and target != "decomposed":
        raise AttnoptError(
            f"A static cache is written by TensorScatter, which ONNX has since opset {SCATTER_SINCE}, and opset {opset} was asked for.", "Or take --target decomposed, which writes it with ScatterElements."
        )


def check_request(model: nn.Module, path: str | os.PathLike[str], opset: int = 24, target: str = "onnx") -> None:
    """Refuse an export to ONNX that cannot succeed, before any work on it. Raises AttnoptError."""
    try:
        from attnopt.emit.onnx import write
    except ModuleNotFoundError as error:
        raise AttnoptError(f"Exporting ONNX needs the package {error.name}.", "pip install 'attnopt[onnx]'") from error
    write.check_request(model, path, opset, target)
