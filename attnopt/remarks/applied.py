"""AO1xx: what was applied."""

from __future__ import annotations

from attnopt.remarks.page import Page

APPLIED: dict[str, Page] = {
    "AO101": Page(
        title="attention replaced",
        text="The attention was lifted to a spec and runs as one fused operation.",
        cause="",
        hint="",
        example="",
    ),
    "AO102": Page(
        title="KV heads un-expanded",
        text="Keys and values were repeated for each query head; the kernel now reads the shared heads.",
        cause="",
        hint="",
        example="",
    ),
    "AO103": Page(
        title="mask lifted",
        text="An existing attention call had a dense mask; the mask is now computed inside the kernel from its formula.",
        cause="",
        hint="",
        example="",
    ),
}
