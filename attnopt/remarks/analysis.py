"""AO3xx: what was found out."""

from __future__ import annotations

from attnopt.remarks.page import Page

ANALYSIS: dict[str, Page] = {
    "AO301": Page(
        title="a dimension was specialised",
        text="The captured graph holds for one size of this dimension only; another size captures the model again.",
        cause="",
        hint="See the source line for where the size was turned into a constant.",
        example="",
    ),
    "AO302": Page(
        title="captured by torch.compile",
        text="torch.export does not take this model, or no inputs were given, so it is optimized when it runs.",
        cause="",
        hint="",
        example="",
    ),
    "AO303": Page(
        title="a part of the score is a dense tensor",
        text="This part could not be expressed by indices; it is read from memory, which is right but slower.",
        cause="",
        hint="",
        example="",
    ),
    "AO304": Page(
        title="unverified",
        text="The optimized model was not compared with the original.",
        cause="",
        hint="",
        example="",
    ),
    "AO305": Page(
        title="captured again",
        text="The model ran with another dtype, device, mode or set of arguments than it was captured with, and was captured again.",
        cause="",
        hint="",
        example="",
    ),
    "AO306": Page(
        title="a compiled function was left as it is",
        text="torch.compile handed over a function that cannot be traced to the form that the analysis reads; it runs as torch.compile made it.",
        cause="",
        hint="",
        example="",
    ),
}
