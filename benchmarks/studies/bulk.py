"""Does bulk embedding survive kills, stay small, and cost next to nothing over the client?

    python -m benchmarks.studies.bulk
    python -m benchmarks.studies.bulk --rehearse      # seconds instead of minutes

1. Kills: JPEGs on a disk, some of them broken, embedded by `clip-rt embed` with the bundled model
   in its process. It is killed with SIGKILL at random moments and started again. Every file must
   be there exactly once, every broken one among the errors.
2. Throughput: `bulk.embed` over these files against `Client.stream_images` over the same, by turns.
3. Many items: tar shards of tiny pictures and a tiny model. Memory is sampled in all of a run, and
   the time of a start that goes on from near the end is measured.
"""

from __future__ import annotations

import contextlib
import io
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro
from PIL import Image

import clip_rt
from benchmarks import photos
from benchmarks.findings import Bar, at_least, at_most
from benchmarks.record import describe_bar, save
from benchmarks.report.terminal import bar_table
from benchmarks.resources import peak_mib
from benchmarks.studies.common import ROOT, console, write_towers
from clip_rt import bulk
from clip_rt.commands.exit_codes import SOME_BAD
from clip_rt.specs import ModelSpec, TextSpec, ViTSpec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.pipeline import fingerprint_of, make_manifest, random_clip
from export.repository import publish

MODULE = "studies.bulk"
PACKAGES = ("numpy", "onnxruntime", "openvino", "pillow", "pyarrow")
SIZE_PX = (320, 240)
NUM_PHOTOS = 500
"""Different pictures; files beyond these have the same with another comment in the JPEG."""
BROKEN_EVERY = 400
"""Of the files, one is cut in the middle."""
PARTITION_ITEMS = 1000
MAX_RSS_MIB = 1024.0
MIN_THROUGHPUT = 0.9
MAX_RESUME_S = 10.0
MAX_GROWTH_MIB = 64.0
SAMPLE_S = 0.2
WARM_UP_SHARE = 0.2
NEAR_END_SHARE = 0.97
TINY_PX = 32


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """Measure, print a table, and write a dated JSON."""

    num_files: int = 20_000
    """JPEGs of the first two parts."""
    num_kills: int = 5
    rounds: int = 3
    """Of A B each."""
    num_rows: int = 1_000_000
    """Pictures of the third part; 0 leaves it out."""
    shard_items: int = 10_000
    """Pictures of a tar file."""
    rehearse: bool = False
    """A few hundred of all, and nothing is written."""
    seed: int = 0
    """Of the moments of the kills."""

    def rehearsal(self) -> BulkConfig:
        """Return the same in small."""
        return replace(self, num_files=400, num_kills=2, rounds=1, num_rows=3000, shard_items=500)


# The files


def write_files(folder: Path, num: int) -> list[Path]:
    """Write JPEGs, 1000 a folder; return those that are broken."""
    encoded = photos.jpegs(SIZE_PX, min(num, NUM_PHOTOS))
    broken = []
    for number in range(num):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = encoded[number % len(encoded)]
        # A comment (COM) behind the start of the image makes each file another.
        comment = f"{number:08d}".encode()
        length = (len(comment) + 2).to_bytes(2, "big")
        content = content[:2] + b"\xff\xfe" + length + comment + content[2:]
        if number % BROKEN_EVERY == BROKEN_EVERY // 2:
            content = content[: len(content) // 2]
            broken.append(path)
        path.write_bytes(content)
    return broken


def write_shards(folder: Path, num: int, shard_items: int) -> None:
    """Write tar files of tiny PNGs, each of another colour, with captions."""
    folder.mkdir()
    for first in range(0, num, shard_items):
        with tarfile.open(folder / f"{first // shard_items:05d}.tar", "w") as shard:
            for number in range(first, min(first + shard_items, num)):
                file = io.BytesIO()
                colour = (number % 256, number // 256 % 256, number // 65536)
                Image.new("RGB", (8, 8), colour).save(file, "BMP")
                for suffix, content in ((".bmp", file.getvalue()), (".txt", b"a %d" % number)):
                    header = tarfile.TarInfo(f"{number:08d}{suffix}")
                    header.size = len(content)
                    shard.addfile(header, io.BytesIO(content))


def write_tiny_model(repository: Path) -> None:
    """Publish a model of one small layer, beside which what is measured is ours."""
    tower = ViTSpec(patch_px=TINY_PX, width=64, layers=1, heads=1)
    text = TextSpec(width=64, layers=1, heads=1)
    spec = ModelSpec(name="tiny", side_px=TINY_PX, image=tower, text=text, embedding_dim=64)
    clip = random_clip(spec)
    files = write_towers(clip, repository.parent / "towers")
    manifest = make_manifest(
        clip, "tiny", precision="fp32", weights_fingerprint=fingerprint_of(clip)
    )
    publish(repository, manifest, image=files["image"], text=files["text"])


# The runs


@dataclass
class Run:
    """A process of `clip-rt embed`, and the most memory it had."""

    process: subprocess.Popen[bytes]
    out: Path
    peak_rss_mib: float = 0.0
    rss_mib: list[float] = field(default_factory=list)

    def wait(self, *, until: Callable[[], bool] = lambda: False) -> bool:
        """Sample its memory until it ends, or until something else; return whether it ended."""
        while self.process.poll() is None:
            with contextlib.suppress(psutil.Error, OSError):
                self.rss_mib.append(psutil.Process(self.process.pid).memory_info().rss / 2**20)
                self.peak_rss_mib = max(self.peak_rss_mib, peak_mib(self.process.pid))
            if until():
                return False
            time.sleep(SAMPLE_S)
        return True

    def kill(self) -> None:
        """End it as nothing else does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def embedding(inputs: Path, out: Path, log: Path, *options: object) -> Iterator[Run]:
    """Start `clip-rt embed` with models in its own process."""
    arguments = [inputs, "--out", out, "--server", "in_process", *options]
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "clip_rt", "embed", *map(str, arguments)],
            cwd=ROOT,
            stderr=file,
        )
        try:
            yield Run(process, out)
        finally:
            process.kill()
            process.wait()


def count_partitions(out: Path) -> int:
    """Return how many partitions there are."""
    return sum(1 for _ in out.glob("embeddings/part*"))


def has_partitions(out: Path, num: int) -> bool:
    """Return whether there are so many."""
    return count_partitions(out) >= num


def check_end(run: Run, log: Path) -> None:
    """Refuse a run that failed.

    Raises:
        RuntimeError: it did.
    """
    if run.process.returncode not in (0, SOME_BAD):
        tail = log.read_text("utf-8", "replace")[-2000:]
        raise RuntimeError(f"clip-rt embed ended with {run.process.returncode}: {tail}")


def measure_kills(
    files: Path, broken: Sequence[Path], folder: Path, config: BulkConfig
) -> dict[str, Any]:
    """Kill and start again, then compare what the folder holds with the files."""
    out, log, rng = folder / "killed", folder / "killed.log", random.Random(config.seed)
    partition_items = min(PARTITION_ITEMS, max(config.num_files // 20, 1))
    options = ("--partition-items", partition_items)
    kills, peak_rss_mib = [], 0.0
    each_kill = config.num_files // partition_items // (config.num_kills + 1)
    for _ in range(config.num_kills):
        before = count_partitions(out)
        # After some more partitions, and then anywhere within one.
        wanted = before + rng.randint(0, max(1, each_kill))
        with embedding(files, out, log, *options) as run:
            is_over = run.wait(until=partial(has_partitions, out, wanted))
            time.sleep(rng.uniform(0, 2))
            run.kill()
            peak_rss_mib = max(peak_rss_mib, run.peak_rss_mib)
        kills.append({"partitions": count_partitions(out), "ended_before": is_over})
    with embedding(files, out, log, *options) as run:
        run.wait()
        check_end(run, log)
        peak_rss_mib = max(peak_rss_mib, run.peak_rss_mib)
    result = bulk.Result(out)
    good = Counter(name for partition in result for name in partition.names)
    bad = Counter(str(row["path"]) for row in result.errors())
    expected = Counter(str(path) for path in files.rglob("*.jpg"))
    found = good + bad
    return {
        "num_files": len(expected),
        "num_broken": len(broken),
        "kills": kills,
        "num_missing": sum((expected - found).values()),
        "num_repeated": sum((found - expected).values()),
        "num_errors_not_named": sum((Counter(map(str, broken)) - bad).values()),
        "num_wrong_errors": sum((bad - Counter(map(str, broken))).values()),
        "peak_rss_mib": round(peak_rss_mib, 1),
    }


def measure_throughput(files: Path, folder: Path, config: BulkConfig) -> dict[str, Any]:
    """Time the client alone and the whole job by turns, over the same files."""
    paths = sorted(files.rglob("*.jpg"))
    rounds: dict[str, list[float]] = {"client": [], "bulk": []}
    with clip_rt.Client(server="in_process") as client:
        for _ in client.stream_images(paths[:1000], on_error="skip"):
            pass
        for turn in range(config.rounds):
            begun_s = time.perf_counter()
            num = sum(
                len(part.indices) + len(part.failures)
                for part in client.stream_images(paths, on_error="skip")
            )
            rounds["client"].append(num / (time.perf_counter() - begun_s))
            begun_s = time.perf_counter()
            summary = bulk.embed(files, folder / f"turn_{turn}", client)
            rounds["bulk"].append(summary.num_items / (time.perf_counter() - begun_s))
    ratios = [b / a for a, b in zip(rounds["client"], rounds["bulk"], strict=True)]
    return {
        "images_per_s": {name: [round(rate, 1) for rate in each] for name, each in rounds.items()},
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(float(np.median(ratios)), 3),
    }


def measure_many(folder: Path, config: BulkConfig) -> dict[str, Any]:
    """Embed many tiny pictures; kill near the end, and time how a new start goes on."""
    repository = folder / "models"
    write_tiny_model(repository)
    shards, out, log = folder / "shards", folder / "many", folder / "many.log"
    write_shards(shards, config.num_rows, config.shard_items)
    partition_items = min(10_000, config.num_rows // 50)
    options = ("--repository", repository, "--partition-items", partition_items)
    near_end = int(NEAR_END_SHARE * config.num_rows / partition_items)
    begun_s = time.perf_counter()
    with embedding(shards, out, log, *options) as run:
        run.wait(until=partial(has_partitions, out, near_end))
        seconds = time.perf_counter() - begun_s
        run.kill()
    done = count_partitions(out)
    begun_s = time.perf_counter()
    with embedding(shards, out, log, *options) as again:
        while again.process.poll() is None and count_partitions(out) == done:
            time.sleep(0.02)
        resume_s = time.perf_counter() - begun_s
        again.wait()
        check_end(again, log)
    result = bulk.Result(out)
    indices = np.concatenate([part.items.column("index").to_numpy() for part in result])
    samples = run.rss_mib[int(WARM_UP_SHARE * len(run.rss_mib)) :]
    quarter = max(1, len(samples) // 4)
    return {
        "num_rows": config.num_rows,
        "num_distinct": len(np.unique(indices)),
        "num_embedded": len(indices),
        "rows_per_s": round(done * partition_items / seconds, 1),
        "seconds_with_listing": round(seconds, 1),
        "peak_rss_mib": round(max(run.peak_rss_mib, again.peak_rss_mib), 1),
        "growth_mib": round(float(np.median(samples[-quarter:]) - np.median(samples[:quarter])), 1),
        "resume_to_next_partition_s": round(resume_s, 2),
        "partition_items": partition_items,
        "rss_mib": [round(each, 1) for each in run.rss_mib[:: max(1, len(run.rss_mib) // 200)]],
    }


def find_bars(results: Mapping[str, Any]) -> list[Bar]:
    """Hold what was found to what was asked."""
    kills, throughput = results["kills"], results["throughput"]
    bars = [
        at_most("files missing after the kills", kills["num_missing"], 0),
        at_most("files embedded twice", kills["num_repeated"], 0),
        at_most("broken files not named", kills["num_errors_not_named"], 0),
        at_most("errors that are none", kills["num_wrong_errors"], 0),
        at_most("peak memory, MiB", kills["peak_rss_mib"], MAX_RSS_MIB),
        at_least("throughput over the client's own", throughput["ratio"], MIN_THROUGHPUT),
    ]
    if many := results.get("many"):
        bars += [
            at_least("rows embedded once", many["num_distinct"], many["num_rows"]),
            at_most("rows in all", many["num_embedded"], many["num_rows"]),
            at_most("peak memory with many rows, MiB", many["peak_rss_mib"], MAX_RSS_MIB),
            at_most("growth of memory, MiB", many["growth_mib"], MAX_GROWTH_MIB),
            at_most("seconds to go on", many["resume_to_next_partition_s"], MAX_RESUME_S),
        ]
    return bars


def measure(config: BulkConfig, folder: Path) -> dict[str, Any]:
    """Do all three parts in a folder."""
    files = folder / "files"
    with console.status("write files"):
        broken = write_files(files, config.num_files)
    results: dict[str, Any] = {"pictures": photos.describe() | {"size_px": SIZE_PX}}
    with console.status("embed and kill"):
        results["kills"] = measure_kills(files, broken, folder, config)
    with console.status("embed by turns"):
        results["throughput"] = measure_throughput(files, folder, config)
    if config.num_rows:
        with console.status("embed many"):
            results["many"] = measure_many(folder, config)
    bars = find_bars(results)
    console.print(bar_table(bars))
    return results | {"bars": [describe_bar(bar) for bar in bars]}


def main(config: BulkConfig) -> None:
    """Measure, and write what was found."""
    if config.rehearse:
        config = config.rehearsal()
    with tempfile.TemporaryDirectory() as place:
        results = measure(config, Path(place))
    if not config.rehearse:
        save(MODULE, results, packages=PACKAGES)


if __name__ == "__main__":
    with command():
        main(tyro.cli(BulkConfig, prog=program(__spec__.name), description=__doc__))
