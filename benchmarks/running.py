"""Going on after what others' code may do: raise anything, not come back, or take the device along."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

import torch

_BEGAN = "ATTNOPT_BENCH_BEGAN"


def message(e: BaseException) -> str:
    """An exception as one short line."""
    first = next((line for line in str(e).splitlines() if line.strip()), "")
    return f"{type(e).__name__}: {first}"[:200]


@contextlib.contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Raises TimeoutError where the block takes longer (a compiler that does not come back).

    Again each second until the block is left: Python prints and drops what is raised within a destructor or a weak reference's callback."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Lost(Exception):
    """The CUDA context is gone, and with it this process. ``pair`` names the item and who was running it."""

    def __init__(self, pair: str) -> None:
        super().__init__(pair)
        self.pair = pair


def alive(device: torch.device, pair: str) -> None:
    """Raises ``Lost`` where a failure took the device along."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as e:
        raise Lost(pair) from e


def add_options(parser: argparse.ArgumentParser, budget: float, patience: int) -> None:
    parser.add_argument("--budget", type=float, default=budget, help="seconds after which nothing more is begun")
    parser.add_argument("--patience", type=int, default=patience, help="seconds until something has to be compiled and run once")
    parser.add_argument("--leave-out", default="", help="ITEM:NAME pairs, separated by semicolons")
    parser.add_argument("--after", type=int, default=-1, help="go on after the item of this number")

    parser.add_argument("--with-flash-attn", action="store_true", help="let attnopt's auto take flash-attn where it is installed")


def begin(options: argparse.Namespace) -> None:
    """Note the time, and keep attnopt from what is installed to be compared with."""
    spent()
    if not options.with_flash_attn and "flash_attn" not in (before := os.environ.get("ATTNOPT_DISABLE", "")):
        os.environ["ATTNOPT_DISABLE"] = ",".join(filter(None, (before, "flash_attn")))


def left_out(options: argparse.Namespace) -> set[str]:
    return set(filter(None, options.leave_out.split(";")))


def spent() -> float:
    """Seconds since the run began, over all its processes."""
    return time.time() - float(os.environ.setdefault(_BEGAN, str(time.time())))


def again(number: int, pair: str, options: argparse.Namespace) -> None:
    """Start over at this item in a fresh process image, without the one that took the device along."""
    print(f"[{number}] lost the device in {pair}; going on without it", flush=True)
    given = [a for a in sys.argv[1:] if not a.startswith(("--after=", "--leave-out="))]
    os.execv(sys.executable, [sys.executable, sys.argv[0], *given, f"--after={number - 1}", f"--leave-out={options.leave_out};{pair}"])
