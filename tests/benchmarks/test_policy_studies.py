"""What the studies of policies and of mistakes are made of."""

import numpy as np
import pytest

from benchmarks.studies import calibration, mistakes
from clip_rt.moderation.policy import Target


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def test_a_word_is_black_on_a_white_band_and_leaves_the_rest(picture):
    plain = np.asarray(mistakes.enlarge(picture))
    empty, written = (mistakes.write_word(picture, each) for each in ("", "umbrella"))
    top = mistakes.SIDE_PX * 5 // 8
    for image in (empty, written):
        np.testing.assert_array_equal(image[:top], plain[:top])
    assert (empty[top:] == 255).all()
    is_black = (written[top:] == 0).all(axis=2)
    assert 0.02 < is_black.mean() < 0.5
    assert not is_black[:, [0, -1]].any()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_as_many_things_are_shown_as_are_asked_for(count):
    # Black from edge to edge, so that each is a square of its own size.
    image = mistakes.repeat(np.zeros((64, 64, 3), np.uint8), count)
    side = mistakes.SIDE_PX // 3
    assert (image == 0).all(axis=2).sum() == count * side**2


def test_halves_are_disjoint_and_random():
    rng = np.random.default_rng(0)
    first, second = calibration.split(rng, 101)
    assert sorted([*first, *second]) == list(range(101))
    assert abs(len(first) - len(second)) == 1
    assert first.tolist() != calibration.split(rng, 101)[0].tolist()


@pytest.mark.parametrize(("measure", "expected"), [("precision", 0.6), ("recall", 0.7)])
def test_the_lucky_threshold_just_reaches_its_target(measure, expected):
    probabilities = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    is_true = np.array([True, True, True, False, False])
    target = Target(measure=measure, value=0.75)
    assert calibration._choose_lucky(probabilities, is_true, target) == expected


def test_every_kind_of_a_task_exists_once():
    kinds, _ = calibration.kind_by_hexcode()
    members = [each for group in calibration.KINDS_BY_LABEL.values() for each in group]
    assert len(members) == len(set(members))
    assert set(members) <= set(kinds)
    assert calibration.PROMPTS_BY_LABEL.keys() == calibration.KINDS_BY_LABEL.keys()
