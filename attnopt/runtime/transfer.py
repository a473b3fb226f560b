"""Lists of numbers as tensors on a device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

_CODES = {torch.int64: "q", torch.int32: "i", torch.float64: "d"}


def on_device(parts: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """A tensor of each list, all by one transfer: a small one takes longer to start than to run. Each begins at a multiple of 16 bytes, as a tensor of its own does.

    The host does not wait for what the device has still to do.
    """
    unit = 16 // dtype.itemsize
    flat: list[float] = []
    places = []
    for part in parts:
        places.append((len(flat), len(flat) + len(part)))
        flat += part
        flat += [0] * (-len(part) % unit)
    # an array is read from a list of numbers several times faster than a tensor is
    whole = torch.frombuffer(array(_CODES[dtype], flat), dtype=dtype) if flat else torch.empty(0, dtype=dtype)
    place = torch.device(device)
    if place.type == "cuda":
        whole = whole.pin_memory().to(place, non_blocking=True)
    elif place.type != "cpu":
        whole = whole.to(place)
    return [whole[a:b] for a, b in places]
