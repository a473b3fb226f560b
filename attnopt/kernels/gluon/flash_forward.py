"""The source of a Hopper flash-attention forward for one spec (FlashAttention-3, arXiv:2407.08608), with its programs inlined.

One warp, the producer, streams blocks of keys and values into shared memory by TMA. Warpgroups of 64 query rows each, the consumers, start
the product of block i with the queries and that of block i - 1 with the values together, and do the softmax of block i while the latter
runs. The grid is persistent: every block of threads walks over tiles of queries, the heaviest first, and the producer is ahead by the
stages of the ring, also over the end of a tile.

Blocks of keys are walked from the last to the first: those that the mask cuts (the diagonal, the end of the keys), those that every query
sees whole (no mask arithmetic), those that a left bound cuts. A mask that reads tensors comes with a map of its blocks (``block_map``).
Head sizes that are no power of two are two parts (96 = 64 + 32), each with buffers and products of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from textwrap import indent

from attnopt.ir import expr as E
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.codegen import GLUON, literal
from attnopt.kernels.gluon.config import Config, Reads
from attnopt.kernels.gluon.distance import ALONG, at_distance_source
from attnopt.kernels.gluon.helpers import KEEP, KEEP_SAME, PLACE, PLACE_OF_MAPPED, SUMS, TO_HALF, rescale_source
from attnopt.kernels.gluon.scores import ROWS, RUNS, ScoreWriter, by_key, conjuncts
from attnopt.kernels.materialise import Part
from attnopt.kernels.programs import LOG2E, programs_of
from attnopt.kernels.triton.flash_forward import MAP_PLACES, MAP_TENSORS


@dataclass(frozen=True)
class Source:
    """A generated module and the arguments of its ``flash_forward``, in order."""

    text: str
    arguments: tuple[str, ...]
    descriptors: tuple[tuple[str, str, int, int], ...]
    """(argument, tensor, rows of its box, columns of its box); those of one tensor cover its columns in this order."""
    sizes: tuple[str, ...]
    """The names of the symbolic sizes behind the arguments size0, size1, ..."""
    parts: tuple[Part, ...]
    """Loads after those of the spec, computed before each call."""
    mapped: bool
    """Whether it takes a map of the mask's blocks."""
    uneven: bool
    """Whether late queries see more keys than early ones."""
    level: Part | None
    """The part whose runs (``materialise.runs``) it takes."""
    margin: int
    """How many distances beyond the first and the last it reads of tables over them."""


def generate(spec: AttentionSpec, D: int, Dv: int, config: Config) -> Source:
    """The kernel of ``spec`` for heads of D and Dv, for any lengths, strides and half-precision dtypes."""
    return _Writer(spec, D, Dv, config).source()


@lru_cache(maxsize=1024)
def reads(spec: AttentionSpec) -> Reads:
    """What the programs hold in registers beside the tile of scores."""
    p = programs_of(spec)
    loads = [e for e in E.postorder(p.score, p.rest) if e.op == "load"]
    per_pair = any({"q", "k"} <= {a.value for a in e.args if a.op == "var"} for e in loads)
    if per_pair or any(not by_key(x) for x in conjuncts(p.rest)):
        return "pairs"
    return "keys" if any(v.value == "k" for e in loads for v in e.variables) else "nothing"


@lru_cache(maxsize=1024)
def is_even(spec: AttentionSpec) -> bool:
    """Whether all queries see the same keys."""
    return spec.mask is E.TRUE


class _Writer(ScoreWriter):
    # ---- the module

    def source(self) -> Source:
        em, c = self.emitter, self.config
        descriptors = [(f"QD{i}", "q", ROWS, w) for i, w in enumerate(self.widths)] + [(f"KD{i}", "k", c.BLOCK_N, w) for i, w in enumerate(self.widths)]
        descriptors += [(f"VD{i}", "v", c.BLOCK_N, w) for i, w in enumerate(self.v_widths)]
        descriptors += [(f"OD{i}", "o", ROWS, w // c.o_chunks) for i, w in enumerate(self.v_widths)]
        loads = [f"L{s}" for s in sorted(em.loads)]
        strides = [f"L{s}_s{d}" for s in sorted(em.loads) for d in range(em.loads[s])]
        extents = [f"L{s}_n{d}" for s, d in em.measured]
        limits = [x for x, used in (("LEFT", self.programs.left), ("RIGHT", self.programs.right)) if used]
        sizes = [f"size{i}" for i in range(len(em.sizes))]
        lists = [*(MAP_TENSORS if self.mapped else ()), *([RUNS] if self.level else [])]
        places = MAP_PLACES if self.mapped else ()
        self.unspecialised = ["total", "tiles", "late", "Hq", "groups", "Sq", "Skv", *places, *limits, *extents, *sizes]
        self.arguments = [d[0] for d in descriptors] + ["LSE", *loads, *strides, *lists, *self.unspecialised]
        buffers = [f"{x}s{i}" for x, widths in (("q", self.widths), ("k", self.widths), ("v", self.v_widths)) for i in range(len(widths))]
        buffers += [f"os{i}" for i in range(len(self.v_widths))]
        self.shared = [*buffers, "q_full", "q_empty", "k_full", "k_empty", "v_full", "v_empty"]
        words = "".join(x for x in str(self.spec) if x.isprintable() and x not in '"\\')
        pieces = [
            f'"""Generated by attnopt: {words}"""\n\nimport triton\nfrom triton.experimental import gluon\nfrom triton.experimental.gluon import language as gl',
            "from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait\n",
            f"BLOCK_M = gl.constexpr({c.consumers * ROWS})\nBLOCK_N = gl.constexpr({c.BLOCK_N})\nSTAGES = gl.constexpr({c.stages})\n",
            GLUON.helpers,
            TO_HALF,
            KEEP,
            *([KEEP_SAME] if self.mapped else []),
            *([ALONG] if self.slopes else []),
            *([at_distance_source(c.BLOCK_N)] if self.tables else []),
            SUMS,
            rescale_source(),
            PLACE_OF_MAPPED if self.mapped else PLACE,
            self.function("producer", "", self.producer()),
            self.function("consumer", "me: gl.constexpr, ", self.consumer()),
            self.kernel(descriptors),
        ]
        return Source("\n".join(pieces), tuple(self.arguments), tuple(descriptors), tuple(em.sizes), self.programs.parts, self.mapped, self.programs.right and not self.programs.left and not self.mapped, self.level.part if self.level else None, max(c.BLOCK_M, c.BLOCK_N) if self.tables else 0)

    def function(self, name: str, first: str, lines: Sequence[str]) -> str:
        return f"\n@gluon.jit\ndef {name}({first}{', '.join([*self.arguments, *self.shared])}):\n" + indent("\n".join(lines), "    ") + "\n"

    def kernel(self, descriptors: Sequence[tuple[str, str, int, int]]) -> str:
        c = self.config
        lines: list[str] = []
        of = {t: [d for d in descriptors if d[1] == t] for t in "qkvo"}
        queries = c.consumers * c.q_buffers
        for name, depth in (("q", queries), ("k", c.stages), ("v", c.stages), ("o", c.consumers)):
            for i, (desc, *_) in enumerate(of[name]):
                lines.append(f"{name}s{i} = gl.allocate_shared_memory({desc}.dtype, [{depth}] + {desc}.block_type.shape, {desc}.layout)")
        barriers: tuple[tuple[str, int, int], ...] = (("q_full", queries, 1), ("q_empty", queries, 1))
        barriers += tuple((f"{x}_{s}", c.stages, 1 if s == "full" else c.consumers) for x in "kv" for s in ("full", "empty"))
        for name, depth, count in barriers:
            lines.append(f"{name} = gl.allocate_shared_memory(gl.int64, [{depth}, 1], mbarrier.MBarrierLayout())")
            lines += [f"for i in gl.static_range({depth}):", f"    mbarrier.init({name}.index(i), count={count})"]
        everything = ", ".join([*self.arguments, *self.shared])
        workers = [f"(consumer, ({i}, {everything}))" for i in range(c.consumers)] + [f"(producer, ({everything}))"]
        registers = [c.registers] * (c.consumers - 1) + [c.producer_registers]
        lines += [
            "fence_async_shared()",
            f"gl.warp_specialize([{', '.join(workers)}], {[4] * (c.consumers - 1) + [1]}, {registers})",
        ]
        head = f"\n@gluon.jit(do_not_specialize={self.unspecialised!r})\ndef flash_forward({', '.join(self.arguments)}):\n"
        return head + indent("\n".join(lines), "    ") + "\n"

    # ---- what producer and consumers do alike

    def tile(self, turn: str) -> list[str]:
        """The place of the tile of a turn, and its ``n`` blocks of keys."""
        if self.mapped:
            return [
                f"p_map, b, h = place({turn}, total, tiles, Hq, map_b, map_h, COUNTS)",
                "first = p_map % tiles * BLOCK_M",
                "cut = gl.load(COUNTS + p_map * 3)",
                "listed = cut + gl.load(COUNTS + p_map * 3 + 1)",
                "p_list = INDICES + p_map.to(gl.int64) * map_blocks",
                "n = gl.maximum(listed, 1)",
            ]
        lines = [
            f"tile, head = place({turn}, total, tiles, late)",
            "b = head // Hq",
            "h = head % Hq",
            "first = tile * BLOCK_M",
            "last = gl.minimum(first + BLOCK_M, Sq) - 1",
        ]
        lines.append("hi = gl.cdiv(gl.maximum(gl.minimum(last + RIGHT + 1, Skv), 1), BLOCK_N)" if self.programs.right else "hi = gl.cdiv(Skv, BLOCK_N)")
        return [*lines, "n = hi - gl.minimum(gl.maximum(first - LEFT, 0) // BLOCK_N, hi - 1)" if self.programs.left else "n = hi"]

    def stretches(self) -> list[str]:
        """The first n_cut blocks of a tile and those from n_whole on take the mask.

        Worked out where they are used: carried from one tile to the next, Triton 3.6 and 3.7 take them for constants of the loop.
        """
        if self.mapped:
            return ["n_cut = gl.maximum(cut, 1)"]
        lines = ["n_cut = 1"]
        if self.programs.right:
            lines = ["n_cut = gl.maximum(gl.minimum(hi - gl.maximum(gl.minimum(first + RIGHT + 1, Skv), 0) // BLOCK_N, n), 1)"]
        if self.programs.left:
            lines += ["last = gl.minimum(first + BLOCK_M, Sq) - 1"]
            lines += ["n_whole = gl.maximum(gl.minimum(hi - gl.cdiv(gl.maximum(last - LEFT, 0), BLOCK_N), n), n_cut)"]
        return lines

    # ---- the producer

    def producer(self) -> list[str]:
        def fill(ring: str, coordinates: str, widths: Sequence[int], index: str, barrier: str) -> list[str]:
            descriptors = [f"{ring.upper()}D{i}" for i in range(len(widths))]
            lines = [f"mbarrier.expect({barrier}, {' + '.join(f'{d}.block_type.nbytes' for d in descriptors)})"]
            column = 0
            for i, w in enumerate(widths):
                lines.append(f"tma.async_copy_global_to_shared({descriptors[i]}, [{coordinates}, {column}], {barrier}, {ring}s{i}.index({index}))")
                column += w
            return lines

        def ring(name: str, widths: Sequence[int], count: str, block: str) -> list[str]:
            return [
                f"at = ({count}) % STAGES",
                f"mbarrier.wait({name}_empty.index(at), ((({count}) // STAGES) & 1) ^ 1)",
                *fill(name, f"b, h_kv, {block} * BLOCK_N", widths, "at", f"{name}_full.index(at)"),
            ]

        depth = self.config.q_buffers
        queries = [
            f"for c in gl.static_range({self.config.consumers}):",
            f"    slot = c * {depth} + done % {depth}",
            f"    mbarrier.wait(q_empty.index(slot), ((done // {depth}) & 1) ^ 1)",
            *("    " + x for x in fill("q", f"b, h, first + c * {ROWS}", self.widths, "slot", "q_full.index(slot)")),
        ]
        body = [
            *self.tile("done"),
            "h_kv = h // groups",
            f"j = {self.block('0')}",
            *ring("k", self.widths, "seen", "j"),
            *queries,
            "for i in range(1, n):",
            f"    j_next = {self.block('i')}",
            *("    " + x for x in ring("k", self.widths, "seen + i", "j_next")),
            *("    " + x for x in ring("v", self.v_widths, "seen + i - 1", "j")),
            "    j = j_next",
            *ring("v", self.v_widths, "seen + n - 1", "j"),
            "seen += n",
        ]
        return ["seen = 0  # blocks of all tiles before", "for done in range(0, turns_of(total, tiles, late)):", *("    " + x for x in body)]

    # ---- a consumer

    def consumer(self) -> list[str]:
        c, vs = self.config, range(len(self.v_widths))
        windowed = self.programs.left and not self.mapped
        shifted = f"m_i + {self.emitter.names[self.row]}" if self.row else "m_i"
        layouts = ["s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])"]
        layouts += [f"o_layout{i}: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {w}, 16])" for i, w in enumerate(self.v_widths)]
        layouts += [
            "p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout0, 2)",
            "row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)",
            "column_layout: gl.constexpr = gl.SliceLayout(0, s_layout)",
            *(["thin_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])"] if self.thin("both") else []),
        ]
        setup = [
            f"offs_m = gl.arange(0, {ROWS}, layout=row_layout)",
            "offs_n = gl.arange(0, BLOCK_N, layout=column_layout)[None, :]",
            "offs_n_float = offs_n.to(gl.float32)",
            *(["offs_thin = gl.arange(0, BLOCK_N, layout=thin_layout)"] if self.thin("both") else []),
            *(["row_number = offs_m.to(gl.float32)"] if self.row else []),
            f"nothing = gl.zeros([{ROWS}, BLOCK_N], gl.float32, s_layout)",
            "seen = 0",
            "turns_mine = turns_of(total, tiles, late)",
            *self.tile("0"),
            *self.queries(),
            f"slot = me * {c.q_buffers}",
            "mbarrier.wait(q_full.index(slot), 0)",
            *self.fetch(""),
            "mbarrier.wait(k_full.index(0), 0)",
            "at = 0",
            *self.scores(),
            *self.columns("0", "both"),
            *self.look_for_level("both", True),
            "s = warpgroup_mma_wait(0, deps=[pending])",
            "mbarrier.arrive(k_empty.index(0), count=1)",
            *self.first_weight(),
            *self.weigh("both", first=True),
            "weights = gl.convert_layout(to_half(p, VD0.dtype), p_layout)",
            "mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES & 1, pred=n > 1)",
        ]
        body = [
            *(f"acc{i} = gl.zeros([{ROWS}, {w}], gl.float32, o_layout{i})" for i, w in enumerate(self.v_widths)),
            f"slot = me * {c.q_buffers} + done % {c.q_buffers}",
            *self.stretches(),
            *(self.loop("1", "n_cut", "both") if self.mapped or self.programs.right else []),
            *self.loop("n_cut", "n_whole" if windowed else "n", ""),
            *(self.loop("n_whole", "n", "left") if windowed else []),
            *([] if c.q_registers else ["mbarrier.arrive(q_empty.index(slot), count=1)"]),
            "# the last product with the values runs beside the first block of the next tile, and where that is is found out meanwhile",
            f"done_b, done_h, done_first, done_m, done_l = b, h, first, {shifted}, gl.convert_layout(gl.sum(l_i, 1), row_layout)",
            "seen += n",
            "more = done + 1 < turns_mine",
            f"slot = me * {c.q_buffers} + (done + 1) % {c.q_buffers}",
            f"mbarrier.wait(q_full.index(slot), ((done + 1) // {c.q_buffers}) & 1, pred=more)",
            *self.fetch(", pred=more"),
            "at = seen % STAGES",
            "before = (seen - 1) % STAGES",
            "mbarrier.wait(k_full.index(at), (seen // STAGES) & 1, pred=more)",
            *self.scores(),
            "mbarrier.wait(v_full.index(before), ((seen - 1) // STAGES) & 1)",
            *self.values(),
            *self.tile("gl.minimum(done + 1, turns_mine - 1)"),
            *self.queries(),
            *self.columns("0", "both"),
            *self.look_for_level("both", True),
            f"s = warpgroup_mma_wait({len(vs)}, deps=[pending])",
            "mbarrier.arrive(k_empty.index(at), count=1, pred=more)",
            *self.first_weight(),
            *self.weigh("both", first=True),
            "mbarrier.wait(k_full.index((seen + 1) % STAGES), ((seen + 1) // STAGES) & 1, pred=more & (n > 1))",
            *(f"acc{i} = warpgroup_mma_wait({len(vs) - 1 - i}, deps=[pending{i}])" for i in vs),
            "mbarrier.arrive(v_empty.index(before), count=1)",
            "weights = gl.convert_layout(to_half(p, VD0.dtype), p_layout)",
            *self.epilogue(),
        ]
        return [*layouts, *setup, "for done in range(0, turns_mine):", *("    " + x for x in body), "tma.store_wait(0)"]

    def queries(self) -> list[str]:
        """What depends on the rows of a tile, and not on keys."""
        p = self.programs
        lines = [
            f"first_query = first + me * {ROWS}",
            "rows = first_query + offs_m",
            "q_index = rows[:, None]",
            "row_inside = q_index < Sq",
            "q_float = q_index.to(gl.float32)",
            *self.emitter.before_loop(),
            *(self.flat.before_loop() if self.level else []),
        ]
        lines.append("to_key = " + ("gl.minimum(q_index + RIGHT, Skv - 1)" if p.right else "q_index * 0 + Skv - 1"))
        return [*lines, *(["from_key = q_index - LEFT"] if p.left else [])]

    def fetch(self, more: str) -> list[str]:
        """Takes the queries of buffer ``slot`` into registers, where the configuration has room for them."""
        if not self.config.q_registers:
            return []
        lines = [f"q{i} = qs{i}.index(slot).reshape([{ROWS}, {w}]).load(gl.DotOperandLayout(0, s_layout, 2))" for i, w in enumerate(self.widths)]
        return [*lines, f"mbarrier.arrive(q_empty.index(slot), count=1{more})"]

    def scores(self) -> list[str]:
        """Starts the product of the queries in buffer ``slot`` with the keys in buffer ``at``."""
        q = [f"q{i}" if self.config.q_registers else f"qs{i}.index(slot).reshape([{ROWS}, {w}])" for i, w in enumerate(self.widths)]
        lines = [f"pending = warpgroup_mma({q[0]}, ks0.index(at).reshape([BLOCK_N, {self.widths[0]}]).permute((1, 0)), nothing, use_acc=False, is_async=True)"]
        for i, w in list(enumerate(self.widths))[1:]:
            lines.append(f"pending = warpgroup_mma({q[i]}, ks{i}.index(at).reshape([BLOCK_N, {w}]).permute((1, 0)), pending, is_async=True)")
        return lines

    def values(self) -> list[str]:
        """Starts the product of the weights with the values in buffer ``before``."""
        return [
            f"pending{i} = warpgroup_mma(weights, vs{i}.index(before).reshape([BLOCK_N, {w}]), acc{i}, is_async=True)" for i, w in enumerate(self.v_widths)
        ]

    def loop(self, start: str, stop: str, cut: str) -> list[str]:
        """``cut``: by which of its bounds the mask may cut these blocks: ``both``, ``left``, or none. A mask that is mapped is one of ``both``."""
        vs = range(len(self.v_widths))
        lines = [
            "at = (seen + i) % STAGES",
            "before = (seen + i - 1) % STAGES",
            *self.scores(),
            "mbarrier.wait(v_full.index(before), ((seen + i - 1) // STAGES) & 1)",
            *self.values(),
            *self.columns("i", cut),
            *self.look_for_level(cut, False),
            f"s = warpgroup_mma_wait({len(self.v_widths)}, deps=[pending])",
            "mbarrier.arrive(k_empty.index(at), count=1)",
            *self.weigh(cut, first=False),
            "# The next keys are waited for here, since the compiler would move the exponentials behind the wait for the product; a branch holds them.",
            "mbarrier.wait(k_full.index((seen + i + 1) % STAGES), ((seen + i + 1) // STAGES) & 1, pred=i + 1 < n)",
            *(f"acc{i} = warpgroup_mma_wait({len(self.v_widths) - 1 - i}, deps=[pending{i}])" for i in vs),
            "mbarrier.arrive(v_empty.index(before), count=1)",
            *(f"acc{i} = rescale(acc{i}, gl.convert_layout(alpha, gl.SliceLayout(1, o_layout{i}))[:, None])" for i in vs),
            "weights = gl.convert_layout(to_half(p, VD0.dtype), p_layout)",
        ]
        return [f"for i in range({start}, {stop}):", *("    " + x for x in lines)]

    def epilogue(self) -> list[str]:
        """Normalises and stores what ``done_*`` tells, by way of shared memory."""
        c = self.config
        log = "gl.log2(gl.where(done_l > 0.0, done_l, 1.0))"
        natural = f"(done_m * {self.factor!r} + {log}) * {1 / LOG2E!r}" if self.programs.folded else f"done_m + {log} * {1 / LOG2E!r}"
        lines = [
            f"done_rows = done_first + me * {ROWS} + offs_m",
            f'gl.store(LSE + (done_b * Hq + done_h).to(gl.int64) * Sq + done_rows, gl.where(done_l > 0.0, {natural}, float("-inf")), mask=done_rows < Sq)',
        ]
        zero = self.spec.zero_without_weight
        # NaN as a factor makes a row NaN, whatever it is; but NaN in hidden values is no zero times zero
        lines += [f"inverse = gl.where(done_l == 0.0, {'1.0' if zero else literal(math.nan)}, 1.0 / done_l)"]
        chunks: list[list[str]] = [[] for _ in range(c.o_chunks)]
        column = 0
        for i, w in enumerate(self.v_widths):
            layout = f"gl.SliceLayout(1, o_layout{i})"
            lines += [
                f"acc{i} = acc{i} * gl.convert_layout(inverse, {layout})[:, None]",
                *([f"acc{i} = gl.where((gl.convert_layout(done_l, {layout}) == 0.0)[:, None], 0.0, acc{i})"] if zero else []),
                f"o{i} = acc{i}.to(OD{i}.dtype)",
            ]
            lines += [f"o{i}_0, o{i}_1 = o{i}.reshape([{ROWS}, 2, {w // 2}]).permute((0, 2, 1)).split()"] if c.o_chunks == 2 else [f"o{i}_0 = o{i}"]
            for n, chunk in enumerate(chunks):
                chunk.append(f"os{i}.index(me).reshape([{ROWS}, {w // c.o_chunks}]).store(o{i}_{n})")
        for n, chunk in enumerate(chunks):
            lines += ["tma.store_wait(0)", *chunk, "fence_async_shared()"]
            column = 0
            for i, w in enumerate(self.v_widths):
                at = column + n * (w // c.o_chunks)
                lines.append(f"tma.async_copy_shared_to_global(OD{i}, [done_b, done_h, done_first + me * {ROWS}, {at}], os{i}.index(me))")
                column += w
        return lines
