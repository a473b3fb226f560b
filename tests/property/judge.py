"""The judge: is one program replaced, right, and called nothing that it is not?

Every question is answered by looking at all indices of two runs at small sizes. ``Wrong`` says which question failed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch._dynamo.config
from torch import Tensor, fx, nn
from torch.export import Dim

from attnopt.config import OptimizeConfig
from attnopt.errors import AttnoptError
from attnopt.passes.pipeline import PipelineResult, run_pipeline
from property.emit import Sizes
from property.expressions import evaluate
from property.masks import Below, Diagonal, Document, Joined, Mask, Not, Padding, Window
from property.meaning import HIDDEN, Meaning, compared, double_of, doubled, eps, meaning
from property.program import Program
from property.steps import Clamp, Given, HeadScale, Hide, NoNan, Softcap, Temperature

UNSTABLE = ("exp over sum", "logsumexp")
"""Spellings that give 0/0, or weights of another sum than one, where every logit is very low."""


class Wrong(AssertionError):
    """``kind``: crash, refused, judge, output, axes, score, mask, claim."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class NotCaptured(Exception):
    """torch.export itself does not take a program with open sizes, so there is no graph to judge."""


@dataclass
class Checked:
    """What was seen of one program: the spec, and at how many sizes."""

    spec: Any
    runs: int


def check(program: Program) -> Checked:
    """Raises Wrong where the rewritten program is not the program, or is called something that it is not."""
    module = program.module()
    inputs = program.make(program.sizes)
    result = lifted(program, module, inputs)
    if [s.status for s in result.sites] != ["replaced"]:
        raise Wrong("refused", "; ".join(f"{s.status} {[str(r) for r in s.remarks]}" for s in result.sites) or "no site at all")
    spec = result.sites[0].spec
    assert spec is not None
    _run(program, module, result, program.sizes, inputs)
    runs = 1
    other = program.other_sizes()
    if program.dynamic and _fits(program, result.graph_module, other):
        _run(program, module, result, other, program.make(other, seed=1))
        runs = 2
    return Checked(spec, runs)


def lifted(program: Program, module: nn.Module, inputs: tuple[Tensor, ...]) -> PipelineResult:
    shapes = tuple({i: Dim.AUTO for i, a in enumerate(x.axes) if isinstance(a, str)} for x in program.inputs().values()) if program.dynamic else None
    try:
        # No two programs share shapes, so PyTorch's cache of fake results costs more than it saves: 40% of the whole.
        with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except RuntimeError as error:
        if shapes is None:
            raise
        raise NotCaptured(str(error)) from error
    try:
        return run_pipeline(exported.module(check_guards=False), OptimizeConfig(backend="reference"))
    except AttnoptError as error:
        raise Wrong("crash", str(error)) from error


def _fits(program: Program, gm: fx.GraphModule, sizes: Sizes) -> bool:
    """Whether the capture kept every axis open: a size that PyTorch turned into a constant admits no second one."""
    values = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    for x, value in zip(program.inputs().values(), values, strict=True):
        for axis, n in zip(x.axes, value.shape, strict=True):
            if isinstance(n, int) and n != x.extent(axis, sizes):
                return False
    return True


# ------------------------------------------------------------------------------------------------ one run


class _Recorder(fx.Interpreter):
    """Runs a rewritten graph and keeps what its one attention got."""

    call: tuple[Any, ...] = ()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.attnopt.attention.default:
            self.call = args
        return super().call_function(target, args, kwargs)


def _run(program: Program, module: nn.Module, result: PipelineResult, sizes: Sizes, inputs: tuple[Tensor, ...]) -> None:
    truth = meaning(program, module, inputs, sizes)
    with torch.no_grad():
        exact = compared(program, double_of(program)(*doubled(inputs)), sizes)
        plain = compared(program, module(*inputs), sizes)
        recorder = _Recorder(result.graph_module)
        ours = compared(program, recorder.run(*inputs), sizes)
        shifted = compared(program, replace(program, softmax="softmax").module()(*inputs), sizes) if program.softmax in UNSTABLE and program.call is None else plain
    rows = ~truth.empty
    apart = _distance(exact, truth.output, rows)
    if not apart <= 1e-6:  # logarithms of positions are float32 in either
        raise Wrong("judge", f"the module in float64 and its meaning differ by {apart:.2e} at {sizes}")
    _compare_outputs(program, truth, exact, plain, shifted, ours, rows, sizes)
    spec = result.sites[0].spec
    _Claims(program, truth, spec, recorder.call, sizes).check()


def _distance(a: np.ndarray, b: np.ndarray, rows: np.ndarray) -> float:
    """Norm of the difference on ``rows``, relative to b; infinite where one is NaN and the other is not."""
    x, y = a[rows], b[rows]
    if (np.isnan(x) != np.isnan(y)).any():
        return np.inf
    x, y = np.nan_to_num(x), np.nan_to_num(y)
    return float(np.linalg.norm(x - y) / max(float(np.linalg.norm(y)), 1e-30)) if y.size else 0.0


def _compare_outputs(program: Program, truth: Meaning, exact: np.ndarray, plain: np.ndarray, shifted: np.ndarray, ours: np.ndarray, rows: np.ndarray, sizes: Sizes) -> None:
    error, own = _distance(ours, truth.output, rows), _distance(plain, truth.output, rows)
    half = eps(program) > 1e-5
    budget = (1.5 if half else 4) * own + (2 if half else 16) * eps(program)
    if not error <= budget:
        raise Wrong("output", f"error {error:.2e} of budget {budget:.2e} (the original's own is {own:.2e}) at {sizes}")
    # What a row without visible keys gives is a matter of the fill's rounding: the original's, in its own dtype or in float64.
    for b, h, q in np.argwhere(truth.empty):
        mine, peak = ours[b, h, q], float(truth.logits[b, h, q].max())
        # A logit that hides nothing yet is rounded itself, and the exponential's relative error is the logit's absolute one.
        size = 4 * abs(peak) if peak > HIDDEN else 0.0
        within = 64 * eps(program) + size * min(eps(program), float(np.finfo(np.float32).eps))
        wanted = [(plain[b, h, q], within), (exact[b, h, q], within)]
        if program.softmax in UNSTABLE:  # these underflow or absorb where a softmax does not: either is right (docs/limits.md)
            wanted += [(shifted[b, h, q], within), (truth.output[b, h, q], (64 + size) * eps(program))]
        if not any(np.allclose(mine, x, rtol=within, atol=within, equal_nan=True) for x, within in wanted):
            raise Wrong("output", f"empty row {(b, h, q)}: {mine} instead of {wanted[0][0]} at {sizes}; empty_rows is wrong")


# ------------------------------------------------------------------------------------------------ what is claimed


class _Claims:
    """The spec of one run beside the truth, in the spec's own order of batches and heads."""

    def __init__(self, program: Program, truth: Meaning, spec: Any, call: tuple[Any, ...], sizes: Sizes) -> None:
        self.program, self.spec, self.sizes = program, spec, sizes
        q, k = (x.detach().double().numpy() for x in call[:2])
        self.loads = [(x.double() if x.is_floating_point() else x.long()).numpy() for x in (y.detach() for y in call[3])]
        self.numbers = dict(zip(spec.sizes, call[4], strict=True))
        B, H, S, _ = q.shape
        T = k.shape[2]
        k = k.repeat(H // k.shape[1], axis=1)
        if (S, T) != (sizes.S, sizes.T) or B * H != sizes.B * program.H:
            raise Wrong("axes", f"the spec has B={B} H={H} Sq={S} Skv={T}, the program is {sizes} with {program.H} heads")
        self.order = self._match(truth, q, k)
        b, h, i, j = np.ogrid[:B, :H, :S, :T]
        self.indices = {"b": b, "h": h, "q": i, "k": j}
        self.shape = (B, H, S, T)
        self.raw = np.einsum("bhqd,bhkd->bhqk", q, k)
        self.logits = truth.logits.reshape(-1, S, T)[self.order].reshape(self.shape)
        self.seen = self.logits > truth.hidden
        self.full = ~truth.empty.reshape(-1, S)[self.order].reshape(B, H, S)
        self.truth = truth
        self.exact = truth.clear and bool(self.seen.any()) and not may_stay_in_the_score(program)

    def _match(self, truth: Meaning, q: np.ndarray, k: np.ndarray) -> list[int]:
        """For each (b, h) of the spec, which (b, h) of the program it is: told by the operands themselves."""
        n = q.shape[0] * q.shape[1]

        def marks(a: np.ndarray, c: np.ndarray) -> np.ndarray:
            rows = [np.concatenate([x.ravel() / np.linalg.norm(x), y.ravel() / np.linalg.norm(y)]) for x, y in zip(a.reshape(n, -1), c.reshape(n, -1), strict=True)]
            return np.stack(rows)

        mine, theirs = marks(q, k), marks(truth.q, truth.k)
        distance = np.linalg.norm(mine[:, None] - theirs[None], axis=-1)
        order = distance.argmin(1)
        if distance[np.arange(n), order].max() > 1e-2 + 8 * eps(self.program) or len(set(order.tolist())) != n:
            raise Wrong("axes", f"the spec's queries and keys are not the program's (off by {distance.min(1).max():.2e}) at {self.sizes}")
        return [int(x) for x in order]

    def value(self, e: Any) -> np.ndarray:
        return np.broadcast_to(evaluate(e, self.indices, self.numbers, self.loads, self.raw), self.shape)

    def fail(self, kind: str, message: str) -> None:
        s = self.spec
        raise Wrong(kind, f"{message} at {self.sizes}; spec: {s}; mask: {s.mask!r}; score: {s.score!r}; empty rows {s.empty_rows}")

    def check(self) -> None:
        score, mask = self.value(self.spec.score), self.value(self.spec.mask).astype(bool)
        if (self.seen & ~mask & (self.logits > -500)).any():
            self.fail("mask", f"hides what is visible, first {self._first(self.seen & ~mask)}")
        if self.truth.clear and (mask & ~self.seen & (score > -500)).any():
            self.fail("mask", f"shows what is hidden, first {self._first(mask & ~self.seen & (score > -500))}")
        if self.exact and (mask != self.seen).any():
            self.fail("mask", f"leaves in the score what is hidden, first {self._first(mask != self.seen)}")
        s = self.spec
        if (s.sink is not None) != (self.truth.sink is not None):
            self.fail("sink", f"the spec's sink is {s.sink!r}, the program's {self.program.sink!r}")
        if s.sink is not None:
            score = score - self.value(s.sink)
            self.logits = self.logits - self.sinks()
        self._same_up_to_rows("score", score)
        if s.sink is not None:
            self.logits = self.logits + self.sinks()
        if s.scale is not None:
            named = s.scale * self.raw if s.softcap is None else s.softcap * np.tanh(s.scale * self.raw / s.softcap)
            self._same_up_to_rows("claim", named + (0 if s.bias is None else self.value(s.bias)), "scale, softcap and bias")
        if s.alibi:
            self._alibi()
        self._names()

    def _first(self, where: np.ndarray) -> tuple[int, ...]:
        return tuple(int(n) for n in np.argwhere(where)[0])

    def _same_up_to_rows(self, kind: str, score: np.ndarray, what: str = "the score") -> None:
        """Equal on visible keys, up to what is the same for all keys of a row (with a sink, equal)."""
        seen = self.seen & (self.logits > -500)
        difference = np.where(seen, score - np.where(seen, self.logits, 0), 0)
        if self.truth.sink is None:
            count = np.maximum(seen.sum(-1, keepdims=True), 1)
            difference = np.where(seen, difference - difference.sum(-1, keepdims=True) / count, 0)
        size = 1 + np.abs(np.where(seen, self.logits, 0)).max() + np.abs(self.raw).max()
        off = np.abs(difference) > (64 if eps(self.program) < 1e-5 else 16) * max(eps(self.program), 1e-7) * size
        if off.any():
            at = self._first(off)
            self.fail(kind, f"{what} is {score[at]:.6g} and the logit {self.logits[at]:.6g}, {at}")

    def sinks(self) -> np.ndarray:
        """[B, H, 1, 1], each row's own."""
        assert self.truth.sink is not None
        one = np.broadcast_to(self.truth.sink, (self.sizes.B, self.program.H)).reshape(-1)[self.order]
        return one.reshape(*self.shape[:2], 1, 1)

    def _alibi(self) -> None:
        """The bias along visible keys is slope(h) times the position, or the running count of the keys that are there."""
        bias = self.value(self.spec.bias)
        pads = [x for n, x in self.truth.world.tensors.items() if n == "pad_l_k"]
        positions = [np.broadcast_to(self.indices["k"], self.shape)]
        if pads:
            counted = np.broadcast_to(((np.cumsum(pads[0], -1) - 1) * pads[0])[:, None, None, :], self.truth.logits.shape)
            positions.append(counted.reshape(-1, *self.shape[2:])[self.order].reshape(self.shape))
        for at in positions:
            ok = True
            for h in range(self.shape[1]):
                x, y = (a[:, h].astype(float) for a in (at, bias))
                keep = self.seen[:, h] & (self.logits[:, h] > -500)
                n = np.maximum(keep.sum(-1, keepdims=True), 1)
                x, y = (np.where(keep, a - np.where(keep, a, 0).sum(-1, keepdims=True) / n, 0) for a in (x, y))
                slope = (x * y).sum() / max((x * x).sum(), 1e-30)
                ok = ok and bool(np.abs(y - slope * x).max() < 1e-5 * (1 + np.abs(y).max()) + 4 * eps(self.program) * np.abs(bias).max())
            if ok:
                return
        self.fail("claim", "ALiBi is claimed, and the bias is not a slope times a position")

    def _names(self) -> None:
        s, (S, T) = self.spec, self.shape[2:]
        q, k = self.indices["q"], self.indices["k"]
        base = T - S if s.causal == "bottom_right" else 0
        named = np.ones(self.shape, bool)
        if s.causal is not None:
            named = named & (k <= q + base)
        left, right = s.window
        if left is not None:
            named = named & (k >= q + base - left)
        if right is not None:
            named = named & (k <= q + base + right)
        if (self.seen & ~named).any():
            self.fail("claim", f"outside of the claimed causal={s.causal} window={s.window} a key is visible, {self._first(self.seen & ~named)}")
        parts, world = self.program.mask_parts, self.truth.world
        if s.key_padding:
            added = [world.tensors["additive"] == 0] if any(isinstance(x, Given) and x.of == "keys" for x in self.program.steps) else []
            named = named & self._parts("key padding", [*added, *(x for p in parts if reads_keys(p) for x in (p.truth(world), ~p.truth(world)))])
        if s.document:
            named = named & self._parts("documents", [p.truth(world) for p in parts if isinstance(p, Document) and p.spelling in ("eq", "not ne")])
        if s.traits.by_position:
            named = named & self._parts("positions from a tensor", [p.truth(world) for p in parts if isinstance(p, Document) and p.spelling == "earlier"])
        if s.traits.chunk is not None:
            n = s.traits.chunk
            named = named & self._parts("chunks", [(q + c) // n == k // n for c in (0, T - S)])
        if s.traits.global_tokens:
            named = named & self._parts("global tokens", [p.truth(world) for p in parts if is_local_and_global(p)])
        if s.traits.blocks is not None:
            self.fail("claim", "a table of blocks is claimed, and the program has none")
        if s.traits.prefix:
            # The smallest set of keys that all queries may see beside their own past: the claim is that there is one.
            past = [k <= q + c for c in (0, T - S)]
            hulls = [p | (self.seen & ~p).any(2, keepdims=True) for p in past]
            rest = self.value(s.traits.mask_rest).astype(bool)
            if not any(((named & x & rest) == self.seen).all() for x in hulls) and self.exact:
                self.fail("claim", "a prefix is claimed, and what is seen beside the past depends on the query")
            named = named & self.seen
        named = named & self.value(s.traits.mask_rest).astype(bool)
        if self.exact and (named != self.seen).any():
            self.fail("claim", f"what is named ({s}) is not what is visible, first {self._first(named != self.seen)}")

    def _parts(self, what: str, candidates: list[np.ndarray]) -> np.ndarray:
        """Of the program's own conditions of that name, those that every visible key fulfils."""
        out, found = np.ones(self.shape, bool), False
        for x in candidates:
            here = np.broadcast_to(x, self.truth.logits.shape).reshape(-1, *self.shape[2:])[self.order].reshape(self.shape)
            if not (self.seen & ~here).any():
                out, found = out & here, True
        if not found:
            self.fail("claim", f"{what} is claimed, and the program has none")
        return out


def may_stay_in_the_score(program: Program) -> bool:
    """Whether a mask need not be told apart from the score: the caller made it as numbers, and which of them hide is known to
    nobody; or a factor that is only known when the model runs (and may be zero or negative) follows it, or a clamp."""
    hidden = False
    for x in program.steps:
        if isinstance(x, Given):
            return True
        if hidden and isinstance(x, (HeadScale, Temperature, Clamp, NoNan, Softcap)):
            return True
        if isinstance(x, Hide):
            if hidden and x.spelling == "multiplied":
                return True
            hidden = True
    return False


def is_local_and_global(m: Mask) -> bool:
    """Whether a condition is a band around the diagonal or what one of query and key decides."""
    if not isinstance(m, Joined) or m.how != "or":
        return False
    atoms = [p for p in m.parts() if not isinstance(p, Joined)]
    return any(isinstance(p, (Window, Diagonal)) for p in atoms) and all(isinstance(p, (Window, Diagonal, Below, Padding)) for p in atoms)


def reads_keys(m: Mask) -> bool:
    """Whether a condition is one on batch and key that a tensor decides."""
    atoms = [p for p in m.parts() if not isinstance(p, (Joined, Not))]
    tensors = [(isinstance(p, Padding) and p.axis == "k") or (isinstance(p, Below) and p.n is None) for p in atoms]
    plain = [isinstance(p, Below) and p.of == "k" for p in atoms]
    return any(tensors) and all(a or b for a, b in zip(tensors, plain, strict=True))
