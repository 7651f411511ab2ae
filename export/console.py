"""What an export prints: plan, stages with time and size, what the gate found."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

console = Console(highlight=False)
MAX_FAILED = 4
"""Cases of a comparison that failed to print."""


@contextmanager
def stage(title: str, *, spinner: bool = True) -> Iterator[list[str]]:
    """Print a stage when it ends, with its duration and what the body appended as its outcome.

    A body that shows its own progress wants no `spinner` beside it.
    """
    outcome: list[str] = []
    start_s = time.perf_counter()
    # Of more characters than ASCII is only the one that every encoding of Unicode has.
    dots = "dots" if console.encoding.startswith("utf") else "line"
    with console.status(title, spinner=dots) if spinner else nullcontext():
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


def print_plan(*stages: tuple[str, str]) -> None:
    """Print what a dry run would do, stage by stage."""
    for title, what in stages:
        console.print(f"[yellow]plan[/] {title:<28} {escape(what)}", soft_wrap=True)


def mib(path: Path) -> str:
    """Return the size of a file in words."""
    return f"{path.stat().st_size / 2**20:.1f} MiB"


def summarise_parity(report: Mapping[str, Any]) -> str:
    """Say in a line how far a model that passed is from its reference; see `print_parity`."""
    limit, cases = report["tolerance"], report["cases"]
    cosine = min(case["min_cosine"] for case in cases)
    difference = max(case["max_difference"] for case in cases)
    return (
        f"{len(cases)} cases pass, worst cosine {cosine:.7f} (limit {limit['min_cosine']}), "
        f"largest difference {difference:.1e} (limit {limit['max_difference']:.0e})"
    )


def print_parity(report: Mapping[str, Any], *, only_failed: bool = False) -> None:
    """Print a `ParityReport` in its JSON form, one row a case; rows over the limit are red.

    Args:
        report: As `parity_report.ParityReport.to_json` returns it.
        only_failed: Leave out the cases that pass, and all but the `MAX_FAILED` worst.
    """
    limit, cases = report["tolerance"], report["cases"]
    if only_failed:
        failed = [case for case in cases if not case["passed"]]
        cases = sorted(failed, key=lambda case: case["min_cosine"])[:MAX_FAILED]
    numbers = ("min cosine", "p1 cosine", "difference", "by batch", "broken")
    table = Table(
        Column("case", overflow="fold"),
        # Where it is narrow, names are folded and not numbers.
        *(Column(each, justify="right", no_wrap=True) for each in numbers),
        "",
    )
    for case in cases:
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
    if cases:
        console.print(table)
    if only_failed and len(cases) < len(failed):
        console.print(f"and {len(failed) - len(cases)} others of {len(report['cases'])} drift")


def print_choices(report: Mapping[str, Any]) -> None:
    """Print what both models choose for the images of the user's samples; a line each."""
    limit = report["tolerance"]["max_top1_lost"]
    for each in report.get("choices", ()):
        text = f"{each['name']}: the same choice for {each['agreement']:.4f} of the images"
        if each["top1"] is not None:
            text += (
                f", right for {each['top1']:.4f} and in torch for {each['reference_top1']:.4f} "
                f"(at most {limit} less)"
            )
        style = None if each["passed"] else "red"
        console.print(text, style=style, markup=False, soft_wrap=True)


def print_next(what: str, command: str) -> None:
    """Print a command that does what comes next, whole and ready to be copied."""
    console.print(f"{what}:\n    {command}", markup=False, soft_wrap=True)
