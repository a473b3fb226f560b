"""A process that runs some variants of one model and writes one line of JSON for each: ``python -m zoo.worker MODEL VARIANT...``.

The line ``start VARIANT`` is written before each, so that whoever waits knows which one hung or crashed. A variant called
``inductor-FORM-padded`` or ``inductor-FORM-unpadded`` counts what Inductor's own matcher fuses.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path


def main(model: str, variants: list[str]) -> None:
    # Lines for the runner go to the first standard output; what libraries print goes to standard error.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.ERROR)
    from zoo.check import check, empty_row
    from zoo.models import CASES

    case = CASES[model]
    for name in variants:
        print("start", name, file=out)
        torch.manual_seed(0)
        torch.compiler.reset()  # each variant is the first of its class that is compiled
        torch.set_grad_enabled(True)  # a failed export may have left it off
        try:
            if name.startswith("inductor-"):
                result = count(model, name)
            else:
                result = check(case, case.variant(name)).to_dict()
        except Exception as error:  # noqa: BLE001 - a row says what happened
            traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error).strip()[:400]} ({Path(where.filename).name}:{where.lineno})"
            result = {"inductor": name, "error": text} if name.startswith("inductor-") else empty_row(case, case.variant(name), text).to_dict()
        print(json.dumps(result), file=out)


def count(model: str, name: str) -> dict[str, object]:
    from zoo.case import BATCH, LENGTH
    from zoo.inductor import count_fused
    from zoo.models import CASES

    _, form, mask = name.split("-")
    case = CASES[model]
    return {"inductor": name, "fused": count_fused(case.build(form), case.inputs(mask == "padded", BATCH, LENGTH))}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
