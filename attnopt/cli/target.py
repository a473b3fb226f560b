"""What a command line names: the model with its inputs, and the options of what is to be done with it."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from attnopt.cli.progress import Stages
from attnopt.config import OptimizeConfig
from attnopt.errors import AttnoptError

if TYPE_CHECKING:
    from attnopt.capture.loader import Loaded
    from attnopt.cli.render import Terminal


def config_of(options: dict[str, Any], *, verify: bool, train: bool = False) -> OptimizeConfig:
    """The options of one optimization: those of its fields that the command has. ``require_all`` is judged by the command, after the report was shown.

    A backend that cannot be used at all is refused now, before the work of loading and capturing.
    """
    if options["kv_cache"] is not None and train:
        raise AttnoptError("A model that generates from a KV cache is in evaluation mode, and --train asks for training mode.")
    if options["backend"] != "auto":
        from attnopt.kernels import paged_choice, registry

        if options["kv_cache"] is not None:
            paged_choice.known(options["backend"])
        registry.find(options["backend"])
    judged = ("verify", "require_all")
    return OptimizeConfig(verify=verify, **{f.name: options[f.name] for f in fields(OptimizeConfig) if f.name in options and f.name not in judged})


def load_target(
    target: str, stages: Stages, *, train: bool, inputs: tuple[str, ...], dtype: str | None, device: str | None, attn_implementation: str | None, kv_cache: str | None = None, **_: Any
) -> Loaded:
    """The model and its inputs on the device and in the dtype that were asked for, after it ran once as it is.

    A model that fails by itself is told from one that cannot be captured that way, with the user's own line.
    """
    from dataclasses import replace

    from attnopt.capture.loader import load, run_once

    stages("load")
    where = None if device is None else _device(device)
    loaded = load(target, inputs, attn_implementation=attn_implementation, generates=kv_cache is not None)
    loaded = replace(loaded, model=loaded.model.train(train), **_moved(loaded, dtype, where))
    stages("run")
    run_once(loaded)
    return loaded


def _moved(loaded: Loaded, dtype: str | None, device: Any) -> dict[str, Any]:
    import torch
    from torch.utils._pytree import tree_map

    kind: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    if kind is not None or device is not None:
        loaded.model.to(device=device, dtype=kind)

    def move(x: Any) -> Any:
        return x.to(device=device, dtype=kind if x.is_floating_point() else None) if isinstance(x, torch.Tensor) else x

    return {"args": tree_map(move, loaded.args), "kwargs": tree_map(move, loaded.kwargs)}


def _device(text: str) -> Any:
    import torch

    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise AttnoptError(f"--device {text!r} is no device: expected cpu, cuda, cuda:1 and so on.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise AttnoptError(
            f"--device {text}: this machine has {torch.cuda.device_count()} CUDA devices that PyTorch can use.", "`attnopt env` shows the devices."
        )
    return device


def introduce(out: Terminal, loaded: Loaded) -> None:
    """One line on the model, and what the user should know about how it was loaded."""
    parameters = sum(p.numel() for p in loaded.model.parameters())
    out.say(f"[bold]{escape(loaded.name)}[/], {parameters / 1e6:.1f} M parameters, inputs {escape(loaded.inputs)}")
    for note in loaded.notes:
        out.say(escape(note), style="yellow")
