"""Names of sites for people: layers of one stack are said once."""

from __future__ import annotations

import re
from collections.abc import Iterable

from attnopt.report.report import Site


def grouped(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites that differ only in the numbers of their names (layers of one stack) share a group."""
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        key = (re.sub(r"\d+", "#", site.name), site.status, str(site.spec), site.kernel, site.why)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def shown_names(group: Iterable[Site]) -> str:
    """The names of sites that differ in their numbers only."""
    return joined([s.name for s in group])


def joined(names: list[str]) -> str:
    """``layers.0-3.attn (4)`` for a run of layers, ``layers.0.attn and 2 more`` for what is not one run."""
    first = names[0]
    if len(names) == 1:
        return first
    numbers = [re.findall(r"\d+", name) for name in names]
    varying = [i for i in range(len(numbers[0])) if len({n[i] for n in numbers}) > 1]
    if len(varying) == 1:
        values = [int(n[varying[0]]) for n in numbers]
        if values == list(range(values[0], values[0] + len(values))):
            spans = list(re.finditer(r"\d+", first))
            span = spans[varying[0]]
            return f"{first[: span.start()]}{values[0]}-{values[-1]}{first[span.end() :]} ({len(names)})"
    return f"{first} and {len(names) - 1} more"
