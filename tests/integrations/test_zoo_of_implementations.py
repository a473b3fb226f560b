"""Every model of transformers in the zoo computes with ``attn_implementation="attnopt"`` what it computes with its eager attention, or is refused."""

from __future__ import annotations

import pytest
import torch
from zoo.check import floats
from zoo.models import CASES

from attnopt.errors import AttnoptError
from attnopt.integrations import calls
from attnopt.integrations import transformers as integration

REFUSED = {"bloom", "mpt", "codegen", "mpnet", "longformer", "big_bird"}
"""Attentions of their own, which take no implementation from outside."""
UNKNOWN = {"gpt_neo", "gptj", "falcon", "falcon_alibi"}
"""The library looks the name up in a table of the model's own, and raises."""
NEVER_ASKED = {"deberta_v2", "xlnet"}
"""They compute as they always do, whatever implementation was named, and make their masks themselves."""
OF_THE_LIBRARY = [name for name, c in CASES.items() if getattr(c.build, "__qualname__", "").startswith("auto.") and "eager" in c.forms]


@pytest.mark.zoo
@pytest.mark.parametrize("name", OF_THE_LIBRARY)
def test_it_computes_what_the_eager_attention_does_or_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    integration.register()
    ran: list[str] = []
    plan = calls.plan
    monkeypatch.setattr(calls, "plan", lambda *a: (ran.append("called"), plan(*a))[1])
    case = CASES[name]
    for padded in (False, True) if case.padded else (False,):
        given = case.inputs(padded, 2, 24)
        with torch.no_grad():
            if name in REFUSED | UNKNOWN:
                with pytest.raises(AttnoptError if name in REFUSED else KeyError, match="attentions of its own" if name in REFUSED else "attnopt"):
                    case.build("attnopt")(**given)
                continue
            expected, found = (floats(case.build(form)(**given)) for form in ("eager", "attnopt"))
        assert bool(ran) == (name not in NEVER_ASKED)
        for a, b in zip(expected, found, strict=True):
            assert float((a - b).norm()) <= 1e-4 * float(a.norm()), f"padded: {padded}"
