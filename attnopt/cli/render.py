"""A report as a person reads it: tables and sentences for the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnopt.cli.measure import Comparison, Measured
from attnopt.remarks import PAGES, Remark
from attnopt.report import Report, Site, Verdict
from attnopt.report.explain import LABELS, Explanation
from attnopt.report.names import grouped, shown_names
from attnopt.report.source import shown_path

_STATUS_STYLE = {"replaced": "green", "missed": "yellow", "reverted": "red"}
_LEVEL_STYLE = {"applied": "green", "missed": "yellow", "analysis": "cyan", "error": "red"}
_PIPED_WIDTH = 140
_SHOWN_CHECKS = 12


class Terminal(Console):
    """Sentences are left to the terminal to wrap, so that a line of output stays one line in a pipe; tables fit the width."""

    def say(self, sentence: str, style: str | None = None) -> None:
        self.print(sentence, style=style, soft_wrap=True)


def console(stderr: bool = False) -> Terminal:
    """The terminal; where output is piped and nobody says how wide it is, lines of 140 columns."""
    made = Terminal(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PIPED_WIDTH
    return made


def show_report(out: Terminal, report: Report) -> None:
    """Sites, then remarks, then the verdict."""
    show_sites(out, report.sites)
    show_remarks(out, [*report.remarks, *(r for s in report.sites for r in s.remarks)])


def show_sites(out: Terminal, sites: list[Site]) -> None:
    if not sites:
        out.say("No attention was found in this model.", style="yellow")
        return
    table = Table(header_style="bold")
    out.say("Attentions", style="bold")
    for name in ("site", "source", "computes", "kernel", "why"):
        table.add_column(name, overflow="fold")
    for group in grouped(sites):
        site = group[0]
        words = str(site.spec) if site.spec is not None else "-"
        kernel = site.kernel if site.status == "replaced" else f"({site.status})" if site.is_attention else "(no attention)"
        source = shown_path(site.source) if len({s.source for s in group}) == 1 else f"{shown_path(site.source)}, ..."
        table.add_row(escape(shown_names(group)), escape(source), escape(words), f"[{_STATUS_STYLE[site.status]}]{escape(kernel)}[/]", escape(site.why))
    out.print(table)


def show_remarks(out: Terminal, remarks: Iterable[Remark]) -> None:
    """Each different remark once, with how often it was made; that a site was replaced is told by the table already."""
    groups: dict[tuple[str, str], list[Remark]] = {}
    for remark in remarks:
        if remark.code != "AO101":
            groups.setdefault((remark.code, remark.message), []).append(remark)
    if not groups:
        return
    out.say("Remarks", style="bold")
    for (code, message), group in sorted(groups.items(), key=lambda item: item[0][0]):
        first = group[0]
        places = [escape(x) for x in dict.fromkeys(r.site for r in group) if x]
        where = f" [dim]{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}[/]" if places else ""
        out.say(f"  [{_LEVEL_STYLE[first.level]}]{code}[/]{where} {escape(message)}{f' [dim]{escape(shown_path(first.source))}[/]' if first.source else ''}")
        hint = first.hint or PAGES[code].hint
        if hint:
            out.say(f"        [dim]{escape(hint)}[/]")


def show_checks(out: Terminal, verdict: Verdict) -> None:
    """The checks that used most of their budget, failed ones first."""
    if not verdict.checks:
        return
    table = Table(header_style="bold")
    out.say("Checks", style="bold")
    for name in ("check", "error", "budget", "", "detail"):
        table.add_column(name, overflow="fold")
    ranked = sorted(verdict.checks, key=lambda c: (c.passed, -(c.error / c.budget if c.budget > 0 else c.error)))
    for check in ranked[:_SHOWN_CHECKS]:
        table.add_row(escape(check.name), f"{check.error:.2e}", f"{check.budget:.2e}", "[green]ok[/]" if check.passed else "[red]FAILED[/]", escape(check.detail))
    out.print(table)
    if len(ranked) > _SHOWN_CHECKS:
        out.say(f"  and {len(ranked) - _SHOWN_CHECKS} more that used a smaller part of their budget", style="dim")


def show_comparison(out: Terminal, comparison: Comparison) -> None:
    out.say(f"[bold]Time and peak memory[/] ({comparison.what}, median of {comparison.runs} runs)")
    table = Table(header_style="bold")
    for name in ("", "time", "peak memory"):
        table.add_column(name, justify="left" if not name else "right")
    for name, m in (("original", comparison.original), ("optimized", comparison.optimized)):
        table.add_row(name, milliseconds(m), mebibytes(m))
    ratio = comparison.memory_ratio
    table.add_row("ratio", f"{comparison.speedup:.2f}x", "-" if ratio is None else f"{ratio:.2f}x")
    out.print(table)


def milliseconds(m: Measured) -> str:
    return f"{m.seconds * 1e3:.1f} ms"


def mebibytes(m: Measured) -> str:
    return "unknown" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.1f} MiB"


def verdict_text(verdict: Verdict) -> str:
    style = "yellow" if verdict.passed is None else "green" if verdict.passed else "red"
    return f"[{style}]{escape(str(verdict))}[/]"


def comparison_words(comparison: Comparison) -> str:
    """``2.31x faster, 5.02x less peak memory``, and the other way round when that is what was measured."""

    def word(ratio: float, better: str, worse: str) -> str:
        return f"{ratio:.2f}x {better}" if ratio >= 1 else f"{1 / ratio:.2f}x {worse}"

    words = word(comparison.speedup, "faster", "slower")
    ratio = comparison.memory_ratio
    return words if ratio is None else f"{words}, {word(ratio, 'less peak memory', 'more peak memory')}"


def show_explanation(out: Terminal, one: Explanation) -> None:
    """One site in full, as ``Report.explain`` says it, and an empty line."""
    style = "default" if one.site is None else _STATUS_STYLE[one.site.status]
    out.say(f"[{style} bold]{escape(one.title)}[/]")
    for label, line in one.lines():
        style = "bold" if label in PAGES or line.startswith(">") else "default"
        out.say(f"  [cyan]{escape(f'{label:{LABELS}}')}[/][{style}]{escape(line)}[/]".rstrip() if label or line else "")
    out.say("")


def show_page(out: Terminal, code: str) -> None:
    page = PAGES[code]
    out.say(f"[bold]{code} {escape(page.title)}[/]\n\n{escape(page.text)}")
    for label, text in (("Why", page.cause), ("Supported", page.supported), ("What to do", page.hint)):
        if text:
            out.say(f"\n[bold]{label}:[/] {escape(text)}")
    out.say(f"\n[bold]Example:[/]\n\n{escape(page.example.rstrip())}")


def show_pages(out: Terminal) -> None:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("code", "remark"):
        table.add_column(name)
    for code, page in PAGES.items():
        table.add_row(code, escape(page.title))
    out.print(table)
