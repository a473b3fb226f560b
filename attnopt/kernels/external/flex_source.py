"""Score and mask programs as the Python functions that FlexAttention traces: one assignment a node, on scalar tensors.

The text of a module has three functions. ``attention`` takes q, k, v, a block mask and what the programs read, and calls
FlexAttention with the score program as a function inside. ``make_mask`` gives the mask program for the same tensors, and
``make_block_mask`` the block mask of that. Each program is thus code of its own with its own compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.affine import capped
from attnopt.kernels.codegen import literal
from attnopt.kernels.materialise import Part, materialise
from attnopt.kernels.programs import may_be_huge

LEAST = -2e38
"""Scores below it are taken for it (-inf aside): FlexAttention multiplies by log2(e), and float32's least number would become -inf."""

_CALLS = {
    name: f"torch.{name}" for name in ("exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "floor", "ceil", "round", "erf", "abs", "pow")
} | {"not": "torch.logical_not"}

_FORMS: dict[str, Callable[[list[str]], str]] = {
    "add": " + ".join,
    "mul": " * ".join,
    "and": " & ".join,
    "or": " | ".join,
    "div": " / ".join,
    "floordiv": " // ".join,
    "mod": " % ".join,
    "ge0": lambda a: f"{a[0]} >= 0",
    "eq0": lambda a: f"{a[0]} == 0",
    "le": " <= ".join,
    "lt": " < ".join,
    "eq": " == ".join,
    "same": " == ".join,
    "where": lambda a: f"torch.where({', '.join(a)})",
    "float": lambda a: f"{a[0]}.to(DTYPE)",
    "trunc": lambda a: f"{a[0]}.to(torch.int64)",
}


@dataclass(frozen=True)
class FlexSource:
    """A module's text, and what its functions take after their fixed arguments: the loads ``slots``, then one tensor for each of ``sizes``."""

    text: str
    slots: tuple[int, ...]
    """From ``len(spec.loads)`` on they are ``parts``."""
    sizes: tuple[str, ...]
    parts: tuple[Part, ...]
    batched: bool
    """Whether the mask differs between batches."""
    per_head: bool
    """Whether the mask differs between heads."""
    shift: float
    """A constant in every score that is left out; lse lacks it."""


@lru_cache(maxsize=1024)
def generate(spec: AttentionSpec) -> FlexSource:
    """The module for one spec, for any sizes and dtypes."""
    # The scale is an argument of FlexAttention's; a score that is more than scale * s + bias reads the product as it is.
    plain = capped(spec.score)
    score, scale, shift = spec.score, 1.0, 0.0
    if plain is not None and plain.softcap is None:
        score, scale, shift = E.score() if plain.bias is None else E.add(E.score(), plain.bias), plain.scale, plain.shift
    (score, mask), parts = materialise((score, spec.mask), len(spec.loads))
    both = list(E.postorder(score, mask))
    slots = tuple(sorted({int(e.value) for e in both if e.op == "load"}))
    sizes = tuple(sorted({str(e.value[0]) for e in both if e.op == "sym"}))
    reads = ", ".join([*(f"L{s}" for s in slots), *(f"size{i}" for i in range(len(sizes)))])
    emitter = _Emitter({name: f"size{i}" for i, name in enumerate(sizes)})
    function = ["    def score_mod(s, b, h, q, k):", *emitter.body(score, may_be_huge(score))]
    call = f"flex_attention(q, k, v, score_mod={'None' if score is E.score() else 'score_mod'}, block_mask=block_mask, scale={scale!r}, enable_gqa=grouped, **options)"
    text = [
        "import torch",
        "from torch.nn.attention.flex_attention import create_block_mask, flex_attention",
        "",
        "",
        f"def attention(q, k, v, block_mask, grouped, options, DTYPE{', ' + reads if reads else ''}):",
        *([] if score is E.score() else function),
        f"    return {call}",
        "",
        "",
        f"def make_mask(DTYPE{', ' + reads if reads else ''}):",
        "    def mask_mod(b, h, q, k):",
        *emitter.body(mask),
        "    return mask_mod",
        "",
        "",
        "def make_block_mask(mask_mod, B, H, Sq, Skv, device):",
        "    return create_block_mask(mask_mod, B, H, Sq, Skv, device=device)",
        "",
    ]
    names = {str(v.value) for v in mask.variables}
    return FlexSource("\n".join(text), slots, sizes, parts, "b" in names, "h" in names, shift)


@dataclass
class _Emitter:
    size_names: dict[str, str]

    def body(self, root: Expr, bounded: bool = False) -> list[str]:
        """Lines that compute ``root`` and return it, with finite values no less than ``LEAST`` where ``bounded``."""
        names: dict[Expr, str] = {}
        lines: list[str] = []
        for i, e in enumerate(E.postorder(root)):
            leaf = self._leaf(e)
            names[e] = leaf or f"t{i}"
            if leaf is None:
                lines.append(f"        t{i} = {self._node(e, names)}")
        value = self._tensor(root, names)
        if bounded:
            lines.append(f"        out = {value}")
            value = f"torch.where(out == float('-inf'), out, torch.clamp(out, min={LEAST!r}))"
        return [*lines, f"        return {value}"]

    def _leaf(self, e: Expr) -> str | None:
        if e.op == "const":
            return literal(e.value) if e.value >= 0 else f"({literal(e.value)})"
        if e.op == "sym":
            return self.size_names[str(e.value[0])]
        if e.op == "var":
            return str(e.value)
        return "s" if e.op == "score" else None

    def _node(self, e: Expr, names: dict[Expr, str]) -> str:
        if e.op == "load":
            return self._load(e, names)
        # In a sum the score comes last: large terms beside it may cancel.
        operands = sorted(e.args, key=lambda a: E.score() in a.leaves) if e.op == "add" else e.args
        args = [names[a] for a in operands]
        if e.op in _CALLS:
            # the exponent of a power may stay a number
            return f"{_CALLS[e.op]}({', '.join(self._tensor(a, names) if i == 0 else names[a] for i, a in enumerate(e.args))})"
        if e.op in ("min", "max"):
            return f"torch.{e.op}imum({', '.join(self._tensor(a, names) for a in e.args)})"
        if e.op == "mul" and e.kind == "int" and sum(not a.is_const for a in e.args) > 1:
            return " * ".join(x if a.is_const else f"{x}.to(torch.int64)" for a, x in zip(operands, args, strict=True))
        if e.op == "where":
            args[0] = self._tensor(e.args[0], names)
            if all(a.is_const for a in e.args[1:]):
                args[1] = self._tensor(e.args[1], names)
        return _FORMS[e.op](args)

    def _tensor(self, a: Expr, names: dict[Expr, str]) -> str:
        """The operand as a tensor: most functions do not take bare numbers."""
        if not a.is_const:
            return names[a]
        dtype = {"float": "DTYPE", "int": "torch.int64", "bool": "torch.bool"}[a.kind]
        return f"torch.full((), {literal(a.value)}, dtype={dtype}, device=q.device)"

    def _load(self, e: Expr, names: dict[Expr, str]) -> str:
        """An element. Computed indices are clamped: a model may compute one out of range in a branch that it does not take."""
        index = [
            names[a] if a.op == "var" or a.is_const else f"torch.clamp({self._tensor(a, names)}, 0, L{e.value}.shape[{d}] - 1)" for d, a in enumerate(e.args)
        ]
        x = f"L{e.value}[{', '.join(index)}]" if index else f"L{e.value}"
        return {"float": f"{x}.to(DTYPE)", "int": f"{x}.to(torch.int64)", "bool": f"({x} != 0)"}[e.kind]


def unsupported(programs: Sequence[Expr]) -> str | None:
    """Why these programs cannot be written so, as a phrase; None when they can."""
    known = {*_CALLS, *_FORMS, *E.LEAVES, "const", "min", "max"}
    for e in E.postorder(*programs):
        if e.op not in known:
            return f"it has no {e.op}"
    return None
