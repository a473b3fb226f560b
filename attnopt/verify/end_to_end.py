"""Two captured graphs side by side: every site on its own, then the whole."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from attnopt.errors import first_line, named
from attnopt.report import Check, Verdict
from attnopt.verify.budget import apart, computing_dtype, judge
from attnopt.verify.compare import leaves as output_leaves
from attnopt.verify.dynamic import flatten, from_graph
from attnopt.verify.inputs import variants
from attnopt.verify.oracle import Float64Interpreter, GraphInterpreter
from attnopt.verify.regions import Outputs, site_regions
from attnopt.verify.scatter import OwnErrors, moved
from attnopt.verify.sites import SiteChecker

SMALL = 256 * 2**20
"""Bytes of parameters up to which a whole model is also run in float64 and differentiated."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass
class Comparison:
    """The result of one comparison: all checks, and those of the failing sites by the site's name."""

    checks: list[Check] = field(default_factory=list)
    failed: dict[str, list[Check]] = field(default_factory=dict)
    whole_failed: bool = False
    """Whether an end-to-end check failed."""

    @property
    def verdict(self) -> Verdict:
        return Verdict(all(c.passed for c in self.checks) if self.checks else None, list(self.checks))


def compare_graphs(
    reference: GraphModule,
    optimized: GraphModule,
    outputs: Outputs,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    root: nn.Module | None = None,
    training: bool = False,
    progress: Progress | None = None,
    only_whole: bool = False,
) -> Comparison:
    """Compare a captured graph with its optimized form on inputs made from one example.

    ``outputs`` maps site names to (reference node, optimized node) of equal value. ``root`` holds parameters and buffers (by
    default ``reference``). ``training``: the captured mode; gradients are compared when it is set or a parameter wants one.
    ``only_whole`` leaves the sites out (for bisection). Nothing is compared, and the verdict says unverified, while parameters are on the meta device.
    """
    holder = root if root is not None else reference
    tensors = [*holder.parameters(), *holder.buffers()]
    result = Comparison()
    if any(t.is_meta for t in tensors):
        return result
    run = _Runner(reference, optimized, root)
    sets, notes = variants(args, kwargs, from_graph(reference), run.refuses)
    checkers = [] if only_whole else [SiteChecker(s, reference, optimized, root) for s in site_regions(reference, optimized, outputs)]
    keep = {n for c in checkers for n in c.site.leaves}
    forms: set[Hashable] = set()
    # Layers are alike: the first of each form is asked everything, the others whether their own values agree.
    first = {c.site.name for c in checkers if not (c.site.form in forms or forms.add(c.site.form))}  # type: ignore[func-returns-value]
    small = sum(p.numel() * p.element_size() for p in holder.parameters()) <= SMALL
    trains = training or any(p.requires_grad for p in holder.parameters())

    short = [i for i, v in enumerate(sets) if not v.light] or [0]
    plain = next((i for i in short if sets[i].name == "other values"), short[0])
    longest = next((i for i in short if sets[i].name == "longer"), plain)
    for i, v in enumerate(sets):
        if progress is not None:
            progress(f"comparing: {v.name}", i, len(sets))
        leaves = flatten(reference, v.args, v.kwargs)
        original, values = run.original(leaves, keep)
        if not v.light:
            for checker in checkers:
                mine = {n: values[n] for n in checker.site.leaves}
                if checker.site.name in first:
                    found = _site_checks(checker, mine, v.name, plain=i == plain, longest=i == longest, trains=trains)
                else:
                    found = [checker.values(f"{checker.site.name}: {v.name}", mine)] if i in (plain, longest) else []
                for check in found:
                    result.checks.append(check)
                    if not check.passed:
                        result.failed.setdefault(checker.site.name, []).append(check)
        lost = [c.site.name for c in checkers if i == plain and trains and small and c.site.name in first and c.loses_scores({n: values[n] for n in c.site.leaves})]
        del values
        whole = [run.whole(f"whole model: {v.name}", leaves, original, truth=small and not v.light)]
        if trains and small and i == plain:
            whole.append(run.gradients("whole model: gradients", leaves, lost))
        if i == 0 and notes:
            whole[0].detail = "; ".join(x for x in (whole[0].detail, *notes) if x)
        result.checks += whole
        result.whole_failed |= not all(c.passed for c in whole)
    if progress is not None:
        progress("compared", len(sets), len(sets))
    return result


def _site_checks(checker: SiteChecker, values: Mapping[Node, Any], about: str, *, plain: bool, longest: bool, trains: bool) -> list[Check]:
    """Everything that is asked of one site on one set of inputs.

    Half precision, stressed values and gradients are asked for on the ``plain`` inputs (nothing padded) and on the ``longest``: on
    rows without a visible key the finite numbers that hide keys depend on the dtype that the model was captured in.
    """
    name, own = checker.site.name, checker.own_dtype(values)
    checks = [checker.values(f"{name}: {about}", values)]
    halves = (torch.bfloat16, torch.float16) if own == torch.float32 else ()
    if plain or longest:
        checks += [checker.low_precision(f"{name}: {about} in {_word(d)}", values, d) for d in halves]
    large = checker.large_scores(values) if plain else None
    if large is not None:
        checks.append(checker.values(f"{name}: large scores", large))
    even = checker.long_sums(values) if longest else None
    if even is not None:
        checks.append(checker.values(f"{name}: long sums", even))
        checks += [checker.low_precision(f"{name}: long sums in {_word(d)}", even, d) for d in halves]
    if plain and trains:
        checks.append(checker.gradients(f"{name}: gradients", values))
    return checks


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Runner:
    """Runs both graphs on the same inputs, with the same random numbers."""

    def __init__(self, reference: GraphModule, optimized: GraphModule, root: nn.Module | None) -> None:
        self.reference, self.optimized, self.root = reference, optimized, root

    def refuses(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the original cannot run on some inputs, or None."""
        try:
            self.original(flatten(self.reference, args, kwargs), ())
        except Exception as error:  # noqa: BLE001 - a captured graph raises whatever its guards and ops raise
            return named(error, 160)
        return None

    def original(self, leaves: Sequence[Any], keep: set[Node] | tuple[()]) -> tuple[Any, dict[Node, Any]]:
        with torch.no_grad(), seeded():
            return GraphInterpreter(self.reference, root=self.root).run_leaves(leaves, keep)

    def whole(self, name: str, leaves: Sequence[Any], original: Any, *, truth: bool) -> Check:
        expected = output_leaves(original)
        dtype, why = computing_dtype(expected), ""
        with torch.no_grad():
            try:
                with seeded():
                    got = output_leaves(GraphInterpreter(self.optimized, root=self.root).run_leaves(leaves)[0])
            except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
                return Check(
                    name,
                    math.inf,
                    apart(dtype),
                    False,
                    f"the optimized model raises {named(error, 200)}",
                )
            exact = None
            if truth:
                try:
                    with seeded():
                        exact = output_leaves(Float64Interpreter(self.reference, root=self.root).run_leaves(leaves)[0])
                except RuntimeError as error:
                    why = f", since it does not run in float64 ({first_line(error, 160)})"
        errors = None if exact is None else OwnErrors(lambda n: self._moved(n, leaves))
        return judge(name, got, expected, exact, dtype, own_errors=errors, detail="" if exact is not None else f"against the original at its own dtype{why}")

    def _moved(self, n: int, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Results of the original whose weights are moved for the n-th time, at its own dtype and in float64."""
        holder = self.root if self.root is not None else self.reference
        held = dict(holder.named_parameters(remove_duplicate=False))
        unique = list({id(p): p for p in held.values()}.values())
        near = dict(zip(map(id, unique), moved(unique, n), strict=True))
        at = {name: near[id(p)] for name, p in held.items()}
        exactly = {name: x.double() if x.is_floating_point() else x for name, x in at.items()}
        found = []
        for interpreter in (GraphInterpreter(self.reference, root=self.root, attributes=at), Float64Interpreter(self.reference, root=self.root, attributes=exactly)):
            with torch.no_grad(), seeded():
                found.append(output_leaves(interpreter.run_leaves(leaves)[0]))
        return found[0], found[1]

    def gradients(self, name: str, leaves: Sequence[Any], lost: Sequence[str]) -> Check:
        """Gradients of the parameters for a random cotangent of every floating output. ``lost``: sites with rows whose scores are lost."""
        holder = self.root if self.root is not None else self.reference
        parameters = {n: p for n, p in holder.named_parameters(remove_duplicate=False) if p.is_floating_point()}
        dtype = computing_dtype(list(parameters.values()))
        if not parameters:
            return Check(name, 0.0, apart(dtype), True, "not compared: the model has no parameters; each site was compared by itself")
        if lost:
            return Check(
                name,
                0.0,
                apart(dtype),
                True,
                f"not compared: in {lost[0]} autograd has a gradient for rows in which the scores have no effect; each site was compared without them",
            )
        try:
            original = self._gradients(GraphInterpreter, self.reference, leaves, parameters)
            truth = self._gradients(Float64Interpreter, self.reference, leaves, parameters)
        except RuntimeError as error:
            return Check(name, 0.0, apart(dtype), True, f"not compared: the original has no gradient ({first_line(error, 160)})")
        try:
            optimized = self._gradients(GraphInterpreter, self.optimized, leaves, parameters)
        except Exception as error:  # noqa: BLE001 - whatever a kernel's backward raises is the finding
            return Check(name, math.inf, apart(dtype), False, f"the optimized model raises {named(error, 200)}")
        return judge(name, optimized, original, truth, dtype, gradient=True)

    def _gradients(self, kind: type[GraphInterpreter], gm: GraphModule, leaves: Sequence[Any], parameters: Mapping[str, Tensor]) -> list[Tensor]:
        exact = issubclass(kind, Float64Interpreter)
        with torch.enable_grad(), seeded():
            by_id: dict[int, Tensor] = {}
            attributes = {}
            for n, p in parameters.items():  # tied parameters stay tied
                attributes[n] = by_id.setdefault(id(p), (p.detach().double() if exact else p.detach().clone()).requires_grad_())
            output = output_leaves(kind(gm, root=self.root, attributes=attributes).run_leaves(leaves)[0])
            generator = torch.Generator().manual_seed(13)
            outs = [x for x in output if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]
            seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outs]
            wanted = list(by_id.values())
            found = torch.autograd.grad(outs, wanted, seeds, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Inside, random ops of a graph (layer drop and the like) draw the same numbers in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
