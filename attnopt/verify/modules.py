"""Two modules side by side, as black boxes."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.errors import first_line, named
from attnopt.report import Check, Verdict
from attnopt.verify.budget import apart, computing_dtype, judge
from attnopt.verify.compare import leaves as output_leaves
from attnopt.verify.dynamic import DynamicShapes
from attnopt.verify.end_to_end import SMALL, Progress, seeded
from attnopt.verify.inputs import variants
from attnopt.verify.scatter import Draw, OwnErrors, moved


def verify_modules(
    original: Callable[..., Any],
    optimized: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic: DynamicShapes | None = None,
    *,
    progress: Progress | None = None,
) -> Verdict:
    """Compare any two callables on inputs made from one example (see ``variants``), without looking inside.

    The truth is a float64 copy of the original, when that is a module with at most ``SMALL`` bytes of parameters that runs in
    float64; otherwise the two are compared with each other, which the detail of the checks says. Modules run in evaluation mode, and
    are left in the mode, with the buffers, that they had. Gradients of the parameters are compared on the example when both are modules with
    parameters of the same names that require them.
    Raises whatever ``original`` raises on the example itself; other inputs that it refuses are noted.
    """
    kwargs = dict(kwargs or {})
    modules = [m for m in (original, optimized) if isinstance(m, nn.Module)]
    if any(t.is_meta for m in modules for t in (*m.parameters(), *m.buffers())):
        return Verdict()
    checks: list[Check] = []
    with contextlib.ExitStack() as stack:
        for m in modules:
            stack.enter_context(_evaluating(m))

        def refuses(a: tuple[Any, ...], k: dict[str, Any]) -> str | None:
            try:
                _run(original, a, k)
            except Exception as error:  # noqa: BLE001 - a model raises what it likes
                return named(error, 160)
            return None

        sets, notes = variants(args, kwargs, dynamic, refuses)
        exact, why = float64_copy(original)
        for i, v in enumerate(sets):
            if progress is not None:
                progress(f"comparing: {v.name}", i, len(sets))
            expected = output_leaves(_run(original, v.args, v.kwargs))
            truth: list[Any] | None = None
            if exact is not None and not v.light:
                found, why = in_float64(_run, exact, *double((v.args, v.kwargs)))
                truth = None if why else output_leaves(found)
            detail = "" if truth is not None else f"against the original at its own dtype ({why or 'long input'})"
            errors = None if truth is None else OwnErrors(_draw(original, v.args, v.kwargs))
            checks.append(_check(f"whole model: {v.name}", optimized, v.args, v.kwargs, expected, truth, detail, errors))
            if i == 0:
                checks[0].detail = "; ".join(x for x in (checks[0].detail, *notes) if x)
        checks += _gradients(original, optimized, exact, sets[0].args, sets[0].kwargs)
    if progress is not None:
        progress("compared", len(sets), len(sets))
    return Verdict(all(c.passed for c in checks), checks)


def _draw(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw:
    def draw(n: int) -> tuple[list[Any], list[Any]]:
        near = copy.deepcopy(original)
        assert isinstance(near, nn.Module)
        with torch.no_grad():
            for p, x in zip(near.parameters(), moved(near.parameters(), n), strict=True):
                p.copy_(x)
        results = output_leaves(_run(near, args, kwargs))
        return results, output_leaves(_run(near.double(), *double((args, kwargs))))

    return draw


def _check(
    name: str,
    optimized: Callable[..., Any],
    args: Any,
    kwargs: Any,
    expected: list[Any],
    truth: list[Any] | None,
    detail: str,
    errors: OwnErrors | None,
) -> Check:
    dtype = computing_dtype(expected)
    try:
        got = output_leaves(_run(optimized, args, kwargs))
    except Exception as error:  # noqa: BLE001 - whatever the optimized model raises is the finding
        return Check(
            name, math.inf, apart(dtype), False, f"the optimized model raises {named(error, 200)}"
        )
    return judge(name, got, expected, truth, dtype, own_errors=errors, detail=detail)


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad(), seeded():
        return function(*args, **kwargs)


def in_float64(run: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, str]:
    """What a float64 copy computes, and why there is nothing where it does not run."""
    try:
        return run(*args, **kwargs), ""
    except RuntimeError as error:
        return None, f"the original does not run in float64: {first_line(error, 160)}"


def float64_copy(original: Callable[..., Any]) -> tuple[nn.Module | None, str]:
    """A float64 copy of a small module, or why there is none."""
    if not isinstance(original, nn.Module):
        return None, "the original is no module"
    size = sum(p.numel() * p.element_size() for p in original.parameters())
    if size > SMALL:
        return None, f"{size / 2**20:.0f} MiB of parameters are more than the {SMALL // 2**20} MiB up to which a float64 copy is made"
    return copy.deepcopy(original).double(), ""


def double(value: Any) -> Any:
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def _gradients(original: Callable[..., Any], optimized: Callable[..., Any], exact: nn.Module | None, args: Any, kwargs: Any) -> list[Check]:
    if not (isinstance(original, nn.Module) and isinstance(optimized, nn.Module)):
        return []
    mine, theirs = dict(original.named_parameters()), dict(optimized.named_parameters())
    names = [n for n, p in mine.items() if p.requires_grad and n in theirs and theirs[n].requires_grad]
    if not names or exact is None:
        return []
    name, dtype = "whole model: gradients", computing_dtype([mine[n] for n in names])
    try:
        expected = _differentiate(original, names, args, kwargs)
        truth = _differentiate(exact, names, *double((args, kwargs)))
    except RuntimeError as error:
        return [Check(name, 0.0, apart(dtype), True, f"not compared: the original has no gradient ({first_line(error, 160)})")]
    try:
        got = _differentiate(optimized, names, args, kwargs)
    except Exception as error:  # noqa: BLE001 - whatever a kernel's backward raises is the finding
        return [Check(name, math.inf, apart(dtype), False, f"the optimized model raises {named(error, 200)}")]
    return [judge(name, got, expected, truth, dtype, gradient=True)]


def _differentiate(module: nn.Module, names: Sequence[str], args: Any, kwargs: Any) -> list[Tensor]:
    parameters = dict(module.named_parameters())
    wanted = [parameters[n] for n in names]
    with torch.enable_grad(), seeded():
        outs = [x for x in output_leaves(module(*args, **kwargs)) if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad]
        generator = torch.Generator().manual_seed(13)
        cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outs]
        found = torch.autograd.grad(outs, wanted, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule is in its own mode again."""
    modes = {m: m.training for m in module.modules()}
    changed = any(modes.values())
    if changed:
        module.eval()
    try:
        yield
    finally:
        if changed:
            for m, mode in modes.items():
                m.training = mode
