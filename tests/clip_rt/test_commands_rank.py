"""`clip-rt rank` with the bundled model and real drawings."""

from __future__ import annotations

import pytest
from asking import BUNDLED, MODEL, PICTURES, ask
from clip_rt_drawings import EXAMPLES

import clip_rt

PIZZA = EXAMPLES / "pizza.png"
CAPTIONS = ("a bicycle with two wheels", "a slice of pizza", "a rocket, flying")


@pytest.fixture(scope="module", autouse=True)
def client():
    """Keeps the model loaded for the commands of this module."""
    with clip_rt.Client(repository=BUNDLED, server="in_process") as client:
        client.zero_shot(PICTURES[:1], CAPTIONS)
        yield client


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_RT_CACHE_DIR", str(tmp_path / "cache"))


def of_client(client, captions, template):
    scores = client.zero_shot(PIZZA, captions, templates=[template])
    cosines = (
        client.class_embeddings(captions, templates=[template]) @ client.encode_images(PIZZA)[0]
    )
    similarity = dict(zip(captions, cosines.tolist(), strict=True))
    return [(text, share, similarity[text]) for text, share in scores.top(len(captions))[0]]


@pytest.mark.parametrize(
    ("arguments", "captions", "template"),
    [
        (CAPTIONS, CAPTIONS, "{}"),
        (
            ("--question", "What is it to eat?", "--answers", "soup, pizza,bread"),
            ("soup", "pizza", "bread"),
            "What is it to eat? {}",
        ),
        (
            ("--question", "a drawing of {} on a plate", "--answers", "soup,pizza"),
            ("soup", "pizza"),
            "a drawing of {} on a plate",
        ),
    ],
)
def test_texts_are_ordered_as_the_client_scores_them(capfd, client, arguments, captions, template):
    done = ask(capfd, "rank", PIZZA, *arguments, *MODEL)
    assert (done.status, done.err) == (0, "")
    expected = of_client(client, captions, template)
    assert [row["caption"] for row in done.rows] == [text for text, _, _ in expected]
    for row, (_, share, similarity) in zip(done.rows, expected, strict=True):
        assert row["probability"] == round(share, 6)
        assert row["similarity"] == pytest.approx(similarity, abs=1e-5)
    assert "pizza" in done.rows[0]["caption"]


def test_a_caption_may_have_braces(capfd, client):
    done = ask(capfd, "rank", PIZZA, "a {pizza}", "{} {}", *MODEL)
    assert (done.status, len(done.rows)) == (0, 2)


def test_an_image_that_cannot_be_used_is_said(capfd, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    for path in (tmp_path / "x.png", tmp_path / "nowhere.png"):
        done = ask(capfd, "rank", path, *CAPTIONS, *MODEL)
        assert (done.status, done.out) == (3, "")
        assert done.err.startswith("error: image ")
        assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name either captions"),
        (("--question", "What?"), "go together"),
        (("--answers", "a,b"), "go together"),
        (("a", "--question", "What?", "--answers", "a,b"), "name either captions"),
        (("--question", "What?", "--answers", ","), "--answers is ','"),
        (("--question", "{} or {}", "--answers", "a"), "exactly one"),
        (("a" * 500, "b " * 500), "tokens"),
    ],
)
def test_options_that_cannot_be_used_are_said(capfd, arguments, words):
    done = ask(capfd, "rank", PIZZA, *arguments, *MODEL)
    assert (done.status, done.out) == (2, "")
    assert words in done.err
