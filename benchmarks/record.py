"""One JSON for each measurement: what was run, where, when, and what came out."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.findings import Bar, Run
from benchmarks.machine import describe
from clip_rt.errors import InputError

ROOT = Path(__file__).parents[1]
RESULTS_DIR = Path(__file__).with_name("results")
VERSION = Run.version
"""Of the form of a run's JSON."""


def versions(*packages: str) -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit(root: Path = ROOT) -> str:
    """Return the commit that is checked out, 12 digits, with "+" where files differ from it.

    Results do not count, since every run leaves some. Empty where `root` is no checkout, or git is
    not there.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        digits = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return digits + ("+" if changes else "")


def describe_bar(bar: Bar) -> dict[str, Any]:
    """Return what a result keeps of a bar."""
    return {
        "what": bar.what,
        "value": round(bar.value, 4),
        bar.side.replace(" ", "_"): bar.limit,
        "met": bar.is_met,
    }


def _shorten(argument: str) -> str:
    """Return an argument without the folders of this machine: relative, or a name."""
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return f"{option}{equals}{shown}"


def describe_result(command: Sequence[str], packages: Sequence[str]) -> dict[str, Any]:
    """Return what every result begins with: when, by which code, where, and with what.

    Args:
        command: What is run, without the arguments of this process.
        packages: Whose versions matter.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": shlex.join([*command, *map(_shorten, sys.argv[1:])]),
        "commit": commit(),
        "machine": describe(),
        "versions": versions(*packages),
    }


def write(path: Path, result: Mapping[str, Any] | Run) -> None:
    """Write a result as JSON; figures that are no number are `NaN`."""
    document = asdict(result) if isinstance(result, Run) else result
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def save(
    module: str, results: Mapping[str, Any], *, packages: Sequence[str], part: str = ""
) -> Path:
    """Write `results/<date>_<name>.json`, and say where.

    Args:
        module: The command, below `benchmarks`; its last part is the name.
        results: What was found.
        packages: Whose versions matter.
        part: Of a run that has its own file.

    Returns:
        The path.
    """
    result = describe_result(["python", "-m", f"benchmarks.{module}"], packages)
    name = module.rpartition(".")[2]
    path = RESULTS_DIR / f"{result['date']}_{'_'.join(filter(None, (name, part)))}.json"
    write(path, result | dict(results))
    Console().print(f"written to {path}", highlight=False, soft_wrap=True)
    return path


def read_run(path: Path) -> Run:
    """Read what `write` wrote of a run.

    Raises:
        InputError: no such file, no JSON, of another version, or a field that is not as `findings`
            has it; the message names it.
    """
    # Here, because results are written too where nothing reads them.
    from pydantic import TypeAdapter, ValidationError

    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as the JSON of a run: {error}.") from error
    found = document.get("version") if isinstance(document, dict) else None
    if found is None:
        raise InputError(f"{path} is no run of benchmarks/run.py: it has no version.")
    if found != VERSION:
        raise InputError(
            f"{path} is a run of version {found}; this code reads version {VERSION}. "
            "Read it with the commit that wrote it, or run again."
        )
    try:
        return TypeAdapter(Run).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{path} is not as a run is: {where}: {first['msg']} "
            f"({error.error_count()} such in all)."
        ) from error
