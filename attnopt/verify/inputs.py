"""Inputs to compare on, made from one example: other values, other sizes, other paddings.

The cost is bounded by the sizes: a float64 run of a part of a graph cannot be restricted to some of the query rows (a
general graph does not say which axis they are), so where lengths may change they are kept at or below ``LENGTH``; the example itself,
when it is longer, is then compared only end to end at its own dtype. Where lengths are fixed the example's are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.verify.dynamic import DynamicShapes

LENGTH = 256
"""The longest sequence that is compared with a float64 truth, where lengths may change."""

LONG = 151
"""What a short sequence is lengthened to: more than one block of every kernel, more than a window of a tiny model, sums long enough to lose precision."""

Kind = Literal["mask", "range", "ids", "bias", "float", "other"]


@dataclass(frozen=True)
class Variant:
    """One set of inputs. ``light``: too long for a float64 truth. ``about``: what it is there for."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    light: bool = False


Accepts = Callable[[tuple[Any, ...], dict[str, Any]], str | None]
"""Runs the original on some inputs: None, or why it refuses them."""


def variants(
    example_args: Sequence[Any],
    example_kwargs: Mapping[str, Any],
    dynamic: DynamicShapes | None = None,
    accepts: Accepts | None = None,
    *,
    length: int = LENGTH,
) -> tuple[list[Variant], list[str]]:
    """Named input sets made from an example, and a note on each kind that could not be made.

    * ``example``: as given. ``other values``: ids drawn from those seen in the example, floats with its mean and deviation.
    * ``shorter``, ``longer`` (and another batch size), ``lengths apart`` (each length another: Sq != Skv): within the dynamic
      ranges, the nearest that ``accepts`` takes.
    * ``right padding``, ``left padding``, ``a padded row``: tensors of integers or booleans that hold only 0 and 1 and mostly
      1 are taken for masks; the last one leaves one row without any visible key.
    * ``large values``: floats ten times as large.

    Everything is drawn from fixed seeds.
    """
    maker = _Maker(list(example_args), dict(example_kwargs), dynamic or DynamicShapes(), accepts)
    return maker.make(length)


class _Maker:
    def __init__(self, args: list[Any], kwargs: dict[str, Any], dynamic: DynamicShapes, accepts: Accepts | None) -> None:
        self.leaves, self.spec = pytree.tree_flatten((tuple(args), kwargs))
        self.dynamic = dynamic
        self.accepts = accepts
        self.kinds = [kind_of(x) for x in self.leaves]
        self.base = dynamic.values(self.leaves)
        self.notes: list[str] = []
        self.taken: set[str] = set()

    def make(self, length: int) -> tuple[list[Variant], list[str]]:
        base, light = self._within(length)
        result = [self._variant("example", self.leaves, light=light)]
        sizes = base
        if light:
            shortened = self._resized("example, shortened", [base], seed=1)
            result += shortened
            if not shortened:  # every shorter one is refused: the example's own size has to do
                sizes, light = self.base, False
                result = [self._variant("example", self.leaves)]
        long = not self.dynamic.dims and any(isinstance(x, Tensor) and self._is_sequence(x) and max(x.shape[1:], default=0) > length for x in self.leaves)
        if not long and any(k in ("ids", "float") for k in self.kinds):
            result.append(self._variant("other values", self._filled(sizes, seed=2)))
        result += self._resized("shorter", self._sizes(sizes, length, shorter=True), seed=3)
        result += self._resized("longer", self._sizes(sizes, length, shorter=False), seed=4)
        result += self._resized("lengths apart", self._apart(sizes, length), seed=5)
        if "mask" in self.kinds:
            result.append(self._variant("right padding", self._filled(sizes, seed=6, padding="right")))
            result.append(self._variant("left padding", self._filled(sizes, seed=7, padding="left")))
            result.append(self._variant("a padded row", self._filled(sizes, seed=8, padding="row")))
        if "float" in self.kinds:
            result.append(self._variant("large values", self._filled(sizes, seed=9, magnitude=10.0)))
        return self._accepted(result), self.notes

    # ---- sizes

    def _is_sequence(self, x: Tensor) -> bool:
        """Whether long dimensions of ``x`` are positions (ids or embeddings), not samples or pixels."""
        return (not x.is_floating_point() and x.ndim == 2) or (x.is_floating_point() and x.ndim == 3)

    def _lengths(self) -> list[str]:
        return [s for s in self.dynamic.symbols if not self.dynamic.is_batch([s])]

    def _within(self, length: int) -> tuple[dict[str, int], bool]:
        """The example's sizes with sequences brought down to ``length``, and whether any had to be."""
        capped = dict(self.base)
        for i, dims in self.dynamic.dims.items():
            for d, dim in dims.items():
                if d > 0 and self._is_sequence(self.leaves[i]) and self.leaves[i].shape[d] > length:
                    capped[dim.symbol] = max(dim.min, (length - dim.plus) // dim.times)
        return capped, capped != self.base

    def _fits(self, sizes: Mapping[str, int], length: int) -> bool:
        limits = self.dynamic.symbols
        inside = all(limits[s].min <= n and (top is None or n <= top) for s, n in sizes.items() for top in [limits[s].max])
        return inside and self.dynamic.admits(sizes)

    def _sizes(self, base: Mapping[str, int], length: int, *, shorter: bool) -> Iterator[dict[str, int]]:
        """Other choices of all sizes, the most telling first."""
        groups = self.dynamic.groups(self.leaves)
        sequences = {dim.symbol for i, dims in self.dynamic.dims.items() for d, dim in dims.items() if d > 0 and self._is_sequence(self.leaves[i])}
        for i in range(5):
            sizes = dict(base)
            for g in groups:
                for s in g:
                    if self.dynamic.is_batch(g):
                        sizes[s] = base[s] if shorter else base[s] + 1
                    else:
                        sizes[s] = (_shorter(base[s]) if shorter else _longer(base[s], length if s in sequences else None))[i]
            if sizes != dict(base) and self._fits(sizes, length):
                yield sizes

    def _apart(self, base: Mapping[str, int], length: int) -> Iterator[dict[str, int]]:
        """Every length another, where the capture did not tie them."""
        names = self._lengths()
        if len(names) < 2:
            return
        for order in (names, names[::-1]):
            sizes = {**base, **{s: max(self.dynamic.symbols[s].min, base[s] - 3 * i) for i, s in enumerate(order)}}
            if len({sizes[s] for s in names}) > 1 and sizes != dict(base) and self._fits(sizes, length):
                yield sizes

    def _resized(self, name: str, candidates: Sequence[dict[str, int]] | Iterator[dict[str, int]], seed: int) -> list[Variant]:
        reason = None
        for sizes in candidates:
            made = self._variant(name, self._filled(sizes, seed))
            reason = self.accepts(made.args, made.kwargs) if self.accepts else None
            if reason is None:
                self.taken.add(name)
                return [made]
        if reason is not None:
            self.notes.append(f"{name}: the original refuses every size tried ({reason})")
        return []

    def _accepted(self, made: list[Variant]) -> list[Variant]:
        """Without those (apart from the example) that the original refuses."""
        kept = made[:1]
        for v in made[1:]:
            reason = self.accepts(v.args, v.kwargs) if self.accepts and v.name not in self.taken else None
            if reason is None:
                kept.append(v)
            else:
                self.notes.append(f"{v.name}: the original refuses it ({reason})")
        return kept

    # ---- values

    def _filled(self, sizes: Mapping[str, int], seed: int, padding: str = "", magnitude: float = 1.0) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        keep = bool(padding) and dict(sizes) == self.base
        result = []
        for i, (leaf, kind) in enumerate(zip(self.leaves, self.kinds, strict=True)):
            if not isinstance(leaf, Tensor):
                result.append(leaf)
                continue
            shape = self.dynamic.shape(i, leaf, sizes)
            if kind == "mask":
                result.append(_mask(leaf, shape, padding))
            elif keep and tuple(leaf.shape) == shape:
                result.append(leaf)
            else:
                result.append(_fill(leaf, kind, shape, generator, magnitude))
        return result

    def _variant(self, name: str, leaves: list[Any], light: bool = False) -> Variant:
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return Variant(name, args, kwargs, light)


def kind_of(leaf: Any) -> Kind:
    """What an input is, judged by its values.

    ``mask``: 0/1 only, mostly 1, at least 2-D. ``range``: consecutive integers along the last axis. ``ids``: other integers.
    ``bias``: floats with infinities or with very large negative values among zeros. ``float``: other floats.
    """
    if not isinstance(leaf, Tensor) or leaf.numel() == 0 or leaf.is_complex():
        return "other"
    if leaf.is_floating_point():
        extreme = (~leaf.isfinite()) | (leaf.abs() > 1e4)
        return "bias" if bool(extreme.any()) else "float"
    if leaf.ndim >= 2 and bool(((leaf == 0) | (leaf == 1)).all()) and float(leaf.double().mean()) > (0.5 if leaf.ndim == 2 else 0.0):
        return "mask"
    if leaf.dtype != torch.bool and leaf.ndim >= 1 and leaf.shape[-1] > 1 and bool((leaf.diff(dim=-1) == 1).all()):
        return "range"
    return "ids"


def _shorter(n: int) -> list[int]:
    """Sizes to try instead of n, the most telling first: odd ones, that are multiples of nothing a kernel cuts by."""
    return [n * 2 // 3 | 1, n // 2, n // 4, n - 1, n]


def _longer(n: int, length: int | None) -> list[int]:
    """The same upwards. ``length`` bounds a sequence; other dimensions (samples, pixels) have no bound of ours."""
    grown = n * 3 // 2 | 1
    if length is None:
        return [grown, n + 1, n * 2, n * 4, n]
    top = max(n, length - 1)
    return [min(x, top) for x in (max(grown, LONG), grown, n + 1, n * 2, n)]


def _mask(leaf: Tensor, shape: tuple[int, ...], padding: str) -> Tensor:
    """A mask of ``shape``: all ones (2-D) or the example's pattern (more axes), with keys hidden by ``padding``.

    Row b keeps all keys, then 2/3, 1/3, and so on in turn; for ``row`` the last row of the batch keeps none.
    """
    if leaf.ndim > 2:
        index = [torch.arange(n, device=leaf.device) % m for n, m in zip(shape, leaf.shape, strict=True)]
        made = leaf[torch.meshgrid(*index, indexing="ij")].clone()
    else:
        made = torch.ones(shape, dtype=leaf.dtype, device=leaf.device)
    keys = shape[-1]
    for b in range(shape[0]):
        visible = keys if padding in ("", "row") or (b % 3 == 0 and shape[0] > 1) else max(1, keys * (3 - (b % 3 or 1)) // 3)
        if padding == "left":
            made[b, ..., : keys - visible] = 0
        else:
            made[b, ..., visible:] = 0
    if padding == "row":
        made[-1] = 0
    return made


def _fill(leaf: Tensor, kind: Kind, shape: tuple[int, ...], generator: torch.Generator, magnitude: float) -> Tensor:
    if kind == "range":
        start = leaf[..., :1]
        index = [torch.arange(n, device=leaf.device) % m for n, m in zip((*shape[:-1], 1), start.shape, strict=True)]
        return start[torch.meshgrid(*index, indexing="ij")] + torch.arange(shape[-1], dtype=leaf.dtype, device=leaf.device)
    if kind in ("ids", "bias"):
        return _drawn(leaf, shape, generator)
    if kind == "float":
        values = leaf.detach().double()
        mean, deviation = float(values.mean()), float(values.std(correction=0))
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return ((noise * deviation + mean) * magnitude).to(leaf.dtype).to(leaf.device)
    return leaf


def _drawn(leaf: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Elements of ``leaf``, drawn with replacement: only values that are known to be valid."""
    picked = torch.randint(leaf.numel(), shape, generator=generator)
    return leaf.detach().reshape(-1)[picked.to(leaf.device)]
