"""Probabilities, rankings and prompt ensembles, without a server."""

from __future__ import annotations

import time

import numpy as np
import pytest

import clip_rt
from clip_rt.classification import zero_shot
from clip_rt.classification.zero_shot import classify, pool


def unit(array):
    array = np.asarray(array, np.float64)
    return (array / np.linalg.norm(array, axis=-1, keepdims=True)).astype(np.float32)


def test_pool_is_the_normalised_mean_of_the_normalised_prompts():
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(5, 7, 16)).astype(np.float32)
    expected = unit(unit(prompts).mean(axis=1))
    pooled = pool(prompts * rng.uniform(0.1, 10, (5, 7, 1)).astype(np.float32))
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


def test_pool_of_one_prompt_is_that_prompt():
    prompts = unit(np.random.default_rng(0).normal(size=(3, 1, 8)))
    np.testing.assert_allclose(pool(prompts), prompts[:, 0], atol=1e-7)


def test_pool_of_no_class_is_empty():
    assert pool(np.empty((0, 7, 8), np.float32)).shape == (0, 8)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_pool_names_a_class_without_a_direction(bad):
    prompts = np.ones((3, 2, 4), np.float32)
    prompts[1, 1] = bad
    with pytest.raises(clip_rt.NonFiniteEmbeddingError, match="class 1") as caught:
        pool(prompts)
    assert caught.value.index == 1


def test_prompts_that_cancel_out_are_an_error():
    prompts = np.stack([np.eye(2, 4), -np.eye(2, 4)], axis=1).astype(np.float32)
    with pytest.raises(clip_rt.NonFiniteEmbeddingError, match="class 0"):
        pool(prompts)


def test_classify_is_the_softmax_of_scaled_cosines():
    rng = np.random.default_rng(0)
    images, classes = unit(rng.normal(size=(4, 8))), unit(rng.normal(size=(3, 8)))
    scores = classify(images, classes, ["a", "b", "c"], logit_scale=100.0, logit_bias=-10.0)
    logits = 100.0 * images.astype(np.float64) @ classes.astype(np.float64).T - 10.0
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(scores.logits, logits, atol=1e-4)
    np.testing.assert_allclose(
        scores.probabilities, weights / weights.sum(axis=1, keepdims=True), atol=1e-5
    )
    assert scores.probabilities.dtype == scores.logits.dtype == np.float32


def test_huge_logits_do_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        scores = classify(
            np.eye(1, 2, dtype=np.float32),
            np.eye(2, dtype=np.float32),
            ["a", "b"],
            logit_scale=1e30,
        )
    assert scores.probabilities.tolist() == [[1.0, 0.0]]


def test_ranking_goes_from_most_to_least_probable_and_keeps_the_order_of_equals():
    images = unit([[1, 0], [0, 1]])
    classes = unit([[0, 1], [1, 0], [0, 1]])
    scores = classify(images, classes, ["sea", "cat", "sea"], logit_scale=10.0)
    assert scores.labels == ("sea", "cat", "sea")
    assert scores.best == ["cat", "sea"]
    assert [[label for label, _ in row] for row in scores.top(2)] == [
        ["cat", "sea"],
        ["sea", "sea"],
    ]
    assert len(scores.top(99)[0]) == 3
    label, probability = scores.top(1)[0][0]
    assert (type(label), type(probability)) == (str, float)
    with pytest.raises(clip_rt.InputError, match="k is 0"):
        scores.top(0)


def test_no_image_gives_scores_of_no_image():
    scores = classify(np.empty((0, 4), np.float32), np.eye(2, 4), ["a", "b"], logit_scale=1.0)
    assert scores.probabilities.shape == scores.logits.shape == (0, 2)
    assert scores.best == scores.top(1) == []


def test_one_label_is_certain():
    scores = classify(unit([[1, 2], [-3, 1]]), unit([[1, 1]]), ["a"], logit_scale=100.0)
    assert scores.probabilities.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("images", "classes", "labels"),
    [
        (np.ones((2, 4)), np.ones((3, 5)), ["a", "b", "c"]),
        (np.ones((2, 4)), np.ones((3, 4)), ["a", "b"]),
        (np.ones(4), np.ones((1, 4)), ["a"]),
        (np.ones((2, 4)), np.ones((0, 4)), []),
    ],
)
def test_shapes_that_do_not_fit_are_refused(images, classes, labels):
    with pytest.raises(clip_rt.InputError, match="do not fit"):
        classify(images, classes, labels, logit_scale=1.0)


def test_small_and_large_products_are_the_same_and_small_ones_wake_no_thread() -> None:
    rng = np.random.default_rng(0)
    classes = rng.standard_normal((400, 512)).astype(np.float32)
    images = rng.standard_normal((40, 512)).astype(np.float32)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    images /= np.linalg.norm(images, axis=1, keepdims=True)

    def ask(some: np.ndarray) -> np.ndarray:
        names = [str(n) for n in range(400)]
        return zero_shot.classify(some, classes, names, logit_scale=1.0).logits

    assert images.size * len(classes) > zero_shot.MAX_SMALL_PRODUCT > images[:8].size * 400
    np.testing.assert_allclose(ask(images)[:8], ask(images[:8]), atol=1e-6)
    np.testing.assert_allclose(ask(images), images.astype(np.float64) @ classes.T, atol=1e-6)

    def spent_s() -> float:
        # Of all threads, for a while: BLAS's work without an end to it.
        before_s = time.process_time()
        for _ in range(5):
            ask(images[:8])
            time.sleep(0.02)
        return time.process_time() - before_s

    time.sleep(0.2)  # Those of the large product go to sleep.
    assert spent_s() < 0.05
