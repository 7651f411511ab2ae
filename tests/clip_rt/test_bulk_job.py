"""Bulk jobs by the bundled model in this process: what the folder holds, and how it is resumed."""

from __future__ import annotations

import concurrent.futures
import hashlib
import http.server
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny_repository
from bulk_pictures import (
    BROKEN,
    assert_same,
    jpeg,
    size_of,
    write_broken,
    write_pictures,
    write_shard,
)

import clip_rt
from clip_rt import bulk
from clip_rt.bulk.folder import JobFolder, written
from clip_rt.errors import (
    InputError,
    JobMismatchError,
    JobRunningError,
    ModelReplacedError,
    ServerError,
)
from clip_rt.testing import FakeServer

NUM, MANY = 70, 800


@pytest.fixture(scope="module")
def client() -> Iterator[clip_rt.Client]:
    with clip_rt.Client(server="in_process") as client:
        yield client


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, NUM)
    write_broken(folder)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """More than are under way at a time."""
    folder = tmp_path_factory.mktemp("many")
    write_pictures(folder, MANY)
    write_broken(folder)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def part_names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "embeddings").iterdir())


@pytest.mark.parametrize("format", ["parquet", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_becomes_rows_and_what_is_broken_is_named(
    client, pictures, tmp_path, format, dtype
):
    summary = bulk.embed(
        pictures, tmp_path / "out", client, format=format, dtype=dtype, partition_items=32
    )
    assert summary == bulk.Summary(
        num_items=NUM + 3, num_embedded=NUM, num_failed=3, is_complete=True
    )
    result = bulk.Result(tmp_path / "out")
    assert result.is_complete
    assert (len(result), result.kind, result.embedding_dim) == (NUM, "image", 256)
    assert result.model["fingerprint"] == client.manifest.fingerprint
    names, rows = result.load()
    paths = [Path(name) for name in names]
    assert paths == [pictures / f"{n // 16:03d}/{n:05d}.jpg" for n in range(NUM)]
    assert rows.dtype == np.float32
    assert_same(client, names, rows)
    for partition in result:
        assert partition.embeddings.dtype == dtype
        for row in partition.items.to_pylist():
            path = Path(row["path"])
            number = int(path.stem)
            assert row["index"] == number
            assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert (row["width"], row["height"]) == size_of(number)
            assert row["caption"] is None
    errors = {row["path"]: row for row in result.errors()}
    assert set(errors) == {str(pictures / name) for name in BROKEN}
    for name, words in BROKEN.items():
        row = errors[str(pictures / name)]
        assert row["error"] == "ImageError"
        assert row["message"].startswith(words), row
    assert [name.partition(".")[0] for name in part_names(tmp_path / "out")] == [
        f"part-{start:012d}-{end:012d}" for start, end in ((0, 32), (32, 64), (64, 73))
    ]


def test_the_files_are_what_other_tools_read(client, pictures, tmp_path):
    bulk.embed(pictures / "000", tmp_path / "out", client, partition_items=10)
    table = pq.read_table(tmp_path / "out/embeddings")
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[256]"
    assert table.num_rows == 16
    metadata = pq.read_schema(next((tmp_path / "out/embeddings").iterdir())).metadata
    assert metadata[b"clip_rt.fingerprint"].decode() == client.manifest.fingerprint
    matrix = np.stack(table.column("embedding").to_numpy())
    assert_same(client, table.column("path").to_pylist(), matrix)


def test_a_complete_job_is_left_as_it_is(client, pictures, tmp_path):
    first = bulk.embed(pictures, tmp_path, client)
    before = tree(tmp_path)
    assert bulk.embed(pictures, tmp_path, client) == first
    assert tree(tmp_path) == before


@pytest.mark.parametrize("stop_after", [1, 33, 300])
def test_a_stopped_run_is_gone_on_with(client, many, tmp_path, stop_after):
    done = []

    def stop() -> bool:
        return bool(done) and done[-1] >= stop_after

    summary = bulk.embed(
        many,
        tmp_path,
        client,
        partition_items=50,
        on_progress=lambda progress: done.append(progress.num_done),
        should_stop=stop,
    )
    assert not summary.is_complete
    assert stop_after <= summary.num_embedded + summary.num_failed < MANY + 3
    before = tree(tmp_path / "embeddings")
    reports: list[bulk.Progress] = []
    again = bulk.embed(many, tmp_path, client, partition_items=50, on_progress=reports.append)
    assert again == bulk.Summary(
        num_items=MANY + 3, num_embedded=MANY, num_failed=3, is_complete=True
    )
    assert reports[0].num_done == summary.num_embedded + summary.num_failed
    assert reports[-1].num_now == MANY + 3 - reports[0].num_done
    after = tree(tmp_path / "embeddings")
    assert {name: after[name] for name in before} == before
    names, rows = bulk.Result(tmp_path).load()
    assert len(names) == len(set(names)) == MANY
    assert_same(client, names, rows)


def test_a_run_stopped_while_it_lists_begins_anew(client, pictures, tmp_path):
    summary = bulk.embed(pictures, tmp_path, client, should_stop=lambda: True)
    assert (summary.num_items, summary.is_complete) == (0, False)
    assert not bulk.Result(tmp_path).is_complete
    assert bulk.embed(pictures, tmp_path, client).num_embedded == NUM


def test_what_a_kill_left_behind_is_gone_and_made_anew(client, pictures, tmp_path):
    bulk.embed(pictures, tmp_path, client, partition_items=20)
    expected = tree(tmp_path)
    # As after a kill between the errors of a partition and its embeddings, and within a file.
    first, *_, last = sorted((tmp_path / "embeddings").iterdir())
    last.rename(last.with_name(f".writing-{last.name}"))
    first.unlink()
    (tmp_path / ".writing-.listing.parquet").write_bytes(b"PAR1")
    (tmp_path / "errors/part-000000000060-000000000065.parquet").write_bytes(b"PAR1")
    assert len(list(bulk.Result(tmp_path).errors())) == 0
    bulk.embed(pictures, tmp_path, client, partition_items=20)
    assert tree(tmp_path) == expected


def test_files_that_go_or_come_do_not_move_the_others(client, tmp_path):
    paths = write_pictures(tmp_path / "pictures", 20)
    bulk.embed(tmp_path / "pictures", tmp_path / "out", client, partition_items=5, on_progress=None)
    for path in sorted((tmp_path / "out/embeddings").iterdir())[2:]:
        path.unlink()
    paths[12].unlink()
    (tmp_path / "pictures/000/000000.jpg").write_bytes(jpeg(0))
    summary = bulk.embed(tmp_path / "pictures", tmp_path / "out", client, partition_items=5)
    assert (summary.num_embedded, summary.num_failed) == (19, 1)
    (error,) = bulk.Result(tmp_path / "out").errors()
    assert error["path"] == str(paths[12])
    assert error["message"] == "cannot be read: No such file or directory."
    names, _ = bulk.Result(tmp_path / "out").load()
    assert names == [str(path) for path in paths if path != paths[12]]


def test_captions_of_shards_are_kept(client, tmp_path):
    members = {}
    for number in range(3):
        members[f"{number}.jpg"] = jpeg(number)
        members[f"{number}.txt"] = f"drawing {number}".encode()
    shard = write_shard(tmp_path / "0.tar", members | {"3.png": b"x"})
    bulk.embed(tmp_path / "0.tar", tmp_path / "out", client)
    result = bulk.Result(tmp_path / "out")
    (partition,) = result
    assert partition.names == [f"{shard}/{number}.jpg" for number in range(3)]
    assert partition.items.column("caption").to_pylist() == [f"drawing {n}" for n in range(3)]
    expected = client.encode_images([jpeg(number) for number in range(3)])
    np.testing.assert_allclose(partition.embeddings, expected, atol=1e-5)
    assert [row["path"] for row in result.errors()] == [f"{shard}/3.png"]


def test_what_is_too_large_is_not_read_and_what_is_gone_is_named(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/0.jpg").write_bytes(jpeg(0) + b"\0" * 10_000)
    os.mkfifo(tmp_path / "pictures/pipe.jpg")
    write_shard(tmp_path / "pictures/1.tar", {"1.jpg": jpeg(1) + b"\0" * 10_000, "2.jpg": jpeg(2)})
    shard = write_shard(tmp_path / "pictures/3.tar", {"3.jpg": jpeg(3)})
    shard.write_bytes(shard.read_bytes()[:600])
    with clip_rt.Client(server="in_process", max_bytes=8000) as client:
        bulk.embed(tmp_path / "pictures", tmp_path / "out", client)
    found = {
        Path(row["path"]).name: row["message"] for row in bulk.Result(tmp_path / "out").errors()
    }
    assert set(found) == {"0.jpg", "pipe.jpg", "1.jpg", "3.jpg", "3.tar"}
    assert found["0.jpg"].endswith("at most 8,000 are read. Make it smaller or raise max_bytes=.")
    assert found["1.jpg"].endswith("at most 8,000 are read. Make it smaller or raise max_bytes=.")
    assert found["pipe.jpg"].startswith("is no regular file")
    assert found["3.jpg"].endswith("3.tar ends within 3.jpg.")
    assert found["3.tar"].startswith("cannot be read as a tar file to its end: ")
    assert bulk.Result(tmp_path / "out").load()[0] == [str(tmp_path / "pictures/1.tar/2.jpg")]


def test_texts_are_embedded_and_those_too_long_are_errors(client, tmp_path):
    texts = [f"a drawing of {number} pizzas" for number in range(1500)]
    long = "word " * 100
    (tmp_path / "texts.txt").write_text("\n".join([*texts, long]), "utf-8")
    file, out = tmp_path / "texts.txt", tmp_path / "out"
    summary = bulk.embed(file, out, client, kind="text", partition_items=1000)
    assert (summary.num_embedded, summary.num_failed) == (1500, 1)
    result = bulk.Result(out)
    names, rows = result.load()
    assert names == texts
    np.testing.assert_allclose(rows, client.encode_texts(texts), atol=1e-5)
    (error,) = result.errors()
    assert (error["error"], error["index"], error["text"]) == (
        "TextTooLongError",
        1500,
        long,
    )
    assert "1500" not in error["message"]
    bulk.embed(file, tmp_path / "cut", client, kind="text", truncate=True)
    assert len(bulk.Result(tmp_path / "cut")) == 1501


def test_the_captions_of_a_job_can_be_embedded(client, tmp_path):
    members = {"0.jpg": jpeg(0), "0.txt": b"a pizza", "1.jpg": jpeg(1)}
    write_shard(tmp_path / "0.tar", members)
    bulk.embed(tmp_path / "0.tar", tmp_path / "images", client)
    tables = f"{tmp_path}/images/embeddings/*.parquet"
    bulk.embed(tables, tmp_path / "texts", client, kind="text", text_column="caption")
    names, rows = bulk.Result(tmp_path / "texts").load()
    assert names == ["a pizza"]
    np.testing.assert_allclose(rows, client.encode_texts(["a pizza"]), atol=1e-5)


def test_shards_share_a_folder_and_are_read_as_one(client, pictures, tmp_path):
    for number in (2, 0, 1):
        assert not (tmp_path / "job.json").exists()
        summary = bulk.embed(pictures, tmp_path, client, shard=(number, 3), partition_items=10)
        assert summary.is_complete
        assert bulk.Result(tmp_path).is_complete == (number == 1)
    result = bulk.Result(tmp_path)
    assert (len(result), len(list(result.errors()))) == (NUM, 3)
    names, rows = result.load()
    assert len(set(names)) == NUM
    indices = {i for part in result for i in part.items.column("index").to_pylist()}
    assert indices | {row["index"] for row in result.errors()} == set(range(NUM + 3))
    assert_same(client, names, rows)
    with pytest.raises(JobMismatchError, match="shard"):
        bulk.embed(pictures, tmp_path, client, shard=(0, 4))
    with pytest.raises(JobMismatchError, match="shard"):
        bulk.embed(pictures, tmp_path, client)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float16"}, 'whose dtype is "float32", and that of this one is "float16"'),
        ({"format": "npy"}, 'whose format is "parquet"'),
        ({"caption_column": "alt"}, "whose caption_column is"),
        ({"kind": "text"}, 'whose kind is "image"'),
    ],
)
def test_other_settings_are_refused(client, pictures, tmp_path, changes, words):
    bulk.embed(pictures / "000", tmp_path, client)
    before = tree(tmp_path)
    with pytest.raises(JobMismatchError, match=words) as refused:
        bulk.embed(pictures / "000", tmp_path, client, **changes)
    assert "to go on, or write to another folder" in str(refused.value)
    assert refused.value.expected != refused.value.found
    assert tree(tmp_path) == before


def test_other_inputs_are_refused(client, pictures, tmp_path):
    bulk.embed(pictures / "000", tmp_path, client)
    with pytest.raises(JobMismatchError, match="whose inputs is"):
        bulk.embed(pictures / "001", tmp_path, client)


def test_a_client_that_decodes_otherwise_is_refused(client, pictures, tmp_path):
    bulk.embed(pictures / "000", tmp_path, client)
    with (
        clip_rt.Client(server="in_process", decode="fast") as other,
        pytest.raises(JobMismatchError, match='whose decode is "exact"'),
    ):
        bulk.embed(pictures / "000", tmp_path, other)


def test_another_model_is_refused_in_the_middle(pictures, tmp_path):
    """Weights that change between two runs, which tiny models stand for."""
    for name, fingerprint in (("old", "a"), ("new", "b")):
        changes = {"fingerprint": fingerprint * 64}
        tiny_repository.write(tmp_path / name, "tiny", image=changes, text=changes)
    with clip_rt.Client(repository=tmp_path / "old", server="in_process") as client:
        bulk.embed(pictures, tmp_path / "out", client, should_stop=_after(NUM + 3 + 20))
    before = tree(tmp_path / "out")
    with (
        clip_rt.Client(repository=tmp_path / "new", server="in_process") as client,
        pytest.raises(JobMismatchError, match=r"weights aaaaaaaaaaaa.*weights bbbbbbbbbbbb"),
    ):
        bulk.embed(pictures, tmp_path / "out", client)
    assert tree(tmp_path / "out") == before
    with clip_rt.Client(repository=tmp_path / "old", server="in_process") as client:
        assert bulk.embed(pictures, tmp_path / "out", client).is_complete


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_model_that_is_replaced_under_way_is_not_mixed_in(pictures, tmp_path, kind):
    (tmp_path / "texts.txt").write_text("".join(f"text {n}\n" for n in range(5000)))
    inputs = pictures if kind == "image" else tmp_path / "texts.txt"
    out = tmp_path / "out"
    with FakeServer(model="shop-v3") as server, clip_rt.Client(server.url) as client:
        weights = client.manifest.fingerprint

        def swap(progress: bulk.Progress) -> None:
            if progress.is_listed and progress.num_now == (0 if kind == "image" else 2048):
                server.stop()
                server.swap_weights()
                server.start()

        with pytest.raises((JobMismatchError, ModelReplacedError)):
            bulk.embed(inputs, out, client, kind=kind, on_progress=swap)
    with FakeServer(model="shop-v3") as server, clip_rt.Client(server.url) as client:
        assert client.manifest.fingerprint == weights
        assert bulk.embed(inputs, out, client, kind=kind).is_complete
        names, rows = bulk.Result(out).load()
        encode = client.encode_images if kind == "image" else client.encode_texts
        np.testing.assert_allclose(rows, encode(names), atol=1e-5)


def _after(num: int):
    """A `should_stop` that says yes once it was asked so often; each item that is listed is one."""
    asked = iter(range(num))
    return lambda: next(asked, None) is None


def test_a_server_that_goes_away_leaves_what_was_done(many, tmp_path):
    with FakeServer(model="shop-v3") as server:
        with clip_rt.Client(server.url, timeout_s=1) as client:

            def stop_server(progress: bulk.Progress) -> None:
                if progress.num_now >= 40:
                    server.stop()

            with pytest.raises(ServerError):
                bulk.embed(many, tmp_path, client, on_progress=stop_server)
        result = bulk.Result(tmp_path)
        done = len(result) + len(list(result.errors()))
        assert 40 <= done < MANY + 3
        assert not result.is_complete


def test_writers_of_one_new_folder_do_not_meet(tmp_path):
    """Shards that begin at once each make the folder of their first partitions."""
    barrier = threading.Barrier(8, timeout=30)

    def write(number: int) -> None:
        for turn in range(50):
            barrier.wait()
            with written(tmp_path / str(turn) / f"part{number}") as path:
                path.touch()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8), timeout=60))
    assert len(list(tmp_path.glob("*/part*"))) == 50 * 8


def test_one_process_at_a_time(client, pictures, tmp_path):
    with JobFolder(tmp_path).locked(), pytest.raises(JobRunningError, match=r"process \d+ is at"):
        bulk.embed(pictures, tmp_path, client)
    # Shards do not wait for each other.
    with JobFolder(tmp_path / "b", (0, 2)).locked():
        assert bulk.embed(pictures, tmp_path / "b", client, shard=(1, 2)).is_complete


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "video"}, "kind is 'video'; it must be 'image' or 'text'"),
        ({"format": "csv"}, "format is 'csv'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"shard": (3, 3)}, r"shard is \(3, 3\)"),
        ({"partition_items": 0}, "partition_items is 0"),
        ({"partition_s": 0}, "partition_s is 0"),
        ({"image_hosts": ["https://a"]}, "is no name of a host"),
        ({"dimensions": 100}, "dimensions is 100"),
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": "gone"}, "there is no file or folder 'gone'"),
    ],
)
def test_arguments_that_cannot_be_used(client, pictures, tmp_path, arguments, words):
    inputs = arguments.pop("inputs", pictures)
    with pytest.raises(InputError, match=words):
        bulk.embed(inputs, tmp_path / "out", client, **arguments)


def test_a_folder_of_other_things_is_left_alone(client, pictures, tmp_path):
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings/part-000000000000-000000000005.parquet").write_bytes(b"theirs")
    with pytest.raises(InputError, match=r"no job\.json says of what"):
        bulk.embed(pictures, tmp_path, client)
    with pytest.raises(InputError, match="holds no bulk job"):
        bulk.Result(tmp_path)
    bulk.embed(pictures, tmp_path / "a", client)
    (tmp_path / "a/.listing.parquet").unlink()
    with pytest.raises(InputError, match="is gone, which says what the partitions"):
        bulk.embed(pictures, tmp_path / "a", client)
    job = json.loads((tmp_path / "a/job.json").read_text())
    (tmp_path / "a/job.json").write_text(json.dumps(job | {"version": 2}))
    with pytest.raises(InputError, match="of another version"):
        bulk.embed(pictures, tmp_path / "a", client)


class _Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/0.jpg")
            content = b""
        else:
            self.send_response(200)
            content = jpeg(int(self.path[1:].partition(".")[0]))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_urls_of_allowed_hosts_are_fetched_and_no_others(client, tmp_path, monkeypatch):
    """Addresses of this machine are public here: no other is to be had."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        here = f"http://localhost:{server.server_port}"
        urls = [f"{here}/{n}.jpg" for n in range(40)] + [f"{here}/moved", "http://b.example/0.jpg"]
        (tmp_path / "urls.csv").write_text("\n".join(["image", *urls]))
        inputs = str(tmp_path / "urls.csv")
        bulk.embed(inputs, tmp_path / "private", client, image_hosts=["localhost"])
        messages = [row["message"] for row in bulk.Result(tmp_path / "private").errors()]
        assert len(messages) == 42
        assert messages[0] == "is at localhost, in a private network."
        monkeypatch.setattr("clip_rt.inputs.fetching.is_public", lambda address: True)
        bulk.embed(inputs, tmp_path / "out", client, image_hosts=["localhost"])
        server.shutdown()
        thread.join(timeout=60)
    names, rows = bulk.Result(tmp_path / "out").load()
    assert names == urls[:40]
    expected = client.encode_images([jpeg(number) for number in range(40)])
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    moved, elsewhere = (row["message"] for row in bulk.Result(tmp_path / "out").errors())
    assert moved == "cannot be fetched from localhost: it answers 302."
    assert elsewhere.startswith("is at 'b.example', which images are not fetched from.")


def test_names_on_stdin_are_not_needed_again(client, many, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{many}\n".encode())))
    stopped = bulk.embed("-", tmp_path, client, should_stop=_after(MANY + 3 + 20))
    assert not stopped.is_complete
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert bulk.embed("-", tmp_path, client).num_embedded == MANY
