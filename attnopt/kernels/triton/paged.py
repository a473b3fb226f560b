"""The source of attention over a paged cache for one spec, with its programs inlined.

One program computes a tile of BLOCK_M rows: HEADS query heads that share a KV head, times BLOCK_Q queries of one request that follow one another. It
finds its request among ``cu_seqlens_q`` by itself, so one launch serves prompts, chunks and generated tokens. Where there are few tiles, SPLITS
programs share the keys of one (flash decoding); each leaves what its keys give and their weight, and ``paged_reduce`` joins them. Keys are found by
page, one page or one vector of pages a block, read one turn ahead. No slot is read that holds no key between a tile's first and last.

Programs that run side by side are those of the KV heads of one stretch of keys, which lie together in memory, then those of the next stretch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from textwrap import indent

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import chunk
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.codegen import HELPERS, Emitter, literal
from attnopt.kernels.materialise import QUERIES
from attnopt.kernels.programs import LOG2E
from attnopt.kernels.triton.flash_forward import Source, Writer
from attnopt.kernels.triton.halves import HALVES, PACKED

TENSORS = ("Q", "K", "V", "O", "PART", "LSE", "TABLE", "STARTS", "LENGTHS")
_STRIDES = ("Q_s0", "Q_s1", "Q_s2", "K_s0", "K_s1", "K_s2", "K_s3", "V_s0", "V_s1", "V_s2", "V_s3", "O_s0", "O_s1", "O_s2")
_SCALES = ("K_SCALE", "V_SCALE")
_SCALE_STRIDES = tuple(f"{t}_s{d}" for t in _SCALES for d in range(3))
CONSTEXPRS = tuple("D DV GROUPS HEADS BLOCK_D BLOCK_D2 BLOCK_DV BLOCK_M BLOCK_N BLOCK_Q BLOCK_R PAGE SPLIT SHARED PDL ASM PRECISION".split())


@lru_cache(maxsize=1024)
def request_spec(spec: AttentionSpec) -> AttentionSpec:
    """The spec with one length for queries and keys, that of a request: the sizes Sq and Skv are the same here."""
    d = spec.dims
    if d.Sq is d.Skv or d.Sq.op != "sym":
        return spec
    same = {d.Sq: d.Skv, d.q: E.var("q", d.Skv)}
    renamed = {
        name: E.substitute(e, same)
        for name, e in (("score", spec.score), ("mask", spec.mask), ("empty_score", spec.empty_score), ("sink", spec.sink))
        if e is not None
    }
    return spec.replace(dims=type(d)(d.B, d.Hq, d.Hkv, d.Skv, d.Skv, d.D, d.Dv), **renamed)


def lengths_of(spec: AttentionSpec) -> frozenset[str]:
    """The names of the sizes that mean the length of a request."""
    return frozenset(x.value[0] for x in (spec.dims.Sq, spec.dims.Skv) if x.op == "sym")


@lru_cache(maxsize=1024)
def generate(spec: AttentionSpec, cache: str = "") -> Source:
    """The kernel for one spec, for any sizes, strides, page sizes and dtypes. ``cache`` is ``scaled`` where the caches have scales, of ``PACKED`` where they are
    read as words of two numbers besides, and empty where they are of the dtype of the query."""
    return (PackedWriter if cache in PACKED else PagedWriter)(request_spec(spec), cache).source()


@dataclass
class _Emitter(Emitter):
    """Heads lie along the rows of a tile, lengths differ by request, and positions may lie outside of what a load has."""

    lengths: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes = [n for n in self.sizes if n not in self.lengths]
        for i, e in enumerate(self.order):
            self.names[e] = self._leaf(e) or f"t{i}"

    def _leaf(self, e: Expr) -> str | None:
        if e is QUERIES:
            return "POSITIONS"
        if e.op == "sym" and e.value[0] in self.lengths:
            return "Skv"
        return super()._leaf(e)

    def needs_clamp(self, e: Expr, a: Expr) -> bool:
        return a.op != "var" or a.value in ("q", "k")

    def depends(self, e: Expr) -> str:
        found = super().depends(e)
        return "row" if found == "scalar" and any(x.op == "var" and x.value == "h" for x in e.leaves) else found


class PagedWriter(Writer):
    name = "paged_forward"

    helpers = HELPERS
    up = ""
    """A factor of all scores, beside the scales of a quantized cache."""

    def __init__(self, spec: AttentionSpec, cache: str) -> None:
        super().__init__(spec)
        self.cache, self.quantized = cache, bool(cache)
        self.chunk = chunk(spec.mask)
        """Queries see no key before the chunk of this many positions that they lie in."""
        self.emitter = _Emitter(self.roots, frozenset(range(len(spec.loads))), lengths=lengths_of(spec))

    def source(self) -> Source:
        em = self.emitter
        loads = tuple(f"L{s}" for s in sorted(em.loads))
        strides = tuple(f"L{s}_s{d}" for s in sorted(em.loads) for d in range(em.loads[s]))
        extents = tuple(f"L{s}_n{d}" for s, d in em.measured)
        limits = tuple(x for x, used in (("LEFT", self.left), ("RIGHT", self.right)) if used)
        sizes = tuple(f"size{i}" for i in range(len(em.sizes)))
        unspecialised = ("TABLE_s0", "T", "R", "Hkv", "SPLITS", "STEP", "POSITIONS", *extents, *limits, *sizes)
        scales, scale_strides = (_SCALES, _SCALE_STRIDES) if self.quantized else ((), ())
        arguments = (*TENSORS, *scales, *loads, *_STRIDES, *scale_strides, *strides, *unspecialised)
        head = f"@triton.jit(do_not_specialize={list(unspecialised)!r})\ndef {self.name}(\n    {', '.join(arguments)},\n"
        head += "    " + ", ".join(f"{c}: tl.constexpr" for c in CONSTEXPRS) + ",\n):\n"
        words = "".join(c for c in str(self.spec) if c.isprintable() and c not in '"\\')
        text = (
            f'"""Generated by attnopt: {words}"""\n\nimport triton\nimport triton.language as tl\nfrom triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n\n{self.helpers}\n\n{head}'
            + indent(self.body(), "    ")
        )
        text += "\n\n" + REDUCE.format(empty=self.empty_output)
        return Source(text, arguments, unspecialised, tuple(em.sizes), self.programs.parts, False, self.programs.dense)

    @property
    def empty_output(self) -> str:
        return literal(0.0 if self.spec.zero_without_weight else math.nan)

    # ---- which rows

    @property
    def from_the_first(self) -> bool:
        """Whether keys are read from the first on, so that a program knows its first block before it knows how many keys there are."""
        return not self.left and not self.chunk

    def first_pages(self) -> list[str]:
        """The pages of a program's first block, as the block table has them; what lies behind a request's last page is not followed."""
        table = "p_table = TABLE + tl.minimum(r, R - 1).to(tl.int64) * TABLE_s0"
        return [table, *self.read_pages("split * BLOCK_N")] if self.from_the_first else []

    def place(self) -> list[str]:
        return [
            "offs_n = tl.arange(0, BLOCK_N)",
            "HEAD_BLOCKS: tl.constexpr = (GROUPS + HEADS - 1) // HEADS",
            "lanes = Hkv * HEAD_BLOCKS",
            "lane = tl.program_id(0) % lanes",
            "split = tl.program_id(0) // lanes % SPLITS",
            "tile = tl.program_id(0) // lanes // SPLITS",
            "h_kv = lane // HEAD_BLOCKS",
            "step = BLOCK_N",
            "if SPLIT:",
            "    step = STEP",
            "if PDL:",
            "    # put in place while the kernel before it ends, whose results are all there from the wait on; the one behind it may be put in place as soon as all of these",
            "    # programs have begun",
            "    gdc_wait()",
            "    gdc_launch_dependents()",
            "# The tiles of request r begin at starts[r] // BLOCK_Q + r: never too few, and at most one too many; where a tile is one token, at starts[r],",
            "# and none is too many. Behind the last request stand the tokens of no request, as one of their own without keys.",
            "MORE: tl.constexpr = 1 if BLOCK_Q > 1 else 0",
            "# Where every request has one token, tile and request are one: its place is read at once, and the search that would come first is not needed.",
            "r = tl.minimum(tile, R)",
            "token_0 = tl.load(STARTS + r)",
            "token_end = tl.load(STARTS + r + 1, mask=r < R, other=T)",
            "Skv = tl.load(LENGTHS + r, mask=r < R, other=0)",
            *self.first_pages(),
            "if (token_0 // BLOCK_Q + r * MORE > tile) | (token_end // BLOCK_Q + (r + 1) * MORE <= tile):",
            "    offs_r = tl.arange(0, BLOCK_R)",
            "    begins = tl.load(STARTS + offs_r, mask=offs_r <= R, other=T) // BLOCK_Q + offs_r * MORE",
            "    r = tl.sum(((begins <= tile) & (offs_r <= R)).to(tl.int32), 0) - 1",
            "    token_0 = tl.load(STARTS + r)",
            "    token_end = tl.load(STARTS + r + 1, mask=r < R, other=T)",
            "    Skv = tl.load(LENGTHS + r, mask=r < R, other=0)",
            *("    " + x for x in self.first_pages()),
            "b = tl.minimum(r, R - 1)",
            "token = token_0 + (tile - token_0 // BLOCK_Q - r * MORE) * BLOCK_Q",
            "if token >= token_end:",
            "    return",
            "position_0 = Skv - token_end",
            "offs_m = tl.arange(0, BLOCK_M)",
            "tokens = token + offs_m // HEADS",
            "in_group = lane % HEAD_BLOCKS * HEADS + offs_m % HEADS",
            "rows = (offs_m < BLOCK_Q * HEADS) & (tokens < token_end) & (in_group < GROUPS)",
            "heads = h_kv * GROUPS + tl.minimum(in_group, GROUPS - 1)",
        ]

    def start(self) -> list[str]:
        return [
            "offs_d = tl.arange(0, BLOCK_D)",
            "offs_dv = tl.arange(0, BLOCK_DV)",
            "h = heads[:, None]",
            "q_index = (position_0 + tokens)[:, None]",
            "row_inside = rows[:, None]",
            "q_float = q_index.to(tl.float32)",
            "p_q = Q + tokens[:, None].to(tl.int64) * Q_s0 + h * Q_s1",
            "p_k = K + h_kv.to(tl.int64) * K_s2",
            "p_v = V + h_kv.to(tl.int64) * V_s2",
            *(["p_ks = K_SCALE + h_kv * K_SCALE_s2", "p_vs = V_SCALE + h_kv * V_SCALE_s2"] if self.quantized else []),
            "p_table = TABLE + b.to(tl.int64) * TABLE_s0",
            *self.queries(),
            'm_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)',
            "l_i = tl.zeros((BLOCK_M,), tl.float32)",
            *self.emitter.before_loop(),
            *self.first_weight(),
        ]

    def queries(self) -> list[str]:
        return [
            "# [BLOCK_M, BLOCK_D], and behind it [BLOCK_M, BLOCK_D2]",
            "b_q = tl.load(p_q + offs_d[None, :] * Q_s2, mask=row_inside & (offs_d[None, :] < D), other=0.0)",
            "if BLOCK_D2 > 0:",
            "    offs_d2 = BLOCK_D + tl.arange(0, BLOCK_D2)",
            "    b_q2 = tl.load(p_q + offs_d2[None, :] * Q_s2, mask=row_inside & (offs_d2[None, :] < D), other=0.0)",
            "acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)",
        ]

    def first_weight(self) -> list[str]:
        """The sink counts once: for the first of the programs that share the keys."""
        lines = super().first_weight()
        return lines and [*lines, "if SPLIT:", '    m_i = tl.where(split == 0, m_i, float("-inf"))', "    l_i = tl.where(split == 0, l_i, 0.0)"]

    # ---- which keys

    def loops(self) -> list[str]:
        whole = self.programs.rest is E.TRUE
        lines = [
            "# positions of the tile's first and last query, and the keys [lo, hi) that any of them sees; blocks begin at multiples of BLOCK_N",
            "first = position_0 + token",
            "last = position_0 + tl.minimum(token + BLOCK_Q, token_end) - 1",
            f"lo = {'tl.minimum(tl.maximum(first - LEFT, 0), Skv)' if self.left else '0'}",
            *([f"lo = tl.maximum(lo, tl.maximum(first, 0) // {self.chunk} * {self.chunk})"] if self.chunk else []),
            f"hi = {'tl.maximum(tl.minimum(last + RIGHT + 1, Skv), 0)' if self.right else 'Skv'}",
            "# programs that share the keys take turns, block by block: together they read one stretch of memory at a time",
            "begin = lo // BLOCK_N * BLOCK_N",
            "if SPLIT:",
            "    begin += split * BLOCK_N",
            *([] if self.from_the_first else self.read_pages("begin")),
        ]
        in_one = self.loop("begin", "hi", self.step(tail=True))
        if not whole:
            return lines + in_one
        return [
            *lines,
            "if BLOCK_Q == 1:",
            "    # each loop begins with nothing read, which costs a short walk more than comparing every key of it",
            *("    " + x for x in in_one),
            "else:",
            *("    " + x for x in self.whole_and_edges()),
        ]

    def whole_and_edges(self) -> list[str]:
        """Loops over the blocks that a bound may cross, and between them over those whose keys all queries see."""
        lines = []
        if self.left:
            lines.append("whole_lo = tl.minimum(tl.cdiv(tl.maximum(last - LEFT, 0), BLOCK_N) * BLOCK_N, hi)")
            lines += self.loop("begin", "whole_lo", self.step(tail=True))
            lines.append("begin += tl.cdiv(tl.maximum(whole_lo - begin, 0), step) * step")
        lines.append(f"whole_hi = {'tl.maximum(tl.minimum(first + RIGHT + 1, Skv), 0)' if self.right else 'Skv'} // BLOCK_N * BLOCK_N")
        lines += self.loop("begin", "whole_hi", self.step(tail=False))
        lines.append("begin += tl.cdiv(tl.maximum(whole_hi - begin, 0), step) * step")
        return lines + self.loop("begin", "hi", self.step(tail=True))

    @staticmethod
    def loop(start: str, stop: str, lines: Sequence[str]) -> list[str]:
        return [f"for start in tl.range({start}, {stop}, step):", *("    " + x for x in lines)]

    @staticmethod
    def read_pages(start: str) -> list[str]:
        """The page of the block at ``start``, or of each of its keys, as the block table has them: it has no entry behind the last of all positions."""
        return [
            "if PAGE == 0:",
            "    page = tl.load(p_table)",
            "elif PAGE >= BLOCK_N:",
            f"    page = tl.load(p_table + tl.minimum({start}, POSITIONS - 1) // PAGE)",
            "else:",
            f"    page = tl.load(p_table + tl.minimum({start} + offs_n, POSITIONS - 1) // PAGE)",
        ]

    def keys(self, tail: bool) -> list[str]:
        lines = [
            "start = tl.multiple_of(start, BLOCK_N)",
            "k_index = (start + offs_n)[None, :]",
            "k_float = k_index.to(tl.float32)",
            "slot_page = page.to(tl.int64)",
            *self.read_pages("start + step"),
            "if PAGE == 0:",
            "    slot = (start + offs_n).to(tl.int64)",
            "elif PAGE >= BLOCK_N:",
            "    slot = start % PAGE + offs_n",
            "else:",
            "    slot = offs_n % PAGE",
        ]
        if tail:
            lines += [f"inside = (start + offs_n < hi){' & (start + offs_n >= lo)' if self.left or self.chunk else ''}", "key_inside = inside[None, :]"]
        lines += self.products(tail)
        if self.quantized:
            lines.append(f"s = s * ({self.scale('p_ks', 'K', tail)}{self.up})")
        return lines

    def products(self, tail: bool) -> list[str]:
        """The scores ``s`` of a block."""
        guard = "inside[:, None] & " if tail else ""
        rows = "p_k + (slot_page * K_s0 + slot * K_s1)[:, None]"
        to_float = ".to(b_q.dtype)" if self.quantized else ""
        return [
            "# [BLOCK_N, BLOCK_D], and beside it [BLOCK_N, BLOCK_D2]: laid out as the values are, so that both find their pages by the same reads",
            f"b_k = tl.load({rows} + offs_d[None, :] * K_s3, mask={guard}(offs_d[None, :] < D), other=0.0){to_float}",
            "s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)",
            "if BLOCK_D2 > 0:",
            f"    b_k2 = tl.load({rows} + offs_d2[None, :] * K_s3, mask={guard}(offs_d2[None, :] < D), other=0.0){to_float}",
            "    s = tl.dot(b_q2, tl.trans(b_k2), s, input_precision=PRECISION)",
        ]

    @staticmethod
    def scale(base: str, of: str, tail: bool) -> str:
        """[1, BLOCK_N], what the numbers of each key or value of a quantized cache are multiplied by."""
        return f"tl.load({base} + slot_page * {of}_SCALE_s0 + slot * {of}_SCALE_s1{', mask=inside, other=0.0' if tail else ''})[None, :]"

    def values(self, tail: bool) -> list[str]:
        guard = "inside[:, None] & " if tail else ""
        to_float = ".to(b_q.dtype)" if self.quantized else ""
        load = f"b_v = tl.load(p_v + (slot_page * V_s0 + slot * V_s1)[:, None] + offs_dv[None, :] * V_s3, mask={guard}(offs_dv[None, :] < DV), other=0.0){to_float}"
        # where the values are features of the keys, one copy to shared memory, made ahead of time, serves both products
        lines = ["# [BLOCK_N, BLOCK_DV]", "if SHARED:", "    b_v = b_k", "else:", f"    {load}"]
        if self.quantized:
            lines.append(f"p = p * {self.scale('p_vs', 'V', tail)}")
        return lines

    # ---- what comes out

    def epilogue(self) -> list[str]:
        scale = "" if self.folded else " * 0.6931471805599453"
        return [
            "# a request without keys gives zeros, whatever rows without a visible key give",
            "m_i = tl.where(Skv > 0, m_i, 0.0)",
            "l_i = tl.where(Skv > 0, l_i, 1.0)",
            "acc = tl.where(Skv > 0, acc, 0.0)",
            "m_out = row_inside & (offs_dv[None, :] < DV)",
            "if SPLIT:",
            "    at = (tokens.to(tl.int64) * (Hkv * GROUPS) + heads) * SPLITS + split",
            f'    tl.store(LSE + at, tl.where(l_i == 0.0, float("-inf"), m_i + tl.log2(tl.where(l_i == 0.0, 1.0, l_i)){scale}), mask=rows)',
            "    tl.store(PART + at[:, None] * DV + offs_dv[None, :], acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None], mask=m_out)",
            "else:",
            f"    acc = tl.where((l_i == 0.0)[:, None], {self.empty_output}, acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None])",
            "    tl.store(O + tokens[:, None].to(tl.int64) * O_s0 + h * O_s1 + offs_dv[None, :] * O_s2, acc.to(O.dtype.element_ty), mask=m_out)",
        ]


class PackedWriter(PagedWriter):
    """Over caches of bytes that are read as words of two numbers (``halves``): the lower halves and the higher halves of all words make a product each.

    K and V are int16, and their strides count words; D and DV count numbers. Words are taken apart into float16, whatever the dtype of the query: every number of the cache is one
    there, and conversions are fewest. So that products stay in its range, a row of a bfloat16 query is divided by a power of two, and what is subtracted from scores counts the size
    of the value's scale too: no weight times scale is more than one. That holds for values from 1e-16 to 1e16.
    """

    helpers = HELPERS + HALVES
    up = " * q_up[:, None]"

    def queries(self) -> list[str]:
        # a power of two is exact, and below float16's range lies what is 2**-14 of the row's largest
        return [
            "offs_w = tl.arange(0, BLOCK_D // 2)",
            "offs_wv = tl.arange(0, BLOCK_DV // 2)",
            "# [BLOCK_M, BLOCK_D // 2]: features with even numbers, and those with odd ones",
            "b_q = tl.load(p_q + 2 * offs_w[None, :] * Q_s2, mask=row_inside & (offs_w[None, :] < D // 2), other=0.0)",
            "b_q2 = tl.load(p_q + (2 * offs_w[None, :] + 1) * Q_s2, mask=row_inside & (offs_w[None, :] < D // 2), other=0.0)",
            "# to base 2: what a scale of zero counts as, and a sink, which has no value; far from overflow as the inverse of a weight, and from being lost beside the largest",
            "LEAST: tl.constexpr = -64",
            "q_up = tl.full((BLOCK_M,), 1.0, tl.float32)",
            "if Q.dtype.element_ty == tl.bfloat16:",
            "    top = tl.max(tl.maximum(tl.abs(b_q.to(tl.float32)), tl.abs(b_q2.to(tl.float32))), 1)",
            "    q_up = tl.where(top > 0.0, tl.exp2(tl.floor(tl.log2(top))), 1.0)",
            "    b_q = (b_q.to(tl.float32) / q_up[:, None]).to(tl.float16)",
            "    b_q2 = (b_q2.to(tl.float32) / q_up[:, None]).to(tl.float16)",
            "acc = tl.zeros((BLOCK_M, BLOCK_DV // 2), tl.float32)",
            "acc2 = tl.zeros((BLOCK_M, BLOCK_DV // 2), tl.float32)",
        ]

    def first_weight(self) -> list[str]:
        """A sink is a key whose value is zero: its scale is the least."""
        lines = super().first_weight()
        return lines and [*lines, f"m_i = m_i + LEAST{'' if self.folded else f' * {1 / LOG2E}'}", "l_i = l_i * 2.0 ** -LEAST"]

    def products(self, tail: bool) -> list[str]:
        guard = "inside[:, None] & " if tail else ""
        return [
            "# [BLOCK_N, BLOCK_D // 2]",
            f"w_k = tl.load(p_k + (slot_page * K_s0 + slot * K_s1)[:, None] + offs_w[None, :] * K_s3, mask={guard}(offs_w[None, :] < D // 2), other=0)",
            self.halves("k"),
            "s = tl.dot(b_q, tl.trans(b_k))",
            "s = tl.dot(b_q2, tl.trans(b_k2), s)",
        ]

    def halves(self, of: str) -> str:
        return f"b_{of}, b_{of}2 = _halves_{self.cache}(w_{of}, ASM)"

    def words_of_values(self, tail: bool) -> list[str]:
        guard = "inside[:, None] & " if tail else ""
        return [
            "# [BLOCK_N, BLOCK_DV // 2]",
            f"w_v = tl.load(p_v + (slot_page * V_s0 + slot * V_s1)[:, None] + offs_wv[None, :] * V_s3, mask={guard}(offs_wv[None, :] < DV // 2), other=0)",
            self.halves("v"),
        ]

    def update(self, tail: bool) -> list[str]:
        scale = "" if self.folded else f" * {LOG2E}"
        natural = "" if self.folded else f" * {1 / LOG2E}"
        return [
            f"v_up = {self.scale('p_vs', 'V', tail)}",
            "# the power of two above a scale, from its bits; values that are all zero have a scale of zero, and one of NaN is NaN in the weight",
            f"above = tl.maximum((v_up.to(tl.int32, bitcast=True) >> 23) - 126, LEAST).to(tl.float32){natural}",
            "m_new = tl.maximum(m_i, tl.max(s + above, 1))",
            'm_use = tl.where(m_new == float("-inf"), 0.0, m_new)',
            f"p = tl.exp2((s - m_use[:, None]){scale})",
            f"alpha = tl.exp2((m_i - m_use){scale})",
            "l_i = l_i * alpha + tl.sum(p, 1)",
            "m_i = m_new",
            "p = (p * v_up).to(tl.float16)",
            *self.words_of_values(tail),
            "acc = tl.dot(p, b_v, acc * alpha[:, None])",
            "acc2 = tl.dot(p, b_v2, acc2 * alpha[:, None])",
        ]

    def epilogue(self) -> list[str]:
        return ["acc = tl.interleave(acc, acc2)", *super().epilogue()]


REDUCE = '''
@triton.jit(do_not_specialize=["Hq", "SPLITS"])
def paged_reduce(
    PART, LSE, O, O_s0, O_s1, O_s2, Hq, SPLITS,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, FOLDED: tl.constexpr, PDL: tl.constexpr,
):
    """One row of o [T, Hq, DV] from what each split left of it: PART [T, Hq, SPLITS, DV] and LSE [T, Hq, SPLITS], to base 2 where FOLDED."""
    row = tl.program_id(0)
    offs_s = tl.arange(0, BLOCK_S)
    offs_dv = tl.arange(0, BLOCK_DV)
    base = row.to(tl.int64) * SPLITS
    m_i = tl.full((), float("-inf"), tl.float32)
    l_i = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for start in tl.range(0, SPLITS, BLOCK_S):
        inside = start + offs_s < SPLITS
        lse = tl.load(LSE + base + start + offs_s, mask=inside, other=float("-inf"))
        part = tl.load(
            PART + (base + start + offs_s)[:, None] * DV + offs_dv[None, :], mask=inside[:, None] & (offs_dv[None, :] < DV), other=0.0
        )
        if not FOLDED:
            lse = lse * 1.4426950408889634
        # a split without a visible key left nothing that counts
        part = tl.where((lse != float("-inf"))[:, None], part, 0.0)
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        m_use = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(lse - m_use)
        alpha = tl.exp2(m_i - m_use)
        l_i = l_i * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(part * p[:, None], 0)
        m_i = m_new
    o = tl.where(l_i == 0.0, {empty}, acc / tl.where(l_i == 0.0, 1.0, l_i))
    p_o = O + (row // Hq).to(tl.int64) * O_s0 + (row % Hq) * O_s1 + offs_dv * O_s2
    tl.store(p_o, o.to(O.dtype.element_ty), mask=offs_dv < DV)
'''
