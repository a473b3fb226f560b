"""Remarks: what was done or not done to each attention, and why. Every remark has a stable code.

AO1xx applied, AO2xx missed, AO3xx analysis, AO9xx error. The table below is the one place that names them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["applied", "missed", "analysis", "error"]
_LEVELS: dict[str, Level] = {"1": "applied", "2": "missed", "3": "analysis", "9": "error"}


@dataclass(frozen=True)
class Page:
    """What ``attnopt explain CODE`` prints."""

    title: str
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Remark:
    """One remark: a code of the table, a sentence with actual and supported values, where it stands, and a hint."""

    code: str
    message: str
    site: str = ""
    """Module path of the attention it is about; empty for the whole model."""
    source: str = ""
    """file:line in the user's code."""
    hint: str = ""

    def __post_init__(self) -> None:
        if self.code not in PAGES:
            raise KeyError(f"{self.code} is not in the table of remarks")

    @property
    def level(self) -> Level:
        return _LEVELS[self.code[2]]

    @property
    def title(self) -> str:
        return PAGES[self.code].title

    def to_dict(self) -> dict[str, str]:
        return {**asdict(self), "level": self.level, "title": self.title}

    def __str__(self) -> str:
        where = f" [{self.site}]" if self.site else ""
        hint = self.hint or PAGES[self.code].hint
        return f"{self.code}{where} {self.message}" + (f" ({hint})" if hint else "")


NOT_ATTENTION = frozenset({"AO201", "AO202", "AO211"})
"""Codes that say of a softmax that it is no attention: a classifier's, a router's. Nothing was missed there."""

PAGES: dict[str, Page] = {
    # ---- applied
    "AO101": Page("attention replaced", "The attention was lifted to a spec and runs as one fused operation."),
    "AO102": Page("KV heads un-expanded", "Keys and values were repeated for each query head; the kernel now reads the shared heads."),
    "AO103": Page("mask lifted", "An existing attention call had a dense mask; the mask is now computed inside the kernel from its formula."),
    # ---- missed
    "AO201": Page("not an attention: no product of probabilities and values", "The softmax's result is not multiplied with values over the axis it was taken along.", "A classifier's softmax needs no attention kernel."),
    "AO202": Page("not an attention: no product of queries and keys", "The softmax's input holds no contraction of two tensors, one along the softmax axis and one not."),
    "AO203": Page("the probabilities are used elsewhere", "A value inside the attention (scores or probabilities) has another user, so it has to exist in memory.", "Do not return attention weights (output_attentions=False, need_weights=False)."),
    "AO204": Page("the probabilities are changed before they meet the values", "Something that is neither a view, a cast nor dropout stands between softmax and the product with the values."),
    "AO205": Page("the softmax axis is not the key axis", "The probabilities are normalised along another axis than the one that is summed with the values."),
    "AO206": Page("operands do not factor into batch, head, query and key", "The index maps of the operands could not be brought to the form [batch, head, sequence, feature]."),
    "AO207": Page("a tensor in the region is modified in place", "A value that the attention reads is written by an in-place operation that could not be made functional."),
    "AO208": Page("the call has an argument that is not supported", "An argument of the existing attention call is outside of what a spec can say."),
    "AO209": Page("the captured function breaks inside the attention", "torch.compile split the model between the product with the keys and the product with the values."),
    "AO211": Page("channels are mixed, not positions", "The product has the form of an attention, but its keys are feature channels and its features are positions; attention kernels gain nothing there."),
    "AO212": Page("the scores pass through an operator that cannot be expressed", "Something between the product with the keys and the softmax is neither pointwise nor a view (talking heads, for instance)."),
    # ---- analysis
    "AO301": Page("a dimension was specialised", "The captured graph holds for one size of this dimension only; another size captures the model again.", "See the source line for where the size was turned into a constant."),
    "AO302": Page("captured by torch.compile", "torch.export does not take this model, or no inputs were given, so it is optimized when it runs."),
    "AO303": Page("a part of the score is a dense tensor", "This part could not be expressed by indices; it is read from memory, which is right but slower."),
    "AO304": Page("unverified", "The optimized model was not compared with the original."),
    "AO305": Page("captured again", "The model ran with another dtype, device, mode or set of arguments than it was captured with, and was captured again."),
    "AO306": Page("a compiled function was left as it is", "torch.compile handed over a function that cannot be traced to the form that the analysis reads; it runs as torch.compile made it."),
    # ---- errors
    "AO901": Page("a site was put back", "The optimized attention differs from the original by more than the budget, so the original form is back in place."),
    "AO902": Page("verification failed", "The optimized model differs from the original by more than the budget."),
}
"""Every code that can be printed."""
