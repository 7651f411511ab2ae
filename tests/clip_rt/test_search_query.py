"""What people write is what is searched for, and filters hold."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import numpy as np
import pytest
from search_pictures import write_drawings

import clip_rt
from clip_rt.search import Index, Query, Where
from clip_rt.search.duplicates import group
from clip_rt.search.query import MINUS_WEIGHT, split_words


@pytest.mark.parametrize(
    ("words", "wanted", "unwanted"),
    [
        ("red car at night", "red car at night", ()),
        ("beach -people", "beach", ("people",)),
        ('beach -"old people" at  sunset', "beach at sunset", ("old people",)),
        ("-people beach", "beach", ("people",)),
        ("a t-shirt, x-ray", "a t-shirt, x-ray", ()),
        (r"\-20 degrees", "-20 degrees", ()),
        ('"red car" -night', "red car", ("night",)),
        ("this - that", "this - that", ()),
        ("-people", "", ("people",)),
        ("", "", ()),
    ],
)
def test_a_minus_is_told_from_a_hyphen(words, wanted, unwanted):
    assert split_words(words) == (wanted, unwanted)


def test_nothing_wanted_is_said():
    with pytest.raises(clip_rt.InputError, match="names nothing that is wanted"):
        Query.parse("-people")
    with pytest.raises(clip_rt.InputError, match="needs a text or an image"):
        Query(minus_texts=("people",))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, Path]:
    return write_drawings(tmp_path_factory.mktemp("drawn"), 30)


@pytest.fixture(scope="module")
def index(drawn, drawings_client, tmp_path_factory):
    folder = next(iter(drawn.values())).parents[1]
    with Index.open(tmp_path_factory.mktemp("index"), create=True) as index:
        index.update(drawings_client, [folder])
        yield index


def test_the_vector_is_the_mean_less_what_is_not_wanted(drawn, drawings_client):
    path = next(iter(drawn.values()))
    vector, manifest = Query(
        texts=("a face", "a hand"), images=(path,), minus_texts=("a cat",)
    ).embed(drawings_client)
    rows = drawings_client.encode_texts(["a face", "a hand", "a cat"])
    image = drawings_client.encode_images(path)
    expected = np.concatenate([rows[:2], image]).mean(axis=0) - MINUS_WEIGHT * rows[2]
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)
    assert manifest == drawings_client.manifest


def test_what_is_not_wanted_comes_later(index, drawings_client):
    (wanted,) = index.query(drawings_client, "a face", top=1)
    without = index.query(
        drawings_client, Query(texts=("a face",), minus_images=(wanted.path,)), top=30
    )
    assert [hit.path for hit in without].index(wanted.path) > 5


def test_an_image_finds_itself_and_a_mixture_what_is_like_both(index, drawn, drawings_client):
    one, other = list(drawn.values())[3], list(drawn.values())[17]
    hits = index.query(drawings_client, Query(images=(one, other)), top=2)
    assert {hit.path for hit in hits} == {str(one), str(other)}


def find(index: Index, client: clip_rt.Client, **where: object) -> list[str]:
    return sorted(hit.path for hit in index.query(client, "a", top=30, where=Where(**where)))


@pytest.mark.parametrize(
    ("pattern", "num"),
    [
        ("*.png", 30),
        ("1/*.png", 10),
        ("0/00[12].png", 2),
        ("00?.png", 10),
        ("1", 10),
        ("01*", 10),
        ("*.jpg", 0),
        ("nowhere", 0),
    ],
)
def test_patterns_of_paths(index, drawings_client, pattern, num):
    assert len(find(index, drawings_client, paths=(pattern,))) == num


def test_a_pattern_with_the_whole_path_and_several(index, drawn, drawings_client):
    folder = next(iter(drawn.values())).parents[1]
    assert len(find(index, drawings_client, paths=(f"{folder}/1",))) == 10
    assert len(find(index, drawings_client, paths=(f"{folder}/1/*", "2/02[0-3].png"))) == 14


def test_dates_and_sizes(index, drawn, drawings_client):
    paths = list(drawn.values())
    old = datetime.datetime(2020, 5, 1, tzinfo=datetime.timezone.utc)
    for path in paths[:4]:
        os.utime(path, (old.timestamp(), old.timestamp()))
    index.update(drawings_client)
    chosen = sorted(map(str, paths[:4]))
    day = datetime.timedelta(days=1)
    assert find(index, drawings_client, before=old + day) == chosen
    assert find(index, drawings_client, after=old, before=old + day) == chosen
    assert find(index, drawings_client, before=old) == []
    sizes = sorted(path.stat().st_size for path in paths)
    assert len(find(index, drawings_client, min_bytes=sizes[20])) == 10
    assert len(find(index, drawings_client, max_bytes=sizes[4], before=None)) == 5
    assert len(find(index, drawings_client, min_side_px=65)) == 0
    assert len(find(index, drawings_client, min_side_px=64)) == 30


def test_filters_and_the_order_of_an_unfiltered_search_agree(index, drawings_client):
    everything = index.query(drawings_client, "a face", top=30)
    some = index.query(drawings_client, "a face", top=5, where=Where(paths=("2",)))
    expected = [hit for hit in everything if "/2/" in hit.path][:5]
    assert [hit.path for hit in some] == [hit.path for hit in expected]
    np.testing.assert_allclose(
        [hit.score for hit in some], [hit.score for hit in expected], atol=1e-6
    )


@pytest.mark.parametrize("where", [{"min_bytes": -1}, {"max_bytes": 1.5}, {"paths": ("",)}])
def test_bounds_that_are_none(where):
    with pytest.raises(clip_rt.InputError):
        Where(**where)


@pytest.mark.parametrize("top", [0, -1, 1.0, True])
def test_top_is_a_number(index, drawings_client, top):
    with pytest.raises(clip_rt.InputError, match="top is"):
        index.query(drawings_client, "a", top=top)


def test_near_duplicates_are_grouped(index, drawn, drawings_client, tmp_path):
    from PIL import Image

    paths = list(drawn.values())
    with Image.open(paths[5]) as picture:
        picture.resize((96, 96)).save(tmp_path / "larger.png")
        picture.save(tmp_path / "again.jpg", quality=95)
    (tmp_path / "copy.png").write_bytes(paths[9].read_bytes())
    index.update(drawings_client, [tmp_path])
    try:
        groups = index.duplicates(threshold=0.98)
        found = [{path for hit in each for path in (hit.path, *hit.copies)} for each in groups]
        assert {str(paths[5]), str(tmp_path / "larger.png")} <= next(
            each for each in found if str(paths[5]) in each
        )
        assert {str(paths[9]), str(tmp_path / "copy.png")} in found
        only = index.duplicates(threshold=0.98, where=Where(paths=("2",)))
        assert all("/2/" in hit.path for each in only for hit in each)
        with pytest.raises(clip_rt.InputError, match="a cosine"):
            index.duplicates(threshold=1.5)
    finally:
        index.forget(tmp_path)


def test_groups_are_those_of_comparing_all_pairs(monkeypatch):
    monkeypatch.setattr("clip_rt.search.duplicates._LEADERS", 7)
    monkeypatch.setattr("clip_rt.search.duplicates._OTHERS", 11)
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((100, 16)).astype(np.float32)
    # The same directions again, a little off, all over the place.
    rows = (rows[generator.integers(0, 40, 100)] + 0.1 * rows).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.full(100, -1)
    for row in range(100):
        if expected[row] < 0:
            near = (rows @ rows[row] >= 0.9) & (expected < 0)
            expected[near] = row
    steps: list[tuple[int, int]] = []
    found = group(rows, 0.9, lambda *step: steps.append(step))
    np.testing.assert_array_equal(found, expected)
    assert 5 < len(set(found.tolist())) < 95
    assert steps[-1] == (100, 100)
