"""A report as a person reads it: tables and sentences for the terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnopt.cli.measure import Comparison, Measured
from attnopt.remarks import PAGES, Remark
from attnopt.report import Report, Site, Verdict

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


def grouped(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites that differ only in the numbers of their names (layers of one stack) share a row."""
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        key = (re.sub(r"\d+", "#", site.name), site.status, str(site.spec), site.kernel, site.why)
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def shown_names(group: list[Site]) -> str:
    """``layers.0-3.attn (4)`` for a run of layers, ``layers.0.attn and 2 more`` for what is not one run."""
    first = group[0].name
    if len(group) == 1:
        return first
    numbers = [re.findall(r"\d+", s.name) for s in group]
    varying = [i for i in range(len(numbers[0])) if len({n[i] for n in numbers}) > 1]
    if len(varying) == 1:
        values = [int(n[varying[0]]) for n in numbers]
        if values == list(range(values[0], values[0] + len(values))):
            spans = list(re.finditer(r"\d+", first))
            span = spans[varying[0]]
            return f"{first[: span.start()]}{values[0]}-{values[-1]}{first[span.end() :]} ({len(group)})"
    return f"{first} and {len(group) - 1} more"


def shown_path(source: str) -> str:
    """A file:line, relative to the working folder when it lies below it, from the package on when it is an installed one."""
    path, _, line = source.rpartition(":")
    if "site-packages/" in path:
        return f"{path.rpartition('site-packages/')[2]}:{line}"
    here = str(Path.cwd()) + os.sep
    return source.removeprefix(here)


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


def show_page(out: Terminal, code: str) -> None:
    page = PAGES[code]
    out.say(f"[bold]{code}[/] {escape(page.title)}")
    out.say(f"\n{escape(page.text)}")
    if page.hint:
        out.say(f"\n[bold]What to do:[/] {escape(page.hint)}")


def show_pages(out: Terminal) -> None:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("code", "remark"):
        table.add_column(name)
    for code, page in PAGES.items():
        table.add_row(code, escape(page.title))
    out.print(table)
