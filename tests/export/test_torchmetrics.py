"""CLIP score through the real Triton is what torchmetrics computes from the same folder."""

from __future__ import annotations

import external_models
import numpy as np
import pytest
import torch
from PIL import Image

import clip_rt
from clip_rt import served_tokenizer
from clip_rt.scoring import clip_score
from export.onnx import OnnxConfig, export

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.usefixtures("open_clip")]

PROMPTS = [
    "a photo of a cat",
    "TWO Dogs, and a  bird",
    "un café crème",
    "red",
    "a house by the sea",
    "a photo of a photo",
]
BAR = 1e-3
"""Of 100."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return external_models.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("served")
    export(
        OnnxConfig(
            model=f"hf:{folder}", name="clip", repository=place / "models", cache=place / "cache"
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "home"))
        served_tokenizer._loaded.clear()
        with clip_rt.Client(
            repository=place / "models", server="embedded", timeout_s=120
        ) as client:
            yield client


def draw(seed, size):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC))


def loader(folder):
    """What torchmetrics 1.9 takes for a name: it does not know the answers of transformers 5 yet.

    Those are wrapped, what it wants is inside; the model and its processor are the folder's own.
    """
    from transformers import CLIPModel, CLIPProcessor

    class Unwrapped(CLIPModel):
        def get_image_features(self, *args, **options):
            return super().get_image_features(*args, **options).pooler_output

        def get_text_features(self, *args, **options):
            return super().get_text_features(*args, **options).pooler_output

    return lambda: (Unwrapped.from_pretrained(folder), CLIPProcessor.from_pretrained(folder))


@torch.inference_mode()
def ask_torchmetrics(images, prompts, folder):
    """The mean, and each score by itself."""
    from torchmetrics.functional.multimodal import clip_score as theirs

    tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in images]
    load = loader(folder)
    mean = float(theirs(tensors, list(prompts), load))
    pairs = zip(tensors, prompts, strict=True)
    return mean, [float(theirs([image], [text], load)) for image, text in pairs]


def test_scores_are_those_of_torchmetrics(client, folder):
    side_px = external_models.SIDE_PX
    images = [draw(seed, (side_px, side_px)) for seed in range(len(PROMPTS))]
    mean, scores = ask_torchmetrics(images, PROMPTS, folder)
    found = clip_score(client, images, PROMPTS)
    assert found.mean == pytest.approx(mean, abs=BAR)
    # It has each pair alone at 0 or more.
    np.testing.assert_allclose(np.maximum(found.scores, 0), scores, atol=BAR)
    assert np.ptp(found.scores) > 1, "random weights that say the same of everything"


def test_a_negative_mean_is_0_as_theirs_is(client, folder):
    side_px = external_models.SIDE_PX
    images = [draw(seed, (side_px, side_px)) for seed in range(40)]
    scores = clip_score(client, images, PROMPTS[0]).scores
    low = [images[index] for index in np.argsort(scores)[:3]]
    mean, _ = ask_torchmetrics(low, [PROMPTS[0]] * 3, folder)
    assert clip_score(client, low, PROMPTS[0]).mean == pytest.approx(mean, abs=BAR)


def test_accumulated_over_batches_it_is_the_same(client, folder):
    from torchmetrics.multimodal import CLIPScore

    side_px = external_models.SIDE_PX
    images = [draw(seed, (side_px, side_px)) for seed in range(len(PROMPTS))]
    metric = CLIPScore(loader(folder))
    for start in (0, 4):
        some = [torch.from_numpy(each.transpose(2, 0, 1).copy()) for each in images[start:][:4]]
        metric.update(some, PROMPTS[start:][:4])
    assert clip_score(client, images, PROMPTS).mean == pytest.approx(
        float(metric.compute()), abs=BAR
    )
