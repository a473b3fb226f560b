"""One decoder by hand, which several modules serve in their own way."""

from __future__ import annotations

import pytest
from torch import nn

from serving.models import hand_written


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return hand_written()
