"""The source of a kernel that computes rows without a visible key, where they have a score of their own (``spec.empty_rows``).

It runs behind a forward that left such rows with an lse of -inf, walks over all keys for the blocks of queries that hold one, and writes
these rows only. In most calls there is none, and all that it reads is lse: a program looks at ``TILES`` blocks of queries at once, since programs that do next to nothing still come one
after another.
"""

from __future__ import annotations

from functools import lru_cache

from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.triton.flash_forward import Source, Writer

TILES = 16


@lru_cache(maxsize=1024)
def generate(spec: AttentionSpec) -> Source:
    """The kernel for one spec whose programs have a score for empty rows, for any sizes, strides and dtypes."""
    return _Filler(spec).source()


class _Filler(Writer):
    name = "empty_rows"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.mapped = self.left = self.right = False  # all keys count

    @property
    def roots(self) -> list[Expr]:
        assert self.programs.empty is not None
        return [self.programs.empty, self.programs.mask]

    def body(self) -> str:
        empty, names = self.roots[0], self.emitter.names
        step = [
            *self.keys(tail=True),
            *self.emitter.in_loop((self.mask, empty), tail=True),
            # -inf from a bias on all visible keys is not an empty row: softmax makes it NaN
            f"seen = tl.maximum(seen, tl.max((({names[self.mask]}) & key_inside & hidden[:, None]).to(tl.int32), 1))",
            f"s = {self.spread(empty)}",
            's = tl.where(hidden[:, None] & key_inside, s, float("-inf"))',
            *self.update(tail=True),
        ]
        rows = [
            *self.start(),
            "seen = tl.zeros((BLOCK_M,), tl.int32)",
            *self.loop("0", "Skv", step),
            'l_i = tl.where(seen > 0, float("nan"), l_i)',
            *self.store("hidden[:, None]"),
        ]
        tile = [
            "offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)",
            'hidden = tl.load(p_lse + offs_m, mask=offs_m < Sq, other=0.0) == float("-inf")',
            "if tl.max(hidden.to(tl.int32), 0) > 0:",
            *("    " + x for x in rows),
        ]
        lines = [
            "tiles = tl.cdiv(Sq, BLOCK_M)",
            f"chunks = tl.cdiv(tiles, {TILES})",
            "head = tl.program_id(0) // chunks",
            "b = head // Hq",
            "h = head % Hq",
            "h_kv = h // groups",
            f"first = tl.program_id(0) % chunks * {TILES}",
            "p_lse = LSE + head.to(tl.int64) * Sq",
            f"all_m = first * BLOCK_M + tl.arange(0, {TILES} * BLOCK_M)",
            'if tl.max((tl.load(p_lse + all_m, mask=all_m < Sq, other=0.0) == float("-inf")).to(tl.int32), 0) > 0:',
            f"    for tile in range(first, tl.minimum(first + {TILES}, tiles)):",
            *("        " + x for x in tile),
        ]
        return "\n".join(lines) + "\n"
