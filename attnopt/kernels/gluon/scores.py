"""The part of a generated Hopper forward that works on scores: score and mask programs over a tile, and the online softmax."""

from __future__ import annotations

from collections.abc import Sequence

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.codegen import GLUON, Emitter
from attnopt.kernels.gluon.config import Config, parts_of
from attnopt.kernels.gluon.distance import FIRST_QUERY, Separated, row_number, separate
from attnopt.kernels.gluon.level import LEAST, SAME, level_of
from attnopt.kernels.programs import LOG2E, programs_of

ROWS = 64
"""Queries of one consumer: the rows of a warpgroup's matrix product."""
RUNS = "RUNS"
STALE = 8.0
"""A row's maximum is replaced when it is exceeded by this many powers of two: weights up to 256 cost no accuracy, and most blocks leave the
sums as they are (the idea is FlashAttention-4's)."""


class ScoreWriter:
    """What a kernel's consumers do with a tile ``s`` of raw scores, as lines of its source."""

    def __init__(self, spec: AttentionSpec, D: int, Dv: int, config: Config) -> None:
        self.spec, self.config = spec, config
        self.programs = p = programs_of(spec)
        self.widths, self.v_widths = parts_of(D), parts_of(Dv)
        self.factor, self.inner = _factor(p.score) if p.folded else (1.0, p.score)
        self.level = level_of(self.inner, p.parts, len(spec.loads))
        # the two kinds of distances are not taken apart together
        separated = Separated(self.inner, None, {}) if self.level else separate(self.inner)
        self.inner, self.row = separated.score, separated.row
        self.conditions, self.words = _split(p.rest, self.inner)
        roots = [x for x in (self.inner, p.sink, *separated.roots, *self.conditions, *(a for w in self.words for a in w)) if x is not None]
        clamped = frozenset(range(len(spec.loads)))
        known = {FIRST_QUERY: "first_query"} | {row_number(v): "row_number" for v in (self.row.variables if self.row else ()) if v.value == "q"}
        self.tables = [e for e in E.postorder(*roots) if e.op == "load" and self.over_distances(e)]
        self.emitter = em = Emitter(roots, clamped, GLUON, known=known, spelled={e: self.at_distance(e) for e in self.tables})
        for leaf, s in separated.slopes.items():
            em.spelled[leaf] = f"along(start * {s.step} + {em.names[s.origin]}, {s.step}, {em.names[s.slope]}, offs_n)"
        em.compared |= {a for w in self.words for a in w}
        self.slopes = bool(separated.slopes)
        if self.level:
            self.flat = Emitter([self.level.flat], clamped, GLUON, known={SAME: "same"}, prefix="flat")
            self.value = Emitter([self.level.value], clamped, GLUON, known={LEAST: "least"}, prefix="value")
        self.mapped = p.rest is not E.TRUE

    def block(self, i: str) -> str:
        """The block of keys that is visited as number ``i``."""
        return f"gl.load(p_list + {i}, mask={i} < listed, other=0)" if self.mapped else f"hi - 1 - {i}"

    def over_distances(self, e: Expr) -> bool:
        """Whether a load is of a part that is a table over distances."""
        if not isinstance(e.value, int) or e.value < len(self.spec.loads):
            return False
        part = self.programs.parts[e.value - len(self.spec.loads)]
        return part.axes.endswith("d") and part.kind == "float"

    @staticmethod
    def at_distance(e: Expr) -> str:
        """A load from a table over distances, whose tensor is contiguous and has a margin: it reads the whole tile."""
        of_head = f" + (h).to(gl.int64) * L{e.value}_s0" if len(e.args) == 2 else ""
        return f"at_distance(L{e.value}{of_head} + (start + Sq - 1 - first_query), offs_n - offs_m[:, None])"

    def hidden(self, cut: str, first: bool) -> list[str]:
        """The scores of keys that are not seen become -inf. Bounds by distance to the query, and the end of the keys, are one comparison each, where
        they cut the block at all; all that depends on the key alone is one number per key."""
        p = self.programs
        until = ["s = keep_until(s, k_index, to_key)"] if cut == "both" and not self.capped(cut) else []
        if first and not p.left and not p.right and not self.mapped:  # then a first block is whole, unless the keys end in it
            until = ["if Skv % BLOCK_N != 0:", *("    " + x for x in until)]
        since = ["s = keep_since(s, k_index, from_key)"] if p.left else []
        if since and cut == "both":
            since = [f"if start < first_query + {ROWS - 1} - LEFT:", *("    " + x for x in since)]
        names = self.emitter.names
        pairs = [f"s = keep_same(s, {names[q]}, {names[k]})" for q, k in self.words]
        pairs += [f's = gl.where({names[x]}, s, float("-inf"))' for x in self.conditions if not by_key(x)]
        return [*(["s = gl.minimum(s, cap)"] if any(map(by_key, self.conditions)) else []), *pairs, *until, *since]

    def capped(self, cut: str) -> bool:
        """Whether the end of the keys is within ``cap``."""
        return cut == "both" and not self.programs.right and any(map(by_key, self.conditions))

    def first_weight(self) -> list[str]:
        """The sink is one more key that every row has seen before the first block. Maxima are kept before the factor."""
        sink = self.programs.sink
        if sink is None:
            return []
        name = self.emitter.names[sink]
        whole = f"gl.zeros([{ROWS}, 1], gl.float32, s_layout) + {name}"
        return [
            f"m_i = gl.max({whole}, 1) * {1 / self.factor!r}" + (f" - {self.emitter.names[self.row]}" if self.row else ""),
            'l_i = gl.where(spread(m_i, row_parts(nothing)) == float("-inf"), 0.0, 0.25) + row_parts(nothing)',
        ]

    def looks_for_level(self, cut: str, first: bool) -> bool:
        """Of the blocks that the mask cuts only the last keys, where all queries see them: others are near the diagonal."""
        return self.level is not None and (not cut or (first and self.programs.mask is E.TRUE))

    def look_for_level(self, cut: str, first: bool) -> list[str]:
        """Whether the table over distances has one value, ``same``, for the whole of the block at ``start``: its least distance is in a run that reaches its greatest."""
        if self.level is None or not self.looks_for_level(cut, first):
            return []
        return [
            "nearest = start + Sq - 1 - first_query",
            f"least = gl.maximum(nearest - {ROWS - 1}, 0)",
            f"level = gl.load({RUNS} + least) >= nearest + BLOCK_N - 1",
            *self.value.before_loop(),
            f"same = {self.value.names[self.level.value]}",
        ]

    def roots(self, cut: str) -> list[Expr]:
        """What has to be computed of a block."""
        return [self.inner, *self.conditions, *(k for _, k in self.words)] if cut else [self.inner]

    def columns(self, i: str, cut: str) -> list[str]:
        """What block ``i`` needs and depends on its keys alone, computed and loaded while the products run."""
        roots = self.roots(cut)
        if not cut and self.level is None and not any(v.value == "k" for e in roots for v in e.variables):
            return []
        lines = [f"start = ({self.block(i)}) * BLOCK_N"]
        inside = ["key_inside = k_index < Skv"] if cut and any(e.op == "load" for r in roots for e in r.leaves) else []
        computed = self.emitter.in_loop(roots, bool(cut), by_key)
        conditions = [self.emitter.names[x] for x in self.conditions if by_key(x)] if cut else []
        wide = ["k_index = start + offs_n", "k_float = start.to(gl.float32) + offs_n_float"]
        where = "gl.where(" + " & ".join([*conditions, *(["(k_index < Skv)"] if self.capped(cut) else [])]) + ', float("inf"), float("-inf"))'
        if not self.thin(cut):
            return [*lines, *wide, *inside, *computed, *([f"cap = {where}"] if conditions else [])]
        # One key a thread: in the layout of the products each thread would read many, and eight threads the same.
        lines += ["k_index = start + offs_thin", "k_float = k_index.to(gl.float32)", *inside, *computed]
        lines += [_spread(self.emitter.names[e]) for e in self.used_by_tiles(roots)]
        return [*lines, *([f"cap = gl.convert_layout({where}, column_layout)[None, :]"] if conditions else []), *wide, *inside]

    def thin(self, cut: str) -> bool:
        """Whether tensors are read by key alone."""
        return any(e.op == "load" and e not in self.emitter.known and e not in self.emitter.spelled and _of_key(e) for e in E.postorder(*self.roots(cut)))

    def used_by_tiles(self, roots: Sequence[Expr]) -> list[Expr]:
        """What depends on the key alone and is an operand of what does not."""
        over = [e for e in E.postorder(*roots) if not _of_key(e)]
        return list(dict.fromkeys(a for e in over for a in e.args if _of_key(a) and a.op != "var"))

    def weigh(self, cut: str, first: bool) -> list[str]:
        """The online softmax over block ``s``: weights ``p``, and ``alpha``, by which what was summed before is scaled."""
        em, started = self.emitter, not first or self.programs.sink is not None
        lines = em.in_loop(self.roots(cut), bool(cut), lambda e: not by_key(e))
        name = em.names[self.inner]
        if name != "s":
            lines.append(f"s = {name}" if E.score() in self.inner.leaves else f"s = {name} + nothing")
        hidden = self.hidden(cut, first) if cut else []
        lines += [*hidden, *self.softmax(started)]
        if self.level is not None and self.looks_for_level(cut, first):
            flat = [] if self.level.scale is not None else [*self.flat.in_loop([self.level.flat], bool(cut)), f"s = {self.flat.names[self.level.flat]}"]
            flat += [*hidden, *self.softmax(started, self.level.scale)]
            lines = ["if level:", *("    " + x for x in flat), "else:", *("    " + x for x in lines)]
        return [*lines, "l_i = l_i * spread(alpha, l_i) + row_parts(p)" if started else "l_i = row_parts(p)", "m_i = m_new"]

    def softmax(self, started: bool, scale: float | None = None) -> list[str]:
        """Of ``s``, or with a ``scale`` of s * scale + same."""
        # A row that has seen no key has maximum -inf: subtract 0 instead, so that its weights are exp(-inf) = 0.
        factor = self.factor if self.programs.folded else LOG2E
        highest = "gl.max(s, 1)" if scale is None else f"gl.max(s, 1) * {scale!r} + same"
        if started:
            lines = [f"m_new = gl.maximum(m_i, {highest})", f"m_new = gl.where(m_new - m_i > {STALE / factor!r}, m_new, m_i)"]
        else:
            lines = [f"m_new = {highest}"]
        lines += ['m_use = gl.where(m_new == float("-inf"), 0.0, m_new)']
        times = "" if factor == 1.0 else f" * {factor!r}"
        if scale is not None:
            lines += [f"p = gl.exp2(s * {scale * factor!r} + ((same - m_use){times})[:, None])"]
        elif self.programs.folded:
            lines += [f"p = gl.exp2(s{times} - (m_use{times})[:, None])"]
        else:
            lines += [f"p = gl.exp2((s - m_use[:, None]){times})"]
        if not started:
            return lines
        return [*lines, f"alpha = gl.exp2(m_i{times} - m_use{times})" if self.programs.folded else f"alpha = gl.exp2((m_i - m_use){times})"]


def conjuncts(mask: Expr) -> list[Expr]:
    return [] if mask is E.TRUE else [x for a in mask.args for x in conjuncts(a)] if mask.op == "and" else [mask]


def _split(mask: Expr, score: Expr) -> tuple[list[Expr], list[tuple[Expr, Expr]]]:
    """A mask as conditions of which all hold, and as pairs of loads that nothing else uses: an integer per query which is one per key, as a document's number."""
    all_of = conjuncts(mask)
    words: dict[Expr, tuple[Expr, Expr]] = {}
    for x in all_of:
        sides = [*x.args] if x.op in ("eq", "same") else []
        if x.op == "eq0" and [(c, a is None) for c, a in E.terms(x.args[0])] in ([(1, False), (-1, False)], [(-1, False), (1, False)]):
            sides = [a for _, a in E.terms(x.args[0]) if a is not None]
        of_key = [a for a in sides if a.op == "load" and a.kind == "int" and _of_key(a)]
        of_query = [a for a in sides if a.op == "load" and a.kind == "int" and _of_query(a)]
        if of_key and of_query:
            words[x] = of_query[0], of_key[0]
    others = [x for x in all_of if x not in words]
    used = set(E.postorder(score, *others))
    if any(used & set(w) for w in words.values()):
        return all_of, []
    return others, list(words.values())


def _of_query(e: Expr) -> bool:
    return {v.value for v in e.variables} >= {"q"} and all(v.value != "k" for v in e.variables)


def _spread(name: str) -> str:
    """One number per key, as a tile needs it."""
    return f"{name} = gl.convert_layout({name}, column_layout)[None, :]"


def by_key(e: Expr) -> bool:
    """Whether a node that depends on the key depends on neither query nor score."""
    return E.score() not in e.leaves and all(v.value != "q" for v in e.variables)


def _of_key(e: Expr) -> bool:
    """Whether a node depends on the key, and on neither query nor score."""
    return by_key(e) and any(v.value == "k" for v in e.variables)


def _factor(score: Expr) -> tuple[float, Expr]:
    """``score`` as factor * inner with a positive constant factor, which then goes into the exponent for free."""
    terms = E.terms(score)
    if len(terms) == 1 and terms[0][1] is not None and float(terms[0][0]) > 0 and terms[0][1].kind == "float":
        return float(terms[0][0]), terms[0][1]
    return 1.0, score
