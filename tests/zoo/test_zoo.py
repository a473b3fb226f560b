"""Every attention of the zoo is found, replaced, named and verified, or refused for the right reason.

The tests without a mark are one or two variants of a model of each spelling; ``pytest tests/zoo -m zoo -k llama`` runs all of a model's.
"""

from __future__ import annotations

import pytest

from zoo.case import Case, Variant
from zoo.check import check
from zoo.models import CASES

REPRESENTATIVE: dict[str, tuple[str, ...]] = {
    # what the mask is made of
    "gpt_neo": ("eager-padded-dynamic",),
    "llama": ("eager-padded-dynamic", "sdpa-unpadded-static"),
    "mistral": ("eager-padded-dynamic",),
    "llama4": ("eager-padded-static",),
    "modernbert": ("sdpa-padded-dynamic",),
    "hand_gpt": ("eager-unpadded-dynamic",),
    "hand_prefix": ("eager-unpadded-static",),
    "hand_documents": ("eager-unpadded-static",),
    # what is added to the scores or done to them
    "bloom": ("eager-padded-dynamic",),
    "falcon_alibi": ("sdpa-padded-static",),
    "gemma2": ("eager-padded-static",),
    "gpt_oss": ("eager-unpadded-dynamic",),
    "mpnet": ("eager-padded-static",),
    "deberta_v2": ("eager-unpadded-static",),
    "xlnet": ("eager-unpadded-dynamic",),
    "swin": ("eager-unpadded-static",),
    "t5": ("eager-padded-dynamic",),
    # how the product is written, and what is multiplied
    "gptj": ("eager-padded-static",),
    "deepseek_v3": ("eager-padded-static",),
    "gpt_bigcode": ("eager-unpadded-dynamic",),
    "hand_exp": ("eager-padded-dynamic",),
    # who attends to whom
    "bert": ("eager-padded-dynamic", "sdpa-padded-static"),
    "vit": ("eager-unpadded-dynamic",),
    "bart": ("sdpa-padded-dynamic",),
    "whisper": ("eager-unpadded-dynamic",),
    "qwen2_past": ("eager-unpadded-dynamic",),
    "xt_memory": ("sdpa-unpadded-static",),
    "vp_cross_vit": ("eager-unpadded-static",),
    "df_unet": ("eager-padded-static",),
    # what must be left alone
    "xt_talking_heads": ("eager-unpadded-static",),
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
