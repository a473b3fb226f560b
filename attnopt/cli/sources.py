"""What the other sequence of a prompt is made of (an encoder's input): ids, a text, numbers, or a file of a tensor, as the tensors that a serving model takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.errors import LoadError, ServingError, named

if TYPE_CHECKING:
    from torch import Tensor

    from attnopt.serving import ServingModel

KEYS = ("source", "source_file")
"""What a line of ``--prompts`` calls it, by its values and by its file."""


@dataclass(frozen=True)
class Source:
    """``values``: numbers in lists, or those of each input by its name. ``file``: where they are instead."""

    values: Any = None
    file: Path | None = None


def source_of(own: dict[str, Any], ids: Callable[[str], Sequence[int]], folder: Path) -> Source | None:
    """What a line says of it; None where it says nothing. ``ids`` makes token ids of a text, and files are found from ``folder``. Raises LoadError for what is neither."""
    given = [k for k in KEYS if k in own]
    if not given:
        return None
    if len(given) > 1:
        raise LoadError("The line has source and source_file; supported is one of them.")
    value = own[given[0]]
    if given[0] == "source_file":
        if not isinstance(value, str):
            raise LoadError(f"source_file is {json.dumps(value)}; it must be the name of a file.")
        return Source(file=folder / value)
    return Source({k: _numbers(x, ids) for k, x in value.items()} if isinstance(value, dict) else _numbers(value, ids))


def _numbers(value: Any, ids: Callable[[str], Sequence[int]]) -> Any:
    if isinstance(value, str):
        return list(ids(value))
    if not isinstance(value, list) or not value:
        raise LoadError(f'source is {json.dumps(value)[:40]}; expected "text", [1, 2, 3], numbers in lists, or an object with one of these for each input.')
    return value


def tensors(serving: ServingModel, source: Source | None) -> tuple[Tensor, ...]:
    """The inputs of ``serving.encode`` for one prompt, each a batch of one. Raises LoadError or ServingError where they are not those of the model."""
    names = serving.plan.context
    if source is None:
        if names:
            raise ServingError(f"The model reads another sequence ({', '.join(names)}), and the prompt has no source; give --source, or `source` in its line.")
        return ()
    if not names:
        raise ServingError("The model reads no other sequence, and the prompt has a source.")
    found = source.values if source.file is None else _read(source.file)
    if not isinstance(found, dict):
        if len(names) > 1:
            raise ServingError(f"The source has no names, and the model reads {', '.join(names)}; supported is an object with these.")
        found = {names[0]: found}
    if set(found) != set(names):
        raise ServingError(f"The source has {', '.join(map(str, found)) or 'no inputs'}; the model reads {', '.join(names)}.")
    made = tuple(_tensor(serving, name, found[name]) for name in names)
    serving.context_length(*made)
    return made


def _tensor(serving: ServingModel, name: str, value: Any) -> Tensor:
    import torch

    assert serving.original is not None
    like: Tensor = serving.original.row(name, 0)
    try:
        x = torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise ServingError(f"The source's {name} is no tensor: {named(error, 120)}.") from error
    if x.is_floating_point() and not like.is_floating_point():
        raise ServingError(f"The source's {name} has numbers that are not whole; the model reads {str(like.dtype).removeprefix('torch.')}.")
    if x.dim() == like.dim() - 1:
        x = x[None]
    if x.dim() != like.dim() or x.shape[0] != 1:
        raise ServingError(f"The source's {name} is {list(x.shape)}; the model reads {like.dim()} axes, a batch of one first, as {list(like.shape)} in the example.")
    return x.to(device=like.device, dtype=like.dtype)


def _read(file: Path) -> Any:
    """The tensor of a ``.npy`` or ``.pt`` file, or tensors by name. Raises LoadError where there is none."""
    import numpy as np
    import torch

    if file.suffix not in (".npy", ".pt"):
        raise LoadError(f"{file.name} is no file of a tensor; supported are .npy and .pt.")
    try:
        return np.load(file, allow_pickle=False) if file.suffix == ".npy" else torch.load(file, weights_only=True)
    except Exception as error:
        raise LoadError(f"{file.name} cannot be read: {named(error, 120)}.") from error
