"""What an export prints: its plan, its stages with time and size, the parity table, its errors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from clip_rt.errors import ClipRTError, ParityError

console = Console(highlight=False)


@contextmanager
def stage(title: str, *, spinner: bool = True) -> Iterator[list[str]]:
    """Print a stage when it ends, with its duration and what the body appended as its outcome.

    A body that shows its own progress wants no `spinner` beside it.
    """
    outcome: list[str] = []
    start_s = time.perf_counter()
    with console.status(title) if spinner else nullcontext():
        try:
            yield outcome
        except BaseException:
            console.print(f"[red]fail[/] {title:<28} {time.perf_counter() - start_s:7.1f} s")
            raise
    duration_s = time.perf_counter() - start_s
    console.print(
        f"[green]done[/] {title:<28} {duration_s:7.1f} s  {escape(', '.join(outcome))}",
        soft_wrap=True,
    )


@contextmanager
def command() -> Iterator[None]:
    """Run a command: errors of ours end it with status 1 and no traceback."""
    try:
        yield
    except (ClipRTError, OSError) as error:
        if isinstance(error, ParityError):
            print_parity(error.report)
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(1) from None


def print_plan(*stages: tuple[str, str]) -> None:
    """Print what a dry run would do, stage by stage."""
    for title, what in stages:
        console.print(f"[yellow]plan[/] {title:<28} {escape(what)}", soft_wrap=True)


def mib(path: Path) -> str:
    """Return the size of a file in words."""
    return f"{path.stat().st_size / 2**20:.1f} MiB"


def print_parity(report: Mapping[str, Any]) -> None:
    """Print a `ParityReport` in its JSON form, one row a case; rows over the limit are red."""
    if not report:
        return
    limit = report["tolerance"]
    numbers = ("min cosine", "p1 cosine", "difference", "by batch", "broken")
    table = Table(
        Column("case", overflow="fold"),
        # Where it is narrow, names are folded and not numbers.
        *(Column(title, justify="right", no_wrap=True) for title in numbers),
        "",
    )
    for case in report["cases"]:
        table.add_row(
            escape(case["name"]),
            f"{case['min_cosine']:.7f}",
            f"{case['p01_cosine']:.7f}",
            f"{case['max_difference']:.1e}",
            f"{case['batch_difference']:.1e}",
            str(case["num_nonfinite"]),
            "ok" if case["passed"] else "drifts",
            style=None if case["passed"] else "red",
        )
    table.caption = (
        f"limits: cosine {limit['min_cosine']}, difference {limit['max_difference']:.0e}, by batch "
        f"{limit['max_batch_difference']:.0e}; "
        f"top-1 agreement {report['top1_agreement']:.3f} (limit {limit['top1_agreement']})"
    )
    console.print(table)
    if report.get("choices"):
        print_choices(report)


def print_choices(report: Mapping[str, Any]) -> None:
    """Print what both models choose for the images of the user's samples."""
    table = Table("samples", "images", "texts", "top-1 in torch", "top-1", "same choice", "")
    for each in report["choices"]:
        shares = [each["reference_top1"], each["top1"], each["agreement"]]
        table.add_row(
            escape(each["name"]),
            str(each["num_images"]),
            str(each["num_texts"]),
            *("" if share is None else f"{share:.4f}" for share in shares),
            "ok" if each["passed"] else "worse",
            style=None if each["passed"] else "red",
        )
    table.caption = f"limit: {report['tolerance']['max_top1_lost']} of top-1 lost"
    console.print(table)
