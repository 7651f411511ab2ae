"""Ray Data with local actors and the bundled model: the rows of one process, whatever dies.

Ray runs in a process of its own, with the settings of a user's: it has threads and warnings that
are not this project's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_pictures import jpeg, write_broken, write_pictures

import clip_rt
from clip_rt.errors import InputError

ROOT = Path(__file__).parents[2]
NUM = 120

DRIVER = """if True:
    import json, os, signal, sys, threading, time
    from pathlib import Path
    import ray
    from clip_rt.ray import EmbedBatch, embed_dataset

    folder, out, what = sys.argv[1:]
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)

    class Watched(EmbedBatch):
        def __call__(self, batch):
            with open(Path(out, "pids"), "a") as file:
                file.write(f"{os.getpid()}\\n")
            time.sleep(0.1)
            return super().__call__(batch)

    def watch():
        while len(pids := (Path(out, "pids").read_text().split() if Path(out, "pids").exists()
                           else ())) < 4:
            time.sleep(0.01)
        os.kill(int(pids[-1]), signal.SIGKILL)
        Path(out, "killed").write_text(pids[-1])

    local = {"client_options": {"server": "in_process"}}
    paths = sorted(map(str, Path(folder).rglob("*.jpg")))
    dataset = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=12)
    if what == "paths":
        rows = embed_dataset(dataset, num_workers=2, batch_size=8, column="path", **local)
    elif what == "bytes":
        dataset = ray.data.read_binary_files(folder, include_paths=True)
        rows = dataset.map_batches(
            EmbedBatch,
            fn_constructor_kwargs={"column": "bytes", **local},
            compute=ray.data.ActorPoolStrategy(size=2),
            batch_size=16,
        ).drop_columns(["bytes"])
    elif what == "texts":
        dataset = ray.data.from_items([{"text": f"{n} owls"} for n in range(50)] + [{"text": ""}])
        rows = embed_dataset(dataset, kind="text", column="text", **local)
    elif what == "killed":
        threading.Thread(target=watch, daemon=True).start()
        rows = dataset.map_batches(
            Watched,
            fn_constructor_kwargs={"column": "path", **local},
            compute=ray.data.ActorPoolStrategy(size=2),
            batch_size=8,
        )
    rows.write_parquet(out + "/rows")
    ray.shutdown()
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, NUM)
    write_broken(folder)
    return folder


def run(folder: Path, out: Path, what: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), str(out), what],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = pq.read_table(out / "rows", columns=None).to_pylist()
    return sorted(rows, key=lambda row: row.get("path") or row["text"])


def assert_rows_of_one_process(rows: list[dict[str, Any]], pictures: Path) -> None:
    paths = sorted(map(str, pictures.rglob("*.jpg")))
    assert [row["path"] for row in rows] == paths
    with clip_rt.Client(server="in_process") as client:
        encoded = client.encode_images(paths, on_error="skip")
    embeddings = np.array([row["embedding"] for row in rows], np.float32)
    bad = [i for i, row in enumerate(rows) if row["error"]]
    assert bad == [error.index for error in encoded.failures]
    assert np.isnan(embeddings[bad]).all()
    np.testing.assert_allclose(embeddings[encoded.indices], encoded.embeddings, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["paths", "bytes"])
def test_two_actors_give_the_rows_of_one_process(pictures, tmp_path, what):
    assert_rows_of_one_process(run(pictures, tmp_path, what), pictures)


@pytest.mark.slow
def test_a_killed_actor_loses_nothing(pictures, tmp_path):
    rows = run(pictures, tmp_path, "killed")
    killed = (tmp_path / "killed").read_text()
    assert killed in (tmp_path / "pids").read_text().split()
    assert len(set((tmp_path / "pids").read_text().split())) == 3
    assert_rows_of_one_process(rows, pictures)


@pytest.mark.slow
def test_texts_too(tmp_path):
    *rows, empty = sorted(run(tmp_path, tmp_path, "texts"), key=lambda row: row["text"] == "")
    with clip_rt.Client(server="in_process") as client:
        expected = client.encode_texts([row["text"] for row in rows])
    embeddings = np.array([row["embedding"] for row in rows], np.float32)
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)
    assert empty["error"]


def test_a_batch_is_what_ray_gives():
    from clip_rt.ray import EmbedBatch

    embed = EmbedBatch(column="bytes", client_options={"server": "in_process"})
    batch = {"bytes": np.array([jpeg(0), b"", jpeg(1)], object), "n": np.arange(3)}
    found = embed(batch)
    assert list(found) == ["bytes", "n", "embedding", "error"]
    assert found["embedding"].shape == (3, 256)
    assert np.isnan(found["embedding"][1]).all()
    assert [bool(error) for error in found["error"]] == [False, True, False]
    with clip_rt.Client(server="in_process") as client:
        np.testing.assert_allclose(
            found["embedding"][[0, 2]], client.encode_images([jpeg(0), jpeg(1)]), atol=1e-5
        )
    pixels = np.random.default_rng(0).integers(0, 255, (4, 80, 64, 3), np.uint8)
    found = EmbedBatch(client_options={"server": "in_process"})({"image": pixels})
    assert found["embedding"].shape == (4, 256)
    with pytest.raises(InputError, match="has no column 'bytes'; it has 'image'"):
        embed({"image": pixels})
    with pytest.raises(InputError, match="a batch is a list"):
        embed([1])
    with pytest.raises(InputError, match="kind is 'video'"):
        EmbedBatch(kind="video")
