"""The tensors of the cache, its size, and errors; and what BlockManager says of bad options."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import ServingError
from attnopt.runtime import BlockManager, LayerShape, PagedCache

LAYERS = [LayerShape(2, 8, 4), LayerShape(1, 16, 16, torch.bfloat16)]
PAGE_BYTES = 16 * (2 * (8 + 4) * 4 + 1 * 32 * 2)


def test_shapes_are_those_of_each_layer() -> None:
    cache = PagedCache(LAYERS, 16, pages=3)
    assert [(tuple(k.shape), tuple(v.shape), k.dtype) for k, v in cache.tensors] == [
        ((3, 16, 2, 8), (3, 16, 2, 4), torch.float32),
        ((3, 16, 1, 16), (3, 16, 1, 16), torch.bfloat16),
    ]
    assert cache.page_bytes == PAGE_BYTES and cache.size_bytes == sum(x.nbytes for pair in cache.tensors for x in pair)


def test_a_budget_of_bytes_is_not_passed() -> None:
    cache = PagedCache(LAYERS, 16, size_bytes=3 * PAGE_BYTES - 1)
    assert cache.pages == 2


def test_copies_read_before_they_write() -> None:
    """One page may be copied from and to in one step: its holder left it, and another took it."""
    cache = PagedCache(LAYERS, 4, pages=4)
    for k, v in cache.tensors:
        k.copy_(torch.arange(4.0)[:, None, None, None].expand(k.shape)), v.copy_(10 + torch.arange(4.0)[:, None, None, None].expand(v.shape))
    cache.copy([(0, 1), (1, 2)])
    cache.copy([])
    for k, v in cache.tensors:
        assert k[:, 0, 0, 0].tolist() == [0, 0, 1, 3] and v[:, -1, -1, -1].tolist() == [10, 10, 11, 13]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"size_bytes": PAGE_BYTES - 1},
            f"The cache may take {PAGE_BYTES - 1} bytes, and one page of 16 tokens takes {PAGE_BYTES} over 2 layers; it must hold at least one.",
        ),
        ({"pages": 0}, "The cache has 0 pages; it must have at least one page of 16 tokens."),
        ({}, "pages is None and size_bytes is None; exactly one of them says how large the cache is."),
        ({"pages": 1, "size_bytes": 1}, "pages is 1 and size_bytes is 1; exactly one of them says how large the cache is."),
        ({"pages": 1, "page_size": 0}, "page_size is 0; it must be at least 1."),
        ({"pages": 1, "layers": []}, "The model has no attention that keeps keys and values; a cache needs at least one."),
    ],
    ids=["bytes", "pages", "no-size", "two-sizes", "page-size", "no-layer"],
)
def test_a_cache_that_cannot_be_is_one_clear_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(ServingError) as e:
        PagedCache(**{"layers": LAYERS, "page_size": 16, **options})  # type: ignore[arg-type]
    assert str(e.value) == message


@pytest.mark.parametrize("options", [(0, 16), (4, 0), (4, 16, True, 0)], ids=["pages", "page-size", "window"])
def test_a_manager_that_cannot_be_is_one_clear_error(options: tuple[int, ...]) -> None:
    with pytest.raises(ServingError, match="must"):
        BlockManager(*options)  # type: ignore[arg-type]


def test_waste_counts_slots_of_shared_pages_once() -> None:
    manager = BlockManager(10, 4)
    manager.allocate("a", [1, 2, 3, 4, 5, 6])
    manager.append("a", 6)
    manager.commit("a", [1, 2, 3, 4, 5, 6])
    manager.fork("a", "b")
    usage = manager.usage()
    assert (usage.held, usage.slots_allocated, usage.slots_filled, usage.waste, usage.padded_waste) == (2, 8, 6, 0.25, 0)
    manager.allocate("c", [9])
    manager.append("c", 1)
    usage = manager.usage()
    assert (usage.slots_allocated, usage.slots_filled) == (12, 7)
    assert usage.padded_waste == pytest.approx(1 - 13 / 18)
    for name in "abc":
        manager.free(name)
    assert manager.usage().waste == 0 and manager.usage().reusable == 1


def test_the_page_that_was_let_go_first_is_evicted_first() -> None:
    manager = BlockManager(3, 2)
    for name in "ab":
        text = [ord(name)] * 2
        manager.allocate(name, text)
        manager.append(name, 2)
        manager.commit(name, text)
    manager.free("b")
    manager.free("a")
    manager.allocate("c", [1, 2, 3])
    manager.append("c", 3)
    found = [manager.match(manager.page_hashes([ord(name)] * 2))[0] for name in "ab"]
    assert found == [1, 0] and manager.evictions == 1


def test_scales_lie_by_head_in_each_page() -> None:
    """Those of one head's tokens stand together, and pages are copied with them."""
    cache = PagedCache([LayerShape(3, 8, 8, torch.int8)], page_size=4, pages=5)
    for scale in cache.tensors[0][2:]:
        assert scale.shape == (5, 4, 3) and scale.stride() == (12, 1, 4)
        scale.copy_(torch.arange(60.0).view(5, 4, 3))
    cache.copy([(4, 0), (0, 2)])
    for scale in cache.tensors[0][2:]:
        assert torch.equal(scale, torch.arange(60.0).view(5, 4, 3)[[4, 1, 0, 3, 4]])
