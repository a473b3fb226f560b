"""In words: in what a call differs from those that a model was captured for (remark AO305)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from attnopt.capture.captured import Example

Key = tuple[Any, ...]
"""(modes, placement of the parameters, autocast, how many positional arguments, names of the others, then each value's form)."""


def other_way(known: Iterable[Key], key: Key) -> str:
    """What is new in ``key``, beside the nearest of the ``known`` keys, with both values of each difference."""
    found = [_differences(key, other) for other in known]
    return " and ".join(sorted(found, key=len)[0]) if found else ""


def other_sizes(examples: Sequence[Example], leaves: Sequence[Any]) -> str:
    """The sizes of a call, where only they are new, and those of the latest of ``examples``."""
    if not examples:
        return "other sizes"
    pairs = [(x.name, tuple(given.shape), x.sizes) for x, given in zip(examples[-1].leaves, leaves, strict=True) if x.is_tensor]
    # A size that was captured as a number tells more than one that has a name and a condition on it.
    clear = [p for p in pairs if any(isinstance(n, int) and n != m for m, n in zip(p[1], p[2], strict=True))]
    said = [f"{_listed(given)} for {name}, where {_listed(sizes)} was captured" for name, given, sizes in clear or pairs]
    return f"other sizes: {'; '.join(said)}"


def _listed(sizes: Iterable[object]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _differences(new: Key, old: Key) -> list[str]:
    out = []
    if new[0] != old[0]:
        out.append(f"the mode (train or eval): {_mode(new[0])}, where {_mode(old[0])} was captured")
    if new[1] != old[1]:
        out.append(f"the dtype or device of the parameters: {_placement(new[1])}, where {_placement(old[1])} was captured")
    if new[2] != old[2]:
        out.append(f"autocast: {_autocast(new[2])}, where {_autocast(old[2])} was captured")
    if new[3] != old[3]:
        out.append(f"the number of positional arguments: {new[3]}, where {old[3]} was captured")
    if new[4:] != old[4:]:
        out.append(f"the arguments: {_arguments(_values(new), _values(old))}")
    return out


def _mode(training: bool | tuple[bool, ...]) -> str:
    return "train in some modules" if isinstance(training, tuple) else "train" if training else "eval"


def _placement(runs: Iterable[tuple[torch.dtype, torch.device]]) -> str:
    return " and ".join(dict.fromkeys(f"{_name(dtype)} on {device}" for dtype, device in runs)) or "none"


def _autocast(setting: tuple[str, torch.dtype] | None) -> str:
    return "off" if setting is None else f"{_name(setting[1])} on {setting[0]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _values(key: Key) -> dict[str, tuple[Any, ...]]:
    """The forms of each argument's leaves, by the argument's name."""
    named = list(itertools.takewhile(lambda x: isinstance(x, str), key[4:]))
    rest = iter(key[4 + len(named) :])
    out: dict[str, tuple[Any, ...]] = {}
    for name in [*(f"argument {i + 1}" for i in range(key[3])), *named]:
        form = next(rest)
        out[name] = (form,) if isinstance(form, tuple) else (form, *itertools.islice(rest, form.num_leaves))
    return out


def _arguments(new: dict[str, tuple[Any, ...]], old: dict[str, tuple[Any, ...]]) -> str:
    if list(new) != list(old):
        return f"{', '.join(new) or 'none'}, where {', '.join(old) or 'none'} was captured"
    changes: dict[tuple[str, str], list[str]] = {}
    for name in new:
        if new[name] != old[name]:
            changes.setdefault(_change(new[name], old[name]), []).append(name)
    return "; ".join(f"{now} for {', '.join(names)}, where {before} was captured" for (now, before), names in changes.items())


def _change(new: tuple[Any, ...], old: tuple[Any, ...]) -> tuple[str, str]:
    """The first difference between two values' forms, as it is now and as it was."""
    a, b = next((a, b) for a, b in itertools.zip_longest(new, old, fillvalue=()) if a != b)
    if not (isinstance(a, tuple) and isinstance(b, tuple)) or not a or not b:
        return "another structure", "one"
    if len(a) != 3 or len(b) != 3:
        return _said(a), _said(b)
    differ = [i for i in range(3) if a[i] != b[i]]
    return " ".join(_tensor(a)[i] for i in differ), " ".join(_tensor(b)[i] for i in differ)


def _tensor(form: tuple[Any, ...]) -> tuple[str, str, str]:
    dtype, device, rank = form
    return _name(dtype), f"on {device}", f"of {rank} axes"


def _said(form: tuple[Any, ...]) -> str:
    return f"a tensor {' '.join(_tensor(form))}" if len(form) == 3 else repr(form[1])
