"""Which test fails without which guard, and which conditions are no guards."""

from __future__ import annotations

TESTS: dict[str, str] = {
}

NO_GUARDS: dict[str, str] = {
}
