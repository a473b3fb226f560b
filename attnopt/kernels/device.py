"""What kernels and their choice ask of the machine: the device's capability and name, and where files may be kept."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
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


def write(path: Path, text: str) -> None:
    """Writes a file whole: beside its place first and moved, so that another process never reads half of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as f:
        f.write(text)
    Path(f.name).replace(path)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """What measured times depend on beside the device: packages, by name, that are installed, and cuDNN."""
    found = {}
    for name in ("attnopt", "torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version() if torch.cuda.is_available() else None)}


def device_name(device: str) -> str:
    """The device as its maker calls it; of a CPU, its threads too, by which times change."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {device}, {torch.get_num_threads()} threads"


@lru_cache(maxsize=64)
def processors(index: int) -> int:
    """Multiprocessors of CUDA device ``index``."""
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
