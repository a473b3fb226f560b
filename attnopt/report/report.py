"""What an optimization did: sites, remarks, verdict. Plain data, printable anywhere."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from attnopt.ir.printing import render
from attnopt.ir.spec import AttentionSpec
from attnopt.remarks import NOT_ATTENTION, NodeInfo, Remark

Status = Literal["replaced", "missed", "reverted"]


def _finite(x: float) -> float | None:
    """JSON has neither NaN nor infinity: None stands for both."""
    return x if math.isfinite(x) else None


@dataclass
class Check:
    """One comparison with the original. ``error`` and ``budget`` are norm-relative errors against float64."""

    name: str
    error: float
    budget: float
    passed: bool
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "error": _finite(self.error), "budget": _finite(self.budget)}


@dataclass
class Verdict:
    """What verification said. ``passed`` is None when nothing was compared (unverified)."""

    passed: bool | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def worst(self) -> Check | None:
        """The check that used the largest part of its budget."""
        return max(self.checks, key=lambda c: c.error / c.budget if c.budget > 0 else float(c.error > 0), default=None)

    @property
    def error(self) -> float:
        return self.worst.error if self.worst else float("nan")

    @property
    def budget(self) -> float:
        return self.worst.budget if self.worst else float("nan")

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "error": _finite(self.error), "budget": _finite(self.budget), "checks": [c.to_dict() for c in self.checks]}

    def __str__(self) -> str:
        if self.passed is None:
            return "unverified"
        word = "verified" if self.passed else "FAILED"
        return f"{word}: {len(self.checks)} checks, worst error {self.error:.2e} of budget {self.budget:.2e}"


@dataclass
class Site:
    """One attention (or one softmax that turned out not to be a replaceable one)."""

    name: str
    """Module path, as in ``model.layers.0.self_attn``; with ``#2`` and so on where a module has several."""
    source: str
    """file:line of the user's code."""
    status: Status
    spec: AttentionSpec | None = None
    kernel: str = ""
    why: str = ""
    """Why this kernel, or why not."""
    remarks: list[Remark] = field(default_factory=list)
    loads: list[NodeInfo] = field(default_factory=list)
    """The tensors that score and mask read, in the order of ``spec.loads``."""
    relations: tuple[str, ...] = ()
    """Equalities between sizes of the inputs on which the proofs rest; tested at each call, and another call is captured anew."""

    @property
    def is_attention(self) -> bool:
        """False for a softmax that turned out to be something else: it is listed, with the reason, and not counted."""
        return not any(r.code in NOT_ATTENTION for r in self.remarks)

    @property
    def is_weak(self) -> bool:
        """Replaced, but slower than it could be: a part of the score is read as a dense tensor, or no fast kernel takes it."""
        return self.status == "replaced" and (self.kernel == "reference" or any(r.code == "AO303" for r in self.remarks))

    def to_dict(self) -> dict[str, Any]:
        s = self.spec
        facts = (
            None
            if s is None
            else {
                "words": str(s),
                "causal": s.causal,
                "window": list(s.window),
                "key_padding": s.key_padding,
                "document": s.document,
                "alibi": s.alibi,
                "bias": None if s.bias is None else str(s.bias),
                "softcap": s.softcap,
                "sinks": s.sinks,
                "scale": s.scale,
                "groups": s.groups,
                "empty_rows": s.empty_rows,
                "score": render(s.score, s.load_names),
                "mask": render(s.mask, s.load_names),
            }
        )
        return {
            "name": self.name,
            "source": self.source,
            "status": self.status,
            "attention": self.is_attention,
            "weak": self.is_weak,
            "spec": facts,
            "loads": [n.to_dict() for n in self.loads],
            "relations": list(self.relations),
            "kernel": self.kernel,
            "why": self.why,
            "remarks": [r.to_dict() for r in self.remarks],
        }


@dataclass
class Report:
    """The whole story of one optimized module, at ``module.attnopt_report``."""

    sites: list[Site] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    """Remarks on the model as a whole; those on one attention stand with its site."""
    verdict: Verdict = field(default_factory=Verdict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Time per stage: capture, passes, verify."""

    @property
    def replaced(self) -> list[Site]:
        return [s for s in self.sites if s.status == "replaced"]

    @property
    def attentions(self) -> list[Site]:
        """The sites that are attentions, replaced or not."""
        return [s for s in self.sites if s.is_attention]

    @property
    def missed(self) -> list[Site]:
        """Attentions that were not replaced."""
        return [s for s in self.attentions if s.status != "replaced"]

    def explain(self, site: str | None = None) -> str:
        """What one site was proven to be, or why it was missed, with its source lines and what to change.

        Without ``site``: that of every attention that was missed or is slower than it could be, of every softmax that is no
        attention, and the remarks on the model as a whole. Raises AttnoptError, with the names that there are, for a name that none has.
        """
        from attnopt.report.explain import as_text

        return as_text(self, site)

    def to_dict(self) -> dict[str, Any]:
        return {
            "sites": [s.to_dict() for s in self.sites],
            "remarks": [r.to_dict() for r in self.remarks],
            "verdict": self.verdict.to_dict(),
            "seconds": dict(self.seconds),
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} of {len(self.attentions)} attentions replaced, {self.verdict}"]
        for s in self.sites:
            what = str(s.spec) if s.spec is not None else "-"
            lines.append(f"  {s.status:8} {s.name} ({s.source}): {what}; {s.kernel or s.why}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in (s.name, s.source, str(s.spec or "-"), s.status, s.kernel, s.why)) + "</tr>"
            for s in self.sites
        )
        head = "".join(f"<th>{x}</th>" for x in ("site", "source", "computes", "status", "kernel", "why"))
        return f"<p>{html.escape(str(self.verdict))}</p><table><tr>{head}</tr>{rows}</table>"
