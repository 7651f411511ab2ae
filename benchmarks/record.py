"""One JSON for each measurement: what was run, where, when, and what came out."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

RESULTS_DIR = Path(__file__).with_name("results")


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores, memory, kernel, Python."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = next((line for line in cpuinfo.splitlines() if line.startswith("model name")), ":")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model.split(":", 1)[1].strip(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Look up the installed version of each package."""
    return {package: importlib.metadata.version(package) for package in packages}


def save(name: str, results: dict[str, Any], *, packages: tuple[str, ...], part: str = "") -> Path:
    """Write `results/<date>_<name>.json` and return its path; a part of a run has its own file."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    document = {
        "date": today,
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(*packages),
        **results,
    }
    path = RESULTS_DIR / f"{today}_{'_'.join(filter(None, (name, part)))}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path
