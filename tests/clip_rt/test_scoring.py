"""CLIP score of pairs: what it is made of, what is refused, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from asking import BUNDLED, MODEL, PICTURES, ask
from PIL import Image

import clip_rt
from clip_rt import scoring
from clip_rt.scoring import ClipScores, clip_score, stream_scores
from clip_rt.testing import FakeServer, Late

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
IMAGES = [Image.new("RGB", (70, 64), colour) for colour in COLOURS.values()]


def test_a_score_is_100_times_the_cosine_of_a_pair(client):
    prompts = ["red", "blue", "a red and blue one"]
    found = clip_score(client, IMAGES, prompts)
    rows = client.encode_images(IMAGES), client.encode_texts(prompts)
    expected = 100 * (rows[0].astype(float) * rows[1]).sum(axis=1)
    np.testing.assert_allclose(found.scores, expected, atol=1e-4)
    assert found.scores[0] > 90 > found.scores[1]
    assert found.mean == pytest.approx(max(expected.mean(), 0), abs=1e-4)
    assert found.standard_error == pytest.approx(expected.std(ddof=1) / math.sqrt(3), abs=1e-4)
    assert found.indices.tolist() == [0, 1, 2]
    assert found.failures == ()


def test_one_prompt_is_for_all_images(client):
    found = clip_score(client, iter(IMAGES), "green")
    np.testing.assert_array_equal(
        found.scores, clip_score(client, IMAGES, ["green"] * len(IMAGES)).scores
    )
    assert found.scores.argmax() == 1


def test_the_mean_is_never_below_0_and_the_scores_are(client):
    found = clip_score(client, IMAGES[:1], ["blue"])
    assert found.scores[0] < 0
    assert found.mean == 0
    assert math.isnan(found.standard_error)


def test_of_no_pair_there_is_no_mean():
    none = ClipScores(scores=np.empty(0), indices=np.empty(0, np.intp))
    assert math.isnan(none.mean)
    assert math.isnan(none.standard_error)


def test_no_pairs_give_no_scores(client):
    assert clip_score(client, [], []).scores.shape == (0,)
    assert clip_score(client, iter([]), "red").scores.shape == (0,)


def test_what_cannot_be_used_is_left_out_with_its_reason(client):
    images = [IMAGES[0], b"no image", IMAGES[2], b"nor this"]
    prompts = ["red", "green", " ", ""]
    found = clip_score(client, images, prompts, on_error="skip")
    assert found.indices.tolist() == [0]
    np.testing.assert_allclose(found.scores, clip_score(client, IMAGES[:1], ["red"]).scores)
    assert [error.index for error in found.failures] == [1, 2, 3]
    assert isinstance(found.failures[0], clip_rt.ImageError)
    assert isinstance(found.failures[1], clip_rt.TextError)


@pytest.mark.parametrize(
    ("images", "prompts", "error", "index"),
    [
        ([IMAGES[0], b"no image"], ["red", "red"], clip_rt.ImageError, 1),
        (IMAGES[:2], ["red", None], clip_rt.TextError, 1),
        (IMAGES[:2], ["red", "a b " * 100], clip_rt.TextTooLongError, 1),
        (IMAGES[:2], " ", clip_rt.TextError, 0),
    ],
)
def test_the_first_error_carries_its_position(client, images, prompts, error, index):
    with pytest.raises(error) as caught:
        clip_score(client, images, prompts)
    assert caught.value.index == index


def test_a_long_prompt_may_be_cut(client):
    long = "red " * 100
    found = clip_score(client, IMAGES[:1], [long], truncate=True)
    expected = client.encode_texts([long], truncate=True) @ client.encode_images(IMAGES[:1])[0]
    np.testing.assert_allclose(found.scores, 100 * expected, atol=1e-4)


@pytest.mark.parametrize("make", [list, iter], ids=["list", "iterator"])
@pytest.mark.parametrize("num_prompts", [2, 4])
def test_as_many_prompts_as_images_are_needed(client, make, num_prompts):
    with pytest.raises(clip_rt.InputError, match=f"images and {num_prompts} prompts"):
        clip_score(client, make(IMAGES), ["red"] * num_prompts)


@pytest.mark.parametrize("prompts", [{"a": 1}, {"a"}, 5, np.array([["a"]])])
def test_prompts_are_a_list(client, prompts):
    with pytest.raises(clip_rt.TextError):
        clip_score(client, IMAGES[:1], prompts)


def test_scores_come_in_parts_and_memory_stays_flat(client):
    held = []

    def images():
        for index in range(200):
            held.append(index)
            yield np.full((64, 64, 3), index, np.uint8)

    parts = stream_scores(client, images(), "red")
    first = next(parts)
    assert len(held) < 200
    rest = list(parts)
    assert rest
    indices = np.concatenate([part.indices for part in (first, *rest)])
    assert indices.tolist() == list(range(200))


def test_many_prompts_have_the_time_of_many_parts(monkeypatch):
    """Each part of them as much as a part of the images: the deadline is not for all."""
    monkeypatch.setattr(scoring, "PROMPTS_A_PART", 2)
    texts = [f"prompt {number}" for number in range(6)]
    with FakeServer(side_px=32) as server, clip_rt.Client(server.url, timeout_s=1.0) as client:
        client.encode_texts(["warm"])
        server.fail_when(lambda request: request.tower == "text", Late(delay_s=1.5))
        found = clip_score(client, np.zeros((6, 32, 32, 3), np.uint8), texts)
    assert len(found.scores) == 6


def test_weights_that_are_replaced_between_are_an_error(monkeypatch):
    with FakeServer(side_px=32) as server, clip_rt.Client(server.url) as client:
        stream = client.stream_images

        def replace_and_stream(*arguments, **options):
            server.stop()
            server.swap_weights()
            server.start()
            return stream(*arguments, **options)

        monkeypatch.setattr(client, "stream_images", replace_and_stream)
        with pytest.raises(clip_rt.ModelReplacedError, match="Score anew"):
            clip_score(client, np.zeros((1, 32, 32, 3), np.uint8), "red")


# The command


@pytest.fixture(scope="module")
def bundled():
    with clip_rt.Client(repository=BUNDLED, server="in_process") as client:
        yield client


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_RT_CACHE_DIR", str(tmp_path / "cache"))


PROMPTS = [f"a drawing of {path.stem}" for path in PICTURES]


def check(done, expected, *, images=PICTURES, prompts=PROMPTS):
    assert done.status == 0
    assert [row["image"] for row in done.rows] == [str(each) for each in images]
    assert [row["prompt"] for row in done.rows] == list(prompts)
    assert [row["score"] for row in done.rows] == [round(each, 6) for each in expected.scores]
    assert done.err == (
        f"CLIP score {expected.mean:.4f}, of {len(images)} pairs; standard error "
        f"{expected.standard_error:.4f}\n"
    )


def test_prompts_in_order_are_scored_as_python_does(capfd, bundled, tmp_path):
    expected = clip_score(bundled, PICTURES, PROMPTS)
    check(ask(capfd, "score", *PICTURES, "--prompts", *PROMPTS, *MODEL), expected)
    (tmp_path / "prompts.txt").write_text("\ufeff" + "\n".join(PROMPTS) + "\n", "utf-8")
    file = ("--prompts-file", tmp_path / "prompts.txt")
    check(ask(capfd, "score", *PICTURES, *file, *MODEL), expected)


def test_one_prompt_is_for_all_files(capfd, bundled):
    done = ask(capfd, "score", *PICTURES, "--prompts", "a rocket", *MODEL)
    expected = clip_score(bundled, PICTURES, "a rocket")
    check(done, expected, prompts=["a rocket"] * len(PICTURES))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_has_pairs(capfd, bundled, tmp_path, suffix):
    names = [f"{number}.png" for number in range(len(PICTURES))]
    for name, picture in zip(names, PICTURES, strict=True):
        (tmp_path / name).write_bytes(picture.read_bytes())
    table = tmp_path / f"pairs{suffix}"
    if suffix == ".csv":
        rows = zip(names, PROMPTS, strict=True)
        table.write_text("file,text\n" + "".join(f"{name},{text}\n" for name, text in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"file": names, "text": PROMPTS}), table)
    columns = ("--image-column", "file", "--text-column", "text")
    summary = tmp_path / "summary.json"
    options = ("--pairs", table, *columns, "--summary", summary)
    done = ask(capfd, "score", *options, *MODEL)
    expected = clip_score(bundled, PICTURES, PROMPTS)
    check(done, expected, images=[tmp_path / name for name in names])
    assert json.loads(summary.read_text()) == {
        "mean": expected.mean,
        "standard_error": expected.standard_error,
        "pairs": len(PICTURES),
    }


def test_pairs_that_cannot_be_used_are_rows_with_an_error(capfd, bundled, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "good.png").write_bytes(PICTURES[0].read_bytes())
    table = tmp_path / "pairs.csv"
    table.write_text("image,prompt\nbad.png,a\ngood.png,a rocket\nnowhere.png,b\n,c\ngood.png,\n")
    summary = tmp_path / "summary.json"
    done = ask(capfd, "score", "--pairs", table, "--summary", summary, *MODEL)
    assert done.status == 3
    errors = [row["error"] for row in done.rows]
    assert errors[1] is None
    assert errors[0].startswith("is no")
    assert errors[2] == "No such file or directory"
    assert errors[3] == "row 3 has no 'image'"
    assert "says nothing" in errors[4]
    assert [row["score"] is None for row in done.rows] == [True, False, True, True, True]
    score = clip_score(bundled, PICTURES[:1], ["a rocket"]).scores[0]
    assert f"CLIP score {max(score, 0):.4f}, of 1 pairs\n" in done.err
    assert json.loads(summary.read_text())["standard_error"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name images"),
        (("PICTURE",), "name what images show"),
        (("PICTURE", "--prompts", "a", "--prompts-file", "x.txt"), "name what images show"),
        (("PICTURE", "--prompts", "a", "b"), "1 images and 2 prompts"),
        (("PICTURE", "--prompts-file", "nowhere.txt"), "--prompts-file cannot be read"),
        (("PICTURE", "--pairs", "x.csv"), "leave IMAGE"),
        (("--pairs", "x.txt"), "must end in"),
        (("--pairs", "nowhere.csv"), "cannot be read"),
        (("PICTURE", "--prompts", "a", "--summary", "nowhere/x.json"), "there is no folder"),
    ],
)
def test_options_that_cannot_be_used_are_said(capfd, arguments, words):
    given = [str(PICTURES[0]) if each == "PICTURE" else each for each in arguments]
    done = ask(capfd, "score", *given, *MODEL)
    assert (done.status, done.out) == (2, "")
    assert words in done.err
