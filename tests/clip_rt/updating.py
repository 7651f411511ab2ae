"""Callers without a pause while a model is updated, and what came of their calls."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import tiny_repository
from numpy.typing import NDArray
from onnx import numpy_helper

import clip_rt

TEXTS = ["red", "green", "blue", "red green"]
LABELS = ["red", "green", "blue"]


def make_versions(folder: Path) -> tuple[Path, Path]:
    """Write two versions of a model with other vectors of both towers and other fingerprints."""
    first = tiny_repository.write(folder / "v1")
    second = tiny_repository.write(
        folder / "v2", image={"fingerprint": "b" * 64}, text={"fingerprint": "b" * 64}
    )
    for number, folder in (1, first), (2, second):
        for model in folder.iterdir():
            (model / "1").rename(model / str(number))
            with (model / "config.pbtxt").open("a") as config:
                config.write(f"version_policy {{ specific {{ versions: [ {number} ] }} }}\n")
    for tower, name, step in ("image", "weights", 2), ("text", "table_fp16", 3):
        path = second / f"tiny_{tower}" / "2" / "model.onnx"
        graph = onnx.load(path)
        for each in graph.graph.initializer:
            if each.name == name:
                # Turned by as many axes, so that both towers' vectors differ from the first's, and
                # the scores of an image of one version and a text of the other from both.
                turned = np.roll(numpy_helper.to_array(each), step, axis=-1)
                each.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(turned), name))
        onnx.save(graph, path)
    return first, second


def publish(version: Path, repository: Path) -> None:
    """Put a version into the place of what is there, as an export does: by renames."""
    repository.mkdir(exist_ok=True)
    for model in version.iterdir():
        staged = repository.parent / f"staged-{model.name}"
        shutil.copytree(model, staged)
        target = repository / model.name
        if target.exists():
            target.rename(repository.parent / f"old-{time.monotonic_ns()}")
        staged.rename(target)


def make_images() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(3)
    side_px = tiny_repository.SIDE_PX
    return [rng.integers(0, 256, (side_px, side_px, 3), np.uint8) for _ in range(4)]


@dataclass
class Expected:
    """The vectors of one version."""

    images: NDArray[np.float32]
    texts: NDArray[np.float32]
    logits: NDArray[np.float32]


def read_expected(client: clip_rt.Client) -> Expected:
    images = make_images()
    return Expected(
        client.encode_images(images),
        client.encode_texts(TEXTS),
        client.zero_shot(images, LABELS).logits,
    )


@dataclass
class Callers:
    """Threads that call without a pause until they are stopped."""

    client: clip_rt.Client
    versions: list[Expected]
    longest_s: float = 0.0
    num_calls: int = 0
    failures: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> Callers:
        images = make_images()
        read_expected(self.client)  # The first call of all may start a server.
        calls = {
            "images": lambda: self.client.encode_images(images),
            "texts": lambda: self.client.encode_texts(TEXTS),
            "logits": lambda: self.client.zero_shot(images, LABELS).logits,
        }
        self._threads = [
            threading.Thread(target=self._work, args=(name, call))
            for name, call in calls.items()
            for _ in range(2)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def wait_until_seen(self, version: int, timeout_s: float = 10.0) -> None:
        self.seen.clear()
        deadline_s = time.monotonic() + timeout_s
        while version not in self.seen:
            assert time.monotonic() < deadline_s, f"version {version} is not served: {self}"
            time.sleep(0.01)

    def _work(self, name: str, call) -> None:
        while not self._stop.is_set():
            start_s = time.monotonic()
            try:
                found = call()
            except Exception as error:
                self.failures.append(f"{name}: {type(error).__name__}: {error}")
                continue
            self.longest_s = max(self.longest_s, time.monotonic() - start_s)
            self.num_calls += 1
            # All of a result is of one version: its rows are those of that one, and no others.
            matching = [
                index
                for index, version in enumerate(self.versions)
                if np.allclose(found, getattr(version, name), atol=1e-6)
            ]
            if len(matching) == 1:
                self.seen.add(matching[0])
            else:
                self.failures.append(f"{name}: vectors of no single version: {found}")

    def check(self) -> None:
        sys.stderr.write(f"{self.num_calls} calls, longest {self.longest_s:.3f} s\n")
        assert not self.failures, self.failures[:5]
        assert self.num_calls > 100
        assert self.longest_s < 2.0
