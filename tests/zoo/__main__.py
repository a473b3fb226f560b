"""``python -m zoo [MODEL...]``: run the zoo, print the scoreboard, and write it to benchmarks/results/zoo.json and docs/zoo.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from zoo import page
from zoo.case import Case
from zoo.models import CASES
from zoo.processes import run_all, tasks
from zoo.scoreboard import merged, rows_of, scoreboard, table, write

RESULTS = page.RESULTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models, or families such as decoder (all)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of one variant")
    parser.add_argument("--only", default="", help="variants whose name holds this, such as eager-padded")
    parser.add_argument("--no-inductor", action="store_true", help="do not count what Inductor's own matcher fuses")
    parser.add_argument("--write", type=Path, help="where to write the scoreboard (benchmarks/results/zoo.json, unless parts are left out)")
    options = parser.parse_args()
    unknown = [m for m in options.models if m not in CASES and m not in {c.family for c in CASES.values()}]
    if unknown:
        parser.error(f"no model or family is called {unknown[0]!r}; there are {', '.join(CASES)}")
    cases = [c for c in CASES.values() if not options.models or {c.name, c.family} & set(options.models)]

    def names(case: Case) -> list[str]:
        return [t for t in tasks(case) if options.only in t and not (options.no_inductor and t.startswith("inductor-"))]

    console = Console(stderr=True)
    start = time.perf_counter()

    def tell(case: Case, task: str, result: dict[str, Any]) -> None:
        wrong = [result["failed"]] if "failed" in result else [result["error"]] if "inductor" in result and "error" in result else result.get("deviations", [])
        seconds = result.get("seconds", {}).get("optimize", 0.0)
        console.print(
            f"{time.perf_counter() - start:6.0f} s  {case.name} {task}  {seconds:.1f} s  {'ok' if not wrong else 'DEVIATES'}",
            style="red" if wrong else "dim",
            highlight=False,
            soft_wrap=True,
        )
        for text in wrong:
            console.print(f"          {text}", style="red", highlight=False, markup=False, soft_wrap=True)

    found = run_all(cases, names, options.jobs, options.seconds, tell)
    rows = [row for c in cases for row in rows_of(c, found[c.name])]
    board = scoreboard(rows)
    Console(width=200).print(table(board))
    target = options.write or (None if options.only or options.no_inductor else RESULTS)
    if target is not None:
        # models that did not run now keep the rows of an earlier run
        write(merged(json.loads(target.read_text()), rows, list(CASES)) if target.exists() else board, target)
        console.print(f"wrote {target}")
        if target == RESULTS:
            page.main()
            console.print(f"wrote {page.PAGE}")
    return int(any(row["deviations"] for row in board["rows"]))


if __name__ == "__main__":
    sys.exit(main())
