"""Decisions of policies on real drawings by the bundled model, and what is refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from asking import BUNDLED, PICTURES
from policies_made_up import make_policy
from scipy.special import expit, softmax

import clip_rt
from clip_rt.classification.open_set import BACKGROUND
from clip_rt.moderation import decisions
from clip_rt.moderation.policy import Calibration, Label, Policy, find_policy

LABELS = ("rocket", "pizza", "bicycle")


@pytest.fixture
def fitted(drawings_client):
    """A policy of this model; its numbers are made up, and rocket and pizza are told apart."""
    return make_policy(drawings_client.manifest)


class TestProbabilities:
    def test_are_sigmoids_of_cosines(self, drawings_client, fitted):
        found = drawings_client.moderate(PICTURES, fitted)
        images = drawings_client.encode_images(PICTURES)
        rows = drawings_client.class_embeddings(
            ["rocket", "a space ship", "pizza"], templates=fitted.templates
        )
        rocket = rows[:2].mean(axis=0)
        classes = np.stack([rocket / np.linalg.norm(rocket), rows[2]])
        np.testing.assert_allclose(found.similarities, images @ classes.T, atol=1e-6)
        expected = expit(60.0 * (images @ classes.T) - 31.0)
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
        assert found.labels == ("rocket", "pizza")
        assert found.probabilities.dtype == found.similarities.dtype == np.float32

    @pytest.mark.parametrize(("temperature", "bias"), [(None, 0.0), (0.5, 0.0), (3.0, 1.5)])
    @pytest.mark.parametrize("none_of_these", [False, True])
    def test_of_a_softmax_have_its_temperature_and_biases(
        self, drawings_client, temperature, bias, none_of_these
    ):
        manifest = drawings_client.manifest
        policy = Policy(
            name="kinds",
            kind="softmax",
            labels=tuple(Label(name=each, bias=bias) for each in LABELS),
            temperature=temperature,
            none_of_these=none_of_these,
            none_bias=-2 * bias if none_of_these else 0.0,
            model=manifest.model,
            fingerprint=manifest.fingerprint,
        )
        found = drawings_client.moderate(PICTURES, policy, allow_uncalibrated=temperature is None)
        images = drawings_client.encode_images(PICTURES)
        classes = drawings_client.class_embeddings([*LABELS, *BACKGROUND])
        biases = np.repeat([bias, -2 * bias], [len(LABELS), len(BACKGROUND)])
        if not none_of_these:
            classes, biases = classes[: len(LABELS)], biases[: len(LABELS)]
        logits = manifest.logit_scale * images @ classes.T / (temperature or 1) + biases
        expected = softmax(logits.astype(np.float64), axis=1)[:, : len(LABELS)]
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
        if temperature is None:
            scores = drawings_client.zero_shot(PICTURES, LABELS, none_of_these=none_of_these)
            shares = scores.probabilities[:, : len(LABELS)]
            np.testing.assert_allclose(found.probabilities, shares, atol=1e-5)

    def test_of_a_starter_are_those_of_the_label_among_background_labels(self, drawings_client):
        policy = Policy(name="bare", labels=tuple(Label(name=each) for each in LABELS))
        found = drawings_client.moderate(PICTURES, policy, allow_uncalibrated=True)
        for index, label in enumerate(LABELS):
            scores = drawings_client.zero_shot(PICTURES, [label], none_of_these=True)
            np.testing.assert_allclose(
                found.probabilities[:, index], scores.probabilities[:, 0], atol=1e-5
            )

    def test_of_a_sigmoid_model_are_its_own(self, drawings_client):
        manifest = replace(drawings_client.manifest, score="sigmoid", logit_bias=-16.0)
        policy = Policy(name="bare", labels=tuple(Label(name=each) for each in LABELS))
        assert decisions.list_texts(policy, "sigmoid") == LABELS
        cosines = np.array([[0.1, 0.5, 0.9]], np.float32)
        found = decisions.find_probabilities(policy, manifest, cosines, np.empty((1, 0), "f4"))
        expected = expit(manifest.logit_scale * cosines.astype(np.float64) - 16.0)
        np.testing.assert_allclose(found, expected)

    def test_do_not_overflow(self, drawings_client, fitted):
        steep = Calibration(slope=1e9, intercept=0.0)
        labels = tuple(replace(each, calibration=steep) for each in fitted.labels)
        found = drawings_client.moderate(PICTURES, replace(fitted, labels=labels))
        assert np.isfinite(found.probabilities).all()
        assert set(np.unique(found.probabilities)) <= {0.0, 1.0}


class TestDecisions:
    def test_name_their_reasons(self, drawings_client, fitted):
        found = drawings_client.moderate(PICTURES, fitted)
        by_name = dict(zip((each.stem for each in PICTURES), found.decisions, strict=True))
        assert by_name["rocket"].action == "block"
        (reason,) = by_name["rocket"].reasons
        assert (reason.label, reason.action, reason.threshold) == ("rocket", "block", 0.9)
        row = [each.stem for each in PICTURES].index("rocket")
        assert reason.probability == pytest.approx(found.probabilities[row, 0])
        assert by_name["pizza"].action == "review"
        assert by_name["owl"] == decisions.Decision("allow")
        assert found.actions == [each.action for each in found.decisions]

    def test_put_the_most_severe_reason_first(self, fitted, drawings_client):
        everything = (
            replace(fitted.labels[0], block_threshold=None, review_threshold=0.0),
            replace(fitted.labels[1], action="block", block_threshold=0.0, review_threshold=0.0),
        )
        found = drawings_client.moderate(PICTURES[:1], replace(fitted, labels=everything))
        assert [each.action for each in found.decisions[0].reasons] == ["block", "review"]

    def test_skip_what_cannot_be_used(self, drawings_client, fitted):
        images = [PICTURES[0], b"no image", PICTURES[1]]
        found = drawings_client.moderate(images, fitted, on_error="skip")
        assert found.indices.tolist() == [0, 2]
        assert len(found.decisions) == len(found.probabilities) == 2
        assert [each.index for each in found.failures] == [1]
        with pytest.raises(clip_rt.ImageError) as caught:
            drawings_client.moderate(images, fitted)
        assert caught.value.index == 1

    def test_of_no_image_are_none(self, drawings_client, fitted):
        found = drawings_client.moderate([], fitted)
        assert (found.decisions, found.probabilities.shape) == ((), (0, 2))

    def test_are_awaited_too(self, fitted):
        async def ask():
            async with clip_rt.AsyncClient(repository=BUNDLED, server="in_process") as client:
                return await client.moderate(PICTURES, fitted)

        assert asyncio.run(ask()).actions.count("block") == 1


class TestWhatIsRefused:
    def test_is_a_policy_of_another_model(self, drawings_client, fitted):
        other = replace(fitted, model="shop-v3", fingerprint="f" * 64)
        for allow in (False, True):
            with pytest.raises(clip_rt.ContractError, match=r"'shop-v3'.*clip-rt calibrate") as it:
                drawings_client.moderate(PICTURES, other, allow_uncalibrated=allow)
        assert it.value.expected == "f" * 64
        assert it.value.found == drawings_client.manifest.fingerprint

    def test_is_a_policy_that_was_not_fitted(self, drawings_client):
        policy = find_policy("weapons")
        with pytest.raises(clip_rt.PolicyError, match=r"--policy weapons --out policy\.json"):
            drawings_client.moderate(PICTURES, policy)
        found = drawings_client.moderate(PICTURES, policy, allow_uncalibrated=True)
        assert "block" not in found.actions

    def test_is_a_policy_with_a_label_that_was_not_fitted(self, drawings_client, fitted):
        rocket, pizza = fitted.labels
        policy = replace(fitted, labels=(rocket, replace(pizza, calibration=None)))
        with pytest.raises(clip_rt.PolicyError, match="not calibrated for 'pizza'"):
            drawings_client.moderate(PICTURES, policy)
        found = drawings_client.moderate(PICTURES, policy, allow_uncalibrated=True)
        whole = drawings_client.moderate(PICTURES, fitted)
        np.testing.assert_array_equal(found.probabilities[:, 0], whole.probabilities[:, 0])

    def test_is_what_is_no_policy(self, drawings_client):
        with pytest.raises(clip_rt.InputError, match=r"policy is a str.*Policy\.load"):
            drawings_client.moderate(PICTURES, "weapons")
