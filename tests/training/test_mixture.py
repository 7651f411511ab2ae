import numpy as np
import pytest

from clip_rt.errors import InputError
from training.data.mixture import PERIOD, Mixture


def test_without_weights_every_pair_comes_once_an_epoch() -> None:
    source, index = Mixture([3, 5, 2], None, seed=0).take(0, 20)
    pairs = list(zip(source.tolist(), index.tolist(), strict=True))
    every = [(s, i) for s, size in enumerate([3, 5, 2]) for i in range(size)]
    assert sorted(pairs[:10]) == sorted(pairs[10:]) == every
    assert pairs[:10] != pairs[10:]


def test_weights_are_kept_exactly_and_each_source_goes_round() -> None:
    source, index = Mixture([70, 1000], [3, 1], seed=0).take(0, PERIOD)
    assert np.bincount(source).tolist() == [7500, 2500]
    assert np.bincount(index[source == 0][: 70 * 5]).tolist() == [5] * 70
    assert sorted(index[source == 1][:1000]) == list(range(1000))
    # Both are everywhere: no batch is of one source.
    assert np.bincount(source[:200]).min() > 20


def test_any_part_of_a_mixture_is_what_reading_up_to_it_gives() -> None:
    source, index = Mixture([7, 11, 3], [1, 2, 0.5], seed=4).take(0, 3 * PERIOD)
    mixture = Mixture([7, 11, 3], [1, 2, 0.5], seed=4)
    for start, count in [(29_000, 1000), (PERIOD - 5, 10), (123, 1), (0, 64), (19_999, 2)]:
        part_source, part_index = mixture.take(start, count)
        np.testing.assert_array_equal(part_source, source[start : start + count])
        np.testing.assert_array_equal(part_index, index[start : start + count])


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, 1e-9]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="weights are"):
        Mixture([5, 5], weights, seed=0)
