"""Embeddings cut to the lengths that a model was trained for, and to no others."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_repository
from PIL import Image

import clip_rt
from clip_rt.classification.zero_shot import pool

ALLOWED = (3, 5)
PHOTOS = [Image.new("RGB", (70, 64), colour) for colour in ("red", "lime", "blue", "navy")]
TEXTS = ["red", "a green one", "sky"]


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    said = {"matryoshka_dimensions": ALLOWED}
    return tiny_repository.write(tmp_path_factory.mktemp("nested"), image=said, text=said)


@pytest.fixture(scope="module")
def client(nested: Path) -> Iterator[clip_rt.Client]:
    with clip_rt.Client(repository=nested) as client:
        yield client


def cut(rows: np.ndarray, dimensions: int) -> np.ndarray:
    head = rows[:, :dimensions].astype(np.float64)
    return head / np.linalg.norm(head, axis=1, keepdims=True)


@pytest.mark.parametrize("dimensions", [*ALLOWED, 8])
def test_every_call_cuts_and_normalises_again(client: clip_rt.Client, dimensions: int) -> None:
    whole_images, whole_texts = client.encode_images(PHOTOS), client.encode_texts(TEXTS)
    images = client.encode_images(PHOTOS, dimensions=dimensions)
    texts = client.encode_texts(TEXTS, dimensions=dimensions)
    assert (images.dtype, images.shape) == (np.float32, (4, dimensions))
    np.testing.assert_allclose(images, cut(whole_images, dimensions), atol=1e-6)
    np.testing.assert_allclose(texts, cut(whole_texts, dimensions), atol=1e-6)
    parts = list(
        client.stream_images(iter([*PHOTOS, b"none"]), on_error="skip", dimensions=dimensions)
    )
    np.testing.assert_allclose(np.concatenate([part.embeddings for part in parts]), images)
    assert [error.index for part in parts for error in part.failures] == [4]
    skipped = client.encode_texts([*TEXTS, ""], on_error="skip", dimensions=dimensions)
    np.testing.assert_allclose(skipped.embeddings, texts)

    templates = ["a {}", "the {} one"]
    prompts = [template.format(text) for text in TEXTS for template in templates]
    rows = cut(client.encode_texts(prompts), dimensions).reshape(len(TEXTS), 2, dimensions)
    classes = client.class_embeddings(TEXTS, templates=templates, dimensions=dimensions)
    np.testing.assert_allclose(classes, pool(rows), atol=1e-6)
    scores = client.zero_shot(PHOTOS, TEXTS, templates=templates, dimensions=dimensions)
    scale = client.manifest.logit_scale
    np.testing.assert_allclose(scores.logits, scale * images @ classes.T, atol=1e-4)
    assert client.encode_images([], dimensions=dimensions).shape == (0, dimensions)


def test_classes_of_two_lengths_are_kept_apart(nested: Path, tmp_path: Path) -> None:
    def ask(cache_dir: Path | None) -> list[np.ndarray]:
        options = {} if cache_dir is None else {"cache_dir": cache_dir}
        with clip_rt.Client(repository=nested, **options) as client:
            return [client.class_embeddings(TEXTS, dimensions=each) for each in (None, 3, 5, 8)]

    whole, three, five, eight = ask(tmp_path)
    assert [each.shape[1] for each in (whole, three, five, eight)] == [8, 3, 5, 8]
    np.testing.assert_array_equal(whole, eight)
    # From the folder, in another order.
    with clip_rt.Client(repository=nested, cache_dir=tmp_path) as client:
        for expected, dimensions in ((five, 5), (whole, None), (three, 3)):
            found = client.class_embeddings(TEXTS, dimensions=dimensions)
            np.testing.assert_array_equal(found, expected)
        assert client.cache.misses == 0


def test_a_client_may_cut_by_default(nested: Path) -> None:
    with clip_rt.Client(repository=nested, dimensions=3) as client:
        assert client.encode_texts(TEXTS).shape == (3, 3)
        assert client.encode_texts(TEXTS, dimensions=8).shape == (3, 8)
        assert client.class_embeddings(TEXTS).shape == (3, 3)
        assert {len(row) for part in client.stream_images(PHOTOS) for row in part.embeddings} == {3}
        again = pickle.loads(pickle.dumps(client))
        assert again.encode_images(PHOTOS).shape == (4, 3)
        again.close()
        # A probe is fitted on all of an embedding.
        probe = clip_rt.Probe(
            weight=np.eye(2, 8, dtype=np.float32),
            bias=np.zeros(2, np.float32),
            labels=("a", "b"),
            fingerprint=client.manifest.fingerprint,
        )
        assert client.classify(PHOTOS, probe).logits.shape == (4, 2)


def test_an_awaited_client_cuts_too(nested: Path) -> None:
    async def ask() -> tuple[np.ndarray, list[int]]:
        async with clip_rt.AsyncClient(repository=nested, dimensions=5) as client:
            texts = await client.encode_texts(TEXTS, dimensions=3)
            parts = [part async for part in client.stream_images(PHOTOS)]
            return texts, [part.embeddings.shape[1] for part in parts]

    texts, lengths = asyncio.run(ask())
    assert texts.shape == (3, 3)
    assert set(lengths) == {5}


@pytest.mark.parametrize("dimensions", [1, 4, 7, 9, 512])
def test_other_lengths_are_refused_with_those_there_are(
    client: clip_rt.Client, dimensions: int
) -> None:
    message = rf"dimensions is {dimensions}; embeddings of 'tiny' have 3 or 5 or 8: pass one"
    calls = (
        lambda: client.encode_images(PHOTOS, dimensions=dimensions),
        lambda: list(client.stream_images(PHOTOS, dimensions=dimensions)),
        lambda: client.encode_texts(TEXTS, dimensions=dimensions),
        lambda: client.class_embeddings(TEXTS, dimensions=dimensions),
        lambda: client.zero_shot(PHOTOS, TEXTS, dimensions=dimensions),
    )
    for call in calls:
        with pytest.raises(clip_rt.InputError, match=message):
            call()


@pytest.mark.parametrize("dimensions", [0, -3, 2.5, "3"])
def test_what_is_no_length_is_refused_at_once(client: clip_rt.Client, dimensions: object) -> None:
    with pytest.raises(clip_rt.InputError, match="dimensions is"):
        clip_rt.Client(dimensions=dimensions)  # type: ignore[arg-type]
    with pytest.raises(clip_rt.InputError, match="dimensions is"):
        client.encode_texts(TEXTS, dimensions=dimensions)  # type: ignore[call-overload]


def test_a_model_that_was_not_trained_for_it_is_cut_by_nobody(
    repository: Path, server: object
) -> None:
    with (
        clip_rt.Client(repository=repository) as client,
        pytest.raises(clip_rt.InputError, match=r"'tiny' have 8: its manifest names no others"),
    ):
        client.encode_texts(TEXTS, dimensions=3)
