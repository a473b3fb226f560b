"""Finds every attention in a PyTorch model by meaning, replaces it with the fastest kernel that computes the same, and proves it.

Importing this package is light: torch is imported when something of it is used. The one thing that must not wait is the
operator ``attnopt::attention``, without which ``torch.export.load`` cannot read an optimized model: it is registered now when
torch is there, and otherwise as soon as it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnopt.api import compile_report, inspect, optimize, verify
    from attnopt.config import OptimizeConfig
    from attnopt.onnx_files import optimize_onnx
    from attnopt.report import Report

__version__ = "0.1.0"
__all__ = ["OptimizeConfig", "Report", "__version__", "compile_report", "inspect", "optimize", "optimize_onnx", "verify"]

_HOME = {
    "OptimizeConfig": "attnopt.config",
    "Report": "attnopt.report",
    "compile_report": "attnopt.api",
    "inspect": "attnopt.api",
    "optimize": "attnopt.api",
    "optimize_onnx": "attnopt.onnx_files",
    "verify": "attnopt.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """``attnopt.verify`` is the function. The package of that name, which the import system would put in its place, is found
    by ``from attnopt.verify import ...``.
    """

    @property
    def verify(self) -> Any:
        return __getattr__("verify")

    @verify.setter
    def verify(self, package: ModuleType) -> None:
        """What the import system does when the package is imported."""


sys.modules[__name__].__class__ = _Package


class _AfterTorch(MetaPathFinder):
    """Registers the operator right after torch was imported."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("attnopt.kernels.ops")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "torch" in sys.modules:
    importlib.import_module("attnopt.kernels.ops")
else:
    sys.meta_path.insert(0, _AfterTorch())
