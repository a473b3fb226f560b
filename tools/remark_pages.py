"""Writes ``docs/remarks`` from the table of remarks: one page for each code, with what its example prints when it is run.

``make docs`` runs it; ``tests/test_remarks.py`` compares the pages with what it would write.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from attnopt.kernels import registry
from attnopt.remarks import PAGES, Page, Remark
from attnopt.report import Report

DOCS = Path(__file__).parents[1] / "docs" / "remarks"
INDEX = "README.md"
_GROUPS = {
    "1": ("Applied", "What was done."),
    "2": ("Missed", "Why a softmax or an existing attention call stayed as it was, or a decoder was not served."),
    "3": ("Analysis", "What was found out about the model and its capture."),
    "9": ("Errors", "What verification did not accept."),
}


def run(code: str, folder: Path) -> Report:
    """The report that the example of ``code`` leaves, run as ``example.py`` in ``folder``."""
    file = folder / "example.py"
    file.write_text(PAGES[code].example)
    names: dict[str, object] = {"__name__": "example"}
    with contextlib.chdir(folder), _as_it_was():
        exec(compile(file.read_text(), str(file), "exec"), names)
    report = names["report"]
    assert isinstance(report, Report), f"the example of {code} leaves no report"
    return report


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """The same random numbers each time; compiled functions and registered backends of one example are not seen by the next."""
    kept = registry.backends()
    torch._dynamo.reset()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch._dynamo.reset()
        for name in set(registry.backends()) - set(kept):
            del registry._BACKENDS[name]


def remarks(report: Report) -> list[Remark]:
    """All of a report: on the model, and on each site."""
    return [*report.remarks, *(r for s in report.sites for r in s.remarks)]


def printed(report: Report, code: str, folder: Path) -> tuple[str, str]:
    """The call that shows the remark, and what it prints, without what differs between machines and runs."""
    on_site = any(r.code == code for s in report.sites for r in s.remarks)
    with contextlib.chdir(folder):
        text = report.explain("model") if on_site else report.explain()
    return 'print(report.explain("model"))' if on_site else "print(report.explain())", _stable(text)


def _stable(text: str) -> str:
    """Measured errors are left out, and symbols of sizes are numbered as they come."""
    symbols: dict[str, str] = {}
    text = re.sub(r"\bs\d+\b", lambda m: symbols.setdefault(m[0], f"s{len(symbols)}"), text)
    return re.sub(r"\d\.\d\de[+-]\d\d", "...", text)


def page(code: str, shown: tuple[str, str]) -> str:
    """One page in Markdown. ``shown`` is what ``printed`` gives for its example."""
    p: Page = PAGES[code]
    call, text = shown
    parts = [f"# {code}: {p.title}", p.text, "## Why", p.cause]
    if p.supported:
        parts += ["## What is supported", p.supported[0].upper() + p.supported[1:]]
    parts += ["## What to change", p.hint or "Nothing."]
    parts += ["## Example", f"```python\n{p.example}```", f"`{call}` then prints", f"```\n{text.rstrip()}\n```", f"[All remarks]({INDEX})"]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """The page that lists all others."""
    parts = [
        "# Remarks",
        "Every remark has a stable code. It names the attention, the line of your code, the values it met, and what to do.",
        "```\n"
        "attnopt explain model.py                               # each attention that is missed or slow: where, why, what to change\n"
        "attnopt explain model.py --site layers.0.self_attn     # one of them, replaced or not\n"
        "attnopt explain AO203                                  # what a code means\n"
        "attnopt explain                                        # all codes\n"
        "```",
        "In Python, `report = optimized.attnopt_report` has `report.remarks` on the whole model and `site.remarks` on each of `report.sites`; "
        "`print(report.explain())` and `print(report.explain(name))` say what the command line says.",
    ]
    for digit, (name, text) in _GROUPS.items():
        rows = [f"| [{code}]({code}.md) | {p.title} |" for code, p in PAGES.items() if code[2] == digit]
        parts += [f"## {name}", text, "\n".join(["| code | remark |", "|---|---|", *rows])]
    parts.append("These pages are written by `make docs` from the table in `attnopt/remarks`; what the examples print is what they printed.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    DOCS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as top:
        for code in PAGES:
            folder = Path(top) / code
            folder.mkdir()
            (DOCS / f"{code}.md").write_text(page(code, printed(run(code, folder), code, folder)))
            sys.stdout.write(f"{DOCS / code}.md\n")
    (DOCS / INDEX).write_text(index())


if __name__ == "__main__":
    main()
