r"""A new version of a model is rolled out, refused and rolled back under load: does anybody notice?

    python -m benchmarks.studies.rollout                   # 10 minutes, 32 callers
    python -m benchmarks.studies.rollout --minutes 1 --num-callers 8

Two servers of clip_rt stand behind one gateway, each over a repository of its own, and in a network
namespace of its own where that is possible (as root, with `ip`). Again and again docs/rollout.md is
followed, by the commands it names: a new version is published on one server, which is restarted and
asked for its canary by `clip-rt doctor` before the other follows; then a version whose embeddings
are wrong is published, which the doctor must refuse, and is rolled back; then they go back to the
first version.

Callers send texts with an image, and images to be classified, without a pause. Versions differ by a
permutation of the dimensions of embeddings, so that every vector tells its version: an answer is
right if all of it is of one version that was let in.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import tyro
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from rich.console import Console

import clip_rt
from benchmarks import photos
from benchmarks.findings import Bar, at_least, at_most
from benchmarks.hosts import Host, hosts, reachable
from benchmarks.record import describe_bar, save
from benchmarks.replicas import Replica
from benchmarks.report.terminal import bar_table
from clip_rt.embedded.bundled import find_model_repository
from clip_rt.specs import EMBEDDINGS, Tower
from clip_rt.wire import canary
from clip_rt.wire.manifest import Manifest
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.model_folders import tower_folders
from export.repository import publish
from export.triton_config import read_config, read_manifest, read_serving

MODEL = "drawings"
TOWERS: tuple[Tower, Tower] = ("image", "text")
NUM_ITEMS = 16
"""Images, and texts, to draw from."""
LABELS = ("apple", "bicycle", "camera", "dog", "hammer", "key", "moon", "ship")
TOLERANCE = 1e-3
"""Between the same embedding by two runtimes and batches; versions differ by a hundred times it."""
DOCTOR_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 60.0
POLL_S = 0.5
"""Between two health checks."""
SETTLE_S = 2.0
"""Between two steps, in which calls are made and nothing changes."""
Array = NDArray[np.float32]

console = Console()


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Measure, print a table, and write a dated JSON."""

    minutes: float = 10.0
    """At least; a cycle that was begun is ended."""
    num_callers: int = 32
    folder: Path | None = None
    """Where repositories are made, and removed at the end."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of the model, and what it answers."""

    name: str
    manifest: Manifest
    files: dict[Tower, Path]
    step: int
    """By so many dimensions its embeddings are turned."""
    is_good: bool = True
    """Whether its canary is that of its embeddings."""


def _turn(source: Path, target: Path, step: int, dim: int) -> None:
    """Write a graph whose embeddings have their dimensions moved on by `step`."""
    model = onnx.load(source)
    before = f"{EMBEDDINGS}_before"
    for node in model.graph.node:
        node.input[:] = [before if name == EMBEDDINGS else name for name in node.input]
        node.output[:] = [before if name == EMBEDDINGS else name for name in node.output]
    order = np.roll(np.arange(dim, dtype=np.int64), step)
    model.graph.initializer.append(numpy_helper.from_array(order, "order"))
    model.graph.node.append(helper.make_node("Gather", [before, "order"], [EMBEDDINGS], axis=1))
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, target)


def make_versions(folder: Path) -> tuple[Version, Version, Version]:
    """Return the bundled model, a new version of it, and one whose embeddings are wrong."""
    image, text = tower_folders(find_model_repository(), MODEL)
    sources: dict[Tower, Path] = {"image": image / "1/model.onnx", "text": text / "1/model.onnx"}
    manifest = read_manifest(image)
    said = manifest.canary
    if said is None:
        raise ValueError(f"{MODEL} carries no canary")

    def turned(tower: Tower, step: int) -> Array:
        vector = np.frombuffer(base64.b64decode(said[tower]), "<f2")
        return np.roll(vector.astype(np.float32), step)

    def make(name: str, digit: str, step: int, canary_step: int) -> Version:
        files = {tower: folder / name / f"{tower}.onnx" for tower in TOWERS}
        for tower in TOWERS:
            _turn(sources[tower], files[tower], step, manifest.embedding_dim)
        recorded = canary.write(
            turned("image", canary_step),
            turned("text", canary_step),
            min_cosine=float(said["min_cosine"]),
        )
        return Version(
            name=name,
            manifest=replace(manifest, fingerprint=digit * 64, canary=recorded),
            files=files,
            step=step,
            is_good=step == canary_step,
        )

    first = Version(name="first", manifest=manifest, files=sources, step=0)
    return first, make("new", "b", 3, 3), make("wrong", "c", 7, 3)


class Site:
    """A server with a repository of its own, handled by the commands of docs/rollout.md."""

    def __init__(self, name: str, folder: Path, host: Host) -> None:
        self.repository = folder / name / "models"
        self.replica = Replica(name, folder / f"{name}.log", self.repository, host)

    def publish(self, version: Version) -> None:
        """Publish a version beside the one that is served."""
        (image, _) = tower_folders(find_model_repository(), MODEL)
        publish(
            self.repository,
            version.manifest,
            image=version.files["image"],
            text=version.files["text"],
            serving=read_serving(read_config(image)),
        )

    def roll_back(self) -> None:
        """Serve the version before from the next start on."""
        _run(
            "-m",
            "export.repository",
            "--repository",
            str(self.repository),
            "--name",
            MODEL,
            "--rollback",
        )

    def restart(self) -> None:
        """Let requests under way end, and start again with what the repository holds."""
        self.replica.drain()
        self.replica.start()

    def passes_canary(self) -> bool:
        """Ask the doctor, on the server's own host: this Triton is for its loopback only."""
        replica = self.replica
        line = [*replica.host.prefix, sys.executable, "-m", "clip_rt", "doctor", "--json"]
        line += ["--url", f"127.0.0.1:{replica.port}", "--timeout-s", str(DOCTOR_TIMEOUT_S)]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=2 * DOCTOR_TIMEOUT_S, check=False
        )
        statuses = {each["check"]: each["status"] for each in json.loads(done.stdout)["findings"]}
        return done.returncode == 0 and statuses.get("canary") == "ok"


def _run(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr}")


@dataclass(frozen=True)
class Request:
    """What is asked of the gateway, and what each version answers."""

    path: str
    body: bytes
    read: Callable[[Any], Array]
    """Takes the numbers out of an answer."""
    expected_by_version: dict[str, Array]


def make_requests(versions: Sequence[Version]) -> list[Request]:
    """Prepare texts with an image, and images to be classified; the first version says what is due.

    Probabilities are the same in all versions, as cosines do not change with the order.
    """
    files = photos.jpegs((96, 80), NUM_ITEMS)
    texts = [f"{label} number {number}" for number, label in enumerate(LABELS * 2)]
    found = []
    with clip_rt.Client(repository=find_model_repository(), server="in_process") as client:
        for number, file in enumerate(files):
            chosen = texts[number % 4 : number % 4 + 3]
            uri = f"data:image/jpeg;base64,{base64.b64encode(file).decode()}"
            rows = np.concatenate([client.encode_texts(chosen), client.encode_images([file])])
            found.append(
                Request(
                    "/v1/embeddings",
                    json.dumps({"model": MODEL, "input": [*chosen, uri]}).encode(),
                    _read_rows,
                    {each.name: np.roll(rows, each.step, axis=1) for each in versions},
                )
            )
            scores = client.zero_shot([file], LABELS).probabilities
            body = {"model": MODEL, "images": [uri], "labels": LABELS, "top_k": len(LABELS)}
            found.append(
                Request(
                    "/v1/classify",
                    json.dumps(body).encode(),
                    _read_probabilities,
                    {each.name: scores for each in versions[:1]},
                )
            )
    return found


def _read_rows(answer: Any) -> Array:
    return np.array([each["embedding"] for each in answer["data"]], np.float32)


def _read_probabilities(answer: Any) -> Array:
    by_label = [
        {each["label"]: each["probability"] for each in row["labels"]} for row in answer["data"]
    ]
    return np.array([[row[label] for label in LABELS] for row in by_label], np.float32)


@dataclass
class Load:
    """Callers without a pause, and what came of their calls."""

    url: str
    requests: Sequence[Request]
    num_calls: int = 0
    longest_s: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    """Answers that are not 200, by status and code, and calls that got none."""
    num_mixed: int = 0
    """Answers that no single version gives."""
    by_version: Counter[str] = field(default_factory=Counter)
    """Embeddings, by the version that gave them."""
    num_unready: int = 0
    """Health checks that found the gateway not ready."""
    num_checks: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def call(self, caller: int, stop: threading.Event) -> None:
        """Make one call after another until `stop` is set."""
        order = np.random.default_rng(caller).permutation(len(self.requests))
        with httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S, trust_env=False) as http:
            for number in itertools.cycle(order):
                if stop.is_set():
                    return
                self._call(http, self.requests[number])

    def _call(self, http: httpx.Client, request: Request) -> None:
        start_s = time.monotonic()
        failure, versions = "", list[str]()
        try:
            answer = http.post(request.path, content=request.body)
            if answer.status_code == httpx.codes.OK:
                found = request.read(answer.json())
                versions = [
                    name
                    for name, expected in request.expected_by_version.items()
                    if found.shape == expected.shape and np.abs(found - expected).max() <= TOLERANCE
                ]
            else:
                failure = f"{answer.status_code} {answer.text[:200]}"
        except httpx.HTTPError as error:
            failure = repr(error)
        elapsed_s = time.monotonic() - start_s
        with self._lock:
            self.num_calls += 1
            self.longest_s = max(self.longest_s, elapsed_s)
            if failure:
                self.failures[failure] += 1
            elif not versions:
                self.num_mixed += 1
            elif request.path == "/v1/embeddings":
                self.by_version[versions[0]] += 1

    def watch(self, stop: threading.Event) -> None:
        """Ask the gateway for its health, as a load balancer does."""
        with httpx.Client(base_url=self.url, timeout=REQUEST_TIMEOUT_S, trust_env=False) as http:
            while not stop.wait(POLL_S):
                self.num_checks += 1
                try:
                    is_ready = http.get("/health/ready").status_code == httpx.codes.OK
                except httpx.HTTPError:
                    is_ready = False
                self.num_unready += not is_ready


def _without_proxies() -> dict[str, str]:
    """Return the environment without what would have gRPC ask a proxy for our own hosts."""
    return {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}


@contextmanager
def _gateway(urls: Sequence[str], log: Path) -> Iterator[str]:
    line = [sys.executable, "-m", "clip_rt", "gateway", "--port", "0", "--model", MODEL]
    line += ["--max-concurrent-requests", "256", "--url", *urls]
    with log.open("w") as file:
        process = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=file, text=True, env=_without_proxies()
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().partition(" on ")[2].strip()
        if not url:
            raise RuntimeError(f"the gateway does not start: {log.read_text('utf-8')[-2000:]}")
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=REQUEST_TIMEOUT_S)


@contextmanager
def _asked(load: Load, num_callers: int) -> Iterator[None]:
    """Have callers call in a `with` block."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(num_callers + 1)
    working = [pool.submit(load.call, caller, stop) for caller in range(num_callers)]
    working.append(pool.submit(load.watch, stop))
    try:
        yield
    finally:
        stop.set()
        pool.shutdown()
        for each in working:
            each.result()


def _cycle(
    sites: Sequence[Site], new: Version, wrong: Version, load: Load, steps: list[dict[str, Any]]
) -> None:
    """Roll out, refuse, roll back."""

    def take(what: str, act: Callable[[], bool | None], expected: bool | None = None) -> None:
        start_s = time.monotonic()
        outcome = act()
        steps.append(
            {
                "what": what,
                "seconds": round(time.monotonic() - start_s, 2),
                "as_expected": outcome is expected,
                "calls_so_far": load.num_calls,
                "failed_so_far": load.failures.total(),
            }
        )
        time.sleep(SETTLE_S)

    for site in sites:
        name = site.replica.name
        take(f"{name}: publish the new version", partial(site.publish, new))
        take(f"{name}: restart", site.restart)
        take(f"{name}: canary of the new version", site.passes_canary, True)
    site = sites[0]
    name = site.replica.name
    take(f"{name}: publish a version that is wrong", partial(site.publish, wrong))
    take(f"{name}: restart", site.restart)
    take(f"{name}: canary of the wrong version", site.passes_canary, False)
    take(f"{name}: roll back to the new version", site.roll_back)
    take(f"{name}: restart", site.restart)
    take(f"{name}: canary after the rollback", site.passes_canary, True)
    for site in sites:
        name = site.replica.name
        take(f"{name}: go back to the first version", partial(_serve_first, site))
        take(f"{name}: restart", site.restart)
        take(f"{name}: canary of the first version", site.passes_canary, True)


def _serve_first(site: Site) -> None:
    """Publish the first version again: a repository keeps two, and the wrong one was the last."""
    (image, text) = tower_folders(find_model_repository(), MODEL)
    site.publish(
        Version(
            name="first",
            manifest=read_manifest(image),
            files={"image": image / "1/model.onnx", "text": text / "1/model.onnx"},
            step=0,
        )
    )


def rehearse(*, minutes: float, num_callers: int, folder: Path) -> tuple[dict[str, Any], list[Bar]]:
    """Go through cycles of rollout and rollback under load.

    Args:
        minutes: At least; the cycle under way is ended.
        num_callers: Threads that call.
        folder: For repositories and logs.

    Returns:
        What was found, and what must hold of it.
    """
    versions = first, new, wrong = make_versions(folder / "versions")
    requests = make_requests(versions)
    steps: list[dict[str, Any]] = []
    num_cycles = 0
    with ExitStack() as until_end:
        places = until_end.enter_context(hosts(2))
        sites = [Site(f"server {index + 1}", folder, host) for index, host in enumerate(places)]
        for site in sites:
            until_end.callback(site.replica.close)
            site.publish(first)
            site.replica.start()
            until_end.enter_context(reachable(site.replica.host, site.replica.port))
        urls = [site.replica.url for site in sites]
        load = Load(until_end.enter_context(_gateway(urls, folder / "gateway.log")), requests)
        start_s = time.monotonic()
        with _asked(load, num_callers):
            time.sleep(SETTLE_S)
            while num_cycles == 0 or time.monotonic() - start_s < 60 * minutes:
                _cycle(sites, new, wrong, load, steps)
                num_cycles += 1
        elapsed_s = time.monotonic() - start_s
    found = {
        "minutes": round(elapsed_s / 60, 2),
        "network_namespaces": not places[0].is_here,
        "num_callers": num_callers,
        "num_cycles": num_cycles,
        "num_calls": load.num_calls,
        "calls_per_s": round(load.num_calls / elapsed_s, 1),
        "longest_call_s": round(load.longest_s, 3),
        "failures": dict(load.failures),
        "num_mixed": load.num_mixed,
        "embeddings_by_version": dict(load.by_version),
        "health_checks": {"asked": load.num_checks, "not_ready": load.num_unready},
        "exit_codes_of_drains": [code for site in sites for code in site.replica.exit_codes],
        "steps": steps,
    }
    unexpected = [each["what"] for each in steps if not each["as_expected"]]
    bars = [
        at_most("calls that failed", load.failures.total(), 0),
        at_most("answers that no single version gives", load.num_mixed, 0),
        at_most("embeddings by the version that fails its canary", load.by_version[wrong.name], 0),
        at_most("steps that did not go as expected", len(unexpected), 0),
        at_least("embeddings by the first version", load.by_version[first.name], 1),
        at_least("embeddings by the new version", load.by_version[new.name], 1),
    ]
    return found, bars


def main(config: RolloutConfig) -> int:
    """Run it; return the exit status."""
    folder = Path(tempfile.mkdtemp(prefix="clip_rt-rollout-", dir=config.folder))
    try:
        found, bars = rehearse(
            minutes=config.minutes, num_callers=config.num_callers, folder=folder
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    console.print(bar_table(bars))
    found["bars"] = [describe_bar(bar) for bar in bars]
    packages = ("clip-rt", "nvidia-pytriton", "onnxruntime", "openvino", "uvicorn", "grpcio")
    save("studies.rollout", found, packages=packages)
    return 0 if all(bar.is_met for bar in bars) else 1


if __name__ == "__main__":
    with command():
        options = tyro.cli(
            RolloutConfig, prog=program("benchmarks.studies.rollout"), description=__doc__
        )
        sys.exit(main(options))
