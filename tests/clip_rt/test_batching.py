"""How rows become requests, and answers the caller's rows again."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_rt.requests.batches import join, plan_texts

TEXTS = st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=77), max_size=60)


def echo(batch):
    """Answer with what tells a text apart: its ids, wherever the padding ends."""
    return np.array([[hash(tuple(row[row > 0])) % 1000003] for row in batch], np.float32)


@settings(deadline=None)
@given(TEXTS, st.integers(1, 9), st.sampled_from([(), (16, 32, 77)]))
def test_every_text_gets_its_own_answer(token_ids, max_rows, buckets):
    plan = plan_texts(token_ids, max_rows=max_rows, buckets=buckets)
    answers = np.concatenate([np.empty((0, 1), np.float32), *map(echo, plan.batches)])[
        plan.row_by_text
    ]
    expected = [[np.float32(hash(tuple(ids)) % 1000003)] for ids in token_ids]
    assert answers.tolist() == np.array(expected, np.float32).reshape(-1, 1).tolist()
    assert all(1 <= len(batch) <= max_rows for batch in plan.batches)


@settings(deadline=None)
@given(TEXTS)
def test_equal_texts_are_sent_once_and_cut_to_the_longest_of_their_request(token_ids):
    plan = plan_texts(token_ids, max_rows=4)
    assert sum(map(len, plan.batches)) == len({tuple(ids) for ids in token_ids})
    for batch in plan.batches:
        assert batch.dtype == np.int32
        assert batch[:, -1].any()
    widths = [batch.shape[1] for batch in plan.batches]
    assert widths == sorted(widths)


def test_with_buckets_a_long_text_does_not_widen_short_ones():
    plan = plan_texts([[1] * 77, [2] * 3, [3] * 16, [4] * 17], max_rows=32, buckets=(16, 32, 77))
    assert [batch.shape for batch in plan.batches] == [(2, 16), (1, 32), (1, 77)]


def test_no_text_needs_no_request():
    plan = plan_texts([], max_rows=4)
    assert plan.batches == ()
    assert join([], dim=5)[plan.row_by_text].shape == (0, 5)
