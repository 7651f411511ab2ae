"""The awaited calls answer what the plain ones do, many at a time, and can be called off."""

from __future__ import annotations

import asyncio
import inspect
import time

import numpy as np
import pytest
from owners import wait_until

import clip_rt
from clip_rt import testing

SIDE_PX = 8


@pytest.fixture
def fake():
    with testing.FakeServer(embedding_dim=16, side_px=SIDE_PX) as server:
        yield server


def squares(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE_PX, SIDE_PX, 3), np.uint8)


def test_it_has_the_surface_of_the_client():
    for name, member in inspect.getmembers(clip_rt.Client):
        if name.startswith("_") or name in ("manifest", "cache", "server_seconds"):
            continue
        twin = getattr(clip_rt.AsyncClient, name)
        assert list(inspect.signature(twin).parameters.values()) == list(
            inspect.signature(member).parameters.values()
        ), name


def test_it_answers_what_the_client_answers(fake):
    images, labels = squares(5), ["cat", "dog"]

    async def ask():
        async with clip_rt.AsyncClient(fake.url) as client:
            parts = [part async for part in client.stream_images([*images, b"x"], on_error="skip")]
            return (
                await client.manifest(),
                await client.encode_images(images),
                await client.encode_texts(labels),
                await client.class_embeddings(labels, templates="simple"),
                (await client.zero_shot([*images, b"x"], labels, on_error="skip")).logits,
                parts,
                client.cache.misses,
            )

    *answers, parts, misses = asyncio.run(ask())
    with clip_rt.Client(fake.url) as client:
        expected = (
            client.manifest,
            client.encode_images(images),
            client.encode_texts(labels),
            client.class_embeddings(labels, templates="simple"),
            client.zero_shot(images, labels).logits,
        )
    for answer, wanted in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer, wanted)
    assert misses == 4
    np.testing.assert_array_equal(parts[0].embeddings, expected[1])
    assert [error.index for error in parts[-1].failures] == [5]


def test_two_hundred_tasks_get_what_is_theirs(fake):
    images = squares(200)

    async def ask():
        async with clip_rt.AsyncClient(fake.url) as client:
            expected = await client.encode_images(images)
            answers = await asyncio.gather(*(client.encode_images(image) for image in images))
            return expected, np.concatenate(answers)

    expected, answers = asyncio.run(ask())
    np.testing.assert_array_equal(answers, expected)
    assert len(fake.requests) < 100


def test_a_cancelled_task_calls_its_request_off_and_the_client_goes_on(fake):
    async def ask():
        async with clip_rt.AsyncClient(fake.url) as client:
            await client.encode_texts(["red"])
            fake.fail_next(testing.Hang())
            task = asyncio.create_task(client.encode_texts(["green"], timeout_s=60))
            before = fake.num_calls["ModelInfer"]
            while fake.num_calls["ModelInfer"] == before:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            (endpoint,) = client._client._session.connection.pool.replicas
            assert wait_until(lambda: endpoint.num_in_flight == 0)
            return await client.encode_texts(["red"])

    start_s = time.monotonic()
    assert asyncio.run(ask()).shape == (1, 16)
    assert time.monotonic() - start_s < 20


def test_errors_and_deadlines_are_the_client_s(fake):
    async def ask():
        async with clip_rt.AsyncClient(fake.url) as client:
            with pytest.raises(clip_rt.ImageError, match="image 0"):
                await client.encode_images([b"x"])
            fake.fail_next(testing.Hang())
            start_s = time.monotonic()
            with pytest.raises(clip_rt.ServerTimeoutError):
                await client.encode_texts(["red"], timeout_s=0.3)
            assert time.monotonic() - start_s < 1.3
            await client.close()
            with pytest.raises(clip_rt.ClientClosedError):
                await client.encode_texts(["red"])

    asyncio.run(ask())


def test_a_stream_can_be_left_in_the_middle(fake):
    async def ask():
        async with clip_rt.AsyncClient(fake.url) as client:
            async for part in client.stream_images(iter(squares(400))):
                assert part.indices[0] == 0
                break
            fake.fail_when(lambda request: True, testing.Hang())

            async def read():
                async for _ in client.stream_images(iter(squares(400, 1)), timeout_s=60):
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            fake.heal()
            return await client.encode_images(squares(1))

    start_s = time.monotonic()
    assert asyncio.run(ask()).shape == (1, 16)
    assert time.monotonic() - start_s < 20


def test_what_is_measured_around_an_awaited_call_is_its_own(fake):
    async def ask(client, texts):
        with clip_rt.measure() as timings:
            await client.encode_texts(texts)
        return timings.counts["texts"]

    async def both():
        async with clip_rt.AsyncClient(fake.url) as client:
            return await asyncio.gather(ask(client, ["a", "b"]), ask(client, ["c"]))

    assert asyncio.run(both()) == [2, 1]


def test_a_stream_has_the_time_a_plain_one_has(fake):
    def slow():
        for image in squares(64):
            time.sleep(0.02)
            yield image

    async def ask():
        async with clip_rt.AsyncClient(fake.url) as client:
            await client.encode_images(squares(1))
            return [len(part.indices) async for part in client.stream_images(slow(), timeout_s=0.7)]

    assert sum(asyncio.run(ask())) == 64
