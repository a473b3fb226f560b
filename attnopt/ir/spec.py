"""What one attention computes: the contract between analysis, passes and kernels.

For batch b, query head h, query q and key k, with ``s = sum_d Q[b, h, q, d] * K[b, h // groups, k, d]``::

    o[b, h, q, :] = sum_k softmax_k(score(s, b, h, q, k) where mask(b, h, q, k)) * V[b, h // groups, k, :]

On a row in which ``mask`` leaves no key, ``empty_rows`` says what is computed instead: ``nan`` and ``zero`` are the
values of the output row, ``uniform`` is the average of all values, ``program`` is the softmax of ``empty_score`` over all keys. Where that
is -inf for every key too, the row is what ``weightless`` says.

``sink`` is the logit of one more key, for which there is no value (an attention sink): it takes a part of each row's
weight, ``exp(sink(b, h, q))`` in the softmax's sum. With a sink a row without a visible key is zero.

A spec is a value: it is compared, printed, and travels in graphs and files as JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

from attnopt.ir import expr as E
from attnopt.ir.bounds import nonnegative
from attnopt.ir.expr import Expr
from attnopt.ir.printing import render
from attnopt.ir.rotary import Rotary
from attnopt.ir.serial import decode, encode

Alignment = Literal["top_left", "bottom_right"]
EmptyRows = Literal["uniform", "nan", "zero", "program"]
Weightless = Literal["nan", "zero"]
Window = tuple[int | None, int | None]


@dataclass(frozen=True)
class Load:
    """A tensor that the score or the mask reads by index. ``name`` is for people, ``origin`` how it was made."""

    name: str
    kind: E.Kind
    origin: str = ""


@dataclass(frozen=True)
class Dims:
    """The sizes of a site, constants or symbolic: batch, query heads, KV heads, queries, keys, head size, value head size."""

    B: Expr
    Hq: Expr
    Hkv: Expr
    Sq: Expr
    Skv: Expr
    D: Expr
    Dv: Expr

    @cached_property
    def b(self) -> Expr:
        return E.var("b", self.B)

    @cached_property
    def h(self) -> Expr:
        return E.var("h", self.Hq)

    @cached_property
    def q(self) -> Expr:
        return E.var("q", self.Sq)

    @cached_property
    def k(self) -> Expr:
        return E.var("k", self.Skv)

    @property
    def all(self) -> tuple[Expr, ...]:
        return (self.B, self.Hq, self.Hkv, self.Sq, self.Skv, self.D, self.Dv)


@dataclass(frozen=True)
class Traits:
    """What was *proven* about score and mask. Absent means "not proven", and the expressions stay exact either way."""

    scale: float | None = None
    """The factor on s, when the score is ``scale * s + bias`` or ``softcap * tanh(scale * s / softcap) + bias``."""
    softcap: float | None = None
    bias: Expr | None = None
    """What is added to the scaled (and capped) product; None when nothing is."""
    alibi: bool = False
    causal: Alignment | None = None
    window: Window = (None, None)
    """Keys seen to the left and to the right of the query itself, inclusive; None is unbounded."""
    key_padding: bool = False
    document: bool = False
    chunk: int | None = None
    """Query and key lie in the same chunk of this many positions."""
    prefix: bool = False
    """Beside the keys up to its own place a query sees keys that all queries see (prefix-LM)."""
    global_tokens: bool = False
    """A band around the diagonal, and tokens that see all keys or are seen by all queries."""
    blocks: tuple[int, int] | None = None
    """A table of blocks of this many queries and keys says which see each other (block sparse)."""
    by_position: bool = False
    """Query and key are compared by positions that a tensor gives them (packed sequences), instead of by their indices."""
    mask_rest: Expr = E.TRUE
    """The part of the mask that none of the words above covers."""
    rotary: Rotary | None = None
    """The form of the rotary embedding that queries and keys went through, when it is the same for both. No part of what the
    op computes: it receives q and k as they are after it."""
    shared_key_features: tuple[int, int] | None = None
    """(start, count): features of the keys that are the same for all heads, where others are not."""


@dataclass(frozen=True)
class AttentionSpec:
    """One attention. See the module's text for the formula.

    ``sizes`` names the symbolic sizes that score, mask, empty_score or sink read, in the order in which the op receives them.
    """

    dims: Dims
    score: Expr
    mask: Expr = E.TRUE
    empty_rows: EmptyRows = "nan"
    empty_score: Expr | None = None
    weightless: Weightless = "nan"
    """What a row gives whose ``empty_score`` is -inf for every key; with ``empty_rows`` other than ``program`` it says nothing."""
    sink: Expr | None = None
    loads: tuple[Load, ...] = ()
    sizes: tuple[str, ...] = ()
    dropout: float = 0.0
    traits: Traits = field(default_factory=Traits)

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __hash__(self) -> int:
        # specs are keys of everything that kernels keep, and to hash a whole one takes as long as a launch
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # strings have other hashes in another process
        return {k: v for k, v in self.__dict__.items() if k != "_hash"}

    # ---- the facts, in the field's words

    @property
    def scale(self) -> float | None:
        return self.traits.scale

    @property
    def softcap(self) -> float | None:
        return self.traits.softcap

    @property
    def bias(self) -> Expr | None:
        return self.traits.bias

    @property
    def alibi(self) -> bool:
        return self.traits.alibi

    @property
    def causal(self) -> Alignment | None:
        return self.traits.causal

    @property
    def window(self) -> Window:
        return self.traits.window

    @property
    def key_padding(self) -> bool:
        return self.traits.key_padding

    @property
    def document(self) -> bool:
        return self.traits.document

    @property
    def sinks(self) -> bool:
        return self.sink is not None

    @property
    def zero_without_weight(self) -> bool:
        """Whether a row of nothing but -inf is zero, and not NaN."""
        return self.sink is not None or (self.weightless if self.empty_rows == "program" else self.empty_rows) == "zero"

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return int(E.floordiv(self.dims.Hq, self.dims.Hkv).value) if self.dims.Hq is not self.dims.Hkv else 1

    @property
    def programs(self) -> tuple[Expr, ...]:
        return (self.score, self.mask, *(x for x in (self.empty_score, self.sink) if x is not None))

    @property
    def load_names(self) -> dict[int, str]:
        return {i: x.name for i, x in enumerate(self.loads)}

    @property
    def is_plain(self) -> bool:
        """Whether the score is just scale * s: no softcap, no bias."""
        return self.scale is not None and self.softcap is None and self.bias is None

    def rows_may_be_empty(self) -> bool:
        """Whether a row without a visible key was not proven impossible: key 0, or the query's own, is seen by all."""
        d = self.dims
        for k in (E.ZERO, d.q, E.add(d.q, E.sub(d.Skv, d.Sq))):
            inside = nonnegative(k) and nonnegative(E.sub(E.sub(d.Skv, E.ONE), k))
            if inside and E.substitute(self.mask, {d.k: k}) is E.TRUE:
                return False
        return True

    def __str__(self) -> str:
        t = self.traits
        words: list[str] = []
        if t.causal:
            words.append("causal" if self.dims.Sq is self.dims.Skv else f"causal ({t.causal.replace('_', '-')})")
        if self.groups > 1:
            words.append(f"{'MQA' if self.dims.Hkv is E.ONE else 'GQA'} {render(self.dims.Hq)}/{render(self.dims.Hkv)}")
        left, right = t.window
        if left is not None or right is not None:
            if t.causal and left is not None:
                words.append(f"window {left + 1}")
            else:
                words.append(f"window {'*' if left is None else left}+1+{'*' if right is None else right}")
        if t.key_padding:
            words.append("key padding")
        if t.document:
            words.append("documents")
        if t.chunk is not None:
            words.append(f"chunks of {t.chunk}")
        if t.by_position:
            words.append("by position ids")
        if t.prefix:
            words.append("prefix")
        if t.global_tokens:
            words.append("local and global tokens")
        if t.blocks is not None:
            words.append(f"block sparse {t.blocks[0]}x{t.blocks[1]}")
        if t.mask_rest is not E.TRUE:
            words.append("mask " + _short(render(t.mask_rest, self.load_names)))
        if t.softcap is not None:
            words.append(f"softcap {t.softcap:g}")
        if t.alibi:
            words.append("ALiBi")
        elif t.bias is not None:
            words.append("bias " + _short(render(t.bias, self.load_names)))
        if self.sink is not None:
            words.append("softmax plus one" if self.sink is E.FZERO else "sinks")
        if t.rotary is not None:
            words.append(str(t.rotary))
        if t.shared_key_features is not None:
            words.append(f"MLA: {t.shared_key_features[1]} of {render(self.dims.D)} key features shared by all heads")
        if t.scale is None:
            words.append("score " + _short(render(self.score, self.load_names)))
        if self.dropout:
            words.append(f"dropout {self.dropout:g}")
        if not words or (not t.causal and left is None and right is None and self._sees_all_or_padding()):
            words.insert(0, "full")
        return ", ".join(words)

    def _sees_all_or_padding(self) -> bool:
        t = self.traits
        return t.mask_rest is E.TRUE and not (t.chunk or t.prefix or t.global_tokens or t.blocks or t.by_position)

    def replace(self, **changes: Any) -> AttentionSpec:
        return replace(self, **changes)

    # ---- as text

    @cached_property
    def _json(self) -> str:
        t = self.traits
        exprs = [*self.dims.all, self.score, self.mask, self.empty_score, self.sink, t.bias, t.mask_rest]
        nodes, roots = encode([x for x in exprs if x is not None])
        it = iter(roots)
        where = [None if x is None else next(it) for x in exprs]
        return json.dumps(
            {
                "nodes": nodes,
                "roots": where,
                "empty_rows": self.empty_rows,
                "weightless": self.weightless,
                "loads": [[x.name, x.kind, x.origin] for x in self.loads],
                "sizes": list(self.sizes),
                "dropout": self.dropout,
                "rotary": None if t.rotary is None else t.rotary.to_list(),
                "shared_key_features": t.shared_key_features,
                "traits": [t.scale, t.softcap, t.alibi, t.causal, list(t.window), t.key_padding, t.document, t.chunk, t.prefix, t.global_tokens, t.blocks, t.by_position],
            },
            separators=(",", ":"),
        )

    def to_json(self) -> str:
        """The spec as one line of JSON, the same in every process."""
        return self._json

    @staticmethod
    def from_json(text: str) -> AttentionSpec:
        """The inverse of ``to_json``."""
        return _parse(text)


def _short(text: str, limit: int = 48) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


@lru_cache(maxsize=1024)
def _parse(text: str) -> AttentionSpec:
    data = json.loads(text)
    table = decode(data["nodes"])
    found = [None if i is None else table[i] for i in data["roots"]]
    score, mask, empty_score, sink, bias, mask_rest = found[7:]
    scale, softcap, alibi, causal, window, key_padding, document, chunk, prefix, global_tokens, blocks, by_position = data["traits"]
    assert score is not None and mask is not None and mask_rest is not None
    return AttentionSpec(
        dims=Dims(*(x for x in found[:7] if x is not None)),
        score=score,
        mask=mask,
        empty_rows=data["empty_rows"],
        empty_score=empty_score,
        weightless=data.get("weightless", "nan"),
        sink=sink,
        loads=tuple(Load(*x) for x in data["loads"]),
        sizes=tuple(data["sizes"]),
        dropout=data["dropout"],
        traits=Traits(
            scale=scale,
            softcap=softcap,
            bias=bias,
            alibi=alibi,
            causal=causal,
            window=(window[0], window[1]),
            key_padding=key_padding,
            document=document,
            chunk=chunk,
            prefix=prefix,
            global_tokens=global_tokens,
            blocks=None if blocks is None else (blocks[0], blocks[1]),
            by_position=by_position,
            mask_rest=mask_rest,
            rotary=None if data.get("rotary") is None else Rotary.from_list(data["rotary"]),
            shared_key_features=None if data.get("shared_key_features") is None else tuple(data["shared_key_features"]),
        ),
    )
