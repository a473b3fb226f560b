"""Generated tokens by CUDA graphs: a step of one token for each request is recorded once for its size, and then replayed.

Such a step launches some hundred small kernels, and at small batches the host takes longer to launch them than the device to run them. A graph is a list of
launches with every address in it, so it may only be replayed while all of these are what they were: its key, and the state of weights and caches, hold all that is.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attnopt.config import disabled_backends
from attnopt.errors import first_line
from attnopt.runtime.watched import State, state_of

MOST_GRAPHS = 64
"""Those that were replayed least recently go."""
MOST_REQUESTS = 512
"""Larger steps keep the device busy without a graph."""

Inputs = tuple[Tensor, ...]
"""A step's, in order (``StepFunction``); where the model reads another sequence, its block table and lengths behind them."""
Replay = Callable[[], Tensor]
Function = Callable[..., Tensor]


class Recorder(Protocol):
    """Makes of a function on inputs, which stay where they are, a call that computes it again on what they hold then. Raises RuntimeError where it cannot."""

    def __call__(self, function: Callable[[], Tensor]) -> Replay: ...


class CudaRecorder:
    """Records with ``torch.cuda.graph``. All graphs share one pool of memory, so what one gave is gone when the next is replayed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, function: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(self.device):
            if not self._graphs:  # a pool is gone with the last of its graphs, and its name must not be used again
                self._pool = torch.cuda.graph_pool_handle()
            # what is made at the first call (compiled kernels, handles, workspaces) must not be made while it records
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                out = function()
            self._graphs.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@dataclass(frozen=True)
class Key:
    """Everything a recorded step depends on but the numbers in its inputs, and ``state_of`` the weights and caches, which is that of all graphs that are kept."""

    requests: int
    """Of the bucket: the step may have fewer."""
    columns: tuple[int, ...]
    """Of the block tables, of the bucket."""
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    modes: tuple[Hashable, ...]
    """Settings of the process by which kernels are chosen."""


def modes() -> tuple[Hashable, ...]:
    """What changes which kernels a step launches, whatever its inputs are."""
    matmul = torch.backends.cuda.matmul
    return (
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        disabled_backends(),
    )


def bucket(n: int) -> int:
    """The size that a graph for ``n`` requests has: powers of two up to 8, then multiples of 8 up to 64, of 32 up to 256, of 64 beyond. At most a quarter is empty above 8."""
    if n <= 8:
        return 1 << (n - 1).bit_length()
    unit = 8 if n <= 64 else 32 if n <= 256 else 64
    return -(-n // unit) * unit


def columns_for(n: int) -> int:
    """The columns of a graph's block table: the next power of two. A wider one costs nothing: programs stop at a request's last key."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass
class _Recorded:
    inputs: Inputs
    replay: Replay


class DecodeGraphs:
    """The step function ``run``, whose steps of one token a request are replayed from graphs on CUDA, and whose other steps run as they are.

    ``state``: all tensors whose addresses a step holds (weights, buffers, constants, caches), asked for at each step. ``reason`` says why steps run without graphs,
    None where they do not. A graph's requests that the step does not have are without keys and are written nowhere.
    """

    def __init__(
        self,
        run: Function,
        state: Callable[[], Iterable[Tensor]],
        device: torch.device,
        recorder: Recorder | None = None,
        most_graphs: int = MOST_GRAPHS,
    ) -> None:
        self.run, self.state, self.device = run, state, device
        self.recorder = recorder
        self.reason: str | None = None
        if recorder is None:
            if device.type == "cuda":
                self.recorder = CudaRecorder(device)
            else:
                self.reason = f"CUDA graphs need a CUDA device, and the caches are on {device.type}"
        self.most_graphs = most_graphs
        self.recorded = 0
        """Graphs that were made."""
        self.replays = 0
        self._graphs: OrderedDict[Key, _Recorded] = OrderedDict()
        self._recorded_at: State | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        tokens, _, _, _, _, seqlens_k, rows, *_ = inputs
        requests = seqlens_k.shape[0]
        # each request of a step has a token, and each has one row at most: where all three are as many, each has one token
        alike = tokens.shape[0] == requests == rows.shape[0] and 0 < requests <= MOST_REQUESTS
        if self.recorder is None or self.reason is not None or not alike:
            return self.run(*inputs)
        state = state_of(self.state())
        if state != self._recorded_at:  # weights or caches are elsewhere: what holds their addresses is never replayed again
            self._graphs.clear()
            self._recorded_at = state
        key = self._key(inputs)
        found = self._graphs.get(key)
        if found is None:
            made = self._record(key, inputs)
            if made is None:
                return self.run(*inputs)
            found = made
        self._graphs.move_to_end(key)
        self._fill(found.inputs, inputs)
        self.replays += 1
        # a copy: the next replay writes to the same place
        return found.replay()[:requests].clone()

    def _key(self, inputs: Inputs) -> Key:
        return Key(
            bucket(inputs[5].shape[0]),
            tuple(columns_for(inputs[i].shape[1]) for i in (3, 7) if i < len(inputs)),
            tuple(x.dtype for x in inputs),
            inputs[0].device,
            modes(),
        )

    def _record(self, key: Key, inputs: Inputs) -> _Recorded | None:
        """A new graph; None where a step cannot be recorded, which ``reason`` says from then on."""
        assert self.recorder is not None
        while len(self._graphs) >= self.most_graphs:
            self._graphs.popitem(last=False)
        n, place = key.requests, key.device

        def filled(like: Tensor, shape: tuple[int, ...], value: int) -> Tensor:
            return torch.full(shape, value, dtype=like.dtype, device=place)

        tokens, positions, slots, table, starts, lengths, rows, *cross = inputs
        held: Inputs = (
            filled(tokens, (n,), 0),
            filled(positions, (n,), 0),
            filled(slots, (n,), -1),
            filled(table, (n, key.columns[0]), 0),
            torch.arange(n + 1, dtype=starts.dtype, device=place),
            filled(lengths, (n,), 0),
            torch.arange(n, dtype=rows.dtype, device=place),
            *(filled(x, (n, key.columns[1]) if i == 0 else (n,), 0) for i, x in enumerate(cross)),
        )
        try:
            replay = self.recorder(lambda: self.run(*held))
        except RuntimeError as error:
            self.reason = f"a step cannot be recorded: {first_line(error)}"
            return None
        self.recorded += 1
        self._graphs[key] = made = _Recorded(held, replay)
        return made

    def _fill(self, held: Inputs, inputs: Inputs) -> None:
        """Put a step into a graph's inputs. What is left of a longer one before it is taken out."""
        n = inputs[5].shape[0]
        for i, (into, x) in enumerate(zip(held, inputs, strict=True)):
            if i == 4:
                continue  # one token each, whichever step it is
            if i in (3, 7):
                into[:n, : x.shape[1]].copy_(x)
                if x.shape[1] < into.shape[1]:
                    into[:n, x.shape[1] :].zero_()
            else:
                into[:n].copy_(x)
            if n < len(into):
                into[n:].fill_(-1 if i == 2 else 0)
