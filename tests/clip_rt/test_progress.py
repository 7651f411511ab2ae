"""Class embeddings made in chunks: what is finished when a call ends early is kept."""

from __future__ import annotations

import numpy as np
import pytest

import clip_rt
from clip_rt.testing import FakeServer, Late, NotFinite, Rejected


@pytest.mark.slow
@pytest.mark.parametrize("templates", [["{}"], "openai_imagenet"])
def test_class_embeddings_finished_before_the_deadline_are_kept(templates):
    labels = [f"thing {number}" for number in range(400 if templates == ["{}"] else 12)]
    with FakeServer(embedding_dim=8, side_px=8) as server, clip_rt.Client(server.url) as client:
        with clip_rt.Client(server.url) as plain:
            expected = plain.class_embeddings(labels, templates=templates)
        client.encode_texts("warm")
        server.fail_next(Late(0.5), times=10_000)
        num_kept = [0]
        while True:
            try:
                found = client.class_embeddings(labels, templates=templates, timeout_s=1.3)
                break
            except clip_rt.ServerTimeoutError as error:
                message = str(error)
            num_kept.append(len(client.cache))
            num_left = len(labels) - num_kept[-1]
            assert f"{num_left:,} of {len(labels):,} class embeddings are left" in message
            assert num_kept[-1] > num_kept[-2]
        assert len(num_kept) > 1
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_labels_in_many_chunks_are_the_same_and_named_by_their_own_index():
    labels = [f"thing {number}" for number in range(900)]
    with FakeServer(embedding_dim=8, side_px=8) as server, clip_rt.Client(server.url) as client:
        client.class_embeddings(labels[:333])
        expected = client.class_embeddings(labels, templates=["{}", "a {}"])
        again = [
            client.class_embeddings([each], templates=["{}", "a {}"])[0] for each in labels[:3]
        ]
        np.testing.assert_allclose(expected[:3], again, atol=1e-6)
        with pytest.raises(clip_rt.TextTooLongError, match="label 777 ") as caught:
            client.class_embeddings([*labels[:777], "so " * 90], templates=["{}", "a {}"])
        assert caught.value.index == 777


@pytest.mark.parametrize(
    ("fault", "error"), [(NotFinite(), clip_rt.NonFiniteEmbeddingError), (Rejected(), None)]
)
def test_a_label_that_the_server_refuses_is_named_by_its_own_index(fault, error):
    labels = [f"thing {number}" for number in range(601)]
    with FakeServer(embedding_dim=8, side_px=8) as server, clip_rt.Client(server.url) as client:
        client.class_embeddings(labels[:600])
        # The last one is the only one that is made.
        server.fail_next(fault, times=99)
        with pytest.raises(error or clip_rt.InferenceError) as caught:
            client.class_embeddings(labels)
        assert caught.value.index == 600
        assert "item 600" in str(caught.value)
