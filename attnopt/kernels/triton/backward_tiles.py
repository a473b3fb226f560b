"""What the four kernels of the backward have in common: their arguments, their tiles, and the weights and gradients of a tile of scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import indent
from typing import Literal

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.codegen import Emitter
from attnopt.kernels.programs import LOG2E, Programs, programs_of
from attnopt.kernels.slopes import LoadSlope, slopes_of
from attnopt.kernels.triton.dropout import SEED, keep, scaled

TILE_HELPERS = """
@triton.jit
def load_tile(p, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    if MASK_ROWS and MASK_COLUMNS:
        x = tl.load(p, mask=rows & columns, other=0.0)
    elif MASK_ROWS:
        x = tl.load(p, mask=rows, other=0.0)
    elif MASK_COLUMNS:
        x = tl.load(p, mask=columns, other=0.0)
    else:
        x = tl.load(p)
    return x
"""

BLOCKS = ("D", "DV", "BLOCK_D", "BLOCK_DV", "BLOCK_M", "BLOCK_N", "PRECISION", "EARLY")
"""Compiled in. EARLY: the product of dO and V starts before the weights are computed, which takes registers."""
Which = Literal["main", "empty"]


@dataclass(frozen=True)
class KernelText:
    """One generated kernel: its name, and its arguments in order."""

    name: str
    arguments: tuple[str, ...]
    unspecialised: tuple[str, ...]
    """Arguments whose value must not be compiled in: sizes, bounds and seeds."""
    sizes: tuple[str, ...]
    """The names of the symbolic sizes behind the arguments size0, size1, ..."""
    text: str


def loop(start: str, stop: str, step: str, lines: Iterable[str]) -> list[str]:
    return [f"for start in tl.range({start}, {stop}, {step}):", f"    start = tl.multiple_of(start, {step})", *block(lines)]


def masked_ends(step: str) -> list[str]:
    """Of [lo, hi), the blocks before whole_lo and from whole_hi on are cut by the mask or the last index."""
    return [f"before = tl.cdiv(tl.maximum(tl.minimum(whole_lo, hi) - lo, 0), {step})", "behind_lo = tl.maximum(whole_lo, whole_hi)", f"behind = tl.cdiv(tl.maximum(hi - behind_lo, 0), {step})"]


def walk_range(p: Programs, step: str, body: Callable[[bool], list[str]]) -> list[str]:
    """Over [lo, hi): the blocks at both ends with the mask, and those that every index of the tile sees whole without."""
    if p.rest is not E.TRUE:
        return loop("lo", "hi", step, body(True))
    ends = [f"start = tl.multiple_of(tl.where(i < before, lo + i * {step}, behind_lo + (i - before) * {step}), {step})"]
    return ["for i in tl.range(0, before + behind):", *block([*ends, *body(True)]), *loop("whole_lo", "whole_hi", step, body(False))]


_NUMBERS = {"const", "var", "sym", "score", "load", "add", "mul", "where", "tanh", "sigmoid", "abs", "min", "max", "float", "exp"}


def is_number(score: Expr) -> bool:
    """Whether the score of a query of zeros is a number, whatever the program reads for it: it takes no root, logarithm or quotient."""
    return all(e.op in _NUMBERS or e.kind != "float" for e in E.postorder(score))


def block(lines: Iterable[str]) -> list[str]:
    return ["    " + x for x in lines]


class BackwardKernel:
    """What the kernels have in common: their arguments, and one pair of a query block and a key block."""

    name: str
    tensors: tuple[str, ...]
    strided: tuple[str, ...]
    inner: Literal["q", "k"] = "k"

    def __init__(self, spec: AttentionSpec, needs: frozenset[int], sums: Sequence[LoadSlope], more: Sequence[Expr] = ()) -> None:
        self.spec = spec
        self.programs = p = programs_of(spec)
        self.slopes = slopes_of(spec, needs)
        self.sums = sums
        roots = [p.score, p.mask, self.slopes.score, *(x.score for x in sums), *more]
        if p.empty is not None:
            roots += [p.empty, self.slopes.empty, *(x.empty for x in sums)]
        self.emitter = Emitter(roots, frozenset(range(len(spec.loads))), inner=self.inner)
        self.row, self.column = ("[:, None]", "[None, :]") if self.inner == "k" else ("[None, :]", "[:, None]")
        self.shape = "(BLOCK_M, BLOCK_N)" if self.inner == "k" else "(BLOCK_N, BLOCK_M)"

    # ---- the text

    def kernel(self) -> KernelText:
        em, p = self.emitter, self.programs
        loads = tuple(f"L{s}" for s in sorted(em.loads))
        strides = tuple(f"{t}_s{d}" for t in self.strided for d in range(4))
        strides += tuple(f"L{s}_s{d}" for s in sorted(em.loads) for d in range(em.loads[s]))
        extents = tuple(f"L{s}_n{d}" for s, d in em.measured)
        limits = (("LEFT",) if p.left else ()) + (("RIGHT",) if p.right else ())
        sizes = tuple(f"size{i}" for i in range(len(em.sizes)))
        unspecialised = ("B", "Hq", "groups", "Sq", "Skv", *extents, *limits, *sizes, *(SEED if self.spec.dropout else ()))
        arguments = (*self.tensors, *self.row_arrays(), "ROWS", *loads, *strides, *unspecialised)
        head = f"@triton.jit(do_not_specialize={list(unspecialised)!r})\ndef {self.name}(\n    {', '.join(arguments)},\n"
        head += "    " + ", ".join(f"{c}: tl.constexpr" for c in BLOCKS) + ",\n):\n"
        return KernelText(self.name, arguments, unspecialised, tuple(em.sizes), head + indent("\n".join(self.body()) + "\n", "    "))

    def row_arrays(self) -> tuple[str, ...]:
        """Arrays [B, Hq, ROWS] in float32 that every kernel knows. ROWS is Sq rounded up, so that no block reads beyond; BASE is infinite
        behind the last query, and weights are 0 there."""
        p = self.programs
        return ("BASE", "DELTA", *(() if p.folded else ("SHIFT",)), *(("EMPTY", "EMPTY_SHIFT") if p.retries else ()))

    def body(self) -> list[str]:
        raise NotImplementedError

    # ---- blocks of rows and of keys

    def query_lines(self, first: str) -> list[str]:
        """The indices of BLOCK_M queries from ``first``."""
        return [f"offs_m = {first} + tl.arange(0, BLOCK_M)", f"q_index = offs_m{self.row}", "row_inside = q_index < Sq", "q_float = q_index.to(tl.float32)"]

    def key_lines(self, first: str) -> list[str]:
        """The indices of BLOCK_N keys from ``first``."""
        return [f"offs_n = {first} + tl.arange(0, BLOCK_N)", f"k_index = offs_n{self.column}", "key_inside = k_index < Skv", "k_float = k_index.to(tl.float32)"]

    @staticmethod
    def head_pointers(*tensors: str) -> list[str]:
        """Where head h (or the KV head that it reads) of batch b begins."""
        head = {"K": "h_kv", "V": "h_kv", "DK": "h_kv", "DV_OUT": "h_kv"}
        return [f"p_{t.lower()} = {t} + b.to(tl.int64) * {t}_s0 + {head.get(t, 'h')}.to(tl.int64) * {t}_s1" for t in tensors]

    @staticmethod
    def tile(name: str, tensor: str, along: Literal["m", "n"], masked: bool, transposed: bool = False, first: str = "") -> list[str]:
        """Loads [block, features], or [features, block] where ``transposed``. In a loop ``first`` is its index, and the block's offsets
        within the tile are named ``r_TENSOR``, computed before it."""
        width = "DV" if tensor in ("V", "DO", "O") else "D"
        features = f"offs_{width.lower()}" + ("[:, None]" if transposed else "[None, :]")
        inside = f"(offs_{along}{'[None, :]' if transposed else '[:, None]'} < {'Sq' if along == 'm' else 'Skv'})"
        where = f"p_{tensor.lower()} + (wide + {first}) * {tensor}_s2 + r_{tensor.lower()}" if first else f"p_{tensor.lower()} + {BackwardKernel.offsets(tensor, along, transposed)}"
        return [f"{name} = load_tile({where}, {inside}, {features} < {width}, {masked}, BLOCK_{width} != {width})"]

    @staticmethod
    def offsets(tensor: str, along: Literal["m", "n"], transposed: bool, within: bool = False) -> str:
        """The offsets of a tile's elements from its head, or from its first row where ``within``."""
        width = "dv" if tensor in ("V", "DO", "O", "DV_OUT") else "d"
        block, features = ("[None, :]", "[:, None]") if transposed else ("[:, None]", "[None, :]")
        index = f"tl.arange(0, BLOCK_{along.upper()}){block}" if within else f"offs_{along}{block}"
        wide = "" if within else ".to(tl.int64)"
        return f"{index}{wide} * {tensor}_s2 + offs_{width}{features} * {tensor}_s3"

    def row_values(self, first: str, which: Which = "main") -> list[str]:
        """What normalises the weights of BLOCK_M rows from ``first``. Apart from ``offs_m``, which then need not wait for these loads."""
        names = {"main": ["base", "delta"] + ([] if self.programs.folded else ["shift"]), "empty": ["empty", "empty_shift", "delta"]}[which]
        return [f"{x} = tl.load({x.upper()} + head.to(tl.int64) * ROWS + {first} + tl.arange(0, BLOCK_M))" for x in names]

    # ---- one pair of blocks

    def weights(self, which: Which, masked: bool, all_nodes: bool = False) -> list[str]:
        """From the raw product ``s`` the weights ``p``, and every slope."""
        em, p = self.emitter, self.programs
        program, slope, parts = (p.score, self.slopes.score, [x.score for x in self.sums])
        if which == "empty":
            assert p.empty is not None
            program, slope, parts = p.empty, self.slopes.empty, [x.empty for x in self.sums]
        roots = [program, slope, *parts] + ([p.mask] if masked and which == "main" else [])
        lines = em.all_lines(roots) if all_nodes else em.in_loop(roots, masked)
        lines.append(f"x = {self.spread(program)}")
        if masked or which == "empty":
            # a row behind the last has weights exp2(score - inf) = 0, if only its score is a number
            inside = ["row_inside"] if self.inner == "q" and not (which == "main" and is_number(p.score)) else []
            inside += ["key_inside"] if self.inner == "k" else []
            if which == "empty":
                # a score of -inf has no gradient, also where the weights of its row are NaN
                inside += [f'(empty{self.row} < float("inf"))', '(x > float("-inf"))']
            elif p.mask is not E.TRUE:
                inside.insert(0, f"({em.names[p.mask]})")
            self.hides = bool(inside)
            if inside:
                lines += [f"visible = {' & '.join(inside)}", 'x = tl.where(visible, x, float("-inf"))']
        scale = "" if p.folded else f" * {LOG2E}"
        base, shift = ("base", "" if p.folded else f" - shift{self.row}") if which == "main" else ("empty", f" - empty_shift{self.row}")
        lines.append(f"p = tl.exp2((x - {base}{self.row}){scale}{shift})" if scale or shift else f"p = tl.exp2(x - {base}{self.row})")
        return lines

    def spread(self, e: Expr) -> str:
        """A program that does not read s may be smaller than a tile."""
        name = self.emitter.names[e]
        return name if E.score() in e.leaves else f"{name} + tl.zeros({self.shape}, tl.float32)"

    def kept(self, first_key: str) -> list[str]:
        """Which weights dropout keeps."""
        return [keep(self.spec.dropout, first_key, transposed=self.inner == "q")] if self.spec.dropout else []

    def score_gradient(self, which: Which, masked: bool) -> list[str]:
        """``ds`` from the weights ``p`` and ``dp``, the gradient of the weights after dropout."""
        lines = [f"ds = p * ({scaled('dp', self.spec.dropout)} - delta{self.row})" if self.spec.dropout else "ds = p * dp"]
        if (masked or which == "empty") and self.hides:
            lines.append("ds = tl.where(visible, ds, 0.0)")
        return lines

    def weight_gradient(self, product: str) -> str:
        """``dp``, the gradient of the weights, from which delta is taken at once: the product starts with it, which costs nothing."""
        start = "" if self.spec.dropout else f", tl.zeros({self.shape}, tl.float32) - delta{self.row}"
        return f"dp = tl.dot({product}{start}, input_precision=PRECISION)"

    def raw_gradient(self, which: Which) -> str:
        """The gradient of the raw product, but for a constant factor."""
        if self.slopes.constant is not None:
            return "ds"
        slope = self.slopes.score if which == "main" else self.slopes.empty
        return "ds" if slope is E.FONE else f"(ds * {self.emitter.names[slope]})"

    def add_sums(self, which: Which, name: str, axis: int) -> list[str]:
        """Adds each load's part to its sum."""
        out = []
        for i, x in enumerate(self.sums):
            slope = x.score if which == "main" else x.empty
            if slope is not E.FZERO:
                out.append(f"{name}{i} += tl.sum(ds{'' if slope is E.FONE else f' * {self.emitter.names[slope]}'}, {axis})")
        return out

    def moves(self, which: Which) -> bool:
        """Whether queries and keys have a gradient through this program."""
        return (self.slopes.score if which == "main" else self.slopes.empty) is not E.FZERO

    def times_constant(self, x: str) -> str:
        c = self.slopes.constant
        return x if c is None or c == 1.0 else f"{x} * {c!r}"
