"""Rotary embeddings are recognised in every spelling, say what they compute, and nothing else is taken for one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rotations import FREQUENCIES, Attention, B, C, D, Found, H, S, angles, half, interleaved
from torch import Tensor, nn

from attnopt.ir.rotary import Pairing, Rotary
from attnopt.ir.spec import AttentionSpec

X = torch.randn(B, S, C, generator=torch.Generator().manual_seed(1))
POSITIONS = torch.stack((torch.arange(S) + 3, torch.arange(S).flip(0)))


def _computed(m: nn.Module, x: Tensor) -> Tensor:
    a = torch.cat((angles(x.shape[-2]),) * 2, -1)
    return x * a.cos() + half(x) * a.sin()


def _repeated(m: nn.Module, x: Tensor) -> Tensor:
    a = angles(x.shape[-2]).repeat(1, 2)
    return x * a.cos() + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * a.sin()


def _early(m: nn.Module, x: Tensor) -> Tensor:
    a = torch.einsum("s,d->sd", torch.arange(x.shape[1]).to(x.dtype), m.inv_freq)[None, :, None]
    a = torch.cat((a, a), -1)
    return x * a.cos() + half(x) * a.sin()


def _products(m: nn.Module, x: Tensor) -> Tensor:
    """Positions and frequencies as a matrix product over an axis of size one."""
    b, _, s, _ = x.shape
    a = (m.inv_freq[None, :, None].expand(b, -1, 1) @ torch.arange(s)[None, None].expand(b, -1, -1).float()).transpose(1, 2)
    a = torch.cat((a, a), -1).unsqueeze(1)
    return x * a.cos() + half(x) * a.sin()


def _halves(m: nn.Module, x: Tensor) -> Tensor:
    c, s = m.cos[: x.shape[-2]], m.sin[: x.shape[-2]]
    a, b = x.split(D // 2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def _island(m: nn.Module, x: Tensor) -> Tensor:
    """In float64, and back."""
    a = torch.cat((angles(x.shape[-2]),) * 2, -1).double()
    return (x.double() * a.cos() + half(x.double()) * a.sin()).float()


def _scaled_tables(m: nn.Module, x: Tensor) -> Tensor:
    a = torch.cat((angles(x.shape[-2]) / 4,) * 2, -1)
    return x * (a.cos() * 1.2) + half(x) * (a.sin() * 1.2)


def _scaled(m: nn.Module, x: Tensor) -> Tensor:
    return _computed(m, x * 0.5) * 0.25


def _backwards(m: nn.Module, x: Tensor) -> Tensor:
    """By the negative angle: a rotation too."""
    a = torch.cat((angles(x.shape[-2]),) * 2, -1)
    return x * a.cos() - half(x) * a.sin()


def _offset(m: nn.Module, x: Tensor) -> Tensor:
    s = x.shape[-2]
    return x * m.cos[2 : s + 2].repeat(1, 2) + half(x) * m.sin[2 : s + 2].repeat(1, 2)


def _stacked(m: nn.Module, x: Tensor) -> Tensor:
    a = angles(x.shape[-2]).repeat_interleave(2, dim=-1)
    return x * a.cos() + interleaved(x) * a.sin()


def _pairs(m: nn.Module, x: Tensor) -> Tensor:
    c, s = m.cos[: x.shape[-2]], m.sin[: x.shape[-2]]
    even, odd = x.reshape(*x.shape[:-1], D // 2, 2).unbind(-1)
    return torch.stack((even * c - odd * s, odd * c + even * s), -1).flatten(-2)


def _parity(m: nn.Module, x: Tensor) -> Tensor:
    """Every element of the table twice, by an index."""
    at = torch.arange(D) // 2
    c, s = m.cos[: x.shape[-2]][:, at], m.sin[: x.shape[-2]][:, at]
    return x * c + interleaved(x) * s


def _complex(m: nn.Module, x: Tensor) -> Tensor:
    a = angles(x.shape[1])
    turn = torch.polar(torch.ones_like(a), a)[None, :, None]
    return torch.view_as_real(torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * turn).flatten(3).type_as(x)


def _complex_table(m: nn.Module, x: Tensor) -> Tensor:
    turn = m.freqs_cis[: x.shape[-2]]
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)


def _complex_looked_up(m: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    turn = m.freqs_cis[positions][:, None]
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)


def _exponential(m: nn.Module, x: Tensor) -> Tensor:
    z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.exp(1j * angles(x.shape[-2]))
    return torch.stack((z.real, z.imag), -1).flatten(-2)


def _sorted(m: nn.Module, x: Tensor) -> Tensor:
    """Interleaved pairs, put into halves and left there."""
    b, h, s, d = x.shape
    return _computed(m, x.view(b, h, s, d // 2, 2).transpose(4, 3).reshape(b, h, s, d))


def _partial(m: nn.Module, x: Tensor) -> Tensor:
    c, s = (t[: x.shape[-2], :2].repeat(1, 2) for t in (m.cos, m.sin))
    a = x[..., :4]
    return torch.cat((a * c + half(a) * s, x[..., 4:]), -1)


def _partial_behind(m: nn.Module, x: Tensor) -> Tensor:
    c, s = (t[: x.shape[-2], :2].repeat_interleave(2, -1) for t in (m.cos, m.sin))
    a = x[..., 4:]
    return torch.cat((x[..., :4], a * c + interleaved(a) * s), -1)


def _partial_by_padding(m: nn.Module, x: Tensor) -> Tensor:
    """cos one and sin zero on the features that stay."""
    a = angles(x.shape[-2])[:, :2]
    c = torch.nn.functional.pad(a.cos().repeat(1, 2), (0, 4), value=1.0)
    s = torch.nn.functional.pad(a.sin().repeat(1, 2), (0, 4))
    return x * c + torch.cat((-x[..., 2:4], x[..., :2], x[..., 4:]), -1) * s


def _looked_up(m: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    c, s = (t[positions][:, None].repeat(1, 1, 1, 2) for t in (m.cos, m.sin))
    return x * c + half(x) * s


def _positions(m: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    a = (positions[:, :, None].float() * m.inv_freq)[:, None]
    a = torch.cat((a, a), -1)
    return x * a.cos() + half(x) * a.sin()


def _tables(m: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    c, s = (t[:, None].repeat(1, 1, 1, 2) for t in (cos, sin))
    return x * c + half(x) * s


def _one_table(m: nn.Module, x: Tensor, table: Tensor) -> Tensor:
    s, c = (t[:, None].repeat_interleave(2, -1) for t in table.chunk(2, -1))
    return x * c + interleaved(x) * s


def _sections(m: nn.Module, x: Tensor) -> Tensor:
    """Two positions a token, each for half of the frequencies: a grid of three columns."""
    at = torch.arange(x.shape[-2])
    a = torch.cat((torch.outer(at // 3, FREQUENCIES[:2]), torch.outer(at % 3, FREQUENCIES[:2])), -1)
    a = torch.cat((a, a), -1)
    return x * a.cos() + half(x) * a.sin()


def _normed_after(m: nn.Module, x: Tensor) -> Tensor:
    y = _computed(m, x)
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)


def _normed_before(m: nn.Module, x: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 1.5, D)
    return _computed(m, weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


def _per_token(m: nn.Module, x: Tensor) -> Tensor:
    """A temperature that grows with the position, on the rotated and the other features alike."""
    return _partial(m, x) * torch.log(torch.arange(x.shape[-2]).float() + 2)[:, None]


HALF = Rotary(D, D, 0, Pairing(0, 4, 1), Pairing(0, 4, 1), "sequence")
PAIRS = Rotary(D, D, 0, Pairing(0, 1, 2), Pairing(0, 1, 2), "sequence")
PARTIAL = Rotary(4, D, 0, Pairing(0, 2, 1), Pairing(0, 2, 1), "sequence")
GIVEN = (POSITIONS,)
TABLES = tuple(torch.rand(B, S, D // 2, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
SPELLINGS = {
    "computed": (Attention(_computed), (), HALF, "rotary"),
    "repeated": (Attention(_repeated), (), HALF, "rotary"),
    "before the transpose": (Attention(_early, early=True), (), HALF, "rotary"),
    "matrix product": (Attention(_products), (), HALF, "rotary"),
    "halves": (Attention(_halves), (), HALF, "rotary"),
    "float64 island": (Attention(_island), (), HALF, "rotary"),
    "scaled tables": (Attention(_scaled_tables), (), HALF, "rotary"),
    "scaled before and after": (Attention(_scaled), (), HALF, "rotary"),
    "backwards": (Attention(_backwards), (), HALF, "rotary"),
    "offset": (Attention(_offset), (), replace(HALF, offset="2"), "rotary"),
    "stacked": (Attention(_stacked), (), PAIRS, "rotary interleaved"),
    "pairs": (Attention(_pairs), (), PAIRS, "rotary interleaved"),
    "table by an index": (Attention(_parity), (), PAIRS, "rotary interleaved"),
    "complex": (Attention(_complex, early=True), (), PAIRS, "rotary interleaved"),
    "complex table": (Attention(_complex_table), (), PAIRS, "rotary interleaved"),
    "complex, looked up": (Attention(_complex_looked_up), GIVEN, replace(PAIRS, positions="given"), "rotary interleaved"),
    "exponential": (Attention(_exponential), (), PAIRS, "rotary interleaved"),
    "sorted": (Attention(_sorted), (), replace(PAIRS, target=Pairing(0, 4, 1)), "rotary interleaved"),
    "partial": (Attention(_partial), (), PARTIAL, "rotary 4/8"),
    "partial behind": (Attention(_partial_behind), (), replace(PARTIAL, start=4, source=Pairing(0, 1, 2), target=Pairing(0, 1, 2)), "rotary interleaved 4 of features 4..8"),
    "partial by padding": (Attention(_partial_by_padding), (), PARTIAL, "rotary 4/8"),
    "looked up": (Attention(_looked_up), GIVEN, replace(HALF, positions="given"), "rotary"),
    "positions": (Attention(_positions), GIVEN, replace(HALF, positions="given"), "rotary"),
    "tables": (Attention(_tables), TABLES, replace(HALF, positions="given"), "rotary"),
    "one table": (Attention(_one_table), (torch.cat(TABLES, -1),), replace(PAIRS, positions="given"), "rotary interleaved"),
    "sections": (Attention(_sections), (), replace(HALF, positions="computed"), "rotary"),
    "norm after": (Attention(_normed_after), (), HALF, "rotary"),
    "norm before": (Attention(_normed_before), (), HALF, "rotary"),
    "temperature": (Attention(_per_token), (), PARTIAL, "rotary 4/8"),
}


_STATIC = ("computed", "pairs", "complex", "looked up", "partial by padding")
"""What is also tried with sizes that are numbers."""


@pytest.mark.parametrize(("name", "dynamic"), [*((n, True) for n in SPELLINGS), *((n, False) for n in _STATIC)], ids=lambda x: x if isinstance(x, str) else "dynamic" if x else "static")
def test_rotary(name: str, dynamic: bool) -> None:
    model, args, form, words = SPELLINGS[name]
    found = Found(model, X, *args, dynamic=dynamic)
    spec = found.site.spec
    assert spec.traits.rotary == form
    assert str(spec.traits.rotary) == words
    assert words in str(spec)
    found.check()
    assert AttentionSpec.from_json(spec.to_json()) == spec


# ------------------------------------------------------------------------------------------------ near misses


def _wrong(cos: object = None, sin: object = None, turned: object = half) -> object:
    def rope(m: nn.Module, x: Tensor) -> Tensor:
        a = torch.cat((angles(x.shape[-2]),) * 2, -1)
        return x * (cos or torch.cos)(a) + turned(x) * (sin or torch.sin)(a)

    return rope


def _unsigned(x: Tensor) -> Tensor:
    return torch.cat((x[..., D // 2 :], x[..., : D // 2]), -1)


def _off_by_one(x: Tensor) -> Tensor:
    return half(x).roll(1, -1)


def _other_signs(x: Tensor) -> Tensor:
    return half(x) * torch.tensor([1.0] * (D - 1) + [-1.0])


def _shifted(f: object) -> object:
    return lambda a: f(a + FREQUENCIES.repeat(2))


def _mixed(m: nn.Module, x: Tensor) -> Tensor:
    """Tables of interleaved features, and pairs of halves."""
    a = angles(x.shape[-2]).repeat_interleave(2, dim=-1)
    return x * a.cos() + half(x) * a.sin()


def _another_row(m: nn.Module, x: Tensor) -> Tensor:
    s = x.shape[-2]
    return x * m.cos[:s].repeat(1, 2) + half(x) * m.sin[1 : s + 1].repeat(1, 2)


def _another_column(m: nn.Module, x: Tensor) -> Tensor:
    c = m.cos[: x.shape[-2]].repeat(1, 2)
    return x * c + half(x) * m.sin[: x.shape[-2]].roll(1, -1).repeat(1, 2)


def _gated(m: nn.Module, x: Tensor) -> Tensor:
    """Coefficients that the model computes from its data: the form of a turn, and none."""
    g = x.mean(1, keepdim=True)
    a, b = g[..., : D // 2], g[..., D // 2 :]
    return x * torch.cat((a, a), -1) + half(x) * torch.cat((b, b), -1)


def _learned(m: nn.Module, x: Tensor) -> Tensor:
    c = m.learned[: x.shape[-2]].repeat(1, 2)
    return x * c + half(x) * m.sin[: x.shape[-2]].repeat(1, 2)


def _by_head(m: nn.Module, x: Tensor) -> Tensor:
    a = torch.cat((angles(x.shape[-2]),) * 2, -1) * torch.arange(1, H + 1)[:, None, None]
    return x * a.cos() + half(x) * a.sin()


def _by_feature(m: nn.Module, x: Tensor) -> Tensor:
    """The same angle everywhere: no position in it."""
    a = FREQUENCIES.repeat(2)
    return x * a.cos() + half(x) * a.sin()


def _weighted(m: nn.Module, x: Tensor) -> Tensor:
    return _computed(m, x) * torch.linspace(0.5, 1.5, D)


MISSES = {
    "no sign": _wrong(turned=_unsigned),
    "the signs of one pair": _wrong(turned=_other_signs),
    "partner off by one": _wrong(turned=_off_by_one),
    "cos of the next position": _wrong(cos=_shifted(torch.cos)),
    "sin of the next position": _wrong(sin=_shifted(torch.sin)),
    "cos for sin": _wrong(sin=torch.cos),
    "no turn at all": _wrong(turned=lambda x: x),
    "cos twice as large": _wrong(cos=lambda a: 2 * a.cos()),
    "sin of another row": _another_row,
    "sin of another column": _another_column,
    "mixed tables": _mixed,
    "computed from data": _gated,
    "learned": _learned,
    "another angle a head": _by_head,
    "no position": _by_feature,
    "weighted after": _weighted,
    "none": lambda m, x: x,
}


@pytest.mark.parametrize("name", MISSES)
def test_near_miss_is_not_rotary(name: str) -> None:
    found = Found(Attention(MISSES[name]), X)
    assert found.site.rotations == (None, None)
    assert found.site.spec.traits.rotary is None
    assert "rotary" not in str(found.site.spec)


def test_a_rotation_of_the_keys_alone_is_seen_and_no_trait() -> None:
    found = Found(Attention(MISSES["none"], k_rope=_computed), X)
    q, k = found.site.rotations
    assert q is None
    assert k is not None
    assert found.site.spec.traits.rotary is None


def test_two_forms_are_no_trait() -> None:
    found = Found(Attention(_stacked, k_rope=_computed), X)
    assert [r.form.style for r in found.site.rotations if r is not None] == ["interleaved", "half"]
    assert found.site.spec.traits.rotary is None


@pytest.mark.parametrize("form", [HALF, replace(PARTIAL, start=4, offset="s0 + 1"), replace(PAIRS, positions="given")], ids=str)
def test_a_form_survives_json(form: Rotary) -> None:
    assert Rotary.from_list(form.to_list()) == form
