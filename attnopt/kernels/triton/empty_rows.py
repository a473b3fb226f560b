"""The source of a kernel that computes rows without a visible key, where they have a score of their own (``spec.empty_rows``).

It runs behind a forward that left such rows with an lse of -inf, walks over all keys for the blocks of queries that hold one, and writes
these rows only. In most calls there is none, and all that it reads is lse.
"""

from __future__ import annotations

from functools import lru_cache

from attnopt.ir.expr import Expr
from attnopt.ir.spec import AttentionSpec
from attnopt.kernels.triton.flash_forward import Source, Writer


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
        lines = [
            *self.place(),
            'hidden = (tl.load(LSE + head.to(tl.int64) * Sq + offs_m, mask=offs_m < Sq, other=0.0) == float("-inf")) & (offs_m < Sq)',
            "if tl.max(hidden.to(tl.int32), 0) > 0:",
            *("    " + x for x in rows),
        ]
        return "\n".join(lines) + "\n"
