"""The whole way: files and strings to the vectors of a SigLIP of open_clip, by the real Triton."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import external_models
import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc
from PIL import Image
from tritonclient.utils import InferenceServerException

import clip_rt
from clip_rt import served_tokenizer
from clip_rt.embedded.server import acquire_server
from clip_rt.specs import CLIP_RESIZING, CLIP_TOKENIZATION, TOKENIZER_CHUNK_BYTES
from export import bundle
from export.models import served_version
from export.onnx import OnnxConfig, export
from export.repository import add_ensembles, publish, switch_version
from export.served import Reference
from export.triton_config import read_manifest
from training.encoders.find import load_encoder

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("open_clip")]

TEXTS = [
    "a photo of a cat.",
    "TWO Dogs",
    "красная машина",
    "a_b & c",
    "long " * 40,
    "<eos> is text",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return external_models.write_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def encoder(folder):
    return load_encoder(f"open_clip:{folder}", weights="openai")


@pytest.fixture(scope="module")
def repository(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("served")
    export(
        OnnxConfig(
            model=f"open_clip:{folder}",
            name="siglip",
            repository=place / "models",
            cache=place / "cache",
            max_batch_size=4,
        )
    )
    return place / "models"


@pytest.fixture(scope="module")
def client(repository, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home")))
        served_tokenizer._loaded.clear()
        with clip_rt.Client(repository=repository, model="siglip", timeout_s=120) as client:
            yield client


def draw(width, height):
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encode_png(image):
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


@torch.inference_mode()
def unit(rows):
    return torch.nn.functional.normalize(rows, dim=-1).numpy()


def test_the_manifest_says_how_the_model_is_fed(client, encoder):
    client.encode_texts(["a cat"])
    manifest = client.manifest
    assert manifest.contract_version == 2
    assert manifest.resizing.mode == "squash"
    assert manifest.tokenization.cleaning == "canonical"
    assert manifest.text_buckets == (external_models.CONTEXT_LENGTH,)
    assert (manifest.score, manifest.mean) == ("sigmoid", (0.5, 0.5, 0.5))
    assert manifest.tokenization.num_bytes == len(encoder.tokenizer_file)


def test_images_equal_those_of_open_clip(client, encoder):
    images = [draw(101, 67), draw(40, 90), draw(32, 32), draw(640, 480)]
    expected = unit(encoder.encode_image(torch.from_numpy(encoder.source.pixels(images))))
    found = client.encode_images([encode_png(image) for image in images])
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_texts_equal_those_of_open_clip_in_any_batch(client, encoder):
    expected = unit(encoder.encode_text(torch.from_numpy(encoder.source.tokens(TEXTS))))
    found = client.encode_texts(TEXTS, truncate=True)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for row, text in zip(found, TEXTS, strict=True):
        np.testing.assert_allclose(client.encode_texts([text], truncate=True)[0], row, atol=1e-6)


def test_probabilities_are_sigmoids_of_each_label(client, encoder):
    labels = ["cat", "dog", "car"]
    image = draw(50, 60)
    scores = client.zero_shot([image], labels)
    prompts = [f"a photo of a {label}." for label in labels]
    image_E = unit(encoder.encode_image(torch.from_numpy(encoder.source.pixels([image]))))
    text_E = unit(encoder.encode_text(torch.from_numpy(encoder.source.tokens(prompts))))
    scale, bias = float(encoder.logit_scale.exp()), float(encoder.logit_bias)
    expected = 1 / (1 + np.exp(-(scale * image_E @ text_E.T + bias)))
    np.testing.assert_allclose(scores.probabilities, expected, atol=1e-4)
    assert scores.score == "sigmoid"


def test_too_long_a_text_is_an_error_with_its_length(client):
    with pytest.raises(clip_rt.TextTooLongError) as caught:
        client.encode_texts(["fine", "a red car " * 20])
    assert caught.value.index == 1
    assert caught.value.context_length == external_models.CONTEXT_LENGTH
    assert caught.value.num_tokens > external_models.CONTEXT_LENGTH


def test_a_control_token_in_a_text_is_text(client):
    found = client.encode_texts(["a <eos> b", "a eos b"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_a_client_with_nothing_but_an_address_fetches_the_tokenizer_once(
    client, repository, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = (
        f"import clip_rt; client = clip_rt.Client({client._session.connection.urls!r}, "
        "model='siglip'); print(client.encode_texts(['a cat']).sum())"
    )
    first = _run(program)
    (kept,) = (tmp_path / "clip_rt/tokenizers").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    assert _run(program) == first
    # Damaged, it is fetched again.
    assert len(kept.read_bytes()) == client.manifest.tokenization.num_bytes


@pytest.mark.parametrize("precision", ["fp16_weights", "int8"])
def test_other_precisions_pass_the_gate_and_are_published(folder, tmp_path, precision):
    report = export(
        OnnxConfig(
            model=f"open_clip:{folder}",
            weights="random",
            precision=precision,
            repository=tmp_path / "models",
            cache=tmp_path / "cache",
        )
    )
    assert report.passed
    manifest = read_manifest(tmp_path / "models" / f"{folder.name}_text")
    assert (manifest.precision, manifest.resizing.mode) == (precision, "squash")


def test_a_bundle_carries_the_tokenizer(repository, encoder, tmp_path):
    bundle.pack(repository, "siglip", tmp_path / "siglip.tar")
    found, _ = bundle.unpack(tmp_path / "siglip.tar", tmp_path / "models")
    assert found.tokenizer_file == encoder.tokenizer_file
    (file,) = (tmp_path / "models").glob("siglip_tokenizer_file/*/tokenizer.json")
    assert file.read_bytes() == encoder.tokenizer_file


def test_going_back_takes_the_tokenizer_along(repository, tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    image, text = (copy / f"siglip_{tower}/1/model.onnx" for tower in ("image", "text"))
    manifest = read_manifest(copy / "siglip_text")
    other = b'{"other": 1}'
    changed = replace(manifest.tokenization, sha256=hashlib.sha256(other).hexdigest())
    changed = replace(changed, num_bytes=len(other))
    manifest = replace(manifest, tokenization=changed)
    publish(copy, manifest, image=image, text=text, tokenizer_file=other)
    folder = copy / "siglip_tokenizer_file"
    assert served_version(folder) == 2
    assert (folder / "2/tokenizer.json").read_bytes() == other
    switch_version(copy, "siglip")
    assert served_version(folder) == served_version(copy / "siglip_text") == 1


@pytest.fixture(scope="module")
def bare(repository):
    """A client of Triton alone, over the model with its ensembles."""
    add_ensembles(repository, "siglip")
    server = acquire_server(repository, start_timeout_s=120)
    with grpc.InferenceServerClient(server.url) as found:
        yield found
    server.stop()


def ask(bare, model, name, items):
    tensor = grpc.InferInput(name, [len(items), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(items, np.object_)[:, None])
    return bare.infer(model, [tensor]).as_numpy("embeddings")


def test_ensembles_prepare_images_and_texts_as_the_client_does(client, bare):
    images = [encode_png(draw(50, 60)), encode_png(draw(90, 33))]
    found = ask(bare, "siglip_jpeg", "image", images)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    np.testing.assert_allclose(found, client.encode_images(images), atol=1e-6)
    texts = ["a photo of a cat.", "TWO Dogs", "красная машина", "<eos> is text"]
    found = ask(bare, "siglip_prompt", "text", [text.encode() for text in texts])
    np.testing.assert_allclose(found, client.encode_texts(texts), atol=1e-6)
    with pytest.raises(InferenceServerException, match=r"text 1 has \d+ tokens"):
        ask(bare, "siglip_prompt", "text", [b"a cat", b"a red car " * 20])


def test_ensembles_follow_their_model_to_another_tokenizer(repository, tmp_path):
    image, text = (repository / f"siglip_{tower}/1/model.onnx" for tower in ("image", "text"))
    siglip = read_manifest(repository / "siglip_text")
    clip = replace(
        siglip,
        resizing=CLIP_RESIZING,
        tokenization=CLIP_TOKENIZATION,
        score="softmax",
        text_buckets=(),
    )
    publish(tmp_path, clip, image=image, text=text)
    add_ensembles(tmp_path, "siglip")
    publish(tmp_path, siglip, image=image, text=text, tokenizer_file=b"{}")
    assert read_manifest(tmp_path / "siglip_tokenize").tokenization == siglip.tokenization
    assert (tmp_path / "siglip_tokenizer_file").is_dir()
    # With the last version that has one the tokenizer goes.
    for _ in range(2):
        publish(tmp_path, clip, image=image, text=text)
    assert read_manifest(tmp_path / "siglip_tokenize").tokenization == CLIP_TOKENIZATION
    assert not (tmp_path / "siglip_tokenizer_file").exists()


def test_ensembles_without_the_file_of_the_tokenizer_say_so(repository, tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(repository, copy)
    add_ensembles(copy, "siglip")
    shutil.rmtree(copy / "siglip_tokenizer_file")
    server = acquire_server(copy, start_timeout_s=120)
    try:
        with grpc.InferenceServerClient(server.url) as found:
            with pytest.raises(InferenceServerException, match="siglip_tokenizer_file"):
                ask(found, "siglip_prompt", "text", [b"a cat"])
            assert ask(found, "siglip_jpeg", "image", [encode_png(draw(50, 60))]).shape == (1, 48)
    finally:
        server.stop()


def test_a_long_file_comes_whole(repository, tmp_path, monkeypatch):
    """In three parts; that they are the right ones says the sha256, checked before it is read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    image, text = (repository / f"siglip_{tower}/1/model.onnx" for tower in ("image", "text"))
    content = np.random.default_rng(0).bytes(5 * TOKENIZER_CHUNK_BYTES // 2)
    manifest = read_manifest(repository / "siglip_text")
    sha256 = hashlib.sha256(content).hexdigest()
    other = replace(manifest.tokenization, sha256=sha256, num_bytes=len(content))
    manifest = replace(manifest, tokenization=other)
    publish(tmp_path / "models", manifest, image=image, text=text, tokenizer_file=content)
    with (
        clip_rt.Client(repository=tmp_path / "models", timeout_s=120) as client,
        pytest.raises(clip_rt.ContractError, match="cannot be read by tokenizers"),
    ):
        client.encode_texts(["a cat"])
    (kept,) = (tmp_path / "home/clip_rt/tokenizers").iterdir()
    assert kept.read_bytes() == content


def test_a_version_in_a_repository_is_served_with_its_tokenizer(
    repository, client, tmp_path, monkeypatch
):
    """As `export.compare` serves one, to a user who has never asked this model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(served_tokenizer, "_loaded", {})
    reference = Reference(name="siglip", repository=repository, version=1)
    with reference.connect() as other:
        found = other.encode_texts(["a cat"])
    np.testing.assert_allclose(found, client.encode_texts(["a cat"]), atol=1e-6)


def _run(program):
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout
