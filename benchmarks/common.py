"""What every benchmark shares: where results go, what is written beside each figure, and tables."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("attnopt", "torch", "triton", "transformers")
_PEERS = ("flash-attn-4", "flash-attn-3", "flash-attn")


def example(name: str) -> ModuleType:
    """The module ``examples/NAME.py``."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def about() -> dict[str, Any]:
    """Versions, machine and date: without them a figure says nothing."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "python": platform.python_version(), "device": device, **versions}


def provenance() -> dict[str, Any]:
    """What stands beside each row of a file that several runs fill: date, device, versions of packages and libraries, and the commit."""
    found = about()
    versions = {k: found[k] for k in ("python", *_PACKAGES)}
    for name in _PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if torch.cuda.is_available():
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {"date": found["date"], "device": found["device"], "versions": versions, "commit": commit()}


def commit() -> str:
    """``ATTNOPT_COMMIT``, which names the commit of a copy; otherwise that of this checkout, with a plus where files differ from it."""
    if named := os.environ.get("ATTNOPT_COMMIT"):
        return named
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "attnopt"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(path: Path, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """Write a file of results whole, so that a run that is cut off leaves the rows it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_suffix(".tmp")
    made.write_text(json.dumps({**about(), **more, "rows": list(rows)}, indent=1, allow_nan=False) + "\n")
    made.replace(path)


def stored(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; none where there is no file."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []  # type: ignore[no-any-return]


def write(name: str, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**about(), **more, "rows": list(rows)}, indent=2) + "\n")
    print(f"written to {path.relative_to(ROOT)}")


def show(title: str, rows: Sequence[dict[str, Any]], lines: bool = True) -> None:
    """One line a row; floats with three significant digits, None as a dash. Without ``lines`` as compact as can be."""
    style: dict[str, Any] = {} if lines else {"box": None, "padding": (0, 1, 0, 0), "pad_edge": False}
    if not lines and title:
        print(f"\n{title}")
    table = Table(title=title if lines else None, title_justify="left", **style)
    for key in rows[0]:
        table.add_column(key, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else "-" if v is None else str(v) for v in row.values()))
    Console(width=140 if lines else 200).print(table)
