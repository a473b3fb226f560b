"""What a model of the zoo is, and what must be true of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

BATCH, LENGTH = 2, 64
"""The sizes that every model is captured with."""

Facts = Mapping[str, Any]
"""Properties of a spec and the values that they must have; a callable value judges the property itself.

Beside the properties of ``AttentionSpec``: ``dense`` (how many loads run along queries and keys by themselves), ``rest`` (the text of what
is left of the mask when all its words are said; empty: nothing), ``words`` (parts of ``str(spec)``).
"""

PLAIN: Facts = {
    "causal": None,
    "window": (None, None),
    "groups": 1,
    "softcap": None,
    "bias": None,
    "alibi": False,
    "sinks": False,
    "document": False,
    "rest": "",
    "dense": 0,
}
"""What holds for a site about which a case says nothing else."""


@dataclass(frozen=True)
class Refusal:
    """An attention that must not be replaced, and why that is right."""

    code: str
    reason: str


@dataclass(frozen=True)
class Variant:
    """One way to run a model."""

    form: str
    """``eager`` (the model spells its attention out) or ``sdpa`` (it calls PyTorch's fused attention)."""
    padded: bool
    """Whether a padding mask is passed."""
    dynamic: bool
    """Whether batch and length stay open."""

    @property
    def name(self) -> str:
        return f"{self.form}-{'padded' if self.padded else 'unpadded'}-{'dynamic' if self.dynamic else 'static'}"


@dataclass(frozen=True)
class Case:
    """A tiny random model and what must be found in it."""

    name: str
    family: str
    build: Callable[[str], nn.Module]
    """Attention form -> model in eval mode."""
    inputs: Callable[[bool, int, int], dict[str, Any]]
    """(padding mask or not, batch, length) -> keyword arguments."""
    sites: int
    """How many attentions the model computes."""
    expect: Mapping[str, Facts] = field(default_factory=dict)
    """Facts by a part of the site's name, on top of ``PLAIN``; later entries win."""
    forms: tuple[str, ...] = ("eager", "sdpa")
    padded: bool = True
    """Whether it takes a padding mask."""
    padded_sites: str = ""
    """Which attentions see the padding: those in whose lower-case names this expression is found."""
    open: str = "bs"
    """Which sizes a dynamic capture leaves open: ``b`` batch, ``s`` length."""
    open_padded: str | None = None
    """The same with a padding mask, where that differs."""
    other: tuple[tuple[int, int], ...] = ((3, 37), (1, 11))
    """The (batch, length) of further calls; what is not open stays at the captured size."""
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    """By a part of the site's name: attentions that must be left alone."""
    exported: bool = True
    """False: torch.export refuses the model, so torch.compile captures it (AO302)."""
    note: str = ""

    def variants(self) -> list[Variant]:
        masks = (False, True) if self.padded else (False,)
        return [Variant(form, padded, dynamic) for form in self.forms for padded in masks for dynamic in (True, False)]

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants() if v.name == name)

    def other_sizes(self, variant: Variant) -> list[tuple[int, int]]:
        """Sizes that the capture has to serve without another."""
        if not variant.dynamic:
            return []
        may_vary = self.open_padded if variant.padded and self.open_padded is not None else self.open
        found = [(b if "b" in may_vary else BATCH, s if "s" in may_vary else LENGTH) for b, s in self.other]
        return list(dict.fromkeys(x for x in found if x != (BATCH, LENGTH)))

    def facts(self, site: str, variant: Variant) -> dict[str, Any]:
        """All that must be true of the spec of the attention called ``site``."""
        found = {**PLAIN, "key_padding": variant.padded and re.search(self.padded_sites, site.lower()) is not None}
        for part, facts in self.expect.items():
            if part in site:
                found.update(facts)
        return found

    def refusal(self, site: str) -> Refusal | None:
        return next((r for part, r in self.refusals.items() if part in site), None)


def says(*parts: str) -> Callable[[Any], bool]:
    """A property whose text holds all ``parts``, in this order."""

    def judge(value: Any) -> bool:
        text, at = repr(value), 0
        for part in parts:
            at = text.find(part, at)
            if at < 0:
                return False
            at += len(part)
        return True

    judge.__name__ = f"says {parts}"
    return judge


def some(value: Any) -> bool:
    """A property that is there, whatever it is."""
    return value is not None
