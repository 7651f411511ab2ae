"""What runs inside Triton's python backend: merged requests, and errors for the guilty only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_repository
from owners import find_processes

import clip_rt
from clip_rt.deadline import Deadline
from clip_rt.server import EmbeddedServer
from clip_rt.transport import ServedModel, Transport

# Ids up to 59999 pass the check at the door and fail inside the graph.
WIDER = 'parameters { key: "vocab_size" value { string_value: "60000" } }\n'


@pytest.fixture(scope="module")
def transport(tmp_path_factory) -> Iterator[Transport]:
    repository = tiny_repository.write(tmp_path_factory.mktemp("wider"), "wider", text_config=WIDER)
    with EmbeddedServer(repository) as server:
        transport = Transport(server.url, may_cancel=False)
        yield transport
        transport.close()


@pytest.fixture(scope="module")
def towers(transport) -> tuple[ServedModel, ServedModel]:
    return transport.describe(["wider_image", "wider_text"], Deadline.after(10))


def embed(transport, model, array):
    return transport.infer(model, array, Deadline.after(30))


def find_stub() -> int:
    (pid,) = find_processes("/models/wider_text/", os.getpid())
    return pid


def test_merged_requests_are_split_again_and_a_bad_one_harms_no_other(transport, towers):
    _, text = towers
    rng = np.random.default_rng(0)
    good = [
        rng.integers(1, 49000, (rows, length), dtype=np.int32)
        for rows, length in ((1, 5), (3, 5), (2, 9), (1, 5), (4, 9), (2, 5))
    ]
    alone = [embed(transport, text, tokens) for tokens in good]
    outside = np.array([[1, 2, 60000, 4, 5]], np.int32)
    inside = np.array([[1, 2, 59999, 4, 5]], np.int32)
    batches = [*good[:3], outside, inside, *good[3:]]
    stub = find_stub()
    with ThreadPoolExecutor(len(batches)) as pool:
        # While the model stands still they queue, and are merged where their shapes agree.
        os.kill(stub, signal.SIGSTOP)
        calls = [pool.submit(embed, transport, text, tokens) for tokens in batches]
        time.sleep(0.5)
        os.kill(stub, signal.SIGCONT)
        errors = [call.exception(timeout=30) for call in calls]
    assert [type(error) for error in errors] == [
        *[type(None)] * 3,
        *[clip_rt.InferenceError] * 2,
        *[type(None)] * 3,
    ]
    assert "60000" in str(errors[3])
    together = [call.result() for call, error in zip(calls, errors, strict=True) if error is None]
    for merged, single in zip(together, alone, strict=True):
        np.testing.assert_allclose(merged, single, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.full((1, 5), -1, np.int32), "token ids span -1"),
        (np.full((1, 78), 7, np.int32), "78 long"),
        (np.full((1, 0), 7, np.int32), "0 long"),
        (np.full((33, 5), 7, np.int32), "batch-size"),
        (np.full((5,), 7, np.int32), "shape"),
        (np.full((1, 5), 7, np.int64), "size"),
    ],
)
def test_a_request_that_is_wrong_is_refused_and_the_server_lives(transport, towers, tokens, words):
    _, text = towers
    with pytest.raises(clip_rt.InferenceError, match=words):
        embed(transport, text, tokens)
    assert embed(transport, text, np.full((1, 5), 7, np.int32)).shape == (1, 8)


def test_images_of_another_size_or_type_are_refused(transport, towers):
    image, _ = towers
    with pytest.raises(clip_rt.InferenceError, match="shape"):
        embed(transport, image, np.zeros((1, 32, 32, 3), np.uint8))
    floats = replace(image, input_type="FP32")
    with pytest.raises(clip_rt.InferenceError, match="FP32"):
        embed(transport, floats, np.zeros((1, 64, 64, 3), np.float32))


def test_answers_are_those_of_the_graph(transport, towers, tmp_path):
    import onnxruntime

    image, text = towers
    tiny_repository.write(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    tokens = np.random.default_rng(0).integers(1, 49000, (5, 7)).astype(np.int32)
    for model, array, name in ((image, pixels, "tiny_image"), (text, tokens, "tiny_text")):
        session = onnxruntime.InferenceSession(Path(tmp_path, name, "1", "model.onnx"))
        (expected,) = session.run(None, {model.input_name: array})
        np.testing.assert_allclose(embed(transport, model, array), expected, atol=1e-6)
