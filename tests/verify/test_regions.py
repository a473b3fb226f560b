"""What belongs to a site, and which values two graphs share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnopt.verify.memory import base, changing, written
from attnopt.verify.regions import operands, shared_nodes, site_regions
from tests.verify.pairs import aten, capture, decoder, replaced, sdpa


def names(nodes: object) -> set[str]:
    return {n.name for n in nodes}  # type: ignore[attr-defined]


def test_a_site_is_cut_at_q_k_v_and_the_bias() -> None:
    pair = replaced(decoder(), sdpa)
    for site in site_regions(pair.reference, pair.optimized, pair.outputs):
        assert names(site.optimized.nodes) == {site.optimized.output.name}
        assert names(site.optimized.leaves) == names(site.reference.leaves) == names(site.leaves)
        assert len(site.leaves) == 4
        assert [n.target for n in site.reference.nodes if n.target in (aten.matmul.default, aten.softmax.int)] == [
            aten.matmul.default,
            aten.softmax.int,
            aten.matmul.default,
        ]


def test_the_second_site_does_not_hold_the_first() -> None:
    pair = replaced(decoder(), sdpa)
    first, second = site_regions(pair.reference, pair.optimized, pair.outputs)
    assert not names(first.reference.nodes) & names(second.reference.nodes)


def test_queries_keys_and_values_are_found() -> None:
    pair = replaced(decoder(), sdpa)
    site = site_regions(pair.reference, pair.optimized, pair.outputs)[0]
    found = operands(site.optimized)
    call = site.optimized.output
    assert (set(found.q), set(found.k), set(found.v)) == ({call.args[0]}, {call.args[1]}, {call.args[2]})
    assert not operands(site.reference).q


def test_merged_and_renamed_nodes_are_the_same_value() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sin().cos(), x.sin().cos() + 1

    reference = capture(Twice(), (torch.randn(3),), dynamic=False)
    pair = replaced(reference, {})
    graph = pair.optimized.graph
    first, second = [n for n in graph.nodes if n.target is aten.cos.default]
    second.replace_all_uses_with(first)
    graph.eliminate_dead_code()
    first.name = "renamed"
    same, number = shared_nodes(reference, pair.optimized, {})
    one, two = [n for n in reference.graph.nodes if n.target is aten.cos.default]
    assert number[one] == number[two] and same[first] is one
    (total,) = [n for n in graph.nodes if n.target is aten.add.Tensor]
    assert same[total].name == total.name


def test_a_changed_constant_is_another_value_but_an_untouched_name_is_trusted() -> None:
    reference = decoder()
    pair = replaced(reference, {})
    (norm,) = [n for n in pair.optimized.graph.nodes if n.name == "layer_norm_1"]
    norm.args = (*norm.args[:4], 1e-2, norm.args[5])
    same, _ = shared_nodes(reference, pair.optimized, {})
    assert same[norm].name == "layer_norm_1"
    norm.name = "other"
    same, _ = shared_nodes(reference, pair.optimized, {})
    assert norm not in same


class Filled(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.zeros(4), torch.zeros(4)
        a[1:] = 1.0
        return x + a.view(2, 2)[0, 1], x + b.view(2, 2)[0, 1]


def test_memory_that_is_written_is_equal_to_no_other() -> None:
    gm = capture(Filled(), (torch.randn(2),), dynamic=False)
    one, two = [n for n in gm.graph.nodes if n.target is aten.zeros.default]
    writers = [n for n in gm.graph.nodes if written(n)]
    assert writers and {base(x) for n in writers for x in written(n)} == {one}
    found = changing(gm.graph)
    assert one in found and two not in found
    assert sum(n.target is aten.view.default for n in found) == 1
    _, number = shared_nodes(gm, replaced(gm, {}).optimized, {})
    views = [n for n in gm.graph.nodes if n.target is aten.view.default]
    assert len({number[n] for n in views}) == 2


def test_written_memory_is_not_computed_again() -> None:
    gm = capture(Filled(), (torch.randn(2),), dynamic=False)
    pair = replaced(gm, {})
    end = next(n for n in gm.graph.nodes if n.target is aten.add.Tensor)
    (site,) = site_regions(gm, pair.optimized, {"site": (end.name, end.name)})
    assert end not in site.leaves
    assert any(n in changing(gm.graph) for n in site.reference.leaves)
