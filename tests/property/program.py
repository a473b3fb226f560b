"""A random attention program: a small value that is printed as the PyTorch module it stands for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor, nn

from property.emit import Emitter, Input, Sizes, compiled
from property.masks import Diagonal, Document, Mask, Padding
from property.steps import Add, Hide, Island, Stage, Step

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
Source = Literal["inputs", "sequence first", "linear", "linear cross", "packed unbind", "packed split", "packed select", "past", "keys transposed", "learned queries"]
Heads = Literal["same", "repeat_interleave", "expand", "tiled", "grouped", "broadcast", "enable_gqa"]
Layout = Literal["matmul", "mT", "einsum", "keys first", "multiply and sum", "flat", "flat product", "baddbmm", "heads last", "softmax over rows"]
Softmax = Literal["softmax", "F.softmax", "method", "axis", "in float32", "exp over sum", "exp minus max", "divide after", "log_softmax", "logsumexp"]
_WRAP = {
    "flat": "({}).expand(B, H, S, T).reshape(B * H, S, T)",
    "baddbmm": "({}).expand(B, H, S, T).reshape(B * H, S, T)",
    "heads last": "({}).expand(B, H, S, T).permute(0, 2, 3, 1)",
    "softmax over rows": "({}).expand(B, H, S, T).mT",
}


@dataclass(frozen=True)
class Call:
    """An existing ``scaled_dot_product_attention`` in place of written-out steps: what it gets."""

    mask: Literal["none", "bool", "float"] = "none"
    is_causal: bool = False
    scale: float | None = None


SMALL = Sizes(2, 5, 5)


@dataclass(frozen=True)
class Program:
    dtype: str = "float32"
    sizes: Sizes = SMALL
    dynamic: bool = False
    H: int = 2
    Hkv: int = 2
    D: int = 4
    Dv: int = 4
    source: Source = "inputs"
    heads: Heads = "same"
    norm: Literal["none", "rms", "l2"] = "none"
    q_scale: float = 1.0
    k_scale: float = 1.0
    layout: Layout = "matmul"
    steps: tuple[Step, ...] = ()
    softmax: Softmax = "softmax"
    sink: Literal["none", "joined", "joined minus max", "plus one", "padded"] = "none"
    dropout: Literal["none", "function", "module"] = "none"
    nan_to_num: bool = False
    product: Literal["matmul", "einsum", "transposed"] = "matmul"
    output: Literal["heads", "merged"] = "heads"
    call: Call | None = None

    # ---- what it has

    @property
    def groups(self) -> int:
        return self.H // self.Hkv

    @property
    def masks(self) -> list[Mask]:
        return [s.mask for s in self.steps if isinstance(s, Hide)]

    @property
    def mask_parts(self) -> list[Mask]:
        return [p for m in self.masks for p in m.parts()]

    @property
    def square(self) -> bool:
        """Whether queries and keys are the same positions at every size."""
        return self.source in ("linear", "packed unbind", "packed split", "packed select") or any(isinstance(p, Document) and p.spelling != "two tensors" for p in self.mask_parts)

    def features(self) -> list[str]:
        """What the program has, for counting."""
        names = [f"dtype {self.dtype}", f"source {self.source}", f"heads {self.heads}", f"layout {self.layout if self.call is None else 'call'}", "dynamic" if self.dynamic else "static"]
        names += [] if self.call else [f"softmax {self.softmax}"]
        names += [f"call mask {self.call.mask}", *(["call is_causal"] if self.call.is_causal else []), *(["call scale"] if self.call.scale else [])] if self.call else []
        for s in self.steps:
            names.append(f"step {type(s).__name__}")
            if isinstance(s, Hide):
                names += [f"fill {s.fill}", f"hide {s.spelling}"]
            if isinstance(s, Add):
                names.append(f"bias {type(s.bias).__name__} {getattr(s.bias, 'by', getattr(s.bias, 'position', ''))}".strip())
        names += sorted({f"mask {type(p).__name__}{' ' + p.align if getattr(p, 'align', '') == 'bottom_right' else ''}" for p in self.mask_parts})
        for name in ("norm", "sink", "dropout"):
            names += [f"{name} {getattr(self, name)}"] if getattr(self, name) != "none" else []
        names += ["nan_to_num"] if self.nan_to_num else []
        names += ["Sq != Skv"] if self.sizes.S != self.sizes.T else []
        names += ["Dv != D"] if self.Dv != self.D else []
        names += ["near miss"] if any(is_near_miss(p) for p in self.mask_parts) else []
        return names

    def __str__(self) -> str:
        plain = Program()
        told = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name))
        return f"Program({told})\n\n{self.source_text()}"

    # ---- what it stands for

    def inputs(self) -> dict[str, Input]:
        return self._emit(False).inputs

    def make(self, sizes: Sizes, seed: int = 0) -> tuple[Tensor, ...]:
        """Arguments of forward at ``sizes``."""
        g = torch.Generator().manual_seed(seed)
        return tuple(x.make(sizes, DTYPES[self.dtype], g) for x in self.inputs().values())

    def module(self, literal: bool = False) -> nn.Module:
        """The module, with the same random parameters each time. ``literal``: fills are numbers and do not follow the dtype it runs in."""
        torch.manual_seed(1)
        return compiled(self.source_text(literal))().to(DTYPES[self.dtype]).eval()

    def source_text(self, literal: bool = False) -> str:
        return self._emit(literal).source()

    def _emit(self, literal: bool) -> Emitter:
        e = Emitter()
        self._operands(e)
        if self.call is not None:
            self._call(e, literal)
        else:
            self._scores(e)
            self._steps(e, literal)
            self._softmax(e, literal)
            self._values(e)
        e.line({"heads": "return o", "merged": "return o.transpose(1, 2).reshape(B, S, -1)"}[self.output])
        return e

    def _operands(self, e: Emitter) -> None:
        H, K, D, Dv = self.H, self.Hkv, self.D, self.Dv
        if self.source == "inputs":
            e.input("q", ("B", H, "S", D)), e.input("k", ("B", K, "T", D)), e.input("v", ("B", K, "T", Dv))
        elif self.source == "sequence first":
            e.input("q", ("B", "S", H, D)), e.input("k", ("B", "T", K, D)), e.input("v", ("B", "T", K, Dv))
            e.line("q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.permute(0, 2, 1, 3)")
        elif self.source == "past":
            e.input("q", ("B", H, "S", D)), e.input("new_k", ("B", K, "S", D)), e.input("new_v", ("B", K, "S", Dv))
            e.input("past_k", ("B", K, "P", D)), e.input("past_v", ("B", K, "P", Dv))
            e.line("k, v = torch.cat([past_k, new_k], 2), torch.cat([past_v, new_v], dim=-2)")
        elif self.source == "keys transposed":
            e.input("q", ("B", H, "S", D)), e.input("kt", ("B", K, D, "T")), e.input("v", ("B", K, "T", Dv))
            e.line("k = kt.transpose(-2, -1)")
        elif self.source == "learned queries":
            e.state(f"torch.randn(1, {H}, {self.sizes.S}, {D})", "query", True)
            e.input("k", ("B", K, "T", D)), e.input("v", ("B", K, "T", Dv))
            e.line("q = self.query.expand(k.shape[0], -1, -1, -1)")
        elif self.source.startswith("packed"):
            e.input("x", ("B", "S", 6))
            e.init.append(f"self.qkv = nn.Linear(6, {3 * H * D})")
            if self.source == "packed unbind":
                e.line(f"q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, {H}, {D}).permute(2, 0, 3, 1, 4).unbind(0)")
            elif self.source == "packed select":
                e.line(f"qkv = self.qkv(x).reshape(x.shape[0], x.shape[1], {H}, 3, {D}).permute(3, 0, 2, 1, 4)")
                e.line("q, k, v = qkv[0], qkv[1], qkv[2]")
            else:
                e.line(f"q, k, v = (y.unflatten(-1, ({H}, {D})).transpose(1, 2) for y in self.qkv(x).split({H * D}, dim=-1))")
        else:
            e.input("x", ("B", "S", 6))
            y = "x" if self.source == "linear" else e.input("y", ("B", "T", 6))
            for name, n, of in (("q", H * D, "x"), ("k", K * D, y), ("v", K * Dv, y)):
                e.init.append(f"self.{name} = nn.Linear(6, {n})")
                e.line(f"{name} = self.{name}({of}).view({of}.shape[0], {of}.shape[1], -1, {D if name != 'v' else Dv}).transpose(1, 2)")
        e.line(f"B, H, S, T = q.shape[0], {H}, {'q.shape[2]' if self.source != 'learned queries' else self.sizes.S}, k.shape[2]")
        e.line("i, j = torch.arange(S)[:, None], torch.arange(T)[None, :]")
        if self.norm == "rms":
            e.line("q, k = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) for y in (q, k))")
        elif self.norm == "l2":
            e.line("q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)")
        for name, by in (("q", self.q_scale), ("k", self.k_scale)):
            if by != 1.0:
                e.line(f"{name} = {name} * {by!r}")
        if self.heads == "repeat_interleave":
            e.line(f"k, v = k.repeat_interleave({self.groups}, dim=1), v.repeat_interleave({self.groups}, 1)")
        elif self.heads == "expand":
            e.line(f"k, v = (y[:, :, None].expand(-1, -1, {self.groups}, -1, -1).reshape(B, H, T, y.shape[-1]) for y in (k, v))")
        elif self.heads == "tiled":
            e.line(f"k, v = k.repeat(1, {self.groups}, 1, 1), v.repeat(1, {self.groups}, 1, 1)")
        elif self.heads == "grouped":
            e.line(f"q = q.reshape(B, {self.Hkv}, {self.groups}, S, {D})")

    def _scores(self, e: Emitter) -> None:
        if self.heads == "grouped":
            e.line('w = torch.einsum("bhgqd,bhkd->bhgqk", q, k)')
            return
        if self.layout in ("flat", "flat product", "baddbmm"):
            e.line("q, k, v = (y.expand(B, H, -1, -1).reshape(B * H, y.shape[2], y.shape[3]) for y in (q, k, v))")
        e.line(
            {
                "matmul": "w = q @ k.transpose(-1, -2)",
                "mT": "w = torch.matmul(q, k.mT)",
                "einsum": 'w = torch.einsum("bhqd,bhkd->bhqk", q, k)',
                "keys first": "w = (k @ q.mT).transpose(2, 3)",
                "multiply and sum": "w = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)",
                "flat": "w = torch.bmm(q, k.transpose(1, 2))",
                "flat product": "w = torch.bmm(q, k.transpose(1, 2)).view(B, H, S, T)",
                "baddbmm": "w = torch.baddbmm(torch.empty(B * H, S, T, dtype=q.dtype), q, k.transpose(1, 2), beta=0, alpha=1.0)",
                "heads last": 'w = torch.einsum("bhqd,bhkd->bqkh", q, k)',
                "softmax over rows": "w = k @ q.mT",
            }[self.layout]
        )

    def stage(self, literal: bool, dtype: torch.dtype) -> Stage:
        wrap = f"({{}}).expand(B, H, S, T).unflatten(1, ({self.Hkv}, {self.groups}))" if self.heads == "grouped" else _WRAP.get(self.layout, "{}")
        return Stage(self.H, dtype, wrap if self.call is None else "{}", literal)

    def _steps(self, e: Emitter, literal: bool) -> None:
        for step, dtype in self.staged():
            e.line(step.code(e, self.stage(literal, dtype)))

    def staged(self) -> list[tuple[Step, torch.dtype]]:
        """Each step with the dtype that it runs in."""
        out: list[tuple[Step, torch.dtype]] = []
        dtype = DTYPES[self.dtype]
        for s in self.steps:
            out.append((s, dtype))
            if isinstance(s, Island) and dtype is not torch.float64:
                dtype = torch.float32
        return out

    @property
    def axis(self) -> int:
        return -2 if self.layout in ("heads last", "softmax over rows") and self.heads != "grouped" else -1

    def _softmax(self, e: Emitter, literal: bool) -> None:
        a = self.axis
        keep = f"dim={a}, keepdim=True"
        if self.sink != "none":
            self._sink(e)
            return
        if self.softmax == "axis":
            e.line(f"p = w.softmax(dim=w.dim() - {-a})")
        elif self.softmax == "exp over sum":
            e.line("p = w.exp()")
            e.line(f"p = p / p.sum({keep})")
        elif self.softmax == "exp minus max":
            e.line(f"p = torch.exp(w - w.amax({keep}))")
            e.line(f"p = p / p.sum({keep})")
        elif self.softmax == "divide after":
            e.line(f"p = torch.exp(w - w.max({keep}).values)")
            e.line(f"total = p.sum({keep})")
        else:
            e.line(
                {
                    "softmax": f"p = torch.softmax(w, dim={a})",
                    "F.softmax": f"p = F.softmax(w, {a})",
                    "method": f"p = w.softmax({a})",
                    "in float32": f"p = F.softmax(w, dim={a}, dtype=torch.{'float64' if literal else 'float32'})",
                    "log_softmax": f"p = F.log_softmax(w, dim={a}).exp()",
                    "logsumexp": f"p = torch.exp(w - torch.logsumexp(w, {keep}))",
                }[self.softmax]
            )
        if (self.softmax == "in float32" or any(isinstance(s, Island) for s in self.steps)) and self.softmax != "divide after":
            e.line("p = p.to(v.dtype)")

    def _sink(self, e: Emitter) -> None:
        sink = e.state(f"torch.randn({self.H})", "sink", True)
        joined = f"torch.cat([w, {sink}.reshape(1, H, 1, 1).to(w.dtype).expand(B, H, S, 1)], dim=-1)"
        if self.sink == "joined":
            e.line(f"p = {joined}.softmax(-1)[..., :-1]")
        elif self.sink == "joined minus max":
            e.line(f"w = {joined}")
            e.line("w = w - w.max(dim=-1, keepdim=True).values")
            e.line("p = F.softmax(w, dim=-1)[..., :T]")
        elif self.sink == "plus one":
            e.line("p = w.exp()")
            e.line("p = p / (1 + p.sum(-1, keepdim=True))")
        else:
            e.line("p = F.pad(w, (1, 0)).softmax(-1)[..., 1:]")
        e.line("p = p.to(v.dtype)")

    def _values(self, e: Emitter) -> None:
        if self.nan_to_num:
            e.line("p = torch.nan_to_num(p)")
        if self.dropout == "function":
            e.line("p = F.dropout(p, p=0.1, training=self.training)")
        elif self.dropout == "module":
            e.init.append("self.drop = nn.Dropout(0.2)")
            e.line("p = self.drop(p)")
        if self.heads == "grouped":
            e.line('o = torch.einsum("bhgqk,bhkd->bhgqd", p, v)')
            e.line("o = o.flatten(1, 2)" if self.softmax != "divide after" else "o = (o / total).flatten(1, 2)")
            return
        p = {"softmax over rows": "p.mT", "heads last": "p.permute(0, 3, 1, 2)", "flat product": "p.view(B * H, S, T)"}.get(self.layout, "p")
        total = {"softmax over rows": "total.mT", "heads last": "total.permute(0, 3, 1, 2)", "flat product": "total.view(B * H, S, 1)"}.get(self.layout, "total")
        flat = self.layout in ("flat", "flat product", "baddbmm")
        axes = "b" if flat else "bh"
        if self.product == "matmul":
            e.line(f"o = {p} @ v")
        elif self.product == "einsum":
            e.line(f'o = torch.einsum("{axes}qk,{axes}kd->{axes}qd", {p}, v)')
        else:
            e.line(f"o = (v.mT @ {p}.mT).mT")
        if self.softmax == "divide after":
            e.line(f"o = o / {total}")
        if flat:
            e.line("o = o.view(B, H, S, -1)")

    def _call(self, e: Emitter, literal: bool) -> None:
        assert self.call is not None
        options: list[str] = []
        if self.call.mask == "bool":
            names = []
            for m in self.masks:
                names.append(e.fresh("mask"))
                e.line(f"{names[-1]} = {m.code(e)}")
            options.append(f"attn_mask={' & '.join(names)}")
        elif self.call.mask == "float":
            e.line("w = torch.zeros(S, T, dtype=q.dtype)")
            self._steps(e, literal)
            options.append("attn_mask=w")
        if self.call.is_causal:
            options.append("is_causal=True")
        if self.call.scale is not None:
            options.append(f"scale={self.call.scale!r}")
        if self.heads == "enable_gqa":
            options.append("enable_gqa=True")
        if self.dropout != "none":
            options.append("dropout_p=0.1 if self.training else 0.0")
        e.line(f"o = F.scaled_dot_product_attention({', '.join(['q', 'k', 'v', *options])})")

    # ---- other sizes

    def other_sizes(self) -> Sizes:
        """A second size, larger in every way that may vary."""
        s = self.sizes
        S = s.S if self.source == "learned queries" else s.S + 4
        return Sizes(s.B + 1, S, S if self.square else s.T + (6 if s.T != s.S else 4))

    def with_sizes(self, sizes: Sizes) -> Program:
        return replace(self, sizes=sizes)


def is_near_miss(m: Mask) -> bool:
    return (isinstance(m, Diagonal) and (m.op != "<=" or m.shift != 0 or m.wrong is not None)) or (isinstance(m, Padding) and m.axis == "q")
