import numpy as np
import pytest
import torch

from clip_rt.errors import InputError
from training.data.batches import Purpose, Shuffled, check_rank, cut_tokens, rng, torch_rng


def test_every_epoch_holds_each_item_once_in_another_order() -> None:
    order = Shuffled(50, seed=3)
    one, two = order.take(0, 50), order.take(50, 50)
    assert sorted(one) == sorted(two) == list(range(50))
    assert not np.array_equal(one, two)


def test_any_part_of_an_order_is_what_reading_up_to_it_gives() -> None:
    whole = Shuffled(7, seed=1).take(0, 100)
    order = Shuffled(7, seed=1)
    for start, count in [(93, 7), (0, 0), (6, 2), (13, 30), (40, 1)]:
        np.testing.assert_array_equal(order.take(start, count), whole[start : start + count])


def test_orders_of_other_seeds_and_keys_differ() -> None:
    orders = [Shuffled(100, seed=seed, key=key).take(0, 100) for seed in (0, 1) for key in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4


def test_no_two_places_share_random_numbers() -> None:
    places = [(p, s, k, r) for p in Purpose for s in (0, 1) for k in (0, 1) for r in (0, 1)]
    draws = {rng(purpose, *where).random() for purpose, *where in places}
    assert len(draws) == len(places)
    torches = {torch.rand(1, generator=torch_rng(p, *where)).item() for p, *where in places}
    assert len(torches) == len(places)


@pytest.mark.parametrize(
    ("start_step", "rank", "world_size", "says"),
    [(-1, 0, 1, "start_step is -1"), (0, 2, 2, "rank is 2 of 2"), (0, 0, 3, "multiple of 3")],
)
def test_a_part_of_a_batch_that_cannot_be_is_refused(
    start_step: int, rank: int, world_size: int, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        check_rank(start_step, rank, world_size, batch_size=8)


def test_an_empty_set_and_a_seed_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        Shuffled(0, seed=0)
    with pytest.raises(InputError, match="seed is -1"):
        Shuffled(1, seed=-1)


def test_columns_that_only_pad_are_cut() -> None:
    tokens = cut_tokens(["a cat", "a very small cat"], context_length=77)
    assert tokens.shape == (2, 6)
    assert cut_tokens(["word " * 100], context_length=24).shape == (1, 24)
