"""The inputs that a comparison runs on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.verify.dynamic import DynamicDim, DynamicShapes, flatten, from_graph
from attnopt.verify.inputs import LENGTH, LONG, Variant, kind_of, variants
from tests.verify.pairs import capture, decoder, example

B, S = DynamicDim("b"), DynamicDim("s", max=512)
IDS = torch.randint(100, 200, (2, 24), generator=torch.Generator().manual_seed(0))
ONES = torch.ones(2, 24, dtype=torch.long)


def made(args: tuple[Any, ...], dynamic: DynamicShapes | None = None, accepts: Any = None) -> dict[str, Variant]:
    found, _ = variants(args, {}, dynamic, accepts)
    assert len({v.name for v in found}) == len(found)
    return {v.name: v for v in found}


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (ONES, "mask"),
        (ONES.bool(), "mask"),
        (torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), "mask"),
        (torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(), "mask"),
        (torch.zeros(2, 24, dtype=torch.long), "ids"),
        (IDS, "ids"),
        (torch.arange(24)[None], "range"),
        (torch.arange(5, 29).expand(2, 24), "range"),
        (torch.ones(2), "float"),
        (torch.zeros(2, 5).masked_fill(torch.ones(2, 5).tril() == 0, -torch.inf), "bias"),
        (torch.tensor([[0.0, -3e38]]), "bias"),
        (torch.ones(2, dtype=torch.bool), "ids"),
        (torch.zeros(2, dtype=torch.complex64), "other"),
        (3, "other"),
        (None, "other"),
    ],
    ids=str,
)
def test_kinds(leaf: Any, kind: str) -> None:
    assert kind_of(leaf) == kind


class TestPadding:
    sets = made((IDS, ONES))

    def mask(self, name: str) -> Tensor:
        mask: Tensor = self.sets[name].args[1]
        assert mask.dtype == torch.long and mask.shape == (2, 24)
        return mask

    def test_right(self) -> None:
        m = self.mask("right padding")
        assert bool((m.diff(dim=1) <= 0).all()) and bool((m[:, 0] == 1).all()) and bool((m[0] == 1).all()) and 0 < int(m[1].sum()) < 24

    def test_left(self) -> None:
        m = self.mask("left padding")
        assert bool((m.diff(dim=1) >= 0).all()) and bool((m[:, -1] == 1).all()) and 0 < int(m[1].sum()) < 24

    def test_a_padded_row(self) -> None:
        m = self.mask("a padded row")
        assert int(m[-1].sum()) == 0 and int(m[0].sum()) == 24

    def test_the_rest_of_the_example_stays(self) -> None:
        assert all(torch.equal(self.sets[n].args[0], IDS) for n in ("right padding", "left padding", "a padded row"))

    def test_a_batch_of_one_is_padded_too(self) -> None:
        m = made((IDS[:1], ONES[:1]))["right padding"].args[1]
        assert 0 < int(m.sum()) < 24

    def test_a_mask_with_more_axes_keeps_its_pattern(self) -> None:
        causal = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
        m = made((causal,))["right padding"].args[0]
        assert bool((m & ~causal).logical_not().all()) and bool((m != causal).any())

    def test_nothing_to_pad(self) -> None:
        assert not {"right padding", "left padding", "a padded row"} & set(made((IDS,)))


class TestValues:
    def test_ids_are_those_seen(self) -> None:
        ids = made((IDS, ONES))["other values"].args[0]
        assert not torch.equal(ids, IDS) and set(ids.flatten().tolist()) <= set(IDS.flatten().tolist())

    def test_floats_have_the_examples_mean_and_deviation(self) -> None:
        x = torch.randn(50, 100) * 3 + 7
        sets = made((x,))
        other, large = sets["other values"].args[0], sets["large values"].args[0]
        assert not torch.equal(other, x)
        assert float(other.mean()) == pytest.approx(7, abs=0.2) and float(other.std()) == pytest.approx(3, abs=0.1)
        assert float(large.std()) == pytest.approx(30, abs=1)

    def test_additive_masks_keep_their_values(self) -> None:
        bias = torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).tril() == 0, -torch.inf)
        sets = made((torch.randn(2, 5), bias))
        assert set(sets["large values"].args[1].flatten().tolist()) <= {0.0, -torch.inf}

    def test_positions_stay_consecutive(self) -> None:
        dynamic = DynamicShapes({0: {1: S}})
        longer = made((torch.arange(3, 27)[None],), dynamic)["longer"].args[0]
        assert torch.equal(longer, torch.arange(3, 3 + longer.shape[1])[None])

    def test_dtypes_and_other_leaves_stay(self) -> None:
        args = (IDS.int(), torch.randn(2, 3).bfloat16(), None, True)
        for v in made(args).values():
            assert [getattr(x, "dtype", x) for x in v.args] == [torch.int32, torch.bfloat16, None, True]

    def test_the_same_every_time(self) -> None:
        one, two = made((IDS, ONES)), made((IDS, ONES))
        assert all(torch.equal(x, y) for n in one for x, y in zip(one[n].args, two[n].args, strict=True))


class TestSizes:
    both = DynamicShapes({0: {0: B, 1: S}, 1: {0: B, 1: S}})

    def test_symbols_change_together(self) -> None:
        sets = made((IDS, ONES), self.both)
        assert sets["shorter"].args[0].shape == sets["shorter"].args[1].shape == (2, 17)
        assert sets["longer"].args[0].shape == sets["longer"].args[1].shape == (3, LONG)

    def test_sizes_that_were_equal_change_together(self) -> None:
        other = DynamicShapes({0: {0: B, 1: S}, 1: {0: DynamicDim("b2"), 1: S}})
        longer = made((IDS, ONES), other)["longer"]
        assert longer.args[0].shape == longer.args[1].shape

    def test_lengths_apart(self) -> None:
        apart = DynamicShapes({0: {1: S}, 1: {1: DynamicDim("t")}})
        v = made((IDS, IDS), apart)["lengths apart"]
        assert v.args[0].shape != v.args[1].shape
        assert "lengths apart" not in made((IDS, ONES), self.both)

    def test_multiples(self) -> None:
        four = DynamicShapes({0: {1: DynamicDim("s", min=2, max=64, times=4)}})
        assert all(v.args[0].shape[1] % 4 == 0 for v in made((IDS,), four).values())

    def test_within_the_range(self) -> None:
        narrow = DynamicShapes({0: {0: DynamicDim("b", 2, 3), 1: DynamicDim("s", 20, 26)}})
        for v in made((IDS,), narrow).values():
            assert 2 <= v.args[0].shape[0] <= 3 and 20 <= v.args[0].shape[1] <= 26

    def test_what_the_original_refuses_is_left_out_and_told(self) -> None:
        def accepts(args: Any, kwargs: Any) -> str | None:
            return None if args[0].shape[1] % 2 == 0 else "odd"

        found, notes = variants((IDS, ONES), {}, self.both, accepts)
        names = {v.name for v in found}
        assert all(v.args[0].shape[1] % 2 == 0 for v in found)
        assert {"shorter", "longer"} <= names and notes == []
        found, notes = variants((IDS, ONES), {}, self.both, lambda a, k: None if torch.equal(a[0], IDS) and a[0].shape == IDS.shape else "no")
        assert {v.name for v in found} == {"example", "right padding", "left padding", "a padded row"}
        assert [n.split(":")[0] for n in notes] == ["shorter", "longer", "other values"]
        assert all("(no)" in n for n in notes)

    def test_long_sequences_are_compared_at_a_bounded_length(self) -> None:
        long = torch.randint(9, (2, 400))
        sets = made((long,), DynamicShapes({0: {1: S}}))
        assert sets["example"].light and sets["example"].args[0].shape == (2, 400)
        assert all(v.args[0].shape[1] <= LENGTH and not v.light for n, v in sets.items() if n != "example")
        assert "example, shortened" in sets

    def test_long_sequences_that_cannot_be_shortened_are_taken_as_they_are(self) -> None:
        long = torch.randint(9, (2, 400))
        assert [v.light for v in made((long,)).values()] == [False]
        sets = made((long,), DynamicShapes({0: {1: S}}), lambda a, k: None if a[0].shape[1] == 400 else "no")
        assert not sets["example"].light

    def test_samples_and_pixels_are_not_lengths_of_a_sequence(self) -> None:
        sets = made((torch.randn(2, 1000),), DynamicShapes({0: {1: DynamicDim("t")}}))
        assert not sets["example"].light and sets["shorter"].args[0].shape[1] > LENGTH


class TestFromGraph:
    def test_symbols_of_the_placeholders(self) -> None:
        shapes = from_graph(decoder())
        assert set(shapes.dims) == {0, 1} and all(set(d) == {0, 1} for d in shapes.dims.values())
        assert shapes.dims[0][1].symbol == shapes.dims[1][1].symbol
        assert shapes.dims[0][1].min >= 1 and shapes.dims[0][1].max is None

    def test_a_graph_with_fixed_sizes_has_none(self) -> None:
        assert from_graph(decoder(dynamic=False)).dims == {}

    def test_products_and_ranges(self) -> None:
        class Halves(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.view(2, -1, 4).sum(1)

        half = torch.export.Dim("half", min=3, max=20)
        gm = torch.export.export(Halves(), (torch.randn(20, 2),), dynamic_shapes=({0: 2 * half},), strict=False).module()
        shapes = from_graph(gm)
        assert shapes.dims[0][0] == DynamicDim(shapes.dims[0][0].symbol, 3, 20, 2, 0)
        for v in made((torch.randn(20, 2),), shapes).values():
            assert v.args[0].shape[0] % 2 == 0 and 6 <= v.args[0].shape[0] <= 40

    def test_guards(self) -> None:
        class Blocks(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.view(-1, 8, 4).sum(1) if x.shape[0] % 8 == 0 else x

        gm = capture(Blocks(), (torch.randn(24, 4),))
        shapes = from_graph(gm)
        (symbol,) = [d.symbol for d in shapes.dims[0].values() if d.symbol in shapes.values([torch.randn(24, 4)])][:1]
        assert shapes.admits({symbol: 32}) and not shapes.admits({symbol: 33})

    def test_inputs_in_the_order_of_the_placeholders(self) -> None:
        ids, mask = example()
        gm = torch.export.export(decoder_module(), (ids,), {"mask": mask}, strict=False).module()
        assert flatten(gm, (ids,), {"mask": mask})[1] is mask
        with pytest.raises(ValueError, match="keyword arguments"):
            flatten(gm, (ids,), {})
        with pytest.raises(ValueError, match="2 inputs"):
            flatten(decoder(), (ids,), {})


def decoder_module() -> nn.Module:
    from tests.verify.pairs import Decoder

    return Decoder().eval()
