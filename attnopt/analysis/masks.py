"""Which keys a query sees, in the field's words: each conjunct of a mask is named by a proof, or left over as it is."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.analysis.visible import only_shows
from attnopt.ir import expr as E
from attnopt.ir.bounds import nonnegative
from attnopt.ir.expr import Expr
from attnopt.ir.mask import diagonal, key_range
from attnopt.ir.spec import Alignment, Dims, Window


@dataclass
class Seen:
    """What was proven of a mask; the fields are those of ``Traits``. ``rest`` is the part that no word covers."""

    causal: Alignment | None = None
    window: Window = (None, None)
    key_padding: bool = False
    document: bool = False
    chunk: int | None = None
    prefix: bool = False
    global_tokens: bool = False
    blocks: tuple[int, int] | None = None
    by_position: bool = False
    rest: Expr = E.TRUE


def read(mask: Expr, dims: Dims) -> Seen:
    """Name the conjuncts of ``mask``."""
    seen = Seen()
    seen.causal, seen.window, rest = _diagonals(mask, dims)
    others: list[Expr] = []
    for c in E.conjuncts(rest):
        chunk, blocks = _chunk(c, dims), _blocks(c, dims)
        if _is_key_padding(c, dims):
            seen.key_padding = True
        elif _is_document(c, dims):
            seen.document = True
        elif chunk is not None and seen.chunk is None:
            seen.chunk = chunk
        elif _is_by_position(c, dims):
            seen.by_position = True
        elif _is_prefix(c, dims):
            seen.prefix = True
        elif _is_global(c, dims):
            seen.global_tokens = True
        elif blocks is not None and seen.blocks is None:
            seen.blocks = blocks
        else:
            others.append(c)
    seen.rest = E.all_of(*others)
    return seen


def _diagonals(mask: Expr, d: Dims) -> tuple[Alignment | None, Window, Expr]:
    """Causality and window from the diagonal bounds; bounds that neither covers go back into the rest."""
    bounds = key_range(mask)
    rest = [bounds.rest]
    corner = E.sub(d.Skv, d.Sq)
    # the tightest bound of each side that is provably at most all others
    right = _tightest(bounds.right)
    left = _tightest(bounds.left)
    rest += [E.le(d.k, E.add(d.q, o)) for o in bounds.right if o is not right]
    rest += [E.ge(d.k, E.sub(d.q, o)) for o in bounds.left if o is not left]
    causal: Alignment | None = None
    keys_right: int | None = None
    keys_left: int | None = None
    base = E.ZERO
    if right is not None:
        if right is E.ZERO:
            causal = "top_left"
        elif right is corner:
            causal, base = "bottom_right", corner
        elif right.is_const and right.value > 0:
            keys_right = int(right.value)
        else:
            rest.append(E.le(d.k, E.add(d.q, right)))
    if left is not None:
        reach = E.add(left, base)
        if reach.is_const and reach.value >= 0:
            keys_left = int(reach.value)
        else:
            rest.append(E.ge(d.k, E.sub(d.q, left)))
    if causal and keys_left is None and keys_right is None:
        return causal, (None, None), E.all_of(*rest)
    return causal, (keys_left, 0 if causal and keys_left is not None else keys_right), E.all_of(*rest)


def _tightest(offsets: tuple[Expr, ...]) -> Expr | None:
    for o in offsets:
        if all(nonnegative(E.sub(other, o)) for other in offsets):
            return o
    return offsets[0] if offsets else None


def _is_key_padding(c: Expr, d: Dims) -> bool:
    """A condition on (b, k) that a tensor decides; a bias that is only known not to hide may be any bias."""
    return c.variables <= {d.b, d.k} and d.k in c.variables and any(x.op == "load" for x in c.leaves) and not only_shows(c)


def _is_document(c: Expr, d: Dims) -> bool:
    """The same tensor's entry for query and key is equal."""
    if c.op == "eq0" and c.args[0].op == "add" and len(c.args[0].args) == 2:
        pair = E.terms(c.args[0])
        if {n for n, _ in pair} != {1, -1}:
            return False
        x, y = (a for _, a in pair)
    elif c.op in ("eq", "same"):
        x, y = c.args
    else:
        return False
    if x is None or y is None or x.op != "load" or y.op != "load" or x.value != y.value:
        return False
    return E.substitute(x, {d.q: d.k}) is E.substitute(y, {d.q: d.k}) and x.variables != y.variables


def _aligned(x: Expr, d: Dims) -> tuple[Expr, Expr]:
    """A function of the query at the key's own place: with both sequences counted from the start, and from the end."""
    return E.substitute(x, {d.q: d.k}), E.substitute(x, {d.q: E.add(d.k, E.sub(d.Sq, d.Skv))})


def _chunk(c: Expr, d: Dims) -> int | None:
    """Query and key lie in the same chunk of a constant length: x(q) // n == x(k) // n."""
    if c.op != "eq0" or len(c.args[0].args) != 2 or c.args[0].op != "add":
        return None
    pair = E.terms(c.args[0])
    if {n for n, _ in pair} != {1, -1} or any(a is None or a.op != "floordiv" or not a.args[1].is_const for _, a in pair):
        return None
    x, y = sorted((a for _, a in pair if a is not None), key=lambda a: d.q not in a.variables)
    if x.args[1] is not y.args[1] or d.q not in x.variables or d.k in x.variables or d.q in y.variables:
        return None
    return int(x.args[1].value) if y in _aligned(x, d) else None


def _is_by_position(c: Expr, d: Dims) -> bool:
    """Query and key are compared by positions that a tensor gives them, p[k] <= p[q] + n or p[q] <= p[k] + n."""
    if c.op != "ge0":
        return False
    moving = [(n, a) for n, a in E.terms(c.args[0]) if a is not None and a.op == "load"]
    others = [a for _, a in E.terms(c.args[0]) if a is not None and a.op != "load"]
    if len(moving) != 2 or {n for n, _ in moving} != {1, -1} or any(a.variables for a in others):
        return False
    x, y = sorted((a for _, a in moving), key=lambda a: d.q not in a.variables)
    return d.q in x.variables and d.k in y.variables and y in _aligned(x, d)


def _is_prefix(c: Expr, d: Dims) -> bool:
    """Beside the keys up to its own place a query sees keys that all queries see."""
    if c.op != "or":
        return False
    diagonals = [a for a in c.args if (found := diagonal(a)) is not None and found[0] > 0 and found[1] in (E.ZERO, E.sub(d.Skv, d.Sq))]
    return len(diagonals) == 1 and all(d.k in a.variables and d.q not in a.variables for a in c.args if a is not diagonals[0])


def _is_global(c: Expr, d: Dims) -> bool:
    """A band around the diagonal, and some tokens that see all or are seen by all."""
    if c.op != "or":
        return False
    local = [a for a in c.args if _is_band(a)]
    rest = [a for a in c.args if a not in local]
    return len(local) == 1 and bool(rest) and all(len({d.q, d.k} & a.variables) == 1 for a in rest)


def _is_band(x: Expr) -> bool:
    bounds = key_range(x)
    return bounds.rest is E.TRUE and bool(bounds.left) and bool(bounds.right)


def _blocks(c: Expr, d: Dims) -> tuple[int, int] | None:
    """A table says for a block of queries and a block of keys whether they see each other: their sizes."""
    if c.op != "load" or c.kind != "bool":
        return None
    sizes: dict[Expr, int] = {}
    for x in c.args:
        if x.op == "floordiv" and x.args[0] in (d.q, d.k) and x.args[1].is_const:
            sizes[x.args[0]] = int(x.args[1].value)
        elif {d.q, d.k} & x.variables:
            return None
    return (sizes[d.q], sizes[d.k]) if len(sizes) == 2 else None
