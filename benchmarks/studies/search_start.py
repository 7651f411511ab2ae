"""How long `clip-rt search` takes from the command to the answer, as a whole process.

    python -m benchmarks.studies.search_start

Drawings are indexed once. Then the command is run again and again: with a server that is warm, with
a Triton of its own, and with the model in its own process; and before each, Python and the imports
alone, for what of it is not ours. Wall clock.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import clip_rt
from benchmarks.record import save
from clip_rt.embedded.bundled import find_model_repository, find_sample
from clip_rt.search import Index
from clip_rt_commands import program
from clip_rt_commands.errors import command

QUERY = "a slice of pizza"
BAR_S = 0.6
ALONE = {
    "python": "pass",
    "python, numpy, grpc": "import numpy, grpc",
    "python, clip_rt.client": "import clip_rt.client",
}


@dataclass(frozen=True, kw_only=True)
class SearchStartConfig:
    """How often each command is run."""

    runs: int = 20
    """Of each that needs no start of a model."""
    slow_runs: int = 5
    """Of each that does."""


def time_process(arguments: Sequence[str], environment: dict[str, str]) -> float:
    """Return the seconds that a process takes from its start to its end."""
    start_s = time.perf_counter()
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    return time.perf_counter() - start_s


def describe(seconds: Sequence[float]) -> dict[str, Any]:
    """Return median and spread of some times."""
    return {
        "p50_s": round(statistics.median(seconds), 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
        "runs": len(seconds),
    }


def main(config: SearchStartConfig) -> None:
    """Measure, print, and write a dated JSON."""
    console = [
        sys.executable,
        "-c",
        "import sys; from clip_rt_commands.console import main; sys.exit(main())",
    ]
    results: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="clip_rt-search-") as folder,
        clip_rt.EmbeddedServer(find_model_repository()) as server,
    ):
        environment = {**os.environ, "CLIP_RT_INDEX": str(Path(folder, "index"))}
        with (
            clip_rt.Client(server.url) as client,
            Index.open(Path(folder, "index"), create=True) as index,
        ):
            report = index.update(client, [find_sample() / "styles/openmoji.tar"])
        search = [*console, "search", QUERY, "--json"]
        ways = {name: [sys.executable, "-c", code] for name, code in ALONE.items()}
        ways["search, a warm server"] = [*search, "--url", server.url]
        times: dict[str, list[float]] = {name: [] for name in ways}
        # By turns; the first one of each, which may compile bytecode, does not count.
        for number in range(config.runs + 1):
            for name, arguments in ways.items():
                took_s = time_process(arguments, environment)
                if number:
                    times[name].append(took_s)
        results = {name: describe(each) for name, each in times.items()}
        own = {**environment, "CLIP_RT_URL": ""}
        # With this server up another of the same repository would be shared.
        server.stop()
        for name, kind in (("in process", "in_process"), ("a Triton of its own", "embedded")):
            arguments = [*search, "--server", kind]
            time_process(arguments, own)
            results[f"search, {name}"] = describe(
                [time_process(arguments, own) for _ in range(config.slow_runs)]
            )
    for name, row in results.items():
        print(name, row)  # noqa: T201
    p50_s = results["search, a warm server"]["p50_s"]
    found = {
        "images": report.num_embedded,
        "results": results,
        "bar": {"what": "p50 with a warm server, s", "at_most": BAR_S, "met": p50_s <= BAR_S},
    }
    save("studies.search_start", found, packages=("numpy", "grpcio", "tokenizers", "tyro"))


if __name__ == "__main__":
    with command():
        main(tyro.cli(SearchStartConfig, prog=program(__spec__.name), description=__doc__))
