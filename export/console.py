"""What an export prints: its stages with time and size, and the parity table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(highlight=False)


@contextmanager
def stage(title: str) -> Iterator[list[str]]:
    """Print a stage when it ends, with its duration and what the body appended as its outcome."""
    outcome: list[str] = []
    start_s = time.perf_counter()
    with console.status(title):
        try:
            yield outcome
        except BaseException:
            console.print(f"[red]fail[/] {title:<28} {time.perf_counter() - start_s:7.1f} s")
            raise
    duration_s = time.perf_counter() - start_s
    console.print(
        f"[green]done[/] {title:<28} {duration_s:7.1f} s  {', '.join(outcome)}", soft_wrap=True
    )


def mib(path: Path) -> str:
    """Return the size of a file in words."""
    return f"{path.stat().st_size / 2**20:.1f} MiB"


def print_parity(report: Mapping[str, Any]) -> None:
    """Print a `ParityReport` in its JSON form, one row a case; rows over the limit are red."""
    if not report:
        return
    limit = report["tolerance"]
    table = Table("tower", "case", "min cosine", "mean cosine", "difference", "broken", "")
    for case in report["cases"]:
        table.add_row(
            case["tower"],
            case["name"],
            f"{case['min_cosine']:.7f}",
            f"{case['mean_cosine']:.7f}",
            f"{case['max_difference']:.1e}",
            str(case["num_nonfinite"]),
            "ok" if case["passed"] else "drifts",
            style=None if case["passed"] else "red",
        )
    table.caption = (
        f"limits: cosine {limit['min_cosine']}, difference {limit['max_difference']:.0e}; "
        f"top-1 agreement {report['top1_agreement']:.3f} (limit {limit['top1_agreement']})"
    )
    console.print(table)
