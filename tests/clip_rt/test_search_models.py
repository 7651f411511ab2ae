"""An index is of one model; what `export.compare` says, and a migration, lead to another."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, replace

import pytest
import tiny_repository
from search_pictures import write_drawings

import clip_rt
from clip_rt.search import Index
from clip_rt.search.identity import Identity
from clip_rt.wire.manifest import Manifest


@pytest.fixture
def make_client(tmp_path):
    """Clients of other models, of as many numbers as the bundled one or of fewer."""
    clients = []

    def make(name: str, **changes: object) -> clip_rt.Client:
        repository = tiny_repository.write(tmp_path / name, name, image=changes, text=changes)
        clients.append(clip_rt.Client(repository=repository, server="in_process"))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def report(a: Manifest, b: Manifest, word: str = "mixable", **changes: object) -> str:
    """What `export.compare --report` writes; test_compare holds it to that form."""
    verdict = {"word": word, "kept": 0.9, "why": "made up", "weak": [], "sentence": f"{word}: x"}
    document = {
        "a": {"reference": "a"} | asdict(a),
        "b": {"reference": "b"} | asdict(b),
        "samples": [],
        "verdict": verdict,
        "limits": {},
    }
    return json.dumps(document | changes)


def test_another_model_is_refused_and_told_what_to_do(index, make_client):
    other = make_client("other")
    for ask in (lambda: index.query(other, "red"), lambda: index.update(other)):
        with pytest.raises(clip_rt.ContractError) as caught:
            ask()
        message = str(caught.value)
        assert "fingerprint" in message
        assert "embedding_dim 256 and 8" in message
        for way_out in ("--migrate", "export.compare", "--accept-compare"):
            assert way_out in message
        assert caught.value.expected["embedding_dim"] == 256
        assert caught.value.found["embedding_dim"] == 8


def test_what_vectors_do_not_depend_on_may_change(drawings_client):
    manifest = drawings_client.manifest
    same = replace(manifest, model="shop", logit_scale=1.0, libraries={"onnx": "9"})
    assert Identity.of(manifest) == Identity.of(same)
    for change in ({"precision": "int8"}, {"fingerprint": "0" * 64}, {"side_px": 96}):
        assert Identity.of(manifest) != Identity.of(replace(manifest, **change))


def test_the_same_weights_in_another_precision_are_another_model(index, make_client, tmp_path):
    with Index.open(tmp_path / "tiny", create=True) as tiny:
        tiny.update(make_client("tiny"), [tmp_path / "photos"])
        with pytest.raises(clip_rt.ContractError, match="precision fp16 and fp32"):
            tiny.query(make_client("wide", precision="fp32"), "red")


def test_a_verdict_lets_another_model_go_on(photos, tmp_path, make_client):
    a, b, c = (
        make_client(name, precision=precision)
        for name, precision in (("a", "fp16"), ("b", "fp32"), ("c", "int8"))
    )
    path = tmp_path / "change.json"
    with Index.open(tmp_path / "tiny", create=True) as index:
        index.update(a, [photos])
        path.write_text(report(a.manifest, b.manifest))
        verdict = index.accept(path)
        assert (verdict.word, verdict.b_name) == ("mixable", "b")
        assert len(index.query(b, "red")) == 10
        # What comes is B's, what is there stays A's.
        write_drawings(photos / "more", 2, every=77)
        done = index.update(b)
        assert (done.num_embedded, done.num_known) == (1, 1)
        # A was not compared with B's vectors, nor C with anything.
        with pytest.raises(clip_rt.ContractError, match="has vectors of 'b', and 'a'"):
            index.query(a, "red")
        path.write_text(report(a.manifest, c.manifest))
        index.accept(path)
        with pytest.raises(clip_rt.ContractError, match="has vectors of 'b', and 'c'"):
            index.query(c, "red")
        path.write_text(report(b.manifest, c.manifest))
        index.accept(path)
        assert len(index.query(c, "red")) == 10


def test_verdicts_that_do_not_count(index, drawings_client, make_client, tmp_path):
    ours, other = drawings_client.manifest, make_client("other").manifest
    path = tmp_path / "change.json"
    path.write_text(report(ours, other, "not mixable"))
    with pytest.raises(clip_rt.ContractError, match="--migrate"):
        index.accept(path)
    path.write_text(report(other, ours))
    with pytest.raises(clip_rt.ContractError, match="Compare with that one as A"):
        index.accept(path)
    for text in ("", "[]", "{}", '{"verdict": 1}', report(ours, other, verdict={"word": "x"})):
        path.write_text(text)
        with pytest.raises(clip_rt.InputError, match="is no report of export"):
            index.accept(path)
    with pytest.raises(clip_rt.InputError, match="is no report of export"):
        index.accept(tmp_path / "nowhere.json")
    assert len(index.query(drawings_client, "a face")) == 10


def test_a_migration_changes_over_at_the_end(index, photos, drawings_client, make_client):
    other = make_client("other")
    found_meanwhile = []

    def search_old(_: object) -> None:
        with Index.open(index.folder) as reader:
            try:
                found_meanwhile.append(len(reader.query(drawings_client, "a face")))
            except clip_rt.ContractError:
                found_meanwhile.append(0)

    done = index.migrate(other, on_progress=search_old)
    assert (done.num_embedded, done.num_bad) == (12, 0)
    # All of it, and nothing any more while the update that follows runs.
    assert found_meanwhile[:2] == [10, 10]
    assert found_meanwhile == sorted(found_meanwhile, reverse=True)
    assert set(found_meanwhile) == {10, 0}
    assert len(index.query(other, "red")) == 10
    with pytest.raises(clip_rt.ContractError):
        index.query(drawings_client, "a face")
    assert len(list(index.folder.glob("vectors-*"))) == 1


def test_a_migration_that_was_cut_short_goes_on(index, drawings_client, make_client, monkeypatch):
    monkeypatch.setattr("clip_rt.search.update.COMMIT_ITEMS", 2)
    other = make_client("other")

    class CutShortError(Exception):
        pass

    def stop(report: object) -> None:
        if report.num_embedded >= 4:
            raise CutShortError

    # A batch is one part; small ones, so that there is a middle.
    monkeypatch.setattr("clip_rt.requests.results.MAX_ITEMS", 2)
    with pytest.raises(CutShortError):
        index.migrate(other, on_progress=stop)
    assert len(index.query(drawings_client, "a face")) == 10
    done = index.migrate(other)
    assert 0 < done.num_embedded < 12
    assert len(index.query(other, "red", top=12)) == 12


def test_a_migration_to_a_third_model_begins_anew(index, make_client, monkeypatch):
    class CutShortError(Exception):
        pass

    def stop(report: object) -> None:
        if report.num_read >= 6:
            raise CutShortError

    with pytest.raises(CutShortError):
        index.migrate(make_client("other"), on_progress=stop)
    third = make_client("third", fingerprint="b" * 64)
    assert index.migrate(third).num_embedded == 12
    assert len(index.query(third, "red", top=12)) == 12


def test_files_that_changed_before_a_migration_come_with_the_update(index, photos, make_client):
    other = make_client("other")
    (photos / "0/003.png").write_bytes((photos / "0/004.png").read_bytes())
    (photos / "0/005.png").unlink()
    # One of which is there already.
    write_drawings(photos / "more", 2, every=77)
    index.migrate(other)
    assert index.count() == {"files": 13, "bad": 0, "images": 11}
    assert len(index.query(other, "red", top=20)) == 11


def test_searches_go_on_while_another_thread_writes(index, photos, drawings_client):
    """A reader sees whole states, whatever is committed meanwhile."""
    stop, trouble = threading.Event(), []

    def search() -> None:
        try:
            with Index.open(index.folder) as reader:
                while not stop.is_set():
                    hits = reader.query(drawings_client, "a face", top=50)
                    assert len(hits) >= 12
                    assert all(hit.score == hit.score for hit in hits)
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=search)
    thread.start()
    try:
        for round_ in range(4):
            write_drawings(photos / f"more{round_}", 5, every=20 + round_)
            index.update(drawings_client)
            index._store.compact(index._store.current())
    finally:
        stop.set()
        thread.join(60)
    assert not trouble
