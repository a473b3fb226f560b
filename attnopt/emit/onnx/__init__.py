"""ONNX files whose attentions are fused nodes. Needs the extra ``onnx``."""

from __future__ import annotations

import os

from torch import nn

from attnopt.errors import AttnoptError


def check_request(model: nn.Module, path: str | os.PathLike[str], opset: int = 24, target: str = "onnx") -> None:
    """Refuse an export to ONNX that cannot succeed, before any work on it. Raises AttnoptError."""
    try:
        from attnopt.emit.onnx import write
    except ModuleNotFoundError as error:
        raise AttnoptError(f"Exporting ONNX needs the package {error.name}.", "pip install 'attnopt[onnx]'") from error
    write.check_request(model, path, opset, target)
