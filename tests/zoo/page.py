"""docs/zoo.md from benchmarks/results/zoo.json: ``python -m zoo.page``."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from zoo.scoreboard import short_words

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "zoo.json", ROOT / "docs" / "zoo.md"
Row = dict[str, Any]


def render(board: dict[str, Any]) -> str:
    """The page as text."""
    t, v = board["totals"], board["versions"]
    text = [
        "# The zoo",
        "",
        "<!-- Made by `make zoo` from benchmarks/results/zoo.json; do not edit. -->",
        "",
        f"{t['models']} tiny random models in {t['variants']} variants: each with its attention spelled out (`eager`) and, where it has that form, as calls of",
        "PyTorch's fused attention (`sdpa`); with and without a padding mask where it takes one; with open (dynamic) and with fixed (static) batch and length.",
        "",
        f"**{t['replaced']} of {t['expected']} attentions are replaced, {t['verified']} of them verified; {t['refused']} are rightly left alone.**",
        f"Of the {t['spelled_out']} that are spelled out, attnopt replaces {t['spelled_out_replaced']}, and PyTorch Inductor's own matcher fuses {t['spelled_out_fused_by_inductor']}.",
        "",
        f"Measured on {board['date']} ({t['seconds']} s of work on one core) with "
        + ", ".join(f"{name} {number}" for name, number in v.items())
        + ", on a CPU in float32.",
        '`make zoo` runs it all again, `make zoo MODELS="llama bert"` some of it; it fails when a model deviates from what is expected of it.',
        "",
        "## How to read it",
        "",
        "* **Attentions** is how many the model computes; **replaced** and **verified** are the fewest in any variant of that line.",
        "* **Verified**: each attention, and the model end to end, stays within its error budget against float64. Beside that, the zoo runs",
        "  original and optimized at other batches and lengths, compares both with the original in float64, and expects no second capture.",
        '* **Inductor** is `torch._dynamo.utils.counters["inductor"]["fuse_attention"]` after `torch.compile` of the same model and inputs, without · with',
        "  padding mask. Sizes are static, since its patterns ask for a scale that is a plain number, gradients are off, and the device is the CPU, where",
        "  all of its patterns are on. It leaves calls of fused attention as they are, so only spelled-out forms count.",
        "* **Proven to be** is what the spec of each attention says, in the variant with padding mask and open sizes.",
    ]
    for family, members in groupby(board["rows"], key=lambda r: r["family"]):
        text += [
            "",
            f"## {_title(family)}",
            "",
            "| model | form | attentions | replaced | verified | Inductor | proven to be |",
            "|---|---|---:|---:|---:|---:|---|",
        ]
        for (model, form), group in groupby(members, key=lambda r: (r["model"], r["form"])):
            text.append(_line(model, form, list(group)))
    text += _left_alone(board["rows"]) + _deviations(board["rows"])
    return "\n".join(text) + "\n"


def _title(family: str) -> str:
    names = {
        "x-transformers": "x-transformers",
        "vit-pytorch": "vit-pytorch",
        "diffusers": "diffusers",
        "cached": "With keys and values of earlier tokens",
        "packed": "Packed documents",
    }
    return names.get(family, f"{family.capitalize()} models" if family.startswith(("vision", "speech", "hand")) else f"{family.capitalize()}s")


def _line(model: str, form: str, rows: list[Row]) -> str:
    telling = max(rows, key=lambda r: (bool(r["words"]), r["padded"], r["dynamic"]))
    mark = "" if all(r["exported"] for r in rows) else " (torch.compile)"
    counts = {r["padded"]: r["fused_by_inductor"] for r in rows}
    inductor = " · ".join("?" if n is None else str(n) for _, n in sorted(counts.items())) if form == "eager" else ""
    proven = short_words(telling["words"]).replace("|", "\\|") or "-"
    fewest = {key: min(r[key] for r in rows) for key in ("replaced", "verified")}
    return f"| {model} | {form}{mark} | {rows[0]['expected']} | {fewest['replaced']} | {fewest['verified']} | {inductor} | {proven} |"


def _left_alone(rows: list[Row]) -> list[str]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for r in rows:
        for site, code, why in r["missed"]:
            sites = found.setdefault((r["model"], code, why), [])
            if site not in sites:
                sites.append(site)
    if not found:
        return []
    lines = ["", "## Left as they were", "", "| model | attentions | remark | reason |", "|---|---|---|---|"]
    return lines + [f"| {model} | {', '.join(sites)} | {code} | {why} |" for (model, code, why), sites in found.items()]


def _deviations(rows: list[Row]) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        for deviation in r["deviations"]:
            found.setdefault((r["model"], deviation), []).append(r["variant"])
    if not found:
        return []
    return ["", "## Not as expected", "", *(f"* {model} ({', '.join(variants)}): {deviation}" for (model, deviation), variants in found.items())]


def main() -> None:
    PAGE.write_text(render(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
