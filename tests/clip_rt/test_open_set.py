"""Answers for images that no label fits: what they are made of, and that a client gives them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import clip_rt
from clip_rt.classification import open_set, zero_shot
from clip_rt.classification.open_set import BACKGROUND, NONE_OF_THESE
from clip_rt.classification.zero_shot import Scores

IMAGES = [Image.new("RGB", (80, 64), colour) for colour in ("red", "lime", "blue")]
LABELS = ["red", "a green one"]


def unit(seed, *shape):
    rows = np.random.default_rng(seed).normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def compare(num_labels, score="softmax", logit_bias=0.0):
    """Scores of 5 images among that many labels, with no answer for the others."""
    return zero_shot.classify(
        unit(0, 5, 16),
        unit(1, num_labels, 16),
        [f"label {each}" for each in range(num_labels)],
        logit_scale=10.0,
        logit_bias=logit_bias,
        score=score,
    )


class TestAnswerNone:
    def test_has_the_probability_of_all_background_labels_together(self):
        scores = compare(7)
        answered = open_set.answer_none(scores, 3)
        assert answered.labels == ("label 0", "label 1", "label 2", NONE_OF_THESE)
        expected = scores.probabilities[:, 3:].astype(np.float64).sum(axis=1)
        np.testing.assert_allclose(answered.probabilities[:, 3], expected, rtol=1e-6)
        np.testing.assert_array_equal(answered.probabilities[:, :3], scores.probabilities[:, :3])

    def test_the_softmax_of_its_logits_is_its_probabilities(self):
        answered = open_set.answer_none(compare(9), 4)
        weights = np.exp(answered.logits.astype(np.float64))
        expected = weights / weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(answered.probabilities, expected, atol=1e-6)
        assert answered.probabilities.dtype == answered.logits.dtype == np.float32

    def test_of_a_sigmoid_has_what_the_best_label_leaves(self):
        scores = compare(4, "sigmoid", logit_bias=-1.0)
        answered = open_set.answer_none(scores, 4)
        best = scores.probabilities.max(axis=1)
        np.testing.assert_allclose(answered.probabilities[:, -1], 1 - best, atol=1e-7)
        expected = 1 / (1 + np.exp(-answered.logits.astype(np.float64)))
        np.testing.assert_allclose(answered.probabilities, expected, atol=1e-6)
        is_none = [label == NONE_OF_THESE for label in answered.best]
        assert is_none == (best < 0.5).tolist()
        assert 0 < sum(is_none) < 5

    def test_of_no_image_is_of_no_image(self):
        none = np.empty((0, 16), np.float32)
        scores = zero_shot.classify(none, unit(1, 5, 16), list("abcde"), logit_scale=1.0)
        answered = open_set.answer_none(scores, 2)
        assert answered.probabilities.shape == answered.logits.shape == (0, 3)


class TestAbove:
    SCORES = Scores(
        labels=("a", "b", "c"),
        probabilities=np.array([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05], [0.4, 0.2, 0.4]], np.float32),
        logits=np.zeros((3, 3), np.float32),
    )

    def test_returns_what_reaches_the_threshold_the_most_probable_first(self):
        labels = [[label for label, _ in each] for each in self.SCORES.above(0.3)]
        assert labels == [["b", "c"], ["a"], ["a", "c"]]

    def test_returns_none_where_none_does(self):
        assert [len(each) for each in self.SCORES.above(0.6)] == [0, 1, 0]

    def test_of_0_is_the_whole_ranking(self):
        assert self.SCORES.above(0) == self.SCORES.top(3)

    @pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
    def test_is_a_probability(self, threshold):
        with pytest.raises(clip_rt.InputError, match="from 0 to 1"):
            self.SCORES.above(threshold)

    def test_leaves_out_what_is_not_similar(self):
        cosines = np.array([[0.2, 0.3, 0.3], [0.1, 0.1, 0.1], [0.4, 0.3, 0.2]], np.float32)
        scores = replace(self.SCORES, similarities=cosines)
        found = [[label for label, _ in each] for each in scores.above(min_similarity=0.25)]
        assert found == [["b", "c"], [], ["a", "b"]]
        assert [[each[0] for each in one] for one in scores.above(0.4, min_similarity=0.25)] == [
            ["b"],
            [],
            ["a"],
        ]

    def test_asks_none_of_these_for_no_similarity(self):
        cosines = np.full((3, 2), 0.1, np.float32)
        scores = replace(self.SCORES, similarities=cosines)
        found = [[label for label, _ in each] for each in scores.above(min_similarity=0.2)]
        assert found == [["c"], ["c"], ["c"]]

    def test_needs_similarities(self):
        with pytest.raises(clip_rt.InputError, match="probe"):
            self.SCORES.above(min_similarity=0.2)
        with pytest.raises(clip_rt.InputError, match="min_similarity is 2"):
            self.SCORES.above(min_similarity=2)


class TestClient:
    def test_answers_as_the_background_labels_would_by_themselves(self, client):
        scores = client.zero_shot(IMAGES, LABELS, none_of_these=True)
        alone = client.zero_shot(IMAGES, [*LABELS, *BACKGROUND])
        assert scores.labels == (*LABELS, NONE_OF_THESE)
        np.testing.assert_allclose(
            scores.probabilities[:, :2], alone.probabilities[:, :2], atol=1e-6
        )
        np.testing.assert_allclose(scores.probabilities.sum(axis=1), 1, atol=1e-6)

    def test_has_the_cosines_of_the_labels(self, client):
        for none_of_these in (False, True):
            scores = client.zero_shot(IMAGES, LABELS, none_of_these=none_of_these)
            expected = client.encode_images(IMAGES) @ client.class_embeddings(LABELS).T
            np.testing.assert_allclose(scores.similarities, expected, atol=1e-6)

    def test_skips_images_as_without_it(self, client):
        images = [IMAGES[0], b"no image", IMAGES[2]]
        scores = client.zero_shot(images, LABELS, none_of_these=True, on_error="skip")
        assert scores.indices.tolist() == [0, 2]
        assert [error.index for error in scores.failures] == [1]
        assert scores.probabilities.shape == (2, 3)

    def test_refuses_a_label_that_it_adds(self, client):
        with pytest.raises(clip_rt.InputError, match="label 1 is 'none of these'") as caught:
            client.zero_shot(IMAGES, ["red", NONE_OF_THESE], none_of_these=True)
        assert caught.value.index == 1
        assert client.zero_shot(IMAGES, ["red", NONE_OF_THESE]).labels == ("red", NONE_OF_THESE)

    def test_is_awaited_too(self, repository, client):
        async def ask():
            async with clip_rt.AsyncClient(repository=repository, server="in_process") as awaited:
                return await awaited.zero_shot(IMAGES, LABELS, none_of_these=True)

        expected = client.zero_shot(IMAGES, LABELS, none_of_these=True)
        np.testing.assert_allclose(asyncio.run(ask()).logits, expected.logits, atol=1e-4)


def test_a_background_label_that_is_asked_for_is_no_background():
    assert open_set.background_of("softmax", ["cat", "dog"]) == BACKGROUND
    left = open_set.background_of("softmax", ["Animal ", "dog", "tool"])
    assert set(BACKGROUND) - set(left) == {"animal", "tool"}
    assert open_set.background_of("sigmoid", ["cat"]) == ()


def test_background_labels_are_distinct_and_none_is_the_answer_itself():
    assert len(set(BACKGROUND)) == len(BACKGROUND)
    assert NONE_OF_THESE not in BACKGROUND
