"""A variant that hangs or kills its process costs one row, which says so."""

from __future__ import annotations

import sys

from zoo.processes import run_tasks

WORKER = """
import json, os, sys, time
for task in sys.argv[2:]:
    print("start", task, flush=True)
    if task == "hangs":
        time.sleep(60)
    if task == "dies":
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(7)
    print(json.dumps({"model": sys.argv[1], "task": task}), flush=True)
"""


def test_a_variant_that_hangs_or_dies_costs_one_row() -> None:
    tasks = ["first", "hangs", "second", "dies", "third"]
    found = dict(run_tasks("m", tasks, 3.0, (sys.executable, "-c", WORKER)))
    assert list(found) == tasks
    for task in ("first", "second", "third"):
        assert found[task] == {"model": "m", "task": task}
    assert found["hangs"] == {"failed": "no result within 3 s"}
    assert found["dies"] == {"failed": "the process ended with 7: out of luck"}
