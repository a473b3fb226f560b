"""``attnopt.optimize_onnx``: an ONNX file with its attentions fused, compared with the original in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attnopt.kernels.ops  # noqa: F401 - registers the operator that the passes put into graphs
from attnopt.errors import AttnoptError
from attnopt.verify.exported import verify_files

if TYPE_CHECKING:
    from attnopt.capture.onnx.read import Source
    from attnopt.emit.onnx.files import FileReport
    from attnopt.emit.onnx.plan import Target

Progress = Callable[[str, int, int], None]


def optimize_onnx(
    model: Source,
    output: str | os.PathLike[str] | None = None,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    opset: int = 24,
    target: Target = "onnx",
    progress: Progress | None = None,
) -> FileReport:
    """Find the attentions of an ONNX model by the analysis that ``optimize`` uses, and replace those that are proven by fused nodes.

    ``model`` is a path, an ``onnx.ModelProto`` or an ``onnx_ir.Model`` of opset 13 to 25, by any exporter; it is not changed. The result has
    opset ``opset`` (23 or 24), or its own where that is higher. ``example_inputs`` are tensors or arrays by the name of the input, for
    inputs that cannot be guessed from names, types and the tables that they pick rows of.

    The result is compared with the original in ONNX Runtime, on the example and on other values, lengths, batches and paddings made from
    it. ``output`` is written only when all agree, and only when an attention was replaced; ``report.model`` is the result in memory.

    Raises AttnoptError for what cannot be read, run or written, CaptureError for a file that contradicts itself, and
    VerificationError when the result differs. See docs/onnx.md.
    """
    try:
        from attnopt.emit.onnx.files import rewrite_file
    except ModuleNotFoundError as error:
        raise AttnoptError(f"Reading ONNX needs the package {error.name}.", "pip install 'attnopt[onnx]'") from error
    told = progress or (lambda *_: None)

    def compare(before: Any, after: Any, inputs: Any, names: Any, lifted: Any, sites: Any) -> Any:
        return verify_files(before, after, inputs, names, lifted.sums, lifted.beyond, sites, lambda text, done, total: told(f"verify: {text}", done, total))

    return rewrite_file(model, output, example_inputs, opset, target, compare, told)
