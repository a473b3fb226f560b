"""What treats tokens one by one is served, whatever its form; what lets them meet outside of attention is refused, at the line that does it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.analysis.rows import Row
from attnopt.ir import expr as E
from attnopt.remarks import NOT_ATTENTION, Remark

WIDTH, LONGEST = 16, 64
Change = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """Embedding, causal attention, head; ``change`` is made to the hidden states [B, S, WIDTH] in between."""

    def __init__(self, change: Change, mask: Callable[[Model, Tensor], Tensor] | None = None, heads: Callable[..., tuple[Tensor, ...]] | None = None) -> None:
        super().__init__()
        self.change, self.mask, self.heads = change, mask, heads
        self.embed, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.places = nn.Embedding(LONGEST, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.table = nn.Parameter(torch.randn(LONGEST, WIDTH))
        self.bias = nn.Parameter(torch.randn(2, LONGEST, LONGEST))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH))
        self.router = nn.Linear(WIDTH, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.change(self, self.embed(ids))
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.heads is not None:
            q, k, v = self.heads(q, k, v)
        if self.mask is None:
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        else:
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(self, x)).transpose(1, 2).flatten(2)
        logits: Tensor = self.head(x)
        return logits


def _i(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def _rotated(m: Model, x: Tensor) -> Tensor:
    angle = torch.outer(_i(x).float(), 1.0 / 100.0 ** (torch.arange(0, WIDTH, 2) / WIDTH))
    a, b = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def _dense_experts(m: Model, x: Tensor) -> Tensor:
    weight, which = m.router(x).softmax(-1).topk(2)
    gates = torch.zeros_like(m.router(x)).scatter(-1, which, weight)
    return torch.einsum("bse,bsed->bsd", gates, torch.einsum("bsd,edf->bsef", x, m.experts))


def _sorted_experts(m: Model, x: Tensor, twist: str = "") -> Tensor:
    """As a mixture of experts is computed; each ``twist`` is a mistake by which rows meet."""
    rows = x.reshape(-1, WIDTH)
    weight, which = m.router(rows).softmax(-1).topk(2)
    chosen = which.reshape(-1) % 3 if twist == "other keys" else which.reshape(-1)
    ordered, order = chosen.sort(descending=twist == "descending")
    counted = 3 - chosen if twist == "counts of others" else ordered
    counts = torch.histc(counted.float(), bins=4, min=0, max=4 if twist == "other bins" else 3)
    ends = (counts if twist == "counts" else counts.cumsum(0)).to(torch.int32)
    first = rows[order // 3] if twist == "other rows" else rows[order // 2]
    matrices = m.experts * rows[:1, :1, None].mean() if twist == "experts of tokens" else m.experts
    done = _grouped(first, matrices, ends) * weight.reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    number = torch.arange(order.shape[0])
    if twist == "added":
        back = torch.ones_like(order).index_put((order,), number, accumulate=True)
    else:
        back[chosen if twist == "by keys" else order] = number.flip(0) if twist == "one on" else number
    if twist == "counts as values":
        done = done * counts.view(1, 4).sum(1)
    return done[back].view(-1, 2, WIDTH).sum(1).view(x.shape)


def _order(m: Model, x: Tensor) -> Tensor:
    """The rows' numbers, [B, S], sorted by something of each."""
    return m.router(x).argmax(-1).reshape(-1).sort()[1]


def _shifted(m: Model, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] = x[:, :-1]
    return y


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    import transformers.integrations.moe  # noqa: F401 - registers an operator for it

    return torch.ops.transformers.grouped_mm_fallback(x, weight, ends)


SERVED: dict[str, Change] = {
    "nothing": lambda m, x: x,
    "features": lambda m, x: F.layer_norm(m.mix(x), (WIDTH,)).softmax(-1) + x.mean(-1, keepdim=True),
    "rows": lambda m, x: m.mix(x.reshape(-1, WIDTH)).view(x.shape),
    "features first": lambda m, x: (x.transpose(1, 2) * 2).relu().transpose(1, 2),
    "learned positions": lambda m, x: x + m.places(_i(x)),
    "learned positions from 2": lambda m, x: x + m.places(_i(x) + 2),
    "positions, counted": lambda m, x: x + m.places(torch.ones_like(x[..., 0], dtype=torch.long).cumsum(1) - 1),
    "every other position": lambda m, x: x + m.places(2 * _i(x) % LONGEST),
    "slice of a table": lambda m, x: x + m.table[: x.shape[1]],
    "slice of a table from 3": lambda m, x: x + m.table[3 : x.shape[1] + 3],
    "rotary": _rotated,
    "temperature by position": lambda m, x: x * torch.log(_i(x).float() + 2)[None, :, None],
    "experts, dense": _dense_experts,
    "experts, sorted": _sorted_experts,
    "one-hot": lambda m, x: F.one_hot(m.router(x).argmax(-1), 4).float() @ m.experts[:, 0] + x,
}

REFUSED: dict[str, tuple[str, Change]] = {
    "mean over the sequence": ("AO214", lambda m, x: x - x.mean(1, keepdim=True)),
    "mean over the batch": ("AO214", lambda m, x: x - x.mean(0, keepdim=True)),
    "softmax over the sequence": ("AO214", lambda m, x: x * x.softmax(1)),
    "running sum": ("AO214", lambda m, x: x.cumsum(1)),
    "maximum of all": ("AO214", lambda m, x: x / x.amax()),
    "reversed": ("AO214", lambda m, x: x + x.flip(1)),
    "another request": ("AO214", lambda m, x: x + x.flip(0)),
    "token shift, rolled": ("AO214", lambda m, x: x + x.roll(1, 1)),
    "token shift, padded": ("AO214", lambda m, x: x + F.pad(x, (0, 0, 1, 0))[:, :-1]),
    "first token": ("AO214", lambda m, x: x + x[:, :1]),
    "last token": ("AO214", lambda m, x: x + x[:, -1:]),
    "convolution": ("AO214", lambda m, x: m.convolution(x.transpose(1, 2)).transpose(1, 2)),
    "products of tokens": ("AO214", lambda m, x: (x @ x.transpose(1, 2)).tril() @ x),
    "tokens in another order": ("AO214", lambda m, x: x[:, x[..., 0].argsort(1)[0]]),
    "picked by length": ("AO214", lambda m, x: x + x[torch.arange(x.shape[0]), -1][:, None]),
    "norm of the batch": ("AO214", lambda m, x: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)),
    "random": ("AO214", lambda m, x: x + torch.randn_like(x)),
    "dropout": ("AO214", lambda m, x: F.dropout(x, 0.5, training=True)),
    "number of a row": ("AO214", lambda m, x: x + m.table[torch.arange(x.shape[0] * x.shape[1]) % LONGEST].view(x.shape)),
    **{
        f"experts, {twist}": ("AO214", lambda m, x, twist=twist: _sorted_experts(m, x, twist))
        for twist in ("descending", "other keys", "counts of others", "other bins", "counts", "other rows", "experts of tokens", "by keys", "one on", "added", "counts as values")
    },
    "numbers of rows, stacked": ("AO214", lambda m, x: x * torch.stack([_order(m, x)] * 2).sum(0).view(x.shape[:2])[..., None]),
    "numbers of rows, as floats": ("AO214", lambda m, x: x * _order(m, x).float().view(x.shape[:2])[..., None]),
    "numbers of rows, summed": ("AO214", lambda m, x: x * _order(m, x).view(*x.shape[:2], 1).sum(-1)[..., None]),
    "numbers of rows, of numbers": ("AO214", lambda m, x: x * _order(m, x)[_order(m, x)].view(x.shape[:2])[..., None]),
    "sum of ones over the length": ("AO214", lambda m, x: x + x.new_ones(x.shape[:2]).sum(1)[:, None, None]),
    "numbers of rows, in products": ("AO214", lambda m, x: x * (_order(m, x) * m.router(x).argmax(-1).reshape(-1)).view(x.shape[:2])[..., None]),
    "numbers of rows, of a table": ("AO214", lambda m, x: x + m.places(_order(m, x) % LONGEST).view(x.shape)),
    "numbers of rows, gathered": ("AO214", lambda m, x: x + x.reshape(-1, WIDTH).gather(0, _order(m, x)[:, None].expand(-1, WIDTH)).view(x.shape)),
    "sorted rows": ("AO214", lambda m, x: x.reshape(-1, WIDTH)[_order(m, x)].view(x.shape) + x),
    "position of another": ("AO214", lambda m, x: x + m.places(_i(x)).flip(0)),
    "written in place": ("AO214", _shifted),
    "every other entry of a table": ("AO214", lambda m, x: x + m.table[: 2 * x.shape[1] : 2]),
    "noise, the same for all": ("AO214", lambda m, x: x + torch.randn(WIDTH)),
    "sum of as many ones": ("AO214", lambda m, x: x + x.new_ones(1, x.shape[1]) @ x.new_ones(x.shape[1], 1)),
    "weights of positions": ("AO214", lambda m, x: x + F.linear(x, m.places(_i(x)))[..., :1]),
    "table of tokens": ("AO214", lambda m, x: x + F.embedding(m.router(x).argmax(-1), m.router(x)[0].T)[..., :1]),
    "gathered along the sequence": ("AO214", lambda m, x: x + x.gather(1, m.router(x).argmax(-1, keepdim=True).expand_as(x))),
    "scattered along the sequence": ("AO214", lambda m, x: x + torch.zeros_like(x).scatter(1, m.router(x).argmax(-1, keepdim=True).expand_as(x), x)),
    "scattered by the first token": ("AO214", lambda m, x: torch.zeros_like(m.router(x)).scatter(-1, m.router(x)[:, :1].topk(2)[1], 1.0) @ m.experts[0, :4] + x),
    "sequence behind itself": ("AO214", lambda m, x: torch.cat([x, x], 1)[:, : x.shape[1]]),
    "tokens by a table": ("AO214", lambda m, x: x + x[:, torch.tensor([0, 3, 1])].sum(1, keepdim=True)),
    "places of a mask": ("AO214", lambda m, x: x + x[x[..., 0] > 0].sum(0)),
    "filled with the length": ("AO216", lambda m, x: x + torch.full((WIDTH,), x.shape[1], dtype=torch.float32)),
    "length": ("AO216", lambda m, x: x / x.shape[1]),
    "position by length": ("AO216", lambda m, x: x * (_i(x) / x.shape[1])[None, :, None]),
    "reversed positions": ("AO216", lambda m, x: x + m.places(x.shape[1] - 1 - _i(x))),
}


def _inspected(model: nn.Module, *args: Tensor) -> list[Remark]:
    torch.manual_seed(0)
    report = attnopt.inspect(model.eval(), args or (torch.randint(0, 32, (2, 11)),), config=attnopt.OptimizeConfig(kv_cache="paged"))
    return [r for r in (*report.remarks, *(r for s in report.sites for r in s.remarks)) if r.code != "AO101" and r.code not in NOT_ATTENTION]


QUICK = {"rows", "slice of a table from 3", "positions, counted", "experts, sorted", "window", "table of distances"}
"""What is run each time of what is served and computed; all is refused each time."""


def _some(names: Iterable[str]) -> list[Any]:
    return [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", _some(SERVED))
def test_tokens_that_are_treated_one_by_one_are_served_and_verified(name: str) -> None:
    torch.manual_seed(0)
    made = attnopt.optimize(Model(SERVED[name]).eval(), (torch.randint(0, 32, (2, 11)),), config=attnopt.OptimizeConfig(kv_cache="paged"))
    assert made.attnopt_report.verdict.passed


@pytest.mark.parametrize("name", REFUSED)
def test_tokens_that_meet_outside_of_attention_are_refused_where_they_do(name: str) -> None:
    code, change = REFUSED[name]
    found = [r for r in _inspected(Model(change)) if r.level == "missed"]
    assert [r.code for r in found] == [code], [str(r) for r in found]
    assert __file__.rpartition("/")[2] in found[0].source or "torch" in found[0].source, found[0].source
    line = int(found[0].source.rpartition(":")[2])
    lines, first = inspect.getsourcelines(change)
    if __file__ in found[0].source and not name.startswith(("experts", "numbers")):
        assert line in (*range(first, first + len(lines)), inspect.getsourcelines(_i)[1] + 1)


def _causal(x: Tensor) -> Tensor:
    i = _i(x)
    return i[:, None] >= i


MASKS: dict[str, tuple[str | None, Callable[[Model, Tensor], Tensor]]] = {
    "causal": (None, lambda m, x: _causal(x)),
    "window": (None, lambda m, x: _causal(x) & (_i(x)[:, None] - _i(x) < 5)),
    "chunks": (None, lambda m, x: _causal(x) & (_i(x)[:, None] // 4 == _i(x) // 4)),
    "table of distances": (None, lambda m, x: torch.where(_causal(x), m.bias[:, 0, (_i(x)[:, None] - _i(x)).clamp(0, 9)], -torch.inf)),
    "table of places": (None, lambda m, x: torch.where(_causal(x), m.bias[:, : x.shape[1], : x.shape[1]], -torch.inf)),
    "all keys": ("AO215", lambda m, x: torch.ones_like(_causal(x))),
    "later keys only": ("AO215", lambda m, x: ~_causal(x) | (_i(x)[:, None] == _i(x))),
    "one key more": ("AO215", lambda m, x: _i(x)[:, None] + 1 >= _i(x)),
    "prefix": (None, lambda m, x: _causal(x) | (_i(x) < 3)),
    "prefix of half the length": ("AO215", lambda m, x: _causal(x) | (_i(x) < x.shape[1] // 2)),
    "half of the length": ("AO216", lambda m, x: _causal(x) & (_i(x)[:, None] - _i(x) < x.shape[1] // 2 + 1)),
    "a weight for each token": ("AO215", lambda m, x: torch.where(_causal(x), x[:, None, None, :, 0], -torch.inf)),
}


@pytest.mark.parametrize("name", _some(n for n, (code, _) in MASKS.items() if code is None))
def test_masks_that_a_cache_serves(name: str) -> None:
    torch.manual_seed(0)
    made = attnopt.optimize(Model(lambda m, x: x, MASKS[name][1]).eval(), (torch.randint(0, 32, (2, 11)),), config=attnopt.OptimizeConfig(kv_cache="paged"))
    assert made.attnopt_report.verdict.passed


@pytest.mark.parametrize("name", [n for n, (code, _) in MASKS.items() if code is not None])
def test_masks_that_no_cache_serves(name: str) -> None:
    code, mask = MASKS[name]
    assert [r.code for r in _inspected(Model(lambda m, x: x, mask)) if r.level == "missed"] == [code]


@pytest.mark.parametrize(
    "heads",
    [
        pytest.param(lambda q, k, v: (q, k.flip(2), v), id="keys"),
        pytest.param(lambda q, k, v: (q, k, v.roll(1, 2)), id="values"),
        pytest.param(lambda q, k, v: (q.flip(0), k, v), id="queries"),
    ],
)
def test_heads_of_other_tokens_are_refused(heads: Callable[..., tuple[Tensor, ...]]) -> None:
    assert [r.code for r in _inspected(Model(lambda m, x: x, heads=heads)) if r.level == "missed"] == ["AO215"]


def test_an_attention_with_dropout_is_refused() -> None:
    class Dropping(Model):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)[:, None]
            return self.head(F.scaled_dot_product_attention(x, x, x, is_causal=True, dropout_p=0.1)[:, 0])

    assert [r.code for r in _inspected(Dropping(lambda m, x: x)) if r.level == "missed"] == ["AO215"]


class _Other(nn.Module):
    """Inputs and results of other forms, one for each ``form``."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.inner = Model(lambda m, x: x)

    def forward(self, ids: Tensor, more: Tensor | None = None) -> Any:
        m = self.inner
        if self.form == "weights":
            m.change = lambda m, x: x * more[..., None]
        if self.form == "memory":
            m.change = lambda m, x: x + m.mix(more).mean(1, keepdim=True)
        if self.form.startswith(("keys", "values")):
            x, y = m.embed(ids)[:, None], m.mix(more)[:, None]
            mask = m.bias[0, : x.shape[2], : y.shape[2]] if self.form == "keys of a memory, by place" else None
            k, v = {"keys and values of a memory": (y, y), "keys alone of a memory": (y, x), "values alone of a memory": (x, y)}.get(self.form, (y, y))
            return m.head((x + F.scaled_dot_product_attention(x, k, v, attn_mask=mask))[:, 0])
        if self.form == "ids as a mask":
            m.mask = lambda m, x: _causal(x) & (ids != 0)[:, None, None]
        out = m(ids)
        return {"pooled": out.mean(1), "two results": (out, out * 2), "last of two": out[:, -2:], "no attention": m.head(m.embed(ids))}.get(self.form, out)


@pytest.mark.parametrize(
    ("form", "code", "more"),
    [
        ("weights", "AO217", torch.rand(2, 11)),
        ("memory", "AO217", torch.rand(2, 7, WIDTH)),
        ("keys alone of a memory", "AO215", torch.rand(2, 11, WIDTH)),
        ("keys of a memory, by place", "AO215", torch.rand(2, 7, WIDTH)),
        ("ids as a mask", "AO215", None),
        ("pooled", "AO214", None),
        ("two results", "AO217", None),
        ("last of two", "AO217", None),
        ("no attention", "AO215", None),
        ("values alone of a memory", "AO215", torch.rand(2, 11, WIDTH)),
    ],
)
def test_inputs_and_results_of_another_form_are_refused(form: str, code: str, more: Tensor | None) -> None:
    args = (torch.randint(0, 32, (2, 11)),) + (() if more is None else (more,))
    assert [r.code for r in _inspected(_Other(form), *args) if r.level == "missed"] == [code]


def test_keys_and_values_of_a_memory_are_served() -> None:
    torch.manual_seed(0)
    args = (torch.randint(0, 32, (2, 11)), torch.rand(2, 7, WIDTH))
    made = attnopt.optimize(_Other("keys and values of a memory").eval(), args, config=attnopt.OptimizeConfig(kv_cache="paged"))
    assert made.attnopt_report.verdict.passed and made.plan.context == ("more",)


def test_a_capture_of_fixed_sizes_is_refused() -> None:
    model = Model(lambda m, x: x).eval()
    report = attnopt.inspect(model, torch.randint(0, 32, (2, 11)), dynamic_shapes="static", config=attnopt.OptimizeConfig(kv_cache="paged"))
    assert [r.code for r in report.remarks if r.level == "missed"] == ["AO217"]


def test_what_depends_on_a_token_is_not_static() -> None:
    place = E.var("i0", E.sym("S"))
    assert Row().is_static
    assert not Row(token=place).is_static and not Row(position=place).is_static
