"""What is done with a served model, done with models of other libraries, by the real Triton."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import external_models
import numpy as np
import pytest
from PIL import Image

import clip_rt
from clip_rt.embedded.server import acquire_server
from clip_rt.specs import slug
from export import bundle, compare
from export.onnx import OnnxConfig, export
from export.triton_config import read_manifest
from training import coop, probe
from training.coop import CoopConfig
from training.evaluation.embed import embed_images, open_model
from training.probe import ProbeConfig

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("open_clip")]

ROOT = Path(__file__).parents[2]
NAMES = {kind: f"model-{index}" for index, kind in enumerate(external_models.KINDS)}
COLOURS = ("blue", "green", "red")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each of the kinds, as --model names it."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: external_models.write_kind(folder / NAMES[kind], kind) for kind in NAMES}


@pytest.fixture(scope="module")
def repository(models, tmp_path_factory):
    place = tmp_path_factory.mktemp("served")
    for kind, name in NAMES.items():
        for precision in ("fp32", "fp16_weights"):
            export(
                OnnxConfig(
                    model=models[kind],
                    name=name,
                    precision=precision,
                    repository=place / "models",
                    cache=place / "cache",
                    matryoshka_dimensions=(16, 8),
                )
            )
    return place / "models"


@pytest.fixture(scope="module")
def server(repository):
    found = acquire_server(repository, start_timeout_s=240)
    yield found
    found.stop()


@pytest.fixture(scope="module", params=external_models.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def client(kind, server, repository, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        with clip_rt.Client(repository=repository, model=NAMES[kind], timeout_s=120) as found:
            yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for channel, colour in enumerate(reversed(COLOURS)):
        (folder / colour).mkdir()
        for index in range(6):
            pixels = rng.integers(0, 90, (30, 47, 3), np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / colour / f"{index}.png")
    return folder


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_client_classifies_by_what_was_fitted(kind, models, client, data, tmp_path):
    out = tmp_path / "probe.npz"
    photos = sorted(data.rglob("*.png"))
    model = open_model(None, model=models[kind])
    fitted, _ = probe.run(ProbeConfig(model=models[kind], data=(data,), out=out))
    scores = client.classify(photos, clip_rt.Probe.load(out))
    expected = fitted.classify(embed_images(model, photos)).logits
    np.testing.assert_allclose(scores.logits, expected, atol=0.1 * np.ptp(expected))
    assert scores.best == [path.parent.name for path in photos]
    options = {"data": (data,), "out": out, "num_context": 3, "num_steps": 2}
    coop.run(CoopConfig(model=models[kind], **options))
    assert client.classify(photos, clip_rt.Probe.load(out)).logits.shape == (18, 3)


def test_the_doctor_finds_it_well(kind, server):
    asked = ("--url", server.url, "--model", NAMES[kind], "--json")
    found = json.loads(run("clip_rt", "doctor", *asked))
    by_check = {each["check"]: each for each in found["findings"]}
    assert {"models", "contract", "execution", "canary", "latency"} <= by_check.keys()
    assert all(by_check[each]["status"] == "ok" for each in ("models", "contract", "canary"))
    numbers = by_check["canary"]["numbers"]
    assert min(numbers["image_cosine"], numbers["text_cosine"]) > 0.9999


def test_two_versions_are_compared(kind, repository, data):
    name = NAMES[kind]
    config = compare.CompareConfig(
        a=f"{name}:1", b=f"{name}:2", repository=repository, samples=(data,)
    )
    found = compare.compare(config)
    assert found.verdict.word == "interchangeable"
    (sample,) = found.comparisons
    assert sample.image_cosine.min > 0.999
    assert sample.text_cosine.min > 0.999


def test_a_bundle_arrives_whole(kind, repository, tmp_path):
    name = NAMES[kind]
    bundle.pack(repository, name, tmp_path / "model.tar")
    bundle.unpack(tmp_path / "model.tar", tmp_path / "models")
    here, there = (
        read_manifest(place / f"{slug(name)}_text") for place in (repository, tmp_path / "models")
    )
    assert here == there
    assert there.matryoshka_dimensions == (8, 16)
    has_file = (tmp_path / "models" / f"{slug(name)}_tokenizer_file").is_dir()
    assert has_file == (there.tokenization.kind == "tokenizer.json")


def test_embeddings_are_cut_as_the_export_says(client):
    whole = client.encode_texts(["a red cat", "two dogs"])
    found = client.encode_texts(["a red cat", "two dogs"], dimensions=8)
    head = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(found, head, atol=1e-6)
    with pytest.raises(clip_rt.InputError, match=r"have 8 or 16 or \d+"):
        client.encode_texts(["a red cat"], dimensions=9)


def test_lengths_that_no_embedding_has_are_refused(models, tmp_path):
    for wrong in ((0,), (16, 48), (4096,)):
        config = OnnxConfig(
            model=models["open_clip's CLIP"],
            repository=tmp_path / "models",
            cache=tmp_path / "cache",
            matryoshka_dimensions=wrong,
        )
        with pytest.raises(clip_rt.InputError, match="--matryoshka-dimensions are"):
            export(config)
    assert not list(tmp_path.glob("models/*_image"))
