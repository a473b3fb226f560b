"""A model file run in ONNX Runtime, called as the original is."""

from __future__ import annotations

import os
from typing import Any

import onnx
import onnxruntime
import torch

from attnopt.capture.call import CallForm
from attnopt.emit.onnx.model import tensors
from attnopt.errors import AttnoptError, VerificationError


class OnnxSession:
    """A file that ONNX Runtime has loaded on a CPU; called with a tensor for each input by name, it returns the list of its output tensors.

    ``file`` is what it is called in errors. Raises VerificationError when it does not load.
    """

    def __init__(self, path: str | os.PathLike[str], file: str) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise VerificationError(f"ONNX Runtime {onnxruntime.__version__} does not load {file}: {_first_line(error)}") from error

    def __call__(self, **inputs: torch.Tensor) -> list[torch.Tensor]:
        quiet = onnxruntime.RunOptions()
        quiet.log_severity_level = 4  # what it refuses is raised, and said by whoever called
        return [torch.from_numpy(x) for x in self.session.run(None, {name: x.detach().cpu().numpy() for name, x in inputs.items()}, quiet)]


def check_file(path: str | os.PathLike[str], file: str) -> None:
    """Run onnx's checker with its shape inference. Raises VerificationError for what is not valid."""
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"{file[:1].upper()}{file[1:]} is not valid ONNX: {_first_line(error)}") from error


class OnnxFile:
    """Takes the original's arguments and returns the list of its output tensors, computed by ONNX Runtime on a CPU.

    Raises VerificationError when the file is not valid or does not load.
    """

    def __init__(self, path: str | os.PathLike[str], form: CallForm) -> None:
        self.form = form
        check_file(path, "the exported model")
        self.run = OnnxSession(path, "the exported model")

    def __call__(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        given = tensors(self.form.normalise(args, kwargs))
        inputs = self.run.session.get_inputs()
        if len(given) < len(inputs):
            raise AttnoptError(f"The exported model takes {len(inputs)} inputs, and the call has {len(given)} tensors.")
        return self.run(**{i.name: x for i, x in zip(inputs, given, strict=True)})


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
