"""SigLIP and SigLIP 2 of transformers: their own probabilities, and ids that no batch changes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import external_models
import numpy as np
import pytest
import torch
from PIL import Image

import clip_rt
from clip_rt import served_tokenizer
from clip_rt.testing import FakeServer
from export.onnx import OnnxConfig, export
from export.source_parity import TEXTS

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.usefixtures("open_clip")]

LENGTH = external_models.CONTEXT_LENGTH
TOWER = {"hidden_size": 32, "intermediate_size": 64}
TOWER |= {"num_hidden_layers": 2, "num_attention_heads": 2}
LABELS = ["cat", "TWO dogs", "the red car"]
TEMPLATE = "a {}."


def siglip_tokenizer(folder):
    """SigLIP's is run in Python, on a sentencepiece model."""
    from transformers import SiglipTokenizer

    model = external_models.sentencepiece_unigram(folder)
    return SiglipTokenizer(str(model), model_max_length=LENGTH)


def siglip2_tokenizer(folder):
    """SigLIP 2 has Gemma's, which lowers its letters when transformers reads it."""
    from transformers import AutoTokenizer

    (folder / "tokenizer.json").write_text(external_models.sentencepiece_bpe(), "utf-8")
    names = '{"tokenizer_class": "Siglip2Tokenizer", "padding_side": "right"}'
    (folder / "tokenizer_config.json").write_text(names, "utf-8")
    return AutoTokenizer.from_pretrained(folder, model_max_length=LENGTH)


TOKENIZERS = {"siglip": siglip_tokenizer, "siglip2": siglip2_tokenizer}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module", params=TOKENIZERS)
def served(request, repository, tmp_path_factory):
    """A client of the exported model, with the model and processor of transformers."""
    from transformers import AutoImageProcessor, SiglipConfig, SiglipImageProcessor, SiglipModel

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = TOKENIZERS[request.param](folder)
    config = SiglipConfig(
        text_config={**TOWER, "projection_size": 32, "max_position_embeddings": LENGTH}
        | {"vocab_size": 400, "pad_token_id": tokenizer.pad_token_id}
        | {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None},
        vision_config={**TOWER, "image_size": 32, "patch_size": 16},
    )
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    external_models.write_transformers(folder, config, tokenizer, images)
    name = request.param
    export(
        OnnxConfig(
            model=f"hf:{folder}",
            name=name,
            repository=repository / name,
            cache=repository / "cache",
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(repository / "home"))
        served_tokenizer._loaded.clear()
        with clip_rt.Client(repository=repository / name, model=name, timeout_s=120) as client:
            yield SimpleNamespace(
                client=client,
                model=SiglipModel.from_pretrained(folder).eval(),
                images=AutoImageProcessor.from_pretrained(folder, backend="pil"),
                tokenizer=tokenizer,
            )


def read_texts(served, texts):
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    return served.tokenizer(texts, return_tensors="pt", **options)["input_ids"]


def draw(width, height):
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@torch.inference_mode()
def test_probabilities_are_those_of_transformers(served):
    images = [draw(101, 67), draw(40, 90), draw(640, 480), draw(32, 32)]
    theirs = served.model(
        pixel_values=served.images(images, return_tensors="pt")["pixel_values"],
        input_ids=read_texts(served, [TEMPLATE.format(label) for label in LABELS]),
    ).logits_per_image.sigmoid()
    ours = served.client.zero_shot(images, LABELS, templates=[TEMPLATE])
    np.testing.assert_allclose(ours.probabilities, theirs.numpy(), atol=1e-4)
    assert np.ptp(ours.probabilities) > 1e-2, "random weights that say the same of everything"


@torch.inference_mode()
def test_a_batch_of_mixed_lengths_has_the_vectors_of_single_texts(served):
    texts = list(TEXTS[:20])
    together = served.client.encode_texts(texts, truncate=True)
    for text, row in zip(texts, together, strict=True):
        alone = served.client.encode_texts([text], truncate=True)[0]
        np.testing.assert_allclose(alone, row, atol=1e-6)
    theirs = served.model.get_text_features(input_ids=read_texts(served, texts)).pooler_output
    theirs = torch.nn.functional.normalize(theirs, dim=-1).numpy()
    np.testing.assert_allclose(together, theirs, atol=2e-5)


def test_a_batch_of_mixed_lengths_sends_the_ids_of_single_texts(served):
    texts = list(TEXTS[:20])
    with FakeServer(model="siglip") as server:
        manifest = served.client.manifest
        server.manifest = replace(
            server.manifest,
            tokenization=manifest.tokenization,
            context_length=LENGTH,
            text_buckets=manifest.text_buckets,
        )
        with clip_rt.Client(server.url) as client:
            client.encode_texts(texts, truncate=True)
            together = {row.tobytes() for each in server.requests for row in each.array}
            for text, theirs in zip(texts, read_texts(served, texts).numpy(), strict=True):
                client.encode_texts([text], truncate=True)
                (alone,) = server.requests[-1].array
                np.testing.assert_array_equal(alone, theirs)
                assert alone.tobytes() in together
