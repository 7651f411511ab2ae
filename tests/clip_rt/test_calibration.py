"""What is fitted, against scikit-learn and SciPy; promises, against what is true of new data."""

from __future__ import annotations

import datetime
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import sklearn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.special import expit, logit, softmax
from scipy.stats import binom, fisher_exact
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, log_loss

from clip_rt.calibration import fitting, measures, plots, report
from clip_rt.calibration.calibrate import calibrate, find_threshold, strip
from clip_rt.calibration.groups import compare_groups, holm
from clip_rt.calibration.thresholds import choose_threshold, count_needed
from clip_rt.errors import InputError
from clip_rt.moderation.decisions import find_probabilities
from clip_rt.moderation.policy import Data, Label, Policy, Target

DATA = Data(sha256="0" * 64, size_bytes=1, num_images=1)
DATE = datetime.date(2026, 11, 29)


def draw(rng, num, *, share=0.3, slope=30.0, intercept=-9.0):
    """Cosines, and truths that are a sigmoid of them."""
    cosines = rng.normal(0.3 - (0.5 - share) * 0.2, 0.12, num)
    return cosines, rng.random(num) < expit(slope * cosines + intercept)


class TestLogisticFit:
    @pytest.mark.parametrize("seed", range(5))
    def test_is_the_one_of_scikit_learn(self, seed):
        cosines, is_true = draw(np.random.default_rng(seed), 400)
        found = fitting.fit_logistic(cosines, is_true)
        # Of an estimator whose decision is the cosine itself.
        identity = LogisticRegression().fit(cosines[:, None], is_true)
        identity.coef_[:], identity.intercept_[:] = 1.0, 0.0
        theirs = CalibratedClassifierCV(FrozenEstimator(identity), method="sigmoid", cv=5)
        theirs = theirs.fit(cosines[:, None], is_true)
        expected = theirs.predict_proba(cosines[:, None])[:, 1]
        ours = expit(found.slope * cosines + found.intercept)
        np.testing.assert_allclose(ours, expected, atol=2e-4)

    def test_finds_what_the_data_was_drawn_from(self):
        cosines, is_true = draw(np.random.default_rng(0), 200_000)
        found = fitting.fit_logistic(cosines, is_true)
        assert (found.slope, found.intercept) == pytest.approx((30.0, -9.0), rel=0.03)

    def test_stays_finite_where_the_label_is_perfect(self):
        cosines = np.concatenate([np.full(12, 0.2), np.full(12, 0.4)])
        found = fitting.fit_logistic(cosines, cosines > 0.3)
        low, high = expit(found.slope * np.array([0.2, 0.4]) + found.intercept)
        # Platt's targets: 1 / 14 and 13 / 14.
        assert (low, high) == pytest.approx((1 / 14, 13 / 14), abs=1e-3)

    def test_needs_images_of_both_kinds(self):
        with pytest.raises(InputError, match="0 images with the label and 3 without"):
            fitting.fit_logistic(np.arange(3.0), np.zeros(3, bool))


class TestSoftmaxFit:
    BIASES = np.array([1.0, 0.5, -1.0, 0.0, -0.5])

    def draw(self, seed, num=4000, *, temperature=2.5, biases=0.0):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 4, (num, 5))
        shares = softmax(logits / temperature + biases, axis=1)
        right = (shares.cumsum(axis=1) > rng.random((num, 1))).argmax(axis=1)
        return logits, right

    def test_finds_what_the_data_was_drawn_with(self):
        logits, right = self.draw(0, 50_000, biases=self.BIASES)
        found = fitting.fit_softmax(logits, right, 5)
        assert found.temperature == pytest.approx(2.5, rel=0.03)
        np.testing.assert_allclose(found.biases, self.BIASES, atol=0.05)

    @pytest.mark.parametrize("num_labels", [5, 3])
    @pytest.mark.parametrize("seed", range(3))
    def test_has_the_smallest_log_loss(self, seed, num_labels):
        """With 3 labels the other 2 columns are background labels, which count together."""
        logits, right = self.draw(seed, biases=self.BIASES)
        right = np.minimum(right, num_labels)
        num_answers = num_labels + (num_labels < 5)
        found = fitting.fit_softmax(logits, right, num_labels)
        assert found.biases.shape == (num_answers,)

        def loss(temperature, biases):
            column_biases = np.append(biases, np.full(5 - num_answers, biases[-1]))
            shares = softmax(logits / temperature + column_biases, axis=1)
            shares[:, num_answers - 1] = shares[:, num_answers - 1 :].sum(axis=1)
            shares = shares[:, :num_answers]
            return log_loss(right, shares) + np.sum(biases**2) / 2 / len(right)

        best = loss(found.temperature, found.biases)
        for factor in (1.01, 1 / 1.01):
            assert best < loss(found.temperature * factor, found.biases)
        for step in np.vstack([np.eye(num_answers), -np.eye(num_answers)]) * 0.01:
            assert best < loss(found.temperature, found.biases + step)

    @pytest.mark.skipif(
        tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8),
        reason="this scikit-learn has no temperature scaling",
    )
    def test_without_biases_is_the_one_of_scikit_learn(self):
        logits, right = self.draw(1)
        identity = LogisticRegression().fit(logits, right)
        identity.coef_, identity.intercept_ = np.eye(5), np.zeros(5)
        theirs = CalibratedClassifierCV(FrozenEstimator(identity), method="temperature", cv=5)
        theirs = theirs.fit(logits, right)
        found = fitting.fit_softmax(logits, right, 5, min_images=len(right) + 1)
        assert not found.biases.any()
        expected = theirs.predict_proba(logits)
        np.testing.assert_allclose(softmax(logits / found.temperature, axis=1), expected, atol=1e-3)

    def test_leaves_labels_with_few_images_as_they_are(self):
        logits, right = self.draw(2, 60, biases=np.array([0, 0, 0, 0, -4.0]))
        found = fitting.fit_softmax(logits, right, 5)
        is_few = np.bincount(right, minlength=5) < fitting.MIN_EXAMPLES
        assert is_few.any()
        assert not found.biases[is_few].any()
        assert found.biases[~is_few].all()


class TestMeasures:
    @given(st.integers(0, 2**32), st.integers(1, 300))
    def test_bins_are_those_of_scikit_learn(self, seed, num):
        rng = np.random.default_rng(seed)
        probabilities = rng.random(num)
        is_right = rng.random(num) < probabilities**2
        found = measures.reliability(probabilities, is_right)
        share, mean = calibration_curve(is_right, probabilities, n_bins=measures.NUM_BINS)
        np.testing.assert_allclose(found.mean_probability, mean)
        np.testing.assert_allclose(found.share_right, share)
        assert found.num_predictions.sum() == num

    def test_error_is_the_mean_distance(self):
        probabilities = np.array([0.9, 0.9, 0.1, 0.1])
        is_right = np.array([True, False, False, False])
        assert measures.reliability(probabilities, is_right).error == pytest.approx(0.25)
        perfect = measures.reliability(np.array([0.0, 1.0]), np.array([False, True]))
        assert perfect.error == 0

    def test_confusion_of_a_softmax_is_that_of_scikit_learn(self):
        rng = np.random.default_rng(0)
        probabilities = rng.dirichlet(np.ones(4), 200)[:, :3]
        truth = rng.integers(0, 4, 200)
        is_true = np.eye(4, dtype=bool)[truth][:, :3]
        found = measures.confusion("softmax", probabilities, is_true, is_true, True)
        answers = measures.with_none(probabilities).argmax(axis=1)
        np.testing.assert_allclose(found, confusion_matrix(truth, answers, normalize="true"))

    def test_confusion_of_independent_labels_counts_each(self):
        is_true = np.array([[1, 1], [1, 0], [0, 0]], bool)
        is_flagged = np.array([[1, 0], [1, 1], [0, 0]], bool)
        found = measures.confusion("independent", is_true * 1.0, is_true, is_flagged, False)
        np.testing.assert_allclose(found, [[1, 0.5, 0], [1, 0, 0], [0, 0, 1]])


class TestThresholds:
    PRECISION = Target(measure="precision", value=0.95)
    RECALL = Target(measure="recall", value=0.95)

    @pytest.mark.parametrize("target", [PRECISION, RECALL], ids=lambda each: each.measure)
    def test_meet_their_target_on_new_data_in_19_of_20(self, target):
        rng = np.random.default_rng(0)
        new_cosines, new_true = draw(rng, 1_000_000)
        missed, found = 0, 0
        for _ in range(300):
            cosines, is_true = draw(rng, 1500)
            choice = choose_threshold(expit(30 * cosines - 9), is_true, target)
            if choice.threshold is None:
                assert choice.shortfall
                continue
            found += 1
            is_flagged = new_cosines >= (logit(choice.threshold) + 9) / 30
            right = (is_flagged & new_true).sum()
            of = is_flagged if target.measure == "precision" else new_true
            missed += right / of.sum() < target.value
        assert found > 200
        # As many misses of `found` have a chance of 1 in 1,000 where one in 20 may be missed.
        assert missed <= binom.ppf(0.999, found, 0.05)

    def test_are_missed_far_more_often_by_the_lowest_that_does_on_its_own_data(self):
        rng = np.random.default_rng(0)
        new_cosines, new_true = draw(rng, 200_000)
        missed = 0
        for _ in range(100):
            cosines, is_true = draw(rng, 1500)
            order = np.argsort(-cosines)
            precision = is_true[order].cumsum() / np.arange(1, 1501)
            lowest = cosines[order][np.flatnonzero(precision >= 0.95)[-1]]
            missed += new_true[new_cosines >= lowest].mean() < 0.95
        assert missed > 30

    @pytest.mark.parametrize("target", [PRECISION, RECALL], ids=lambda each: each.measure)
    def test_of_a_perfect_label_need_no_more_than_is_said(self, target):
        error = 0.05 / 4 if target.measure == "precision" else 0.05
        enough = count_needed(target.value, error)
        for num_true, is_there in ((enough, True), (int(enough * 0.95) - 1, False)):
            probabilities = np.concatenate([np.linspace(0.6, 0.9, num_true), np.full(500, 0.1)])
            choice = choose_threshold(probabilities, probabilities > 0.5, target)
            assert (choice.threshold is not None) is is_there
            assert bool(choice.shortfall) is not is_there
            if is_there:
                assert 0.1 < choice.threshold <= 0.9

    def test_are_not_found_for_labels_that_say_nothing(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            is_true = rng.random(800) < 0.5
            choice = choose_threshold(rng.random(800), is_true, self.PRECISION)
            assert choice.threshold is None
            assert "lower target" in choice.shortfall

    def test_say_how_many_images_would_do(self):
        is_true = np.ones(200, bool)
        is_true[[20, 60, 70, 150]] = False
        probabilities = np.linspace(1, 0.01, 200)
        choice = choose_threshold(probabilities, is_true, self.PRECISION)
        assert choice.threshold is None
        assert "of the 86 surest images 83 are right" in choice.shortfall
        assert choice.shortfall.endswith("images that the label fits would")

    @given(st.integers(0, 2**32), st.floats(0.5, 0.99), st.sampled_from(["precision", "recall"]))
    def test_do_what_was_measured_of_them(self, seed, value, measure):
        rng = np.random.default_rng(seed)
        cosines, is_true = draw(rng, int(rng.integers(2, 600)))
        choice = choose_threshold(cosines, is_true, Target(measure=measure, value=value))
        assert (choice.threshold is None) == bool(choice.shortfall)
        if choice.threshold is not None:
            is_flagged = cosines >= choice.threshold
            of = is_flagged if measure == "precision" else is_true
            assert (is_flagged & is_true).sum() / of.sum() >= value


@pytest.fixture
def manifest(drawings_client):
    return drawings_client.manifest


class TestPolicies:
    def draw(self, num, *, num_labels=2, seed=0):
        rng = np.random.default_rng(seed)
        columns = [draw(rng, num) for _ in range(num_labels)]
        cosines, is_true = (np.column_stack(each) for each in zip(*columns, strict=True))
        return cosines.astype(np.float32), rng.normal(0.2, 0.02, (num, 32)), is_true

    def fit(self, manifest, num, *, action="review", **options):
        policy = Policy(
            name="p", labels=tuple(Label(name=each, action=action) for each in ("a", "b"))
        )
        cosines, background, is_true = self.draw(num, **options)
        target = Target(measure="precision", value=0.9)
        return calibrate(
            policy, manifest, cosines, background, is_true, target=target, data=DATA, date=DATE
        )

    def test_carry_what_they_were_fitted_with(self, manifest):
        fit = self.fit(manifest, 2000, action="block")
        policy = fit.policy
        assert policy.is_calibrated
        assert (policy.model, policy.fingerprint) == (manifest.model, manifest.fingerprint)
        assert (policy.data, policy.date) == (DATA, "2026-11-29")
        assert policy.calibration_error.after < policy.calibration_error.before / 2
        for label in policy.labels:
            assert label.calibration.slope == pytest.approx(30, rel=0.2)
            assert label.measured.is_target_met
            assert label.block_threshold is not None
            assert label.review_threshold == 0.5
            assert label.target == Target(measure="precision", value=0.9)
        assert Policy.from_json(policy.to_json()) == policy

    def test_predict_new_images_as_well_as_those_left_out(self, manifest):
        fit = self.fit(manifest, 4000)
        cosines, background, is_true = self.draw(50_000, seed=1)
        new = find_probabilities(fit.policy, manifest, cosines, background)
        error = measures.calibration_error("independent", new, is_true, False)
        assert error < 0.02
        assert fit.policy.calibration_error.after < 0.03
        for index, label in enumerate(fit.policy.labels):
            is_flagged = new[:, index] >= find_threshold(label)
            share = is_true[is_flagged, index].mean()
            assert label.measured.precision.low - 0.02 <= share <= label.measured.precision.high

    def test_left_out_images_are_predicted_without_them(self, manifest):
        """Truths that say nothing of others: with them, a fit would look better than a coin."""
        fit = self.fit(manifest, 200)
        shuffled = np.random.default_rng(0).permutation(fit.is_true)
        cosines, background, _ = self.draw(200)
        again = calibrate(
            fit.policy,
            manifest,
            cosines,
            background,
            shuffled,
            target=Target(measure="precision", value=0.9),
            data=DATA,
            date=DATE,
        )
        assert not any(each.measured.is_target_met for each in again.policy.labels)
        share = shuffled.mean(axis=0)
        for index in range(2):
            expected = np.full(200, share[index])
            loss = log_loss(shuffled[:, index], again.after[:, index])
            assert loss > log_loss(shuffled[:, index], expected) - 1e-3

    @pytest.mark.parametrize("num", [1, 5, 12])
    def test_of_too_few_images_say_so_and_promise_nothing(self, manifest, num):
        fit = self.fit(manifest, num, action="block")
        assert not fit.policy.is_calibrated
        for label in fit.policy.labels:
            assert label.calibration is label.block_threshold is None
            assert "at least 10" in label.measured.shortfall
            assert not label.measured.is_target_met
        assert set(fit.policy.shortfalls) == {"a", "b"}

    def test_of_enough_to_fit_and_too_few_to_promise_only_review(self, manifest):
        fit = self.fit(manifest, 80, action="block")
        assert fit.policy.is_calibrated
        for label in fit.policy.labels:
            assert label.block_threshold is None
            assert label.review_threshold == 0.5
            assert "at least" in label.measured.shortfall

    def test_of_a_softmax_have_one_temperature_and_biases(self, manifest):
        rng = np.random.default_rng(0)
        cosines = rng.normal(0.3, 0.15, (3000, 3)).astype(np.float32)
        background = rng.normal(0.2, 0.05, (3000, 4)).astype(np.float32)
        logits = manifest.logit_scale * np.hstack([cosines, background]) / 3
        biases = np.array([0.5, -0.5, 0, *[1.0] * 4])
        shares = softmax(logits.astype(np.float64) + biases, axis=1)
        right = (shares.cumsum(axis=1) > rng.random((3000, 1))).argmax(axis=1)
        is_true = np.eye(7, dtype=bool)[right][:, :3]
        policy = Policy(
            name="p",
            kind="softmax",
            labels=(Label(name="a"), Label(name="b"), Label(name="c", action="allow")),
            none_of_these=True,
        )
        target = Target(measure="recall", value=0.9)
        fit = calibrate(
            policy, manifest, cosines, background, is_true, target=target, data=DATA, date=DATE
        )
        assert fit.policy.temperature == pytest.approx(3, rel=0.1)
        assert fit.policy.calibration_error.after < fit.policy.calibration_error.before / 2
        first, second, third = fit.policy.labels
        assert first.measured.is_target_met
        assert second.measured.recall.value >= 0.9
        assert (third.action, third.measured, third.target) == ("allow", None, None)
        # Only their differences matter.
        found = np.array([first.bias, second.bias, third.bias, fit.policy.none_bias])
        np.testing.assert_allclose(found - found[2], [0.5, -0.5, 0, 1.0], atol=0.25)
        new = find_probabilities(fit.policy, manifest, cosines, background)
        expected = shares[:, :3]
        assert np.abs(new - expected).mean() < 0.01

    def test_of_a_softmax_need_one_label_for_each_image(self, manifest):
        policy = Policy(name="p", kind="softmax", labels=(Label(name="a"), Label(name="b")))
        cosines = np.zeros((2, 2), np.float32)
        options = {"target": TestThresholds.RECALL, "data": DATA, "date": DATE}
        bare = np.empty((2, 0))
        with pytest.raises(InputError, match=r"1 images have several.*--kind independent"):
            calibrate(policy, manifest, cosines, bare, np.array([[1, 1], [1, 0]], bool), **options)
        with pytest.raises(InputError, match=r"1 images have none.*--none-of-these"):
            calibrate(policy, manifest, cosines, bare, np.array([[0, 0], [1, 0]], bool), **options)
        with pytest.raises(InputError, match="no image"):
            calibrate(policy, manifest, cosines[:0], bare[:0], np.empty((0, 2), bool), **options)

    @pytest.mark.parametrize("num_labels", [1, 40])
    def test_are_shown_whatever_labels_are_called(self, manifest, num_labels):
        names = [
            f"<script>{number}</script> $x_{{ 日本 \x1b[2J {'long ' * 9}" for number in range(40)
        ]
        policy = Policy(name="<img src=x>", labels=tuple(Label(name=each) for each in names))
        policy = replace(policy, labels=policy.labels[:num_labels])
        cosines, background, is_true = self.draw(60, num_labels=num_labels)
        fit = calibrate(
            policy,
            manifest,
            cosines,
            background,
            is_true,
            target=Target(measure="recall", value=0.5),
            data=DATA,
            date=DATE,
        )
        picture = plots.draw_calibration(fit)
        assert Image.open(io.BytesIO(picture)).size == (1650, 550)
        page = report.describe_fit(fit, picture)
        assert "<script" not in page
        assert page.count("<img") == 1
        assert page.count("<tr>") == 1 + num_labels

    def test_forget_an_earlier_fit(self, manifest):
        fitted = self.fit(manifest, 2000).policy
        bare = strip(fitted)
        assert not bare.is_calibrated
        assert bare == replace(bare, labels=(Label(name="a"), Label(name="b")))


class TestGroups:
    def test_that_differ_are_found(self):
        rng = np.random.default_rng(0)
        group = np.repeat(["x", "y", "z"], 400)
        is_given = np.column_stack(
            [rng.random(1200) < 0.2, rng.random(1200) < np.where(group == "z", 0.6, 0.3)]
        )
        found = compare_groups(is_given, ["same", "other"], group.tolist())
        assert found.groups == ("x", "y", "z")
        assert not found.differs[:, :, 0].any()
        assert found.differs[:, :, 1].tolist() == [
            [False, False, True],
            [False, False, True],
            [True, True, False],
        ]
        np.testing.assert_allclose(found.rates[2, 1], is_given[group == "z", 1].mean())
        low, high = found.intervals
        assert ((low <= found.rates) & (found.rates <= high)).all()

    def test_that_do_not_are_blamed_in_1_of_20_at_most(self):
        rng = np.random.default_rng(0)
        group = np.repeat(["x", "y", "z"], 60).tolist()
        labels = [f"label {number}" for number in range(6)]
        blamed = sum(
            compare_groups(rng.random((180, 6)) < 0.3, labels, group).differs.any()
            for _ in range(150)
        )
        assert blamed <= binom.ppf(0.999, 150, 0.05)

    def test_are_compared_by_fishers_test(self):
        is_given = np.array([[True]] * 8 + [[False]] * 2 + [[True]] + [[False]] * 9)
        found = compare_groups(is_given, ["a"], ["x"] * 10 + ["y"] * 10)
        assert found.p_values[0, 1, 0] == pytest.approx(fisher_exact([[8, 1], [2, 9]]).pvalue)

    def test_need_to_be_two(self):
        with pytest.raises(InputError, match="one group, 'x'"):
            compare_groups(np.ones((2, 1), bool), ["a"], ["x", "x"])
        with pytest.raises(InputError, match="no image"):
            compare_groups(np.ones((0, 1), bool), ["a"], [])

    def test_are_shown_whatever_they_are_called(self):
        group = ["<b>$", "日本"] * 50
        is_given = np.array(group)[:, None] == ["<b>$", "-", "日本"]
        found = compare_groups(is_given, ["<script>", "none", "$x_{"], group)
        picture = plots.draw_groups(found)
        assert Image.open(io.BytesIO(picture)).format == "PNG"
        page = report.describe_groups(found, picture, "Rates by <i>")
        assert not {"<script", "<b>", "<i>"} & set(re.findall(r"<\w+>?", page))
        assert page.count('class="warning"') == 2
        same = compare_groups(np.ones((100, 1), bool), ["all"], group)
        assert "shows no equality" in report.describe_groups(same, picture, "Rates")

    def test_share_their_error_as_holm_says(self):
        # Of R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
        np.testing.assert_allclose(
            holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02]
        )
