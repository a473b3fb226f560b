"""Functions that every generated Hopper kernel has in its module, as source."""

from __future__ import annotations

TO_HALF = '''
@gluon.jit
def to_half(x, dtype: gl.constexpr):
    """Pairs at a time: left to itself the compiler swaps the halves of each pair, twice."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16, is_pure=True, pack=2)
'''

KEEP = '''
@gluon.jit
def keep_until(s, k, last):
    """Each comparison beside its selection: left apart, their results are packed into words and unpacked again."""
    return gl.inline_asm_elementwise("{ .reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }", "=f,f,r,r", [s, k, last], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def keep_since(s, k, first):
    return gl.inline_asm_elementwise("{ .reg .pred p; setp.ge.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }", "=f,f,r,r", [s, k, first], dtype=gl.float32, is_pure=True, pack=1)
'''


SUMS = '''
@gluon.jit
def row_parts(p):
    """What each thread has of the sum of a row, which 4 threads share: their sums meet once, at the end."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def spread(x, parts):
    """One number per row beside what 4 threads have of each."""
    return gl.convert_layout(x, gl.SliceLayout(1, parts.type.layout))[:, None]
'''


KEEP_SAME = '''
@gluon.jit
def keep_same(s, of_query, of_key):
    """The scores for which one integer per query [M, 1] is that per key [BLOCK_N], of which each thread has one. A key that differs in half of its bits differs: halves take half of the registers."""
    if of_query.dtype == gl.int32 and of_key.dtype == gl.int32:
        return keep_same_word(s, of_query, of_key)
    else:
        s = keep_same_word(s, of_query.to(gl.int32), of_key.to(gl.int32))
        return keep_same_word(s, (of_query.to(gl.int64) >> 32).to(gl.int32), (of_key.to(gl.int64) >> 32).to(gl.int32))


@gluon.jit
def keep_same_word(s, of_query, of_key):
    wide = gl.convert_layout(of_key, gl.SliceLayout(0, s.type.layout))[None, :]
    return gl.inline_asm_elementwise("{ .reg .pred p; setp.eq.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }", "=f,f,r,r", [s, of_query, wide], dtype=gl.float32, is_pure=True, pack=1)
'''


def rescale_source(n: int = 32) -> str:
    """Skips the products of a warp all of whose rows have a factor of 1. Of 4 elements that a thread holds, 2 are of one row and 2 of another."""
    out = [f"mov.b32 ${i}, ${n + i};" for i in range(n)]
    products = [f"mul.f32 ${i}, ${n + i}, ${2 * n + i};" for i in range(n)]
    text = " ".join(
        [
            "{ .reg .pred p, other;",
            f"setp.neu.f32 p, ${2 * n}, 0f3F800000;",
            f"setp.neu.f32 other, ${2 * n + 2}, 0f3F800000;",
            "or.pred p, p, other;",
            "vote.sync.any.pred p, p, 0xffffffff;",
            *out,
            "@!p bra DONE;",
            *products,
            "DONE: }",
        ]
    )
    constraints = ",".join(["=f"] * n + ["f"] * 2 * n)
    return f'''
@gluon.jit
def rescale(x, factor):
    return gl.inline_asm_elementwise("{text}", "{constraints}", [x, factor], dtype=gl.float32, is_pure=True, pack={n})
'''


PLACE = '''
@gluon.jit
def turns_of(total, tiles, late):
    """How many of ``total`` tiles this block of threads computes."""
    me = gl.program_id(0)
    workers = gl.num_programs(0)
    first = total // tiles * late
    return gl.cdiv(gl.maximum(first - me, 0), workers) + gl.cdiv(gl.maximum(total - first - me, 0), workers)


@gluon.jit
def place(turn, total, tiles, late):
    """The tile of queries and the head (over all batches) of a turn.

    Of the ``tiles`` of a head the last ``late`` and the rest are taken in turn: with a causal mask late queries see more keys than early ones, and
    so all workers have the same to do. All are at the same few heads, whose keys and values stay in the L2 cache.
    """
    me = gl.program_id(0)
    workers = gl.num_programs(0)
    early_turns = gl.cdiv(gl.maximum(total - total // tiles * late - me, 0), workers)
    is_late = (turn % 2 == 0) | (turn >= 2 * early_turns)
    t = gl.where(turn < 2 * early_turns, turn // 2, turn - early_turns) * workers + me
    count = gl.where(is_late, late, tiles - late)
    tile = gl.where(is_late, tiles - 1 - t % count, t % count)
    return tile, t // count
'''

PLACE_OF_MAPPED = '''
@gluon.jit
def turns_of(total, tiles, late):
    """How many of ``total`` tiles this block of threads computes."""
    workers = gl.num_programs(0)
    return total // workers + (number(total // workers) < total % workers).to(gl.int32)


@gluon.jit
def number(turn):
    """This block of threads among the others in a turn: first and last change places from turn to turn."""
    me = gl.program_id(0)
    return gl.where(turn % 2 == 0, me, gl.num_programs(0) - 1 - me)


@gluon.jit
def place(turn, total, tiles, Hq, map_b, map_h, COUNTS):
    """The row of the map of a turn, the batch and the head.

    The rows with the most blocks come first, each for all batches and heads that share it: dealt out in that order, forth and back, all
    workers have nearly the same to do.
    """
    i = turn * gl.num_programs(0) + number(turn)
    copies = gl.where(map_h > 0, 1, Hq) * gl.where(map_b > 0, 1, total // tiles // Hq)
    row = gl.load(COUNTS + i // copies * 3 + 2)
    group, copy = row // tiles, i % copies
    h = gl.where(map_h > 0, group, copy) % Hq
    b = gl.where(map_b > 0, gl.where(map_h > 0, group // Hq, group), gl.where(map_h > 0, copy, copy // Hq))
    return row, b, h
'''
