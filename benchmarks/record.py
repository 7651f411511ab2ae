"""One JSON for each measurement: what was run, where, when, and what came out."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from benchmarks.findings import Bar, Run
from benchmarks.machine import describe
from clip_rt.errors import InputError

ROOT = Path(__file__).parents[1]
RESULTS_DIR = Path(__file__).with_name("results")
VERSION = Run.version
"""Of the form of a run's JSON."""


def versions(*packages: str) -> dict[str, str]:
    """Look up the installed version of each package."""
    return {package: importlib.metadata.version(package) for package in packages}


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
    """Return what the result of `save` keeps of a bar."""
    return {
        "what": bar.what,
        "value": round(bar.value, 4),
        bar.side.replace(" ", "_"): bar.limit,
        "met": bar.is_met,
    }


def save(name: str, results: dict[str, Any], *, packages: tuple[str, ...], part: str = "") -> Path:
    """Write `results/<date>_<name>.json` and return its path; a part of a run has its own file."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    document = {
        "date": today,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "machine": describe(),
        "versions": versions(*packages),
        **results,
    }
    path = RESULTS_DIR / f"{today}_{'_'.join(filter(None, (name, part)))}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def write_run(run: Run, path: Path) -> None:
    """Write all of a run as JSON that `read_run` reads; figures that are no number are `NaN`."""
    path.write_text(json.dumps(dataclasses.asdict(run), indent=1) + "\n", encoding="utf-8")


def read_run(path: Path) -> Run:
    """Read what `write_run` wrote.

    Raises:
        InputError: no such file, no JSON, of another version, or a field that is not as `findings`
            has it; the message names it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as the JSON of a run: {error}.") from error
    version = document.get("version") if isinstance(document, dict) else None
    if version is None:
        raise InputError(f"{path} is no run of benchmarks/run.py: it has no version.")
    if version != VERSION:
        raise InputError(
            f"{path} is a run of version {version}; this code reads version {VERSION}. "
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
