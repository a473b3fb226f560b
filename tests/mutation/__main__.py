"""``python -m mutation [number]``: removes each guard in turn (or a sample of that many) and runs the test that must notice."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

from mutation.guards import Guard, all_guards
from mutation.registry import NO_GUARDS, TESTS
from mutation.runner import run


def unlisted(guards: Sequence[Guard]) -> list[str]:
    """Guards of the source that neither list names."""
    return [g.name for g in guards if g.name not in TESTS and g.name not in NO_GUARDS]


def gone(guards: Sequence[Guard]) -> list[str]:
    """Names in the lists that no guard of the source has any more."""
    return sorted({*TESTS, *NO_GUARDS} - {g.name for g in guards})


def main(sample: int | None) -> int:
    guards = [g for g in all_guards() if g.name in TESTS]
    chosen = guards if sample is None else random.Random(0).sample(guards, min(sample, len(guards)))
    plain = run(sorted({TESTS[g.name] for g in chosen}))
    if not plain.passed:
        print(f"With every guard in place a test fails:\n{plain.output[-3000:]}")
        return 1
    unnoticed = 0
    for g in chosen:
        if run([TESTS[g.name]], g).passed:
            unnoticed += 1
            print(f"{g.file}:{g.line}: without `{g.condition}` {TESTS[g.name]} still passes", flush=True)
    print(f"{len(chosen)} of {len(guards)} guards removed one by one, {len(chosen) - unnoticed} noticed; {len(NO_GUARDS)} conditions are listed as no guards.")
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else None))
