"""Precision and recall at each threshold, against scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_curve

from clip_rt.errors import InputError
from clip_rt.moderation.curve import measure_share, precision_recall, wilson


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=60))
def test_they_are_those_of_scikit_learn(rows):
    scores = np.array([score for score, _ in rows]) / 9
    is_true = np.array([true for _, true in rows])
    found = precision_recall(scores, is_true)
    assert (found.num_images, found.num_true) == (len(rows), is_true.sum())
    if not is_true.any():
        assert np.isnan(found.recall).all()
        return
    precision, recall, thresholds = precision_recall_curve(is_true, scores)
    np.testing.assert_array_equal(found.thresholds, thresholds)
    np.testing.assert_allclose(found.precision, precision[:-1])
    np.testing.assert_allclose(found.recall, recall[:-1])


def test_a_threshold_flags_what_is_equal_to_it():
    found = precision_recall([0.5, 0.5, 0.2, 0.9], [True, False, True, True])
    assert found.thresholds.tolist() == [0.2, 0.5, 0.9]
    assert found.num_flagged.tolist() == [4, 3, 1]
    assert found.num_right.tolist() == [3, 2, 1]
    low, high = found.precision_interval()
    assert ((low <= found.precision) & (found.precision <= high)).all()
    assert (found.recall_interval()[1] >= found.recall).all()


@given(st.integers(0, 500), st.integers(1, 500))
def test_intervals_are_those_of_scipy(successes, trials):
    successes = min(successes, trials)
    low, high = wilson(successes, trials)
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    interval = measure_share(successes, trials)
    assert interval.low <= interval.value <= interval.high


def test_an_interval_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert measure_share(0, 0) is None


@pytest.mark.parametrize(
    ("scores", "is_true", "said"),
    [
        ([], [], "N >= 1"),
        ([0.1], [True, False], "do not fit"),
        ([[0.1]], [[True]], "do not fit"),
        ([0.1, float("nan")], [True, False], "score 1 is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(scores, is_true, said):
    with pytest.raises(InputError, match=said):
        precision_recall(scores, is_true)
