"""Timing several functions side by side: in turn, in rounds, on inputs that have left the cache.

On CUDA a time is what the device needs between two events. Before each call a waiting kernel is queued, so that the host has
handed over all that the call launches before the first of it runs: what a call costs the host stands apart, as ``host_us``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from running import message

Call = Callable[[int], object]
"""Runs once on the inputs of the given number."""
CYCLES_PER_SECOND = 1.98e9
"""At most, of an H100 or H200; where the clock is lower the wait is longer."""
LONGEST_WAIT = 0.05
SLOW = 0.1
"""Seconds from which a function is timed alone, a few times."""


@dataclass
class Timed:
    ms: float
    """Median on the device."""
    quartiles: tuple[float, float]
    host_us: float
    """Median of what a call costs the host; on a CPU the same as ``ms``."""
    runs: int


@dataclass
class Stopwatch:
    device: torch.device
    sets: int
    """How many sets of inputs there are."""
    seconds: float = 1.0
    """To spend on each group of functions."""
    cold: bool = True
    """Each call takes another set of inputs than the one before it; otherwise each is timed at its second run on one set."""
    most_rounds: int = 50
    alone: bool = False
    """Each call meets an idle device, so that what it costs the host is in its time: for whole models."""
    _turn: int = field(default=0, repr=False)

    def measure(self, calls: Mapping[str, Call]) -> dict[str, Timed | str]:
        """Times by name. A function that raises while it is timed has its message instead."""
        out: dict[str, Timed | str] = {}
        estimates: dict[str, tuple[float, float]] = {}
        for name, call in calls.items():
            try:
                for _ in range(2):
                    self._round({name: call}, 0.0)
                device, host = self._round({name: call}, 0.0)[name]
                estimates[name] = (device, host)
            except Exception as e:  # noqa: BLE001 - a peer may raise anything; its message stands in its row
                out[name] = message(e)
        slow = {} if self.alone else {n: calls[n] for n, (device, _) in estimates.items() if device >= SLOW}
        fast = {n: calls[n] for n in estimates if n not in slow}
        for group, rounds in [(fast, self._rounds(fast, estimates)), *(({n: c}, 3) for n, c in slow.items())]:
            times: dict[str, list[tuple[float, float]]] = {n: [] for n in group}
            names = list(group)
            for r in range(rounds):
                for n in names[r % len(names) :] + names[: r % len(names)]:
                    # each waits for its own host alone: calls that launch much would use up the wait of those behind them
                    wait = 0.0 if self.alone else min(LONGEST_WAIT, 1.5 * estimates[n][1])
                    times[n].append(self._round({n: group[n]}, wait)[n])
            for n, found in times.items():
                device_times = sorted(t[0] * 1e3 for t in found)
                quarter = len(found) // 4
                host = statistics.median(t[1] for t in found) * 1e6
                out[n] = Timed(statistics.median(device_times), (device_times[quarter], device_times[-1 - quarter]), host, len(found))
        return out

    def _rounds(self, group: Mapping[str, Call], estimates: Mapping[str, tuple[float, float]]) -> int:
        one = sum(max(estimates[n]) * (1 if self.cold else 2) for n in group)
        return max(5, min(self.most_rounds, int(self.seconds / max(one, 1e-9)))) if group else 0

    def _round(self, calls: Mapping[str, Call], wait: float) -> dict[str, tuple[float, float]]:
        """(device seconds, host seconds) of one call each, in turn."""
        cuda = self.device.type == "cuda"
        marks: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        hosts: dict[str, float] = {}
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(int(wait * CYCLES_PER_SECOND) + 1)
        for name, call in calls.items():
            n = self._turn % self.sets
            if not self.cold:
                call(n)
            if cuda:
                marks[name] = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
                marks[name][0].record()
            start = time.perf_counter()
            call(n)
            hosts[name] = time.perf_counter() - start
            if cuda:
                marks[name][1].record()
            self._turn += 1
        if not cuda:
            return {n: (t, t) for n, t in hosts.items()}
        torch.cuda.synchronize(self.device)
        return {n: (begin.elapsed_time(end) / 1e3, hosts[n]) for n, (begin, end) in marks.items()}
