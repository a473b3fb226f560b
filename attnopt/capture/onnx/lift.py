"""The one call of this front end: the graph of a file that was read and prepared."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from attnopt.capture.export import quiet
from attnopt.capture.onnx import pointwise, products, shapes
from attnopt.capture.onnx.translate import LiftedFile, Observed, ShapesNeeded, Translator

RULE_MODULES = (pointwise, products, shapes)
"""Importing these fills the table of rules."""


def lift(model: ir.Model, sizes: Mapping[str, int], observe: Callable[[], Mapping[str, Observed]]) -> LiftedFile:
    """The graph of ``model``. ``sizes``: the example's size of each named dimension.

    ``observe`` gives dtype and shape of intermediate values in a run of the example; it is called only when the file has operators without
    a translation whose shapes it does not tell. Raises CaptureError for a file that contradicts itself.
    """
    with quiet():
        try:
            return Translator(model, sizes).run()
        except ShapesNeeded:
            return Translator(model, sizes, observe()).run()
