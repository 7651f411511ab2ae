"""Figures and what they are held to, as a table and as a result keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.findings import Bar


def describe_bar(bar: Bar) -> dict[str, Any]:
    """Return what a result keeps of a bar."""
    return {
        "what": bar.what,
        "value": round(bar.value, 4),
        bar.side.replace(" ", "_"): bar.limit,
        "met": bar.is_met,
    }


def show_bars(bars: Sequence[Bar], console: Console) -> None:
    """Print the table of the bars."""
    table = Table("bar", "measured", "limit", "")
    for bar in bars:
        verdict = "met" if bar.is_met else "missed"
        style = None if bar.is_met else "red"
        limit = f"{bar.side} {bar.limit:g}"
        table.add_row(bar.what, f"{bar.value:.3f}", limit, verdict, style=style)
    console.print(table)
