"""Steps that are recorded and replayed: when, under which key, and that none is replayed after what it holds has changed. A recorder in plain Python stands for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from attnopt.runtime import DecodeGraphs, Engine, LayerShape, PagedCache, SamplingParams
from attnopt.runtime.graphs import CudaRecorder, bucket, columns_for
from attnopt.runtime.transfer import on_device
from attnopt.runtime.watched import ModuleTensors
from tests.runtime.toy import DV, HEADS, LAYERS, VOCABULARY, D, Toy, alone

CPU = torch.device("cpu")


class Recorder:
    """As CUDA graphs do: the addresses of now, whatever stands behind them later. The result of a replay lies where that of the one before lay."""

    def __init__(self) -> None:
        self.recorded = 0
        self.out: dict[torch.Size, Tensor] = {}

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        function()

        def replay() -> Tensor:
            found = function()
            place = self.out.setdefault(found.shape, torch.empty_like(found))
            return place.copy_(found)

        return replay


def toy_engine(recorder: Recorder, pages: int = 64, **options: int) -> tuple[Engine, DecodeGraphs]:
    """The toy without its checks of what it is given, which a graph's empty requests do not meet."""
    cache = PagedCache([LayerShape(HEADS, D, DV, torch.float64)] * LAYERS, 4, pages)
    toy = Toy(cache)

    def run(tokens: Tensor, positions: Tensor, slots: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        keys = lengths > 0
        if bool(keys.all()):
            return toy(tokens, positions, slots, table, starts, lengths, rows)
        n = int(keys.sum())
        assert bool(keys[:n].all()) and bool((slots[n:] == -1).all()), "an empty request writes nowhere and stands behind the others"
        if n == 0:
            return torch.full((len(rows), VOCABULARY), torch.nan, dtype=torch.float64)
        found = toy(tokens[:n], positions[:n], slots[:n], table[:n], starts[: n + 1], lengths[:n], rows[:n])
        return torch.cat([found, torch.full((len(rows) - n, VOCABULARY), torch.nan, dtype=torch.float64)])

    graphs = DecodeGraphs(run, lambda: (x for pair in cache.tensors for x in pair), CPU, recorder)
    engine = Engine(graphs, cache, vocabulary=VOCABULARY, **options)  # type: ignore[arg-type]
    toy.manager = engine.manager
    return engine, graphs


def test_the_same_tokens_with_graphs() -> None:
    recorder = Recorder()
    engine, graphs = toy_engine(recorder, chunk=3)
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, VOCABULARY, (n,), generator=g).tolist() for n in (9, 1, 5, 14, 3)]
    params = [SamplingParams(max_new_tokens=n, temperature=0.8, seed=i) for i, n in enumerate((7, 26, 4, 19, 11))]
    results = engine.generate(prompts, params)
    assert [r.tokens for r in results] == [alone(tuple(p), x, x.seed or 0) for p, x in zip(prompts, params, strict=True)]
    assert graphs.replays > 8 and graphs.recorded == recorder.recorded == len(graphs) < graphs.replays
    assert graphs.reason is None


def test_a_small_cache_and_graphs() -> None:
    engine, graphs = toy_engine(Recorder(), pages=9)
    prompts = [[i, i + 1, i + 2] for i in range(6)]
    params = SamplingParams(max_new_tokens=14)
    results = engine.generate(prompts, params)
    assert [r.tokens for r in results] == [alone(tuple(p), params) for p in prompts]
    assert engine.statistics().preemptions > 0 and graphs.replays > 0


# ------------------------------------------------------------------------------------------------ keys


class Held:
    """A step function that reads a module's weight and a cache by address, as a graph does."""

    def __init__(self) -> None:
        self.module = nn.ModuleDict({"a": nn.Linear(1, 3, bias=False), "b": nn.BatchNorm1d(2)})
        self.cache = torch.zeros(8, 3)
        self.recorder = Recorder()
        weights = ModuleTensors(self.module)
        self.graphs = DecodeGraphs(self.run, lambda: [*weights(), self.cache], CPU, self.recorder)

    def run(self, tokens: Tensor, positions: Tensor, slots: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        return (tokens[:, None] * self.module["a"].weight.T + self.cache[table[:1, 0].long()])[rows]

    def step(self, requests: int = 3, columns: int = 2, per: int = 1, dtype: torch.dtype = torch.int64) -> Tensor:
        n = requests * per
        tokens = torch.arange(1, n + 1, dtype=dtype)
        starts = torch.arange(0, n + 1, per, dtype=torch.int32)
        rows = torch.arange(per - 1, n, per)
        return self.graphs(
            tokens,
            torch.zeros(n, dtype=torch.int64),
            torch.arange(n),
            torch.ones(requests, columns, dtype=torch.int32),
            starts,
            torch.ones(requests, dtype=torch.int32),
            rows,
        )


@pytest.fixture
def held() -> Iterator[Held]:
    with torch.no_grad():
        yield Held()


def test_one_graph_for_steps_alike(held: Held) -> None:
    first = held.step(3)
    kept = first.clone()
    second = held.step(4)
    assert held.recorder.recorded == 1 and held.graphs.replays == 2
    assert torch.equal(first, kept), "a result is overwritten by the next replay"
    assert first.shape == (3, 3) and second.shape == (4, 3)
    held.step(4, columns=1)
    held.step(5)
    assert held.recorder.recorded == 3


@pytest.mark.parametrize("change", ["weight", "storage", "strides", "buffer", "module", "cache", "modes", "dtype", "disabled"])
def test_what_a_graph_holds_is_in_its_key(held: Held, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held.step()
    held.step()
    assert held.recorder.recorded == 1
    keep: list[object] = [held.module["a"], held.module["a"].weight.data, held.cache, held.module["b"].running_mean]  # so that no address comes back
    before = torch.get_float32_matmul_precision()
    options = {}
    if change == "weight":
        held.module["a"].weight = nn.Parameter(torch.ones(3, 1))
    elif change == "storage":
        held.module["a"].weight.data = torch.full((3, 1), 2.0)
    elif change == "strides":
        held.module["a"].weight.data = torch.as_strided(held.module["a"].weight.data, (3, 1), (0, 1))
    elif change == "buffer":
        held.module["b"].running_mean = torch.zeros(2)
    elif change == "module":
        held.module["a"] = nn.Linear(1, 3, bias=False)
    elif change == "cache":
        held.cache = torch.ones(8, 3)
    elif change == "modes":
        torch.set_float32_matmul_precision("medium" if before == "highest" else "highest")
    elif change == "dtype":
        options["dtype"] = torch.int32
    else:
        monkeypatch.setenv("ATTNOPT_DISABLE", "triton")
    try:
        held.step(**options)  # type: ignore[arg-type]
    finally:
        torch.set_float32_matmul_precision(before)
    assert held.recorder.recorded == 2, f"a graph is replayed after a change of {change}"
    assert keep


def test_new_numbers_at_the_same_place_need_no_new_graph(held: Held) -> None:
    held.step()
    held.module["a"].weight.fill_(5.0)
    held.cache.fill_(1.0)
    assert torch.equal(held.step(2), torch.tensor([[6.0] * 3, [11.0] * 3]))
    held.step()
    assert held.recorder.recorded == 2  # of two requests, and of three


def test_graphs_of_weights_that_are_gone_are_dropped(held: Held) -> None:
    for n in (1, 2, 3):
        held.step(n)
    assert len(held.graphs) == 3
    held.cache = torch.ones(8, 3)
    held.step(1)
    assert len(held.graphs) == 1


def test_few_graphs_are_kept(held: Held) -> None:
    held.graphs.most_graphs = 2
    held.step(1)
    held.step(2)
    held.step(1)
    held.step(8)  # in place of that for two
    held.step(1)
    assert held.recorder.recorded == 3 and len(held.graphs) == 2


def test_prompts_run_without(held: Held) -> None:
    assert held.step(2, per=3).shape == (2, 3)
    assert held.recorder.recorded == 0 and held.graphs.reason is None


def test_another_sequence_goes_along() -> None:
    """A step with the block table and the lengths of other sequences behind its own."""
    seen: list[tuple[Tensor, ...]] = []

    def run(*inputs: Tensor) -> Tensor:
        seen.append(tuple(x.clone() for x in inputs))
        return inputs[8][:, None].float()

    recorder = Recorder()
    graphs = DecodeGraphs(run, list, CPU, recorder)
    for n, width in ((5, 3), (6, 4), (5, 1)):
        ids, lengths = torch.arange(n), torch.arange(1, n + 1, dtype=torch.int32)
        table = torch.full((n, width), 7, dtype=torch.int32)
        out = graphs(ids, ids, ids, table, torch.arange(n + 1, dtype=torch.int32), lengths, ids, table, 2 * lengths)
        assert out.shape == (n, 1) and torch.equal(out[:, 0], 2.0 * lengths)
        held = seen[-1]
        assert held[7].shape == (8, columns_for(width)) and not held[7][n:].any() and not held[7][:, width:].any() and not held[8][n:].any()
    assert recorder.recorded == 2


def test_why_there_are_no_graphs_is_said(held: Held) -> None:
    graphs = DecodeGraphs(held.run, list, CPU)
    held.graphs = graphs
    held.step()
    assert graphs.reason == "CUDA graphs need a CUDA device, and the caches are on cpu" and graphs.replays == 0

    def cannot(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    held.graphs = DecodeGraphs(held.run, list, CPU, cannot)
    want = held.step()
    assert want.shape == (3, 3) and torch.equal(held.step(), want)
    assert held.graphs.reason == "a step cannot be recorded: operation not permitted when stream is capturing"


def test_buckets() -> None:
    assert [bucket(n) for n in (1, 2, 3, 5, 8, 9, 17, 64, 65, 200, 257)] == [1, 2, 4, 8, 8, 16, 24, 64, 96, 224, 320]
    assert all(bucket(n) >= n for n in range(1, 600))
    assert [columns_for(n) for n in (1, 2, 3, 500, 512)] == [1, 2, 4, 512, 512]


def test_what_is_sent_together_lies_as_tensors_of_their_own_do() -> None:
    """Kernels are compiled for whether addresses are multiples of 16 bytes: a step of another size must not be another case."""
    for dtype in (torch.int32, torch.int64):
        parts = ([5], [], [1, 2, 3, 4, 5], [7, 8])
        found = on_device(parts, dtype, "cpu")
        assert [x.tolist() for x in found] == [list(p) for p in parts]
        assert all(x.dtype == dtype and x.data_ptr() % 16 == 0 for x in found)


# ------------------------------------------------------------------------------------------------ on a device


@pytest.mark.gpu
def test_a_graph_on_a_device() -> None:
    held = Held()
    device = torch.device("cuda")
    held.module.to(device)
    held.cache = held.cache.to(device)
    with torch.no_grad():
        weight, cache = held.module["a"].weight, held.cache
        x = torch.ones(4, 1, device=device)
        replay = CudaRecorder(device)(lambda: x @ weight.T + cache[:4])
        for scale in (1.0, 2.0):
            x.fill_(scale)
            torch.testing.assert_close(replay(), x @ weight.T + cache[:4])
