"""Stand-ins for a GPU, so that a machine without one runs the whole of an eager call but the launch itself: tensors on the CPU are taken for a Hopper GPU's, and generated
kernels for functions that do nothing. What is left is the time of the host. The time that PyTorch takes to make a tensor is the CPU's, and Triton's own part of a launch is not in it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from attnopt.kernels import registry
from attnopt.kernels.external import cudnn
from attnopt.kernels.gluon import launch as gluon
from attnopt.kernels.triton import launch as triton
from attnopt.kernels.triton import launch_paged as paged

PROCESSORS = 132
launches = 0
"""How many kernels were launched."""


class Compiled:
    """What Triton gives for a launch: of these kernels every later launch is ``run`` or a call of one of its grids."""

    function, packed_metadata = 0, ()

    def run(self, *arguments: Any) -> None:
        global launches
        launches += 1

    def __getitem__(self, grid: Any) -> Any:
        return self.run


class Function:
    """A jitted kernel."""

    compiled = Compiled()

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> Compiled:
        self.compiled.run()
        return self.compiled


def install() -> None:
    """Until the process ends."""
    from triton.runtime import driver

    module = SimpleNamespace(**dict.fromkeys(("flash_forward", "empty_rows", "paged_forward", "paged_reduce"), Function()))
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": triton.SHARED_MEMORY_SM90})
    driver.set_active(SimpleNamespace(get_current_stream=lambda index: 0, utils=utils))  # type: ignore[arg-type]
    real = gluon.refusal
    changes: dict[Any, dict[str, Any]] = {
        gluon: {"available": lambda: None, "refusal": lambda spec, device, dtype: real(spec, "cuda", dtype), "processors": lambda index: PROCESSORS},
        triton: {"available": lambda: None, "refusal": lambda spec, device, dtype: None},
        paged: {"refusal": lambda spec, setting: None, "INTERPRETED_PROCESSORS": PROCESSORS},
        cudnn: {"aten": SimpleNamespace(_scaled_dot_product_cudnn_attention=_cudnn)},
        torch.cuda: {"device": lambda device: contextlib.nullcontext(), "current_device": lambda: 0},
    }
    for place, names in changes.items():
        for name, value in names.items():
            setattr(place, name, value)
    for place in (gluon, triton, paged):
        place.import_source = lambda text: module  # type: ignore[assignment]
    registry.register(replace(registry.backends()["cudnn"], available=lambda: None, accepts=lambda spec, setting: None))


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, None]:
    global launches
    launches += 1
    return torch.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), dtype=q.dtype).transpose(1, 2), None
