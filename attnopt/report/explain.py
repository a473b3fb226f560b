"""One site in full: what it was proven to be and which kernel runs it, or why it was missed, on which line, and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnopt.errors import AttnoptError
from attnopt.ir import expr as E
from attnopt.ir.printing import render
from attnopt.ir.spec import AttentionSpec
from attnopt.remarks import PAGES, NodeInfo, Remark
from attnopt.report.names import grouped, shown_names
from attnopt.report.report import Report, Site
from attnopt.report.source import quote, shown_path

LABELS = 11
"""Columns that labels take."""
_EMPTY_ROWS = {
    "uniform": "a row that sees no key gives the average of all values",
    "nan": "a row that sees no key gives NaN",
    "zero": "a row that sees no key gives zeros",
    "program": "a row that sees no key is computed from its hidden scores",
}


@dataclass(frozen=True)
class Explanation:
    """A site, and the names of all that are like it (layers of one stack), itself included."""

    site: Site
    names: tuple[str, ...]
    title: str

    def facts(self) -> list[tuple[str, list[str]]]:
        """A label and lines for each thing that is known."""
        site = self.site
        out = [("at", _place(site.source))]
        if site.spec is not None:
            out += _meaning(site, site.spec)
        for remark in site.remarks:
            if remark.code != "AO101":
                out += _remark(remark, site)
        return out

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the site's own facts, the quoted lines, and for each remark what its page says."""
        remarks = [
            {
                **r.to_dict(),
                "lines": _lines(r.node.source if r.node is not None else r.source),
                "supported": PAGES[r.code].supported,
                "because": PAGES[r.code].cause,
                "change": r.advice,
            }
            for r in self.site.remarks
        ]
        return {**self.site.to_dict(), "alike": list(self.names), "lines": _lines(self.site.source), "remarks": remarks}

    def lines(self) -> list[tuple[str, str]]:
        """A label (empty where a line goes on) and text, line by line."""
        return [(label if not i else "", line) for label, lines in self.facts() for i, line in enumerate(lines)]

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"  {label:{LABELS}}{line}".rstrip() for label, line in self.lines())])


def explain(report: Report, name: str | None = None) -> list[Explanation]:
    """That of one site by name; without a name, of all that were missed, are weak, or are no attention, those alike said once."""
    if name is not None:
        return [_explanation([_named(report, name)])]
    return [_explanation(group) for group in grouped(s for s in report.sites if s.status != "replaced" or s.is_weak)]


def no_site_left(report: Report) -> str:
    """What to say when ``explain`` without a name has nothing to tell."""
    if not report.sites:
        return "No attention was found in this model."
    return f"Every attention was replaced, and none is weak. To see what one was proven to be, name it: {known_names(report)}."


def known_names(report: Report) -> str:
    """All sites by name, layers of one stack once."""
    return ", ".join(shown_names(g) for g in grouped(report.sites))


def _named(report: Report, name: str) -> Site:
    for site in report.sites:
        if site.name == name:
            return site
    if not report.sites:
        raise AttnoptError(f"There is no site {name!r}: no attention was found in this model.")
    names = [s.name for s in report.sites]
    near = list(dict.fromkeys([*(n for n in names if name in n), *difflib.get_close_matches(name, names, n=3, cutoff=0.5)]))[:3]
    raise AttnoptError(f"There is no site {name!r}; the sites of this model are {known_names(report)}.", f"Close to it: {', '.join(near)}." if near else "")


def _explanation(group: Sequence[Site]) -> Explanation:
    site = group[0]
    what = site.status if site.is_attention else "no attention"
    words = f": {site.spec}" if site.status == "replaced" else ""
    return Explanation(site, tuple(s.name for s in group), f"{shown_names(list(group))}: {what}{words}")


def _meaning(site: Site, spec: AttentionSpec) -> list[tuple[str, list[str]]]:
    d = spec.dims
    heads = f"{render(d.Hq)} heads" if d.Hq is d.Hkv else f"{render(d.Hq)} query heads, {render(d.Hkv)} KV heads"
    size = f"head size {render(d.D)}" if d.D is d.Dv else f"head size {render(d.D)} of queries and keys, {render(d.Dv)} of values"
    out = [
        ("sizes", [f"batch {render(d.B)}, {heads}, {render(d.Sq)} queries, {render(d.Skv)} keys, {size}"]),
        ("score", [render(spec.score, spec.load_names)]),
        ("mask", ["none: every query sees every key" if spec.mask is E.TRUE else f"query q sees key k where {render(spec.mask, spec.load_names)}"]),
    ]
    if spec.rows_may_be_empty():
        out.append(("", [_EMPTY_ROWS[spec.empty_rows]]))
    if site.loads:
        out.append(("reads", [f"{n}{_at(n, site)}" for n in site.loads]))
    if site.kernel:
        out.append(("kernel", [f"{site.kernel}: {site.why}" if site.why else site.kernel]))
    return out


def _remark(remark: Remark, site: Site) -> list[tuple[str, list[str]]]:
    page = PAGES[remark.code]
    out = [("", [""]), (remark.code, [page.title]), ("actual", [remark.message])]
    if remark.node is not None:
        out.append(("node", [f"{remark.node}{_at(remark.node, site)}", *(_place(remark.node.source)[1:] if remark.node.source != site.source else [])]))
    out += [(label, [text]) for label, text in (("supported", page.supported), ("because", page.cause), ("change", remark.advice)) if text]
    return out


def _at(node: NodeInfo, site: Site) -> str:
    if not node.source:
        return ""
    return ", on that line" if node.source == site.source else f", at {shown_path(node.source)}"


def _place(source: str) -> list[str]:
    """file:line, and the line itself with its neighbours where the file can be read."""
    found = quote(source)
    return [shown_path(source) or "a line that the graph does not record", *(found.shown() if found is not None else [])]


def _lines(source: str) -> dict[str, Any] | None:
    found = quote(source)
    return None if found is None else found.to_dict()
