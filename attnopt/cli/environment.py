"""``attnopt env``: what is installed here, which devices there are, and which backends can be used."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import click

from attnopt.config import disabled_backends

_PACKAGES = ("attnopt", "torch", "triton", "transformers", "onnx", "onnxscript", "onnxruntime", "flash-attn", "flash-attn-3", "flash-attn-4", "numpy")


def env_command(as_json: bool) -> int:
    facts = environment()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _show(facts)
    return 0


def environment() -> dict[str, Any]:
    """Versions (None: not installed), devices, and for each backend None or why it cannot be used here."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "backends": _backends(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    found = [f"cpu ({os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads)"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(f"cuda:{i} ({p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return found


def _backends() -> dict[str, str | None]:
    from attnopt.kernels import registry

    disabled = disabled_backends()
    return {name: "switched off by ATTNOPT_DISABLE" if name in disabled else one.available() for name, one in registry.backends().items()}


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table

    from attnopt.cli.render import console

    out = console()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("Python", f"{facts['python']} on {facts['system']}")
    for name, version in facts["packages"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    for device in facts["devices"]:
        table.add_row("device", device)
    for name, reason in facts["backends"].items():
        table.add_row(f"backend {name}", "[green]available[/]" if reason is None else f"[yellow]not available:[/] {reason}")
    out.print(table)
