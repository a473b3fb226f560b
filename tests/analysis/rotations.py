"""Rotary embeddings as people write them, and what a recognised one says, computed again from its own words."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

from attnopt.analysis.lift import Lifter
from attnopt.analysis.rotary import Rotation, annotate
from attnopt.analysis.site import AttentionSite, Operand
from attnopt.analysis.sites import find_sites
from attnopt.config import OptimizeConfig
from attnopt.ir import expr as E
from attnopt.passes.pipeline import NAMES, run_pipeline
from attnopt.passes.raise_attention import constant_of

B, S, H, D = 2, 6, 2, 8
C = H * D
FREQUENCIES = 10000.0 ** -(torch.arange(0, D, 2).float() / D)
Rope = Callable[..., Tensor]


def half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def interleaved(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def angles(s: int) -> Tensor:
    return torch.outer(torch.arange(s).float(), FREQUENCIES)


class Attention(nn.Module):
    """``rope(module, x, *args)`` on queries and keys, in [B, H, S, D] or, ``early``, in [B, S, H, D]."""

    def __init__(self, rope: Rope, early: bool = False, k_rope: Rope | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rope, self.k_rope, self.early = rope, k_rope or rope, early
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.register_buffer("inv_freq", FREQUENCIES.clone(), persistent=False)
        table = torch.outer(torch.arange(32).float(), FREQUENCIES)
        self.register_buffer("cos", table.cos())
        self.register_buffer("sin", table.sin())
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(table), table))
        self.learned = nn.Parameter(table.cos())

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, H, D) for p in (self.q, self.k, self.v))
        if self.early:
            q, k = self.rope(self, q, *args), self.k_rope(self, k, *args)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if not self.early:
            q, k = self.rope(self, q, *args), self.k_rope(self, k, *args)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, C)


class Found:
    """The site of a captured model, and the values of its graph on the example."""

    def __init__(self, model: nn.Module, *args: Tensor, dynamic: bool = True) -> None:
        each = tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in args)
        shapes = {"x": each[0], **({"args": each[1:]} if args[1:] else {})} if dynamic else None
        gm = torch.export.export(model.eval(), args, dynamic_shapes=shapes, strict=False).module(check_guards=False)
        self.module = run_pipeline(gm, OptimizeConfig(disable_passes=NAMES[1:])).graph_module
        lifter = Lifter(constant_of(self.module))
        sites = [s for s in find_sites(self.module.graph, constant_of(self.module)) if isinstance(s, AttentionSite)]
        for s in sites:
            annotate(s, lifter)
        (self.site,) = sites
        run = fx.Interpreter(self.module, garbage_collect_values=False)
        with torch.no_grad():
            run.run(*args)
        self.values: dict[fx.Node, Tensor] = run.env

    def operand(self, operand: Operand) -> Tensor:
        return self.seen(self.values[operand.node], operand.views)

    def seen(self, x: Tensor, views: tuple) -> Tensor:
        def size(e: E.Expr) -> int:
            return int(self.number(e))

        for name, args in views:
            if name == "select":
                x = x.select(args[0], size(args[1]))
            elif name == "narrow":
                x = x.narrow(args[0], size(args[1]), size(args[2]))
            elif name == "permute":
                x = x.permute(args)
            else:
                x = getattr(x, name)([size(a) for a in args])
        return x

    def number(self, e: E.Expr, **at: int) -> float:
        if e.op == "var":
            return at[str(e.value)]
        if e.op == "sym":
            return next(t.shape[d] for n, t in self.values.items() if n.op == "placeholder" for d, m in enumerate(n.meta["val"].shape) if str(m) == e.value[0])
        if e.op == "load":
            return float(self._real(self.values[e.value], len(e.args))[tuple(int(self.number(a, **at)) for a in e.args)])
        return float(E.rebuild(e, tuple(E.const(type(0.0 if a.kind == "float" else 0)(self.number(a, **at))) for a in e.args)).value) if e.args else e.value

    @staticmethod
    def _real(x: Tensor, rank: int) -> Tensor:
        return torch.view_as_real(x) if x.is_complex() else x

    def rotated(self, r: Rotation) -> Tensor:
        """The operand as the rotation says it is made: [B, H, S, D], or only its rotated features."""
        assert r.views is not None
        f = r.form
        x = self.seen(self.values[r.source], r.views).double()
        b, h, s, _ = x.shape
        turned = x[..., f.start : f.start + f.dim] if r.whole else x
        out = torch.empty_like(turned)
        for ib in range(b):
            for t in range(s):
                for i in range(f.dim // 2):
                    p, q = (turned[ib, :, t, at] for at in (f.source.first + f.source.step * i, f.source.second + f.source.step * i))
                    c, z = (self.number(e, b=ib, s=t, i=i) for e in (r.cos, r.sin))
                    out[ib, :, t, f.target.first + f.target.step * i] = c * p - z * q
                    out[ib, :, t, f.target.second + f.target.step * i] = c * q + z * p
        factor = torch.tensor([[[self.number(r.factor, b=ib, h=ih, s=t) for t in range(s)] for ih in range(h)] for ib in range(b)]).double()[..., None]
        whole = torch.cat((x[..., : f.start], out, x[..., f.start + f.dim :]), -1) if r.whole else out
        return whole * factor

    def check(self) -> None:
        """What is claimed of q and k is what the graph computes."""
        for r, operand in zip(self.site.rotations, (self.site.q, self.site.k), strict=True):
            assert r is not None
            want = self.operand(operand).double()
            if not r.whole:
                want = want[..., r.form.start : r.form.start + r.form.dim]
            torch.testing.assert_close(self.rotated(r), want, rtol=2e-6, atol=2e-6)
