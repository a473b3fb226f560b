"""What a person should know of a serving model: what it caches, how long a request may be, and how fast it generates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from attnopt.cli.render import mebibytes
from attnopt.report.names import joined

if TYPE_CHECKING:
    from attnopt.cli.decode import Decoding
    from attnopt.cli.render import Terminal
    from attnopt.passes.insert_kv_cache import CacheLayer
    from attnopt.serving import ServingModel


def cache_facts(serving: ServingModel) -> dict[str, Any]:
    """For JSON. Bytes are of one token of one request, over all layers that keep it, scales included."""
    from attnopt.runtime.paged_cache import token_bytes

    layers = [
        {"name": x.name, "Hkv": x.Hkv, "D": x.D, "Dv": x.Dv, "window": x.window, "dtype": _dtype(x), "cross": x.cross, "bytes": token_bytes([x])}
        for x in serving.layers
    ]
    return {
        "layout": serving.plan.layout,
        "vocabulary": serving.vocabulary,
        "max_positions": serving.max_positions,
        "bytes_per_token": token_bytes([x for x in serving.layers if not x.cross]),
        "layers": layers,
    }


def _dtype(layer: CacheLayer) -> str:
    return str(layer.dtype).removeprefix("torch.")


def show_cache(out: Terminal, serving: ServingModel) -> None:
    """Layers that keep the same are one row, as in the table of attentions."""
    from attnopt.runtime.paged_cache import token_bytes

    facts = cache_facts(serving)
    out.say(f"[bold]Cache[/] ({facts['layout']})")
    table = Table(header_style="bold")
    for name in ("layer", "keys", "values", "dtype", "of", "bytes a token"):
        table.add_column(name, overflow="fold", justify="right" if name.startswith("bytes") else "left")
    groups: dict[tuple[Any, ...], list[CacheLayer]] = {}
    for layer in serving.layers:
        groups.setdefault((layer.Hkv, layer.D, layer.Dv, layer.window, layer.dtype, layer.cross), []).append(layer)
    for group in groups.values():
        one = group[0]
        of = "another sequence" if one.cross else "all tokens" if one.window is None else f"the last {one.window} tokens"
        table.add_row(
            escape(joined([x.name for x in group])), f"{one.Hkv} x {one.D}", f"{one.Hkv} x {one.Dv}", _dtype(one), of, f"{token_bytes(group):,}"
        )
    out.print(table)
    longest = "as many tokens as the cache holds" if serving.max_positions is None else f"{serving.max_positions:,} tokens at most, prompt included"
    out.say(f"{facts['bytes_per_token']:,} bytes a token in all; a request may have {longest}; {serving.vocabulary:,} token ids.")


def show_decode(out: Terminal, found: Decoding) -> None:
    """Each case is a row."""
    out.say(f"[bold]Generation[/] (greedy, {found.cases[0].new} new tokens each; the original by {found.how}; medians)")
    table = Table(header_style="bold")
    for name in ("batch", "prompt", "original", "serving", "ratio", "peak memory before", "after", "same texts"):
        table.add_column(name, justify="right")
    for x in found.cases:
        rates = [f"{x.rate(m):.1f} tokens/s" for m in (x.original, x.serving)]
        peaks = [mebibytes(m) for m in (x.original, x.serving)]
        table.add_row(str(x.batch), str(x.prompt), *rates, f"{x.speedup:.2f}x", *peaks, f"{x.same} of {x.batch}")
    out.print(table)
