"""How long `clip-rt search` takes from the command to the answer, as a whole process.

    python -m benchmarks.studies.search_start

Drawings are indexed once. Then the command is run again and again: with a server that is warm, with
a Triton of its own, and with the model in its own process; and before each, Python and the imports
alone, for what of it is not ours. Wall clock.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
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


def time_process(arguments: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return the seconds that a process takes from its start to its end, and of processors."""
    before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    took_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Serve the bundled model in a process of its own, and yield its address."""
    command = [sys.executable, "-m", "clip_rt", "serve", "--port", "0"]
    server = subprocess.Popen(
        [*command, "--repository", str(find_model_repository())],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        yield server.stdout.readline().partition(" on ")[2].partition(",")[0]
    finally:
        server.terminate()
        server.wait(60)


def describe(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return median and spread of some times; a busy machine shows in the first kind."""
    seconds = [each for each, _ in times]
    return {
        "p50_cpu_s": round(statistics.median(cpu_s for _, cpu_s in times), 4),
        "p50_s": round(statistics.median(seconds), 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
        "load_1min": round(os.getloadavg()[0], 2),
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
        serving() as url,
    ):
        environment = {**os.environ, "CLIP_RT_INDEX": str(Path(folder, "index"))}
        with (
            clip_rt.Client(url) as client,
            Index.open(Path(folder, "index"), create=True) as index,
        ):
            report = index.update(client, [find_sample() / "styles/openmoji.tar"])
        search = [*console, "search", QUERY, "--json"]
        ways = {name: [sys.executable, "-c", code] for name, code in ALONE.items()}
        ways["search, a warm server"] = [*search, "--url", url]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        # By turns; the first one of each, which may compile bytecode, does not count.
        for number in range(config.runs + 1):
            for name, arguments in ways.items():
                took = time_process(arguments, environment)
                if number:
                    times[name].append(took)
        results = {name: describe(each) for name, each in times.items()}
        own = {**environment, "CLIP_RT_URL": ""}
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
