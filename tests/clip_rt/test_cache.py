"""The memory of class embeddings: bounded, keyed by all that matters, made once among threads."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from owners import wait_until

from clip_rt.cache.memory import ENTRY_BYTES, Key, PromptCache
from clip_rt.deadline import Cancellation, Deadline
from clip_rt.errors import InferenceError, ServerTimeoutError

KEY = Key("weights", "tokenizer", 77, ("a {}.",), "cat")
DIM = 8
ENTRY = ENTRY_BYTES + 4 * 1 + 4 * DIM
"""Bytes of an entry whose label has one character."""
ROOM = 1_000_000


def embed(key):
    """The embedding of a key, which depends on all of it."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).normal(size=DIM)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def keys_of(labels):
    return [KEY._replace(label=label) for label in labels]


class Encoder:
    """Makes what a cache asks for, and remembers what that was."""

    def __init__(self):
        self.calls = []

    @property
    def made(self):
        return [key for call in self.calls for key in call]

    def ask(self, cache, keys, *, timeout_s=30.0):
        def make(positions: Sequence[int]):
            assert list(positions) == sorted(set(positions))
            self.calls.append([keys[position] for position in positions])
            return np.stack([embed(keys[position]) for position in positions])

        found = cache.get_or_make(keys, make, dim=DIM, deadline=Deadline.after(timeout_s))
        assert found.dtype == np.float32
        assert found.tolist() == [embed(key).tolist() for key in keys]
        return found


def test_what_is_known_is_not_made_again():
    cache, encoder = PromptCache(ROOM), Encoder()
    for _ in range(3):
        encoder.ask(cache, keys_of("abc"))
    assert encoder.calls == [keys_of("abc")]
    assert (cache.misses, cache.hits, cache.disk_hits, len(cache)) == (3, 6, 0, 3)


def test_ten_new_labels_among_a_thousand_make_ten():
    cache, encoder = PromptCache(10 * ROOM), Encoder()
    labels = [f"label {index}" for index in range(1000)]
    encoder.ask(cache, keys_of(labels[:990]))
    new = [labels[index] for index in range(990, 1000)]
    encoder.ask(cache, keys_of([*new[:5], *labels[:990], *new[5:]]))
    assert encoder.calls[1:] == [keys_of(new)]


def test_equal_labels_are_made_once_and_stand_where_the_caller_put_them():
    cache, encoder = PromptCache(0), Encoder()
    encoder.ask(cache, keys_of("abacab"))
    assert encoder.calls == [keys_of("abc")]


def test_no_keys_make_nothing():
    cache, encoder = PromptCache(ROOM), Encoder()
    found = cache.get_or_make([], pytest.fail, dim=DIM, deadline=Deadline.after(1))
    assert (found.shape, found.dtype) == ((0, DIM), np.float32)
    assert encoder.calls == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "weight"),
        ("tokenizer", "sother"),
        ("context_length", 76),
        ("templates", ("a {}.", "a {}.")),
        ("templates", ("a {}", ".")),
        ("label", "cat "),
        ("label", "\ud83d"),
        ("label", "c\0t"),
    ],
)
def test_any_part_of_the_key_makes_another_entry(field, value):
    cache, encoder = PromptCache(ROOM), Encoder()
    keys = [KEY, KEY._replace(**{field: value})]
    for key in keys:
        encoder.ask(cache, [key])
    encoder.ask(cache, keys[::-1])
    assert encoder.made == keys


def test_a_label_does_not_cost_the_hash_of_the_templates():
    class Template(str):
        num_hashes = 0

        def __hash__(self):
            Template.num_hashes += 1
            return super().__hash__()

    templates = tuple(Template(f"{number} {{}}.") for number in range(80))
    keys = [key._replace(templates=templates) for key in keys_of("abcdefghij")]
    cache, encoder = PromptCache(ROOM), Encoder()
    encoder.ask(cache, keys)
    encoder.ask(cache, keys)
    assert Template.num_hashes <= 2 * 80
    assert len(encoder.calls) == 1


def test_the_least_recently_used_go_first_and_the_bound_holds():
    cache, encoder = PromptCache(3 * ENTRY), Encoder()
    encoder.ask(cache, keys_of("abc"))
    encoder.ask(cache, keys_of("a"))
    encoder.ask(cache, keys_of("d"))
    assert cache.num_bytes == 3 * ENTRY == cache.max_bytes
    encoder.calls.clear()
    encoder.ask(cache, keys_of("acd"))
    assert encoder.made == []
    encoder.ask(cache, keys_of("b"))
    assert encoder.made == keys_of("b")


def test_a_call_for_more_than_fits_is_answered_whole():
    cache, encoder = PromptCache(2 * ENTRY), Encoder()
    encoder.ask(cache, keys_of("abcde"))
    encoder.ask(cache, keys_of("edcba"))
    assert len(cache) == 2


def test_without_room_nothing_is_kept():
    cache, encoder = PromptCache(0), Encoder()
    for _ in range(2):
        encoder.ask(cache, keys_of("a"))
    assert encoder.made == keys_of("aa")
    assert (len(cache), cache.num_bytes, cache.num_disk_bytes) == (0, 0, 0)


def test_neither_the_encoders_array_nor_the_callers_is_the_caches():
    cache = PromptCache(ROOM)
    made = embed(KEY)[None]
    for _ in range(2):
        found = cache.get_or_make([KEY], lambda _: made, dim=DIM, deadline=Deadline.after(1))
        assert found.tolist() == [embed(KEY).tolist()]
        found[:] = 2
        made[:] = 3


def test_clear_forgets_and_counts_from_zero():
    cache, encoder = PromptCache(ROOM), Encoder()
    encoder.ask(cache, keys_of("ab"))
    encoder.ask(cache, keys_of("ab"))
    cache.clear()
    assert (len(cache), cache.num_bytes, cache.hits, cache.misses) == (0, 0, 0, 0)
    encoder.ask(cache, keys_of("a"))
    assert encoder.made == keys_of("aba")


def test_a_cache_says_what_it_holds(tmp_path):
    cache = PromptCache(ROOM, tmp_path)
    Encoder().ask(cache, keys_of("aab"))
    Encoder().ask(cache, keys_of("a"))
    assert repr(cache) == (
        f"PromptCache(2 embeddings in {2 * ENTRY:,} of 1,000,000 bytes, "
        f"hits=1, disk_hits=0, misses=2, folder={str(tmp_path)!r})"
    )


CALLS = st.lists(
    st.lists(
        st.builds(
            Key,
            st.sampled_from(["w", "v"]),
            st.just("t"),
            st.sampled_from([16, 77]),
            st.sampled_from([("{}",), ("a {}", "b {}")]),
            st.sampled_from("abcde"),
        ),
        max_size=8,
    ),
    max_size=8,
)


@settings(deadline=None)
@given(CALLS, st.integers(0, 12 * ENTRY))
def test_it_is_a_dictionary_that_forgets_the_least_recently_used(calls, max_bytes):
    cache, encoder, known = PromptCache(max_bytes), Encoder(), []
    for keys in calls:
        encoder.calls.clear()
        encoder.ask(cache, keys)
        distinct = list(dict.fromkeys(keys))
        missing = [key for key in distinct if key not in known]
        assert encoder.calls == ([missing] if missing else [])
        found = [key for key in distinct if key in known]
        known = [key for key in known if key not in distinct] + found + missing
        known = known[max(0, len(known) - max_bytes // ENTRY) :]
        assert cache.num_bytes == ENTRY * len(known) == ENTRY * len(cache) <= max_bytes


# ---- threads


@dataclass(frozen=True)
class WatchedDeadline(Deadline):
    """Tells when a call begins to wait for another."""

    waits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def waking(self, wake):
        self.waits.release()
        return super().waking(wake)


class SlowEncoder:
    """Makes a set only when it is told to, so that others come while it is made."""

    def __init__(self, cache, keys, *, fails=False):
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.cache, self.keys, self.fails = cache, keys, fails

    def __call__(self):
        return self.cache.get_or_make(
            self.keys, self.make, dim=DIM, deadline=Deadline.after(30)
        ).tolist()

    def make(self, positions):
        self.has_begun.set()
        assert self.may_end.wait(30)
        if self.fails:
            raise InferenceError("refused")
        return np.stack([embed(self.keys[position]) for position in positions])


@pytest.mark.parametrize("max_bytes", [0, ROOM])
def test_what_one_thread_is_making_the_others_wait_for(max_bytes):
    cache, encoder = PromptCache(max_bytes), Encoder()
    slow = SlowEncoder(cache, keys_of("abc"))
    deadline = WatchedDeadline(30.0, Deadline.after(30).at_s)

    def wait(keys):
        return cache.get_or_make(keys, encoder_never, dim=DIM, deadline=deadline).tolist()

    def encoder_never(positions):
        encoder.calls.append(positions)
        raise AssertionError("it is being made")

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(slow)
        assert slow.has_begun.wait(30)
        waiting = [pool.submit(wait, keys_of("cab"[: 1 + index % 3])) for index in range(7)]
        for _ in waiting:
            assert deadline.waits.acquire(timeout=30)
        slow.may_end.set()
        assert first.result(30) == [embed(key).tolist() for key in keys_of("abc")]
        for index, each in enumerate(waiting):
            expected = [embed(key).tolist() for key in keys_of("cab"[: 1 + index % 3])]
            assert each.result(30) == expected
    assert encoder.calls == []
    assert cache.misses == 3
    assert cache.hits == sum(1 + index % 3 for index in range(7))


def test_other_labels_are_made_while_a_thread_is_making():
    cache, encoder = PromptCache(ROOM), Encoder()
    slow = SlowEncoder(cache, keys_of("ab"))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow)
        assert slow.has_begun.wait(30)
        encoder.ask(cache, keys_of("cd"))
        assert not first.done()
        overlapping = pool.submit(encoder.ask, cache, keys_of("bce"))
        assert wait_until(lambda: encoder.calls == [keys_of("cd"), keys_of("e")])
        slow.may_end.set()
        overlapping.result(30)
    assert encoder.calls == [keys_of("cd"), keys_of("e")]


def test_who_waits_past_its_deadline_is_told_so_and_the_other_goes_on():
    cache = PromptCache(ROOM)
    slow = SlowEncoder(cache, keys_of("ab"))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow)
        assert slow.has_begun.wait(30)
        with pytest.raises(ServerTimeoutError, match=r"making 1 of .* after 0\.05 s") as caught:
            Encoder().ask(cache, keys_of("bx"), timeout_s=0.05)
        assert caught.value.timeout_s == 0.05
        slow.may_end.set()
        first.result(30)
    later = Encoder()
    later.ask(cache, keys_of("abx"))
    assert later.calls == []


def test_a_call_that_is_called_off_stops_waiting():
    cache, cancellation = PromptCache(ROOM), Cancellation()
    slow = SlowEncoder(cache, keys_of("a"))
    deadline = WatchedDeadline(30.0, Deadline.after(30).at_s, cancellation)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow)
        assert slow.has_begun.wait(30)
        second = pool.submit(
            cache.get_or_make, keys_of("a"), pytest.fail, dim=DIM, deadline=deadline
        )
        assert deadline.waits.acquire(timeout=30)
        cancellation.cancel()
        assert isinstance(second.exception(timeout=10), ServerTimeoutError)
        assert not first.done()
        slow.may_end.set()
        first.result(30)


def test_an_endless_deadline_is_one_too():
    cache, encoder = PromptCache(ROOM), Encoder()
    slow = SlowEncoder(cache, keys_of("a"))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow)
        assert slow.has_begun.wait(30)
        second = pool.submit(encoder.ask, cache, keys_of("ab"), timeout_s=float("inf"))
        assert wait_until(lambda: encoder.made == keys_of("b"))
        slow.may_end.set()
        first.result(30)
        second.result(30)


def test_when_the_first_fails_one_of_those_who_wait_makes_them():
    cache, encoder = PromptCache(ROOM), Encoder()
    slow = SlowEncoder(cache, keys_of("ab"), fails=True)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(slow)
        assert slow.has_begun.wait(30)
        others = [pool.submit(encoder.ask, cache, keys_of("abc")) for _ in range(4)]
        assert wait_until(lambda: encoder.made == keys_of("c"))
        slow.may_end.set()
        with pytest.raises(InferenceError, match="refused"):
            first.result(30)
        for other in others:
            other.result(30)
    assert sorted(encoder.made) == keys_of("abc")
    assert cache.misses == 3


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, InferenceError("no")])
def test_a_call_that_ends_early_keeps_nobody_waiting(interrupt):
    cache, encoder = PromptCache(ROOM), Encoder()

    def fail(positions):
        raise interrupt

    with pytest.raises((KeyboardInterrupt, InferenceError)):
        cache.get_or_make(keys_of("ab"), fail, dim=DIM, deadline=Deadline.after(1))
    assert (len(cache), cache.misses) == (0, 0)
    encoder.ask(cache, keys_of("ab"), timeout_s=1)
    assert encoder.calls == [keys_of("ab")]


def test_too_few_rows_are_an_error_and_nobody_waits_for_the_rest():
    cache, encoder = PromptCache(ROOM), Encoder()
    with pytest.raises(ValueError, match="shorter"):
        cache.get_or_make(
            keys_of("ab"), lambda _: embed(KEY)[None], dim=DIM, deadline=Deadline.after(1)
        )
    encoder.ask(cache, keys_of("b"), timeout_s=1)
    assert encoder.made == keys_of("b")


def test_overlapping_sets_in_many_threads_never_lock_up_or_mix_up():
    cache = PromptCache(20 * ENTRY)

    def work(seed):
        rng, num_failed = np.random.default_rng(seed), 0
        for _ in range(150):
            keys = keys_of(chr(97 + code) for code in rng.integers(0, 26, rng.integers(1, 9)))
            fails = rng.random() < 0.2

            def make(positions, keys=keys, fails=fails):
                if fails:
                    raise InferenceError("refused")
                return np.stack([embed(keys[position]) for position in positions])

            try:
                found = cache.get_or_make(keys, make, dim=DIM, deadline=Deadline.after(60))
            except InferenceError:
                num_failed += 1
            else:
                assert found.tolist() == [embed(key).tolist() for key in keys]
        return num_failed

    with ThreadPoolExecutor(8) as pool:
        assert 0 < sum(pool.map(work, range(8))) < 8 * 150
    assert cache._future_by_entry == {}
    assert cache.num_bytes == ENTRY * len(cache) <= cache.max_bytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_keeps_the_memory_and_waits_for_no_thread_it_does_not_have():
    cache, encoder = PromptCache(ROOM), Encoder()
    encoder.ask(cache, keys_of("a"))
    slow = SlowEncoder(cache, keys_of("b"))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow)
        assert slow.has_begun.wait(30)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                encoder.ask(cache, keys_of("ab"), timeout_s=5)
                status = 0 if encoder.made == keys_of("ab") else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        slow.may_end.set()
        first.result(30)
    assert encoder.made == keys_of("a")


# ---- what a call that ends early leaves


class Stopping:
    """Makes some, and then ends as it is told."""

    def __init__(self, keys, num_made, ending):
        self.keys, self.num_made, self.ending = keys, num_made, ending

    def __call__(self, positions):
        for position in positions[: self.num_made]:
            yield embed(self.keys[position])
        raise self.ending


ENDINGS = [
    ServerTimeoutError("late.", url="u:1", timeout_s=4.0),
    InferenceError("no"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("place", ["memory", "disk", "both"])
def test_what_is_finished_when_a_call_ends_is_kept(ending, place, tmp_path):
    folder = None if place == "memory" else tmp_path
    cache = PromptCache(0 if place == "disk" else ROOM, folder)
    keys, encoder = keys_of("abcdefg"), Encoder()
    with pytest.raises(type(ending)):
        cache.get_or_make(keys, Stopping(keys, 3, ending), dim=DIM, deadline=Deadline.after(9))
    assert cache.misses == 3
    encoder.ask(cache, keys)
    assert encoder.calls == [keys_of("defg")]
    if folder is not None:
        other = Encoder()
        other.ask(PromptCache(ROOM, folder), keys)
        assert other.calls == []


def test_calls_that_end_early_come_to_an_end_together():
    cache, keys = PromptCache(ROOM), keys_of("abcdefgh")
    for left in (5, 2):
        with pytest.raises(ServerTimeoutError, match=rf"late\. {left} of 8 .* left") as caught:
            cache.get_or_make(
                keys, Stopping(keys, 3, ENDINGS[0]), dim=DIM, deadline=Deadline.after(9)
            )
        assert "What is finished is kept: calling again goes on from there." in str(caught.value)
        assert (caught.value.url, caught.value.timeout_s) == ("u:1", 4.0)
    encoder = Encoder()
    encoder.ask(cache, keys)
    assert encoder.calls == [keys_of("gh")]


@pytest.mark.parametrize(("max_bytes", "kept"), [(0, 0), (2 * ENTRY, 2)])
def test_where_there_is_no_room_it_says_what_makes_some(max_bytes, kept):
    cache, keys = PromptCache(max_bytes), keys_of("abcdefgh")
    with pytest.raises(ServerTimeoutError, match=rf"5 of 8 .* {kept} are kept: raise cache_bytes"):
        cache.get_or_make(keys, Stopping(keys, 3, ENDINGS[0]), dim=DIM, deadline=Deadline.after(9))


def test_a_killed_process_leaves_what_it_wrote_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_rt.cache.memory.WRITE_EVERY_S", 0.0)
    keys = keys_of("abcd")

    def make(positions):
        for position in positions:
            yield embed(keys[position])
            # As another process would, after this one was killed here.
            other = Encoder()
            other.ask(PromptCache(ROOM, tmp_path), keys[: position + 1])
            assert other.calls == []

    cache = PromptCache(ROOM, tmp_path)
    cache.get_or_make(keys, make, dim=DIM, deadline=Deadline.after(9))
    assert cache.misses == 4


class Stepping:
    """Makes one row each time it is told to."""

    def __init__(self, cache, keys):
        self.cache, self.keys, self.steps = cache, keys, threading.Semaphore(0)
        self.ending = None

    def __call__(self):
        return self.cache.get_or_make(
            self.keys, self.make, dim=DIM, deadline=Deadline.after(30)
        ).tolist()

    def make(self, positions):
        for position in positions:
            assert self.steps.acquire(timeout=30)
            if self.ending is not None:
                raise self.ending
            yield embed(self.keys[position])


@pytest.mark.parametrize("max_bytes", [0, ROOM])
def test_who_waits_for_finished_ones_waits_for_no_others(max_bytes):
    cache = PromptCache(max_bytes)
    stepping = Stepping(cache, keys_of("abcd"))
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(stepping)
        assert wait_until(lambda: len(cache._future_by_entry) == 4)
        second = pool.submit(Encoder().ask, cache, keys_of("ba"))
        stepping.steps.release(2)
        assert len(second.result(30)) == 2
        assert not first.done()
        # And whoever comes later waits for nothing.
        Encoder().ask(cache, keys_of("a"), timeout_s=1)
        stepping.steps.release(2)
        first.result(30)


def test_who_waits_past_its_deadline_keeps_what_was_there_and_counts_the_rest():
    cache = PromptCache(ROOM)
    stepping = Stepping(cache, keys_of("abcd"))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(stepping)
        stepping.steps.release(1)
        assert wait_until(lambda: cache.misses == 1)
        with pytest.raises(ServerTimeoutError, match=r"making 2 of .* 2 of 4 .* left") as caught:
            Encoder().ask(cache, keys_of("axcd"), timeout_s=0.2)
        assert "goes on from there" in str(caught.value)
        stepping.steps.release(3)
        first.result(30)
    later = Encoder()
    later.ask(cache, keys_of("axcd"))
    assert later.calls == []


def test_when_the_first_ends_halfway_those_who_wait_make_only_the_rest():
    cache, encoder = PromptCache(ROOM), Encoder()
    stepping = Stepping(cache, keys_of("abcd"))
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(stepping)
        assert wait_until(lambda: len(cache._future_by_entry) == 4)
        others = [pool.submit(encoder.ask, cache, keys_of("abcdz")) for _ in range(3)]
        stepping.steps.release(2)
        assert wait_until(lambda: cache.misses >= 3)
        stepping.ending = ENDINGS[0]
        stepping.steps.release(1)
        assert isinstance(first.exception(30), ServerTimeoutError)
        for other in others:
            other.result(30)
    assert sorted(encoder.made) == keys_of("cdz")
