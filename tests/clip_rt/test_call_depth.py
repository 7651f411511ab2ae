"""From a public call to the socket there are few frames of ours, each with a job of its own."""

import sys
from pathlib import Path

import grpc._channel
import numpy as np
import pytest

import clip_rt
from clip_rt import testing

PACKAGE = str(Path(clip_rt.__file__).parent)
MAX_FRAMES = 8


@pytest.fixture
def stacks(monkeypatch):
    """The frames of this package above each inference request, from the call to the socket."""
    found = []
    send = grpc._channel._UnaryUnaryMultiCallable.future

    def recorded(self, *args, **kwargs):
        if b"ModelInfer" in bytes(self._method):
            frame, names = sys._getframe(1), []
            while frame is not None:
                code = frame.f_code
                if code.co_filename.startswith(PACKAGE):
                    names.append(f"{Path(code.co_filename).stem}.{code.co_name}")
                frame = frame.f_back
            found.append(names[::-1])
        return send(self, *args, **kwargs)

    monkeypatch.setattr(grpc._channel._UnaryUnaryMultiCallable, "future", recorded)
    return found


@pytest.mark.parametrize("call", ["encode_images", "encode_texts", "zero_shot"])
def test_a_request_is_sent_from_few_frames(stacks, call):
    image = np.zeros((8, 8, 3), np.uint8)
    arguments = {
        "encode_images": [image],
        "encode_texts": ["red"],
        "zero_shot": [image, ["red", "blue"]],
    }[call]
    with testing.FakeServer(embedding_dim=16, side_px=8) as server, clip_rt.Client(server.url) as c:
        c.class_embeddings(["red", "blue"])  # Kept: what makes them goes through the cache as well.
        stacks.clear()
        getattr(c, call)(*arguments)
    assert stacks
    assert all(len(stack) <= MAX_FRAMES for stack in stacks), stacks
