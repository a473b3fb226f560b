"""The scoreboard: what came out of the workers as data, and as a table for people."""

from __future__ import annotations

import datetime as dt
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from zoo.case import Case
from zoo.check import empty_row

LIBRARIES = ("attnopt", "torch", "transformers", "x-transformers", "vit-pytorch", "diffusers")


def rows_of(case: Case, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each variant that ran, with Inductor's count for the same form and mask."""
    rows = []
    for variant in case.variants():
        result = results.get(variant.name)
        if result is None:
            continue
        row = empty_row(case, variant, result["failed"]).to_dict() if "failed" in result else dict(result)
        counted = results.get(f"inductor-{variant.form}-{'padded' if variant.padded else 'unpadded'}", {})
        row["fused_by_inductor"] = counted.get("fused")
        row["inductor_note"] = counted.get("failed") or counted.get("error") or ""
        row["date"] = dt.date.today().isoformat()
        rows.append(row)
    return rows


def scoreboard(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that docs/zoo.md is made of."""
    rows = [_rounded(r) for r in rows]
    return {
        "about": "Made by `make zoo`; docs/zoo.md is made from this.",
        "date": max((r["date"] for r in rows), default=""),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "totals": totals(rows),
        "rows": rows,
    }


def merged(old: dict[str, Any], rows: list[dict[str, Any]], order: list[str]) -> dict[str, Any]:
    """A scoreboard in which the models of ``rows`` are those of ``rows``, and the others as they were; models that are not in ``order`` go."""
    fresh = {r["model"] for r in rows}
    kept = [r for r in old["rows"] if r["model"] not in fresh and r["model"] in order]
    return scoreboard(sorted([*kept, *rows], key=lambda r: order.index(r["model"])))


def write(board: dict[str, Any], path: Path) -> None:
    """One line for each row, so that two scoreboards can be compared line by line."""
    head = json.dumps({k: v for k, v in board.items() if k != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(r, ensure_ascii=False) for r in board["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')


def _rounded(x: Any) -> Any:
    if isinstance(x, float):
        return float(f"{x:.3g}")
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    return x


def totals(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Sums over all variants. Inductor's count is over the spelled-out forms: it leaves fused calls as they are."""
    rows = list(rows)
    spelled = [r for r in rows if r["form"] == "eager" and r["fused_by_inductor"] is not None]
    return {
        "models": len({r["model"] for r in rows}),
        "variants": len(rows),
        "deviating": sum(bool(r["deviations"]) for r in rows),
        "seconds": round(sum(sum(r["seconds"].get(key, 0) for key in ("build", "optimize", "compare")) for r in rows)),
        **{key: sum(r[key] for r in rows) for key in ("expected", "replaced", "verified", "refused")},
        "spelled_out": sum(r["expected"] for r in spelled),
        "spelled_out_replaced": sum(r["replaced"] for r in spelled),
        "spelled_out_fused_by_inductor": sum(r["fused_by_inductor"] for r in spelled),
    }


def short_words(words: Iterable[Iterable[str]]) -> str:
    """What the attentions were proven to be, each kind once with its count."""
    counts: dict[str, int] = {}
    for _, text in words:
        counts[text] = counts.get(text, 0) + 1
    return "; ".join(f"{n}x {text}" if len(counts) > 1 else text for text, n in counts.items())


def table(board: dict[str, Any]) -> Table:
    """One line for each model, form and mask; static and dynamic shapes side by side."""
    found = Table(title=f"{board['totals']['models']} models, {board['totals']['variants']} variants, {board['totals']['seconds']} s of work")
    for name in ("model", "form", "mask", "shapes", "sites", "replaced", "verified", "Inductor", "proven to be", "s"):
        found.add_column(name, justify="right" if name in ("sites", "replaced", "verified", "Inductor", "s") else "left", overflow="fold")
    for r in board["rows"]:
        words = short_words(r["words"]) + "".join(f"\n{code} {site}: {why}" for site, code, why in r["missed"]) + "".join(f"\n! {d}" for d in r["deviations"])
        found.add_row(
            r["model"],
            r["form"],
            "yes" if r["padded"] else "no",
            "dynamic" if r["dynamic"] else "static",
            str(r["expected"]),
            str(r["replaced"]),
            str(r["verified"]),
            "-" if r["fused_by_inductor"] is None else str(r["fused_by_inductor"]),
            words.replace("[", r"\["),
            f"{r['seconds'].get('optimize', 0):.1f}",
            style="red" if r["deviations"] else None,
        )
    t = board["totals"]
    found.caption = (
        f"{t['replaced']} of {t['expected']} attentions replaced, {t['verified']} verified, {t['refused']} rightly refused; "
        f"of {t['spelled_out']} that are spelled out {t['spelled_out_replaced']}, PyTorch Inductor {t['spelled_out_fused_by_inductor']}"
    )
    return found
