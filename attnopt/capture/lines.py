"""The user's lines in what export records: of each node, and of an error that stops it."""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import uninteresting_files

from attnopt.remarks.lines import Frame, own_line

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parents[1])
_EXPORT = str(Path(__file__).with_name("export.py"))


@contextlib.contextmanager
def whole_stacks() -> Iterator[None]:
    """Export then keeps helper functions in ``stack_trace``; by itself it keeps only frames of functions named ``forward``.

    For exports of this thread, until the block is left.
    """
    tracer = proxy_tensor._ModuleStackTracer
    kept = getattr(tracer, "_filter_traceback_frames", None)
    if kept is None:  # a torch that does not filter
        yield
        return
    owner = threading.get_ident()

    def whole(self: proxy_tensor._ModuleStackTracer, stack: traceback.StackSummary) -> traceback.StackSummary:
        return _of_the_model(stack) if threading.get_ident() == owner else kept(self, stack)

    with mock.patch.object(tracer, "_filter_traceback_frames", whole):
        yield


def line_of(error: BaseException) -> str:
    """file:line of the model's code on which export stopped with ``error``; empty when the model was not reached."""
    stack = _of_the_model(traceback.extract_tb(error.__traceback__))
    return own_line([Frame(f.filename, f.lineno or 0, f.name) for f in stack])


def _of_the_model(stack: traceback.StackSummary) -> traceback.StackSummary:
    """The frames from the traced model's ``forward`` on, without those of torch that serve tracing and not the model."""
    frames = list(stack)
    exports = [i for i, f in enumerate(frames) if f.filename == _EXPORT and f.name == "_export"]
    frames = frames[exports[-1] + 1 if exports else 0 :]
    first = next((i for i, f in enumerate(frames) if f.name == "forward"), len(frames))
    skipped = uninteresting_files()
    return traceback.StackSummary.from_list([f for f in frames[first:] if f.filename not in skipped and _is_models(f)])


def _is_models(frame: traceback.FrameSummary) -> bool:
    if frame.filename.startswith(_OURS):
        return False
    return not frame.filename.startswith(_TORCH) or frame.name == "forward"
