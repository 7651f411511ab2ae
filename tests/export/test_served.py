"""The bar: what Triton serves is what open_clip computes, from the same weights and raw inputs.

A checkpoint of open_clip goes through the command line and the embedded server; the client's own
resize, crop and tokenizer are compared with open_clip's along with the towers.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_rt
from clip_rt.embedded.server import acquire_server

ROOT = Path(__file__).parents[2]
TEXTS = (
    "a photo of a cat.",
    "A DIAGRAM",
    "two people riding bicycles through heavy rain past a long row of parked cars &amp; trees",
    "naïve ☔ 東京",
    "so " * 60,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytriton") is None, reason="the embedded server is not installed"
)


def photographs() -> list[Image.Image]:
    """Make smooth and noisy images of odd sizes in the modes that people send."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((641, 427))
    noise = Image.fromarray(rng.integers(0, 256, (301, 223, 3), np.uint8))
    return [
        smooth,
        noise,
        smooth.convert("L").resize((97, 333)),
        noise.convert("RGBA"),
        smooth.transpose(Image.Transpose.ROTATE_90).convert("CMYK"),
        Image.new("RGB", (224, 224), (255, 255, 255)),
    ]


@pytest.fixture(scope="module")
def reference(open_clip):
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32-quickgelu")
    return model.eval(), preprocess, open_clip.get_tokenizer("ViT-B-32-quickgelu")


@pytest.fixture(scope="module")
def client(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    torch.save(reference[0].state_dict(), folder / "clip.pt")
    export = subprocess.run(
        [
            *(sys.executable, "-m", "export.onnx", "--model", "ViT-B/32", "--name", "proof"),
            *("--activation", "quick_gelu"),
            *("--weights", str(folder / "clip.pt"), "--repository", str(folder / "models")),
            *("--cache", str(folder / "cache")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert export.returncode == 0, export.stdout + export.stderr
    # Started ahead of the client, with more patience than it has: the weights are 600 MB.
    server = acquire_server(folder / "models", start_timeout_s=300)
    try:
        with clip_rt.Client(repository=folder / "models", timeout_s=300) as client:
            yield client
    finally:
        server.stop()


def assert_same_embeddings(found: np.ndarray, expected: np.ndarray):
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    cosines = (found.astype(np.float64) * expected).sum(axis=1)
    cosines /= np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    # Different inputs must be told apart, or agreement would mean nothing.
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    print(f"cosine {cosines.min():.8f}, difference {np.abs(found - expected).max():.1e}")  # noqa: T201
    assert cosines.min() >= 0.99999
    assert np.abs(found - expected).max() <= 2e-5


def test_image_embeddings_equal_those_of_open_clip(client, reference):
    model, preprocess, _ = reference
    images = photographs()
    with torch.inference_mode():
        batch = torch.stack([preprocess(image) for image in images])
        expected = model.encode_image(batch, normalize=True).numpy()
    assert_same_embeddings(client.encode_images(images), expected)


def test_text_embeddings_equal_those_of_open_clip(client, reference):
    model, _, tokenize = reference
    with torch.inference_mode():
        expected = model.encode_text(tokenize(list(TEXTS)), normalize=True).numpy()
    assert_same_embeddings(client.encode_texts(TEXTS, truncate=True), expected)
