"""What an export did: each attention's form in the file, and the comparisons in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnopt.emit.onnx.model import Layer
from attnopt.emit.onnx.plan import OPERATORS
from attnopt.report import Verdict


@dataclass
class OnnxReport:
    path: str
    opset: int
    target: str
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    layers: list[Layer]
    verdict: Verdict
    seconds: float = 0.0

    @property
    def fused(self) -> list[Layer]:
        return [x for x in self.layers if x.lowered_to in OPERATORS]

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "opset": self.opset,
            "target": self.target,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "fused": len(self.fused),
            "layers": [x.to_dict() for x in self.layers],
            "verdict": self.verdict.to_dict(),
            "seconds": self.seconds,
        }
