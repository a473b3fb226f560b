"""What holds for every test: no network, one thread a worker, and a reason printed for each test that cannot run here."""

from __future__ import annotations

import gc
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Inductor's cache on disk does not notice that what our operators return has changed: each run of the tests has one of its own.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="attnopt-inductor-")

import pytest
import torch
import torch._dynamo.config

torch.set_num_threads(1)

# Export keeps what each operation did to fake tensors, for the layers that come after. Models of one or two layers only pay for that:
# a quarter of the time of the tests. These keep it, as do all tests that start a process of their own.
KEEP_FAKE_RESULTS = {"test_api.py", "test_zoo.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(reason)


def pytest_collection_finish() -> None:
    """What was imported stays: the collector of cycles need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """What is collected here is collected before a worker says that it is done: whatever it does later for more than five seconds, xdist
    interrupts, and the KeyboardInterrupt appears in the middle of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _memory_of_fake_results(request: pytest.FixtureRequest) -> None:
    torch._dynamo.config.fake_tensor_cache_enabled = request.path.name in KEEP_FAKE_RESULTS


@pytest.fixture(autouse=True)
def _same_random_numbers_and_gradients_on() -> None:
    """Each test starts from the same seed, whatever ran before it, and with autograd on (a failed export may leave it off)."""
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
