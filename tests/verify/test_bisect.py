"""Finding the sites to put back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnopt.verify import GraphPair, compare_graphs, end_to_end, first_bad_site, verify_and_repair
from tests.verify.pairs import calls, decoder, example, replaced, sdpa
from tests.verify.test_sites import one_percent, right, shifted


@pytest.mark.parametrize("count", [1, 2, 3, 8, 31])
def test_the_first_bad_site_in_about_log2_steps(count: int) -> None:
    sites = [f"s{i}" for i in range(count)]
    for bad in ({0}, {count - 1}, {count // 2, count - 1}):
        asked = 0

        def holds(without: frozenset[str], bad: set[int] = bad) -> bool:
            nonlocal asked
            asked += 1
            return all(sites[i] in without for i in bad)

        assert first_bad_site(sites, holds) == sites[min(bad)]
        assert asked <= 1 + math.ceil(math.log2(count)) + 1


def test_no_site_is_blamed_when_the_fault_is_elsewhere() -> None:
    assert first_bad_site(["a", "b"], lambda without: False) is None
    assert first_bad_site([], lambda without: True) is None


class TestRepair:
    def rebuild(self, **wrong: object) -> object:
        self.built: list[frozenset[str]] = []

        def build(skip: frozenset[str]) -> GraphPair:
            self.built.append(skip)
            makes = {i: wrong.get(f"site{i}", sdpa) for i in range(3) if f"site{i}" not in skip}
            return replaced(decoder(3), makes)  # type: ignore[arg-type]

        return build

    def test_nothing_to_repair(self) -> None:
        result = verify_and_repair(self.rebuild(), example(), {})  # type: ignore[arg-type]
        assert result.verdict.passed and result.reverted == {} and len(self.built) == 1

    def test_sites_that_fail_on_their_own(self) -> None:
        result = verify_and_repair(self.rebuild(site0=shifted, site2=one_percent), example(), {})  # type: ignore[arg-type]
        assert result.verdict.passed and set(result.reverted) == {"site0", "site2"}
        assert set(result.pair.outputs) == {"site1"}
        assert all(c.name.startswith(s) and not c.passed for s, checks in result.reverted.items() for c in checks)
        assert len(self.built) == 2

    def test_a_site_that_only_the_whole_model_shows(self) -> None:
        def build(skip: frozenset[str]) -> GraphPair:
            pair = replaced(decoder(3), {i: sdpa for i in range(3) if f"site{i}" not in skip})
            if "site1" not in skip:  # its rewrite also damaged a node outside of the site
                (norm,) = [n for n in pair.optimized.graph.nodes if n.name == "layer_norm_2"]
                norm.args = (*norm.args[:4], 1e-2, norm.args[5])
            return pair

        result = verify_and_repair(build, example(), {})
        assert result.verdict.passed and set(result.reverted) == {"site1"}
        assert all(c.name.startswith("whole model") for c in result.reverted["site1"])

    def test_a_fault_that_no_site_is_to_blame_for(self) -> None:
        def build(skip: frozenset[str]) -> GraphPair:
            pair = replaced(decoder(3), {i: sdpa for i in range(3) if f"site{i}" not in skip})
            (norm,) = [n for n in pair.optimized.graph.nodes if n.name == "layer_norm_2"]
            norm.args = (*norm.args[:4], 1e-2, norm.args[5])
            return pair

        result = verify_and_repair(build, example(), {})
        assert result.verdict.passed is False and result.reverted == {}


class TestWhole:
    def test_a_large_model_is_compared_at_its_own_dtype(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(end_to_end, "SMALL", 0)
        for make, passed in ((sdpa, True), (one_percent, False)):
            pair = replaced(decoder(), make)
            result = compare_graphs(pair.reference, pair.optimized, pair.outputs, example(), {})
            whole = [c for c in result.checks if c.name.startswith("whole")]
            assert all("at its own dtype" in c.detail for c in whole) and not any("gradients" in c.name for c in whole)
            assert result.whole_failed is not passed
            assert bool(result.failed) is not passed, "sites are measured against float64 all the same"

    def test_long_examples_are_compared_at_their_length_without_float64(self) -> None:
        pair = replaced(decoder(), sdpa)
        result = compare_graphs(pair.reference, pair.optimized, pair.outputs, example(1 + 1, 300), {})
        details = {c.name: c.detail for c in result.checks}
        assert "at its own dtype" in details["whole model: example"]
        assert "at its own dtype" not in details["whole model: example, shortened"]
        assert "site0: example" not in details and "site0: example, shortened" in details
        assert result.verdict.passed

    def test_long_examples_show_what_short_ones_do_not(self) -> None:
        def window(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            hidden = torch.ones(bias.shape[-2:], dtype=torch.bool).tril(-280)
            return right(q, k, v, bias.masked_fill(hidden, torch.finfo(bias.dtype).min))

        pair = replaced(decoder(), calls(window))
        failed = [c.name for c in compare_graphs(pair.reference, pair.optimized, pair.outputs, example(2, 300), {}).checks if not c.passed]
        assert failed == ["whole model: example"]

    def test_models_on_the_meta_device_are_unverified(self) -> None:
        pair = replaced(decoder(), sdpa)
        with torch.device("meta"):
            holder = torch.nn.Linear(1, 1)
        result = compare_graphs(pair.reference, pair.optimized, pair.outputs, example(), {}, root=holder)
        assert result.verdict.passed is None and str(result.verdict) == "unverified"

    def test_frozen_models_have_no_gradients_to_compare(self) -> None:
        pair = replaced(decoder(), sdpa)
        wanted = [p for p in pair.reference.parameters() if p.requires_grad]
        try:
            for p in wanted:
                p.requires_grad_(False)
            result = compare_graphs(pair.reference, pair.optimized, pair.outputs, example(), {})
            assert not any("gradients" in c.name for c in result.checks)
            result = compare_graphs(pair.reference, pair.optimized, pair.outputs, example(), {}, training=True)
            assert any("gradients" in c.name for c in result.checks) and result.verdict.passed
        finally:
            for p in wanted:
                p.requires_grad_(True)

    def test_progress_is_told(self) -> None:
        told: list[tuple[str, int, int]] = []
        pair = replaced(decoder(), {})
        compare_graphs(pair.reference, pair.optimized, pair.outputs, example(), {}, progress=lambda *x: told.append(x))
        assert told[0][:2] == ("comparing: example", 0) and told[-1][1] == told[-1][2] == len(told) - 1
