"""What kernels and their choice ask of the machine: the device's capability and name, and where files may be kept."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache(maxsize=1)
def capability() -> tuple[int, int]:
    """The compute capability of the current CUDA device, as (9, 0); (0, 0) where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def arch() -> str:
    """The same as a name, ``sm_90``; empty where there is no CUDA device."""
    major, minor = capability()
    return f"sm_{major}{minor}" if major else ""


def cache_folder() -> Path:
    """Where generated modules and measured times are kept: ``ATTNOPT_CACHE_DIR``, or attnopt's folder in the user's cache."""
    base = os.environ.get("ATTNOPT_CACHE_DIR")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnopt"
