"""The image and the text every model is asked, and how the answers of its reference travel."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_repository
from PIL import Image

from clip_rt.errors import ContractError
from clip_rt.wire import canary
from clip_rt.wire.manifest import Manifest


def unit(rng, dim):
    vector = rng.normal(size=dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return unit(rng, 1280), unit(rng, 1280)


def test_the_image_is_the_same_everywhere():
    image = Image.open(io.BytesIO(canary.draw_image()))
    assert (image.mode, image.size) == ("RGB", (canary.WIDTH_PX, canary.HEIGHT_PX))
    # Manifests that were written with another image would be wrong.
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "4c96c7805e52307a"


def test_answers_travel_through_json_nearly_unchanged(vectors):
    image, text = vectors
    written = json.loads(json.dumps(canary.write(image, text, min_cosine=0.5)))
    cosines, min_cosine = canary.compare(written, image=image, text=text)
    assert min_cosine == 0.5
    assert all(1 - 1e-7 < cosine <= 1 + 1e-12 for cosine in cosines.values())
    assert len(written["image"]) < 3 * len(image)


def test_another_answer_is_told_by_its_tower(vectors):
    image, text = vectors
    cosines, _ = canary.compare(
        canary.write(image, text, min_cosine=0.9), image=-image, text=text
    )  # fmt: skip
    assert cosines["image"] == pytest.approx(-1)
    assert cosines["text"] == pytest.approx(1)


@pytest.mark.parametrize(
    "damage",
    [
        {"image": "not base64!"},
        {"image": "AAA="},
        {"text": None},
        {"text": "AAAA" * 10},
        {"min_cosine": "much"},
        {"min_cosine": None},
    ],
)
def test_a_canary_that_cannot_be_read_is_refused(vectors, damage):
    image, text = vectors
    damaged = canary.write(image, text, min_cosine=0.9) | damage
    with pytest.raises(ContractError, match="cannot be read"):
        canary.compare(damaged, image=image, text=text)


@pytest.mark.parametrize("other", ["a string", 7, [1, 2], {}])
def test_what_is_no_canary_is_refused(vectors, other):
    image, text = vectors
    with pytest.raises(ContractError, match="cannot be read"):
        canary.compare(other, image=image, text=text)


class TestInTheManifest:
    def test_is_carried_and_read_back(self, vectors):
        carried = canary.write(*vectors, min_cosine=0.9)
        manifest = replace(tiny_repository.MANIFEST, canary=carried)
        read = Manifest.from_parameters(manifest.to_parameters(), served="x")
        assert read.canary == carried

    def test_may_be_missing(self):
        parameters = tiny_repository.MANIFEST.to_parameters()
        assert "canary" not in parameters
        assert Manifest.from_parameters(parameters, served="x").canary is None

    def test_does_not_make_a_model_another(self, vectors):
        manifest = replace(
            tiny_repository.MANIFEST, canary=canary.write(*vectors, min_cosine=0.9)
        )  # fmt: skip
        assert manifest == tiny_repository.MANIFEST

    def test_everything_else_may_not_be_missing(self):
        for name in tiny_repository.MANIFEST.to_parameters():
            parameters = tiny_repository.MANIFEST.to_parameters()
            del parameters[name]
            with pytest.raises(ContractError, match=name):
                Manifest.from_parameters(parameters, served="x")
