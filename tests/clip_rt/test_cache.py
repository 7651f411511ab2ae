"""The memory of class embeddings: bounded, keyed by all that matters, safe among threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clip_rt.cache import ENTRY_BYTES, EmbeddingCache, Key

KEY = Key("weights", "tokenizer", 77, ("a {}.",), "cat")


def vector(value):
    return np.full(8, value, np.float32)


def test_what_was_put_comes_back_and_is_a_copy():
    cache, put = EmbeddingCache(10_000), vector(1)
    cache.put(KEY, put)
    put[:] = 2
    assert cache.get(KEY).tolist() == vector(1).tolist()


def test_any_part_of_the_key_makes_another_entry():
    cache = EmbeddingCache(10_000)
    cache.put(KEY, vector(1))
    for field, value in KEY._asdict().items():
        other = KEY._replace(**{field: (value[0], "b {}.") if field == "templates" else value * 2})
        assert cache.get(other) is None


def test_the_least_recently_used_go_first_and_the_bound_holds():
    entry_bytes = ENTRY_BYTES + 4 * 1 + 32
    cache = EmbeddingCache(3 * entry_bytes)
    keys = [KEY._replace(label=label) for label in "abcd"]
    for key in keys[:3]:
        cache.put(key, vector(1))
    cache.get(keys[0])
    cache.put(keys[3], vector(1))
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    assert cache.num_bytes == 3 * entry_bytes <= cache.max_bytes
    cache.put(keys[3], vector(2))
    assert cache.num_bytes == 3 * entry_bytes


def test_without_room_nothing_is_kept():
    cache = EmbeddingCache(0)
    cache.put(KEY, vector(1))
    assert cache.get(KEY) is None
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_many_threads_leave_the_count_right():
    cache = EmbeddingCache(20_000)

    def work(seed):
        rng = np.random.default_rng(seed)
        for label in rng.integers(0, 200, 500):
            key = KEY._replace(label=str(label))
            found = cache.get(key)
            assert found is None or found[0] == label
            cache.put(key, vector(label))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert 0 < cache.num_bytes <= cache.max_bytes
