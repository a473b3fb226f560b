"""Files that the commands are run on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_decoder import DECODER


@pytest.fixture
def decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "140")
    (tmp_path / "decoder.py").write_text(DECODER)
    monkeypatch.chdir(tmp_path)
    return "decoder.py"
