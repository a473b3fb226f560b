"""Every attention of the zoo is found, replaced, named and verified, or refused for the right reason.

The tests without a mark are one or two variants of a model of each spelling; ``pytest tests/zoo -m zoo -k llama`` runs all of a model's.
"""

from __future__ import annotations

import pytest

from zoo.case import Case, Variant
from zoo.check import check
from zoo.models import CASES

BOTH = ("eager-padded-dynamic", "sdpa-unpadded-static")
REPRESENTATIVE: dict[str, tuple[str, ...]] = {
    "gpt2": BOTH,
}


def _parameters() -> list[object]:
    found = []
    for case in CASES.values():
        for variant in case.variants():
            marks = () if variant.name in REPRESENTATIVE.get(case.name, ()) else (pytest.mark.zoo,)
            found.append(pytest.param(case, variant, id=f"{case.name}-{variant.name}", marks=marks))
    return found


@pytest.mark.parametrize(("case", "variant"), _parameters())
def test_every_attention(case: Case, variant: Variant) -> None:
    row = check(case, variant)
    assert row.deviations == []


def test_the_representative_part_names_variants_that_exist() -> None:
    assert {(m, v) for m, names in REPRESENTATIVE.items() for v in names} <= {(c.name, v.name) for c in CASES.values() for v in c.variants()}
