"""Each site on its own: both forms of it, from the same values as they flow through the original graph, against float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from attnopt.errors import BackendError, first_line
from attnopt.report import Check
from attnopt.verify.budget import band, computing_dtype, factor, judge
from attnopt.verify.compare import leaves as output_leaves
from attnopt.verify.oracle import Float64Interpreter, GraphInterpreter, LowPrecisionInterpreter, to_dtype
from attnopt.verify.regions import Region, SiteRegions, operands

LARGE = 40.0
"""Standard deviation of large scores: exp() overflows float32 there unless the maximum is subtracted."""

EVEN = 0.1
"""Standard deviation of even scores."""

LOST = 0.5
"""A budget above which a comparison in another dtype than the model's says nothing (small values underflow in float16)."""


class SiteChecker:
    """Checks one site. ``values`` of its leaves are those of a run of the reference graph, by node."""

    def __init__(self, site: SiteRegions, reference: GraphModule, optimized: GraphModule, root: nn.Module | None = None) -> None:
        self.site, self.reference, self.optimized, self.root = site, reference, optimized, root
        found = operands(site.optimized)
        self.q, self.k, self.v = ({site.optimized.source[n] for n in x} for x in (found.q, found.k, found.v))

    def own_dtype(self, values: Mapping[Node, Any]) -> torch.dtype:
        return computing_dtype([values[n] for n in self.site.leaves])

    def values(self, name: str, values: Mapping[Node, Any]) -> Check:
        """At the dtype of the values themselves."""
        return self._compare(name, values, self.own_dtype(values), type_of=GraphInterpreter)

    def large_scores(self, values: Mapping[Node, Any]) -> Mapping[Node, Any] | None:
        """The values with queries scaled so that scores exceed 100. None where the site names no queries, or they are as large already."""
        scale = self._score_factor(values, LARGE)
        return None if scale is None or scale <= 1.0 else self._scaled(values, scale)

    def long_sums(self, values: Mapping[Node, Any]) -> Mapping[Node, Any] | None:
        """The values with small scores and positive values: every key counts as much, and sums in a half-precision accumulator stop growing.

        None where the site names no queries, or its values come from the same tensors.
        """
        scale = self._score_factor(values, EVEN)
        if scale is None or not self.v or self.v & (self.q | self.k):
            return None
        return {n: v.abs() if n in self.v and _is_float(v) else v for n, v in self._scaled(values, scale).items()}

    def _score_factor(self, values: Mapping[Node, Any], deviation: float) -> float | None:
        q, k = ([values[n] for n in x if _is_float(values[n])] for x in (self.q, self.k))
        size = _rms(q) * _rms(k)  # a score is q . k / sqrt(D), so this is about its standard deviation
        return deviation / size if q and k and 0 < size < math.inf else None

    def _scaled(self, values: Mapping[Node, Any], scale: float) -> dict[Node, Any]:
        return {n: v * scale if n in self.q and _is_float(v) else v for n, v in values.items()}

    def low_precision(self, name: str, values: Mapping[Node, Any], dtype: torch.dtype) -> Check:
        """In another, lower dtype, as ``model.to(dtype)`` would run it."""
        check = self._compare(name, {n: to_dtype(v, dtype) for n, v in values.items()}, dtype, type_of=LowPrecisionInterpreter)
        if check.budget > LOST:
            return Check(name, 0.0, band(dtype), True, f"not compared: the original is off by {check.budget / factor(dtype):.0%} itself in this dtype")
        return check

    def gradients(self, name: str, values: Mapping[Node, Any]) -> Check:
        """Gradients of every floating leaf that is no constant, for a random cotangent.

        The cotangent is zero on rows that do not depend on the queries while autograd reports a gradient to them: adding
        ``finfo.min`` to every score of a row loses the scores, so the function is constant there, but the derivative of the sum is still 1.
        """
        wanted = [n for n in self.site.leaves if _is_float(values[n]) and not self._is_constant(n)]
        dtype = computing_dtype([values[n] for n in wanted])
        site = self.site
        try:
            cotangent = self._cotangent(values)
            original = self._gradients(GraphInterpreter(self.reference, root=self.root), site.reference, values, wanted, cotangent)
            truth = self._gradients(Float64Interpreter(self.reference, root=self.root), site.reference, values, wanted, cotangent)
        except RuntimeError as error:
            return Check(name, 0.0, band(dtype), True, f"not compared: the original has no gradient here ({first_line(error, 200)})")
        try:
            optimized = self._gradients(GraphInterpreter(self.optimized, root=self.root), site.optimized, values, wanted, cotangent)
        except Exception as error:  # noqa: BLE001 - whatever a kernel's backward raises is the finding
            return Check(name, math.inf, band(dtype), False, f"the optimized site raises {type(error).__name__}: {first_line(error, 200)}")
        return judge(name, optimized, original, truth, dtype, gradient=True)

    def _is_constant(self, node: Node) -> bool:
        """Whether ``node`` is made of buffers, constants, sizes and integers only: nothing has a gradient there, and a formula may stand for their values."""
        if "val" in node.meta and not any(_is_float(x) for x in output_leaves(node.meta["val"])):
            return True
        if node.op == "get_attr":
            owner: Any = self.root if self.root is not None else self.reference
            for part in str(node.target).split("."):
                owner = getattr(owner, part, None)
            return isinstance(owner, Tensor) and not owner.requires_grad
        return node.op == "call_function" and all(self._is_constant(n) for n in node.all_input_nodes)

    # ---- how

    def _compare(self, name: str, values: Mapping[Node, Any], dtype: torch.dtype, type_of: type[GraphInterpreter]) -> Check:
        site, root = self.site, self.root

        def interpreter(gm: GraphModule) -> GraphInterpreter:
            return LowPrecisionInterpreter(gm, dtype, root=root) if type_of is LowPrecisionInterpreter else type_of(gm, root=root)

        with torch.no_grad():
            try:
                original = _run(interpreter(self.reference), site.reference, values)
            except RuntimeError as error:
                if type_of is not LowPrecisionInterpreter:
                    raise
                return Check(name, 0.0, band(dtype), True, f"not compared: the captured original does not run in this dtype ({first_line(error, 200)})")
            truth = _run(Float64Interpreter(self.reference, root=root), site.reference, values)
            try:
                optimized = _run(interpreter(self.optimized), site.optimized, values)
            except BackendError as error:
                if type_of is LowPrecisionInterpreter:  # the kernel was chosen for the dtype of the capture; another dtype is captured, and chosen for, anew
                    return Check(name, 0.0, band(dtype), True, f"not compared: the kernel is for another dtype ({error.message})")
                return Check(name, math.inf, band(dtype), False, f"the optimized site raises BackendError: {error.message}")
            except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
                return Check(name, math.inf, band(dtype), False, f"the optimized site raises {type(error).__name__}: {first_line(error, 200)}")
            if type_of is LowPrecisionInterpreter:
                original, optimized = to_dtype(original, dtype), to_dtype(optimized, dtype)
        return judge(name, [optimized], [original], [truth], dtype)

    def loses_scores(self, values: Mapping[Node, Any]) -> bool:
        """Whether some rows are constant while autograd has a gradient for their scores."""
        return bool((self._cotangent(values) == 0).any())

    def _cotangent(self, values: Mapping[Node, Any]) -> Tensor:
        """A random gradient of the output in float64; zero on rows whose scores are lost."""
        generator = torch.Generator().manual_seed(11)
        floats = [n for n in self.q if _is_float(values[n])]
        size = _rms([values[n] for n in self.k if _is_float(values[n])])
        exact = Float64Interpreter(self.reference, root=self.root)
        with torch.no_grad():
            out = _run(exact, self.site.reference, values)
            moved = None
            if floats and 0 < size < math.inf:
                other = {n: torch.randn(values[n].shape, generator=generator).to(values[n]) * (LARGE / size) for n in floats}
                moved = _run(exact, self.site.reference, {**values, **other})
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
        if moved is None:
            return cotangent
        constant = ((out == moved) | (out.isnan() & moved.isnan())).all(-1, keepdim=True)
        if not bool(constant.any()):
            return cotangent
        # A row that sees one key is constant as well, and rightly has no gradient.
        reported = self._gradients(exact, self.site.reference, values, floats, torch.where(constant, cotangent, 0.0))
        return torch.where(constant, 0.0, cotangent) if any(bool((g.nan_to_num() != 0).any()) for g in reported) else cotangent

    def _gradients(self, interpreter: GraphInterpreter, region: Region, values: Mapping[Node, Any], wanted: Sequence[Node], cotangent: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = {n: interpreter.load_leaf(values[n]).detach().clone().requires_grad_() for n in wanted}
            out = _run(interpreter, region, {**values, **leaves})
            found = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype), allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), found, strict=True)]


def _run(interpreter: GraphInterpreter, region: Region, values: Mapping[Node, Any]) -> Any:
    """The region's output from the values of its leaves' sources."""
    env = {n: interpreter.load_leaf(values[region.source[n]]) for n in region.leaves}
    return interpreter.run_nodes(region.nodes, env, {region.output})[region.output]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _rms(values: Sequence[Tensor]) -> float:
    squares = [float(v.detach().double().square().mean()) for v in values]
    return math.sqrt(sum(squares) / max(len(squares), 1))
