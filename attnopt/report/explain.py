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
    """A site, or the whole model where ``site`` is None, with what was remarked on it."""

    title: str
    site: Site | None
    names: tuple[str, ...]
    """All sites that are like this one (layers of one stack), itself included."""
    remarks: tuple[Remark, ...]

    def facts(self) -> list[tuple[str, list[str]]]:
        """A label and lines for each thing that is known."""
        out: list[tuple[str, list[str]]] = []
        if self.site is not None:
            out.append(("at", _place(self.site.source)))
            if self.site.spec is not None:
                out += _meaning(self.site, self.site.spec)
        for remark in self.remarks:
            if remark.code != "AO101":
                out += [*([("", [""])] if out else []), *_remark(remark, "" if self.site is None else self.site.source)]
        return out

    def lines(self) -> list[tuple[str, str]]:
        """A label (empty where a line goes on) and text, line by line."""
        return [(label if not i else "", line) for label, lines in self.facts() for i, line in enumerate(lines)]

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
            for r in self.remarks
        ]
        site = {} if self.site is None else {**self.site.to_dict(), "alike": list(self.names), "lines": _lines(self.site.source)}
        return {**site, "remarks": remarks}

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"  {label:{LABELS}}{line}".rstrip() for label, line in self.lines())])


def explain(report: Report, name: str | None = None) -> list[Explanation]:
    """That of one site by name; without a name, of all that were missed, are weak, or are no attention, those alike said once."""
    if name is not None:
        return [_of_sites([_named(report, name)])]
    return [_of_sites(group) for group in grouped(s for s in report.sites if s.status != "replaced" or s.is_weak)]


def whole_model(report: Report) -> Explanation | None:
    """The remarks that are on no site; None where there are none."""
    remarks = tuple({(r.code, r.message): r for r in report.remarks}.values())
    return Explanation("the whole model", None, (), remarks) if remarks else None


def as_text(report: Report, name: str | None = None) -> str:
    """``explain`` as plain text; without a name, with the remarks on the model as a whole."""
    found = explain(report, name)
    model = whole_model(report) if name is None else None
    return "\n\n".join([*([no_site_left(report)] if not found else map(str, found)), *([str(model)] if model is not None else [])])


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


def _of_sites(group: Sequence[Site]) -> Explanation:
    site = group[0]
    what = site.status if site.is_attention else "no attention"
    words = f": {site.spec}" if site.status == "replaced" else ""
    return Explanation(f"{shown_names(list(group))}: {what}{words}", site, tuple(s.name for s in group), tuple(site.remarks))


def _meaning(site: Site, spec: AttentionSpec) -> list[tuple[str, list[str]]]:
    d = spec.dims
    heads = _count(d.Hq, "head") if d.Hq is d.Hkv else f"{_count(d.Hq, 'query head')}, {_count(d.Hkv, 'KV head')}"
    size = f"head size {render(d.D)}" if d.D is d.Dv else f"head size {render(d.D)} of queries and keys, {render(d.Dv)} of values"
    out = [
        ("sizes", [f"batch {render(d.B)}, {heads}, {'1 query' if d.Sq is E.ONE else f'{render(d.Sq)} queries'}, {_count(d.Skv, 'key')}, {size}"]),
        ("score", [render(spec.score, spec.load_names)]),
        ("mask", ["none: every query sees every key" if spec.mask is E.TRUE else f"query q sees key k where {render(spec.mask, spec.load_names)}"]),
    ]
    if spec.sink is not None:
        out.append(("sink", [f"one more key without a value, with the score {render(spec.sink, spec.load_names)}"]))
    if spec.rows_may_be_empty():
        out.append(("", [_EMPTY_ROWS[spec.empty_rows]]))
    if site.loads:
        out.append(("reads", [f"{n}{_at(n, site.source)}" for n in site.loads]))
    if site.relations:
        out.append(("holds if", list(site.relations)))
    if site.kernel:
        out.append(("kernel", [f"{site.kernel}: {site.why}" if site.why else site.kernel]))
    return out


def _count(n: E.Expr, what: str) -> str:
    return f"{render(n)} {what}" if n is E.ONE else f"{render(n)} {what}s"


def _remark(remark: Remark, shown: str) -> list[tuple[str, list[str]]]:
    """A remark with what its page says; ``shown`` is the source line that was quoted before it."""
    page = PAGES[remark.code]
    out = [(remark.code, [page.title])]
    if remark.source and remark.source != shown:
        out.append(("at", _place(remark.source)))
    out.append(("actual", [remark.message]))
    if remark.node is not None:
        other = remark.node.source not in ("", shown)
        out.append(("node", [f"{remark.node}{_at(remark.node, shown)}", *(_place(remark.node.source)[1:] if other else [])]))
    out += [(label, [text]) for label, text in (("supported", page.supported), ("because", page.cause), ("change", remark.advice)) if text]
    return out


def _at(node: NodeInfo, shown: str) -> str:
    if not node.source:
        return ""
    return ", on that line" if node.source == shown else f", at {shown_path(node.source)}"


def _place(source: str) -> list[str]:
    """file:line, and the line itself with its neighbours where the file can be read."""
    found = quote(source)
    return [shown_path(source) or "a line that the graph does not record", *(found.shown() if found is not None else [])]


def _lines(source: str) -> dict[str, Any] | None:
    found = quote(source)
    return None if found is None else found.to_dict()
