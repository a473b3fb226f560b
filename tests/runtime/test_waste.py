"""The figure that docs/serving.md gives, on a sample of the traffic of benchmarks/cache_waste.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_waste_is_under_4_percent_at_pages_of_16_where_a_padded_cache_wastes_half() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "cache_waste.py"
    spec = importlib.util.spec_from_file_location("cache_waste", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    s = module.traffic(16, 80)
    print(f"paged {s.mean_waste:.2%}, padded {s.mean_padded_waste:.2%}, reserved {s.mean_reserved_waste:.2%}")
    assert s.finished == 80
    assert 0 < s.mean_waste < 0.04
    assert s.mean_reserved_waste > s.mean_padded_waste > 0.5
