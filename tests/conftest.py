"""What holds for every test: no network, one thread a worker, and a reason printed for each test that cannot run here."""

from __future__ import annotations

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Inductor's cache on disk does not notice that what our operators return has changed: each run of the tests has one of its own.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="attnopt-inductor-")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    reason = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(reason)


@pytest.fixture(autouse=True)
def _same_random_numbers_and_gradients_on() -> None:
    """Each test starts from the same seed, whatever ran before it, and with autograd on (a failed export may leave it off)."""
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
