"""AO9xx: what was wrong."""

from __future__ import annotations

from attnopt.remarks.page import Page

ERRORS: dict[str, Page] = {
    "AO901": Page(
        title="a site was put back",
        text="The optimized attention differs from the original by more than the budget, so the original form is back in place.",
        cause="",
        hint="",
        example="",
    ),
    "AO902": Page(
        title="verification failed",
        text="The optimized model differs from the original by more than the budget.",
        cause="",
        hint="",
        example="",
    ),
}
