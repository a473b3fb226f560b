"""Memory and work that grow with the sequence, not with its square. Counted by a dispatch mode, so that it is exact."""

from __future__ import annotations

from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from attnopt.kernels import reference, sdpa
from tests.kernels.cases import BY_NAME, Case


class Peak(TorchDispatchMode):
    """The most bytes that live storages held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.note(x.untyped_storage())
        return out

    def note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        n = storage.nbytes()
        self.now += n
        self.peak = max(self.peak, self.now)
        finalize(storage, self.free, key, n)

    def free(self, key: int, n: int) -> None:
        self.seen.discard(key)
        self.now -= n


def case(name: str, S: int) -> Case:
    c = BY_NAME[name]
    return Case(**{**vars(c), "shape": (1, 4, 2, S, S, 16, 16)})


def peak(backend: str, name: str, S: int) -> int:
    c = case(name, S)
    q, k, v, loads = c.tensors(torch.float32)
    with torch.no_grad(), Peak() as counted:
        if backend == "reference":
            reference.attention(q, k, v, loads, [], c.spec())
        elif backend == "backward":
            reference.gradients(torch.ones_like(q), q, k, v, loads, [], c.spec(), 0, [True] * 3 + [False] * len(loads))
        else:
            sdpa.attention(q, k, v, loads, [], c.spec())
    return counted.peak


@pytest.mark.parametrize("backend", ["reference", "backward", "sdpa"])
@pytest.mark.parametrize("name", ["causal-GQA", "causal-left-padding-uniform", "alibi-causal", "window-causal"])
def test_memory_is_linear(backend: str, name: str) -> None:
    # from lengths on at which a tile has the fewest queries it may have
    small, large = peak(backend, name, 2048), peak(backend, name, 4096)
    assert large < 2.3 * small
    scores = 4 * 4096 * 4096 * 4
    assert large < scores / 4


def test_the_dense_formula_is_not_linear() -> None:
    """The measure sees what it should: attention by the book takes four times as much at twice the length."""

    def by_the_book(S: int) -> int:
        q = torch.randn(1, 4, S, 16)
        with torch.no_grad(), Peak() as counted:
            torch.softmax(q @ q.transpose(-1, -2), -1) @ q
        return counted.peak

    assert by_the_book(1024) > 3.5 * by_the_book(512)


def work(backend: str, name: str) -> int:
    c = case(name, 4096)
    q, k, v, loads = c.tensors(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        if backend == "reference":
            reference.attention(q, k, v, loads, [], c.spec())
        else:
            sdpa.attention(q, k, v, loads, [], c.spec())
    return counted.get_total_flops()


def test_the_reference_skips_what_no_query_of_a_tile_sees() -> None:
    full = work("reference", "full")
    assert work("reference", "causal-GQA") < 0.55 * full
    assert work("reference", "causal-left-padding-uniform") < 0.55 * full
    assert work("reference", "window-causal") < 0.05 * full


@pytest.mark.parametrize(("name", "most"), [("causal-left-padding-uniform", 0.56), ("alibi-causal", 0.56), ("window-causal", 0.06)])
def test_sdpa_is_given_only_the_keys_that_a_tile_sees(name: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = 0
    whole = sdpa._Call.kernel

    def counting(self: sdpa._Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        nonlocal pairs
        pairs += q.shape[2] * k.shape[2]
        return whole(self, q, k, v, mask, causal)

    monkeypatch.setattr(sdpa._Call, "kernel", counting)
    c = case(name, 4096)
    q, k, v, loads = c.tensors(torch.float32)
    sdpa.attention(q, k, v, loads, [], c.spec())
    assert pairs < most * 4096 * 4096
