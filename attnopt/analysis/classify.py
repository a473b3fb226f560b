"""A score and a mask in the field's words: scale, softcap, bias, ALiBi, and with ``masks.py`` what is visible.

Everything here is a proof about expressions. A part that no rule proves stays in the expressions as it is.
"""

from __future__ import annotations

from attnopt.analysis import masks
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Alignment, Dims, Load, Traits


def traits(score: Expr, mask: Expr, dims: Dims, loads: tuple[Load, ...], sink: Expr | None = None) -> Traits:
    """Name what is proven of score and mask."""
    scale, softcap, bias = _score(score, sink)
    seen = masks.read(mask, dims)
    return Traits(
        scale=scale,
        softcap=softcap,
        bias=bias,
        alibi=bias is not None and _is_alibi(bias, dims, loads, seen.causal),
        causal=seen.causal,
        window=seen.window,
        key_padding=seen.key_padding,
        document=seen.document,
        chunk=seen.chunk,
        prefix=seen.prefix,
        global_tokens=seen.global_tokens,
        blocks=seen.blocks,
        by_position=seen.by_position,
        mask_rest=seen.rest,
    )


# ------------------------------------------------------------------------------------------------ score


def _score(score: Expr, sink: Expr | None) -> tuple[float | None, float | None, Expr | None]:
    """(scale, softcap, bias) of ``scale * s + bias`` or ``softcap * tanh(scale / softcap * s) + bias``."""
    with_s: list[Expr] = []
    bias: list[Expr] = []
    for a in score.args if score.op == "add" else (score,):
        (with_s if any(x.op == "score" for x in a.leaves) else bias).append(a)
    total = E.add(E.FZERO, *bias)
    if sink is None and all(not any(v.op == "var" and v.value == "k" for v in b.leaves) for b in bias):
        total = E.FZERO  # softmax does not see what is the same for all keys of a row
    found = None if total is E.FZERO else total
    if len(with_s) != 1:
        return None, None, None
    factor = _linear(with_s[0])
    if factor is not None:
        return factor, None, found
    c, capped = E.terms(with_s[0])[0]
    if capped is not None and capped.op == "tanh":
        inner = _linear(capped.args[0])
        if inner is not None and abs(inner * c) > 0:
            return float(inner * c), float(c), found
    return None, None, None


def _linear(x: Expr) -> float | None:
    if x.op == "score":
        return 1.0
    if x.op == "mul" and len(x.args) == 2 and x.args[0].is_const and x.args[1].op == "score":
        return float(x.args[0].value)
    return None


def _is_alibi(bias: Expr, d: Dims, loads: tuple[Load, ...], causal: Alignment | None) -> bool:
    """A sum of slope(h) * position(k), positions up to what is the same for all keys of a row.

    A position is k itself, k - q, |k - q| where no key after the query is seen, or a running count of the visible keys (zero on hidden ones allowed).
    It is the same one in all terms.
    """
    positions: set[frozenset[Expr]] = set()
    for a in bias.args if bias.op == "add" else (bias,):
        if d.k not in a.variables:
            continue
        factors = list(a.args) if a.op == "mul" else [a]
        moving = [f for f in factors if d.k in f.variables]
        slope = [f for f in factors if d.k not in f.variables]
        if any(v is not d.h for f in slope for v in f.variables):
            return False
        if not any(d.h in f.variables for f in slope) and d.Hq is not E.ONE:
            return False
        if not ((len(moving) == 1 and _is_position(moving[0], d, causal)) or _is_counted_position(moving, d, loads)):
            return False
        positions.add(frozenset(x for f in moving for x in f.leaves if x.op == "load"))
    return len(positions) == 1


def _is_position(x: Expr, d: Dims, causal: Alignment | None) -> bool:
    if x.op == "float":
        x = x.args[0]
    _, atom = E.split_term(x)
    if atom is not None and atom.op == "abs":
        behind = E.sub(d.q, d.k) if causal == "top_left" else E.add(E.sub(d.q, d.k), E.sub(d.Skv, d.Sq))
        return causal is not None and atom.args[0] in (behind, E.neg(behind))
    return x.kind == "int" and all(a is None or a in (d.k, d.q) or not a.variables for _, a in E.terms(x)) and any(a is d.k for _, a in E.terms(x))


def _is_counted_position(factors: list[Expr], d: Dims, loads: tuple[Load, ...]) -> bool:
    """count[b, k] + constant, times the mask that was counted or not."""
    flat: list[Expr] = []
    for f in factors:
        x = f.args[0] if f.op == "float" else f
        flat.extend(x.args if x.op == "mul" else (x,))
    # an integer product is distributed: (count - 1) * m = count * m - m
    if len(flat) == 1 and flat[0].op == "add":
        counts = [_counted(a, d, loads) for _, a in E.terms(flat[0])]
        return any(c == "count" for c in counts) and all(c is not None for c in counts)
    return any(_counted(f, d, loads) == "count" for f in flat) and all(_counted(f, d, loads) is not None for f in flat)


def _counted(x: Expr | None, d: Dims, loads: tuple[Load, ...]) -> str | None:
    """``count`` for a running count over keys (perhaps times other key masks), ``key`` for another tensor over keys."""
    if x is None or x.is_const:
        return "constant"
    if x.op == "float":
        return _counted(x.args[0], d, loads)
    if x.op == "mul":
        parts = [_counted(a, d, loads) for a in x.args]
        return None if None in parts else "count" if "count" in parts else "key"
    if x.op == "add":
        parts = [_counted(a, d, loads) for _, a in E.terms(x)]
        return None if None in parts else "count" if "count" in parts else "key"
    if x.op == "load" and x.variables <= {d.b, d.k} and isinstance(x.value, int):
        return "count" if loads[x.value].origin == "cumsum" else "key"
    if x.op == "where" and x.variables <= {d.b, d.k}:
        return "key"
    return None
