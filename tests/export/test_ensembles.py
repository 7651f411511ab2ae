"""The ensembles answer any client with the embeddings of clip_rt.Client, and follow their model."""

from __future__ import annotations

import importlib.util
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from google.protobuf import text_format
from PIL import Image
from tritonclient.utils import InferenceServerException

import clip_rt
from clip_rt.embedded.server import acquire_server
from clip_rt.errors import InputError
from clip_rt.inputs.decoding import MAX_BYTES, MAX_PIXELS
from export.ensembles import folder_names, read_limits
from export.repository import (
    RepositoryConfig,
    add_ensembles,
    configure,
    main,
    publish,
    switch_version,
)
from export.triton_config import ModelConfig, read_config, read_manifest

BUNDLED = Path(__file__).parents[2] / "model_repository"
TEXTS = ["a cat", "naïve 東京 ☔", "an umbrella " * 8]


def encoded_images() -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for mode, form, size in (
        ("RGB", "JPEG", (91, 64)),
        ("P", "PNG", (40, 77)),
        ("L", "WEBP", (64, 64)),
    ):
        pixels = rng.integers(0, 256, (size[1] // 7, size[0] // 7, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize(size).convert(mode).save(file, form)
        files.append(file.getvalue())
    return files


def ask(
    client: grpc.InferenceServerClient, model: str, name: str, items: list[bytes]
) -> np.ndarray:
    tensor = grpc.InferInput(name, [len(items), 1], "BYTES")
    tensor.set_data_from_numpy(np.array(items, np.object_)[:, None])
    return client.infer(model, [tensor]).as_numpy("embeddings")


@pytest.fixture
def repository(tmp_path) -> Path:
    return Path(shutil.copytree(BUNDLED, tmp_path / "models"))


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[grpc.InferenceServerClient, clip_rt.Client]]:
    models = tmp_path_factory.mktemp("ensembles") / "models"
    shutil.copytree(BUNDLED, models)
    add_ensembles(models, "drawings")
    server = acquire_server(models, start_timeout_s=120)
    try:
        with (
            clip_rt.Client(repository=models, timeout_s=60) as client,
            grpc.InferenceServerClient(server.url) as bare,
        ):
            yield bare, client
    finally:
        server.stop()


@pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="no embedded server")
class TestServed:
    def test_encoded_images_give_the_embeddings_of_the_client(self, served):
        bare, client = served
        found = ask(bare, "drawings_jpeg", "image", encoded_images())
        expected = client.encode_images(encoded_images())
        assert np.abs(expected[0] - expected[1]).max() > 1e-2
        assert np.abs(found - expected).max() < 1e-6

    def test_strings_give_the_embeddings_of_the_client(self, served):
        bare, client = served
        found = ask(bare, "drawings_prompt", "text", [text.encode() for text in TEXTS])
        expected = client.encode_texts(TEXTS)
        assert np.abs(expected[0] - expected[1]).max() > 1e-2
        assert np.abs(found - expected).max() < 1e-6

    def test_a_batch_of_the_largest_size_is_answered_in_order(self, served):
        bare, client = served
        items = (encoded_images() * 22)[:64]
        found = ask(bare, "drawings_jpeg", "image", items)
        assert np.abs(found - client.encode_images(items)).max() < 1e-6

    @pytest.mark.parametrize(
        ("model", "name", "items", "message"),
        [
            (
                "drawings_jpeg",
                "image",
                [encoded_images()[0], b"no image"],
                r"image 1 .*no readable",
            ),
            ("drawings_jpeg", "image", [b""], "image 0 .*empty"),
            ("drawings_jpeg", "image", [b"/etc/passwd"], "image 0 .*no readable"),
            ("drawings_jpeg", "image", [encoded_images()[0][:300]], "image 0 .*cannot be decoded"),
            ("drawings_prompt", "text", [b"a cat", b"\xff\xfe"], "text 1 is not UTF-8"),
            ("drawings_prompt", "text", [b"   "], "text 0 .*says nothing"),
            ("drawings_prompt", "text", [b"cat " * 99], "text 0 has 101 tokens"),
        ],
    )
    def test_an_unusable_item_is_named_and_the_server_goes_on(
        self, served, model, name, items, message
    ):
        bare, _ = served
        with pytest.raises(InferenceServerException, match=message):
            ask(bare, model, name, items)
        assert np.isfinite(ask(bare, "drawings_prompt", "text", [b"a cat"])).all()

    def test_control_tokens_typed_by_a_user_are_plain_text(self, served):
        bare, _ = served
        found = ask(bare, "drawings_prompt", "text", [b"<|endoftext|> cat", b"cat"])
        assert np.abs(found[0] - found[1]).max() > 1e-2

    def test_the_client_sees_one_model(self, served):
        _, client = served
        assert client.manifest.model == "drawings"


def test_every_config_parses_and_names_what_is_there(repository):
    folders = add_ensembles(repository, "drawings")
    assert sorted(path.name for path in folders) == sorted(folder_names("drawings"))
    present = {path.name for path in repository.iterdir()}
    for folder in folders:
        text = (folder / "config.pbtxt").read_text("utf-8")
        config = text_format.Parse(text, ModelConfig())
        assert config.name == folder.name
        assert read_manifest(folder).model == "drawings"
        assert {step.model_name for step in config.ensemble_scheduling.step} <= present


def test_they_follow_their_model_to_another_version_and_back(repository):
    add_ensembles(repository, "drawings")
    before = read_manifest(repository / "drawings_image")
    files = [repository / f"drawings_{tower}/1/model.onnx" for tower in ("image", "text")]
    changed = type(before)(**{**vars(before), "fingerprint": "f" * 64})
    publish(repository, changed, image=files[0], text=files[1])
    assert read_manifest(repository / "drawings_prompt").fingerprint == "f" * 64
    switch_version(repository, "drawings", 1)
    assert read_manifest(repository / "drawings_prompt") == before
    assert read_config(repository / "drawings_jpeg").max_batch_size == 64


def test_adding_them_again_renews_them(repository):
    add_ensembles(repository, "drawings")
    (repository / "drawings_decode/1/model.py").write_text("damaged")
    add_ensembles(repository, "drawings")
    assert "damaged" not in (repository / "drawings_decode/1/model.py").read_text()


def test_a_foreign_folder_in_the_way_is_named_and_kept(repository):
    (repository / "drawings_jpeg").mkdir()
    with pytest.raises(InputError, match=r"drawings_jpeg.*holds no clip_rt model"):
        add_ensembles(repository, "drawings")
    assert not (repository / "drawings_decode").exists()


def test_a_model_that_is_not_there_is_named(repository):
    with pytest.raises(InputError, match="no model 'other'"):
        add_ensembles(repository, "other")


def limits_of(repository: Path) -> tuple[int, int]:
    limits = read_limits(read_config(repository / "drawings_decode"))
    return limits.max_pixels, limits.max_bytes


def test_limits_of_images_are_set_kept_and_follow_the_model(repository):
    add_ensembles(repository, "drawings")
    assert limits_of(repository) == (MAX_PIXELS, MAX_BYTES)
    assert "max_pixels" not in read_config(repository / "drawings_tokenize").parameters
    main(RepositoryConfig(repository=repository, name="drawings", ensembles=True, max_pixels=1234))
    add_ensembles(repository, "drawings", max_bytes=99)
    assert limits_of(repository) == (1234, 99)
    add_ensembles(repository, "drawings")
    configure(repository, "drawings", max_batch_size=8)
    assert read_config(repository / "drawings_decode").max_batch_size == 8
    assert limits_of(repository) == (1234, 99)
    for limit in ({"max_pixels": 0}, {"max_bytes": -1}):
        with pytest.raises(InputError, match=f"{next(iter(limit))} is"):
            add_ensembles(repository, "drawings", **limit)
    with pytest.raises(InputError, match="pass that too"):
        main(RepositoryConfig(repository=repository, name="drawings", max_pixels=1234))
    assert limits_of(repository) == (1234, 99)


def test_ensembles_of_old_have_the_limits_there_always_were(repository):
    add_ensembles(repository, "drawings", max_pixels=1234)
    path = repository / "drawings_decode" / "config.pbtxt"
    config = read_config(path.parent)
    del config.parameters["max_pixels"], config.parameters["max_bytes"]
    path.write_text(text_format.MessageToString(config), "utf-8")
    assert limits_of(repository) == (MAX_PIXELS, MAX_BYTES)
    config.parameters["max_pixels"].string_value = "many"
    path.write_text(text_format.MessageToString(config), "utf-8")
    with pytest.raises(InputError, match="drawings_decode"):
        add_ensembles(repository, "drawings")


@pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="no embedded server")
def test_a_limit_of_the_ensembles_holds_and_is_the_one_its_error_names(repository):
    add_ensembles(repository, "drawings", max_pixels=77 * 40)
    server = acquire_server(repository, start_timeout_s=120)
    try:
        with grpc.InferenceServerClient(server.url) as bare:
            small = [encoded_images()[1]]
            assert np.isfinite(ask(bare, "drawings_jpeg", "image", small)).all()
            with pytest.raises(InferenceServerException, match=r"at most 3,080 .* max_pixels"):
                ask(bare, "drawings_jpeg", "image", [encoded_images()[0]])
    finally:
        server.stop()
