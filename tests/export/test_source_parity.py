"""Models of open_clip and transformers: exported, gated, and fed as their own libraries would."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import external_models
import numpy as np
import onnx
import pytest
import torch

from clip_rt.errors import CheckpointError, InputError, ParityError, UnknownModelError
from clip_rt.requests.batches import plan_texts
from clip_rt.specs import Resizing
from export import onnx_writer, parity, source_parity
from export.graphs import make_graphs
from export.parity_report import TOLERANCES
from export.probes import PROMPTS
from training.encoders.encoder import encode_usable, measure_any_length
from training.encoders.find import load_encoder, name_model
from training.weights import hub

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("open_clip")]

SIGLIP = {
    "no_causal_mask": True,
    "pool_type": "last",
    "proj_bias": True,
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
OPEN_CLIP = {
    "siglip2": {
        "text": SIGLIP,
        "tokenizer": external_models.sentencepiece_bpe,
        "preprocessing": {"resize_mode": "squash"},
        "bias": -10.0,
    },
    "bilinear": {"preprocessing": {"interpolation": "bilinear", "resize_mode": "squash"}},
    "longest": {"preprocessing": {"resize_mode": "longest", "fill_color": 128}},
    "clipa": {
        "text": {"pool_type": "last", "no_causal_mask": True}
        | {"tokenizer_kwargs": {"strip_sep_token": True}},
        "tokenizer": external_models.word_piece,
        "preprocessing": {"resize_mode": "squash", "interpolation": "bilinear"},
    },
    "clip": {},
}


@pytest.fixture(scope="module", params=OPEN_CLIP)
def encoder(request, tmp_path_factory):
    options = dict(OPEN_CLIP[request.param])
    if "tokenizer" in options:
        options["tokenizer"] = options["tokenizer"]()
    folder = external_models.write_open_clip(tmp_path_factory.mktemp(request.param), **options)
    found = load_encoder(f"open_clip:{folder}", weights="openai")
    is_exact = measure_any_length(found, PROMPTS)
    assert is_exact == (request.param not in ("siglip2", "clipa"))
    found.facts = replace(found.facts, is_any_length_exact=is_exact)
    return found


def export(encoder, folder):
    files = []
    for graph in make_graphs(encoder):
        files.append(folder / f"{graph.tower}.onnx")
        onnx_writer.write_onnx(graph, encoder.facts, files[-1])
    return files


def test_an_export_is_the_model_and_is_fed_as_its_library_feeds_it(encoder, tmp_path):
    image, text = export(encoder, tmp_path)
    report = parity.check_files(encoder, image=image, text=text, precision="fp32")
    assert report.passed
    encode_images, encode_texts = parity.load_files(image, text)
    found = source_parity.check_source(
        encoder,
        encode_images=encode_images,
        encode_texts=encode_texts,
        tolerance=TOLERANCES["fp32"],
    )
    assert found.max_levels <= 1.01
    assert min(found.min_image_cosine, found.min_text_cosine) > 0.9999
    # The weights of the other tower are not in a file.
    sizes = [file.stat().st_size for file in (image, text)]
    weights = 4 * sum(each.numel() for each in encoder.parameters())
    assert sum(sizes) < 1.2 * weights + 300_000


def test_fp16_of_another_librarys_graph_is_valid_and_normalises_in_fp32(encoder, tmp_path):
    files = {}
    for graph in make_graphs(encoder):
        files[graph.tower] = tmp_path / f"{graph.tower}.onnx"
        onnx_writer.write_onnx(graph, encoder.facts, files[graph.tower], fp16=True)
        # Sorted, and of types that agree: what TensorRT demands too.
        onnx.checker.check_model(str(files[graph.tower]), full_check=True)
    report = parity.check_files(encoder, **files, precision="fp16")
    assert max(case.norm_error for case in report.cases) < 1e-6
    encode_images, encode_texts = parity.load_files(**files)
    found = source_parity.check_source(
        encoder,
        encode_images=encode_images,
        encode_texts=encode_texts,
        tolerance=TOLERANCES["fp16"],
    )
    assert min(found.min_image_cosine, found.min_text_cosine) > 0.9999


def torch_encoders(encoder):
    image_graph, text_graph = make_graphs(encoder)
    return {
        "encode_images": lambda batch: image_graph(torch.from_numpy(batch)).numpy(),
        "encode_texts": lambda batch: text_graph(torch.from_numpy(batch)).numpy(),
        "tolerance": TOLERANCES["fp32"],
    }


def test_a_wrong_resize_is_caught(encoder):
    wrong = {"shortest": "squash", "squash": "shortest", "longest": "squash"}
    right = encoder.facts
    encoder.facts = replace(right, resizing=Resizing(mode=wrong[right.resizing.mode]))
    try:
        with pytest.raises(ParityError, match="prepared otherwise"):
            source_parity.check_source(encoder, **torch_encoders(encoder))
    finally:
        encoder.facts = right


def test_a_wrong_padding_is_caught(encoder):
    right = encoder.facts
    if right.tokenization.kind == "openai":
        with pytest.raises(InputError, match="pad_id of OpenAI's tokenizer is 7"):
            replace(right.tokenization, pad_id=7)
        return
    encoder.facts = replace(right, tokenization=replace(right.tokenization, pad_id=7))
    try:
        with pytest.raises(ParityError, match="has other ids"):
            source_parity.check_source(encoder, **torch_encoders(encoder))
    finally:
        encoder.facts = right


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("ViT-B/32", "ViT-B/32"),
        ("open_clip:ViT-B-16-SigLIP2", "ViT-B-16-SigLIP2"),
        ("open_clip:models/mine", "mine"),
        ("hf:google/siglip2-base-patch16-224@main", "siglip2-base-patch16-224"),
        ("hf:google/siglip2-base-patch16-224@refs/pr/1", "siglip2-base-patch16-224"),
    ],
)
def test_a_model_is_served_under_its_own_name(model, name):
    assert name_model(model) == name


def test_a_configuration_that_open_clip_does_not_have():
    with pytest.raises(UnknownModelError, match=r"open_clip .* has no model 'ViT-nothing'"):
        load_encoder("open_clip:ViT-nothing", weights=None)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return external_models.write_open_clip(tmp_path_factory.mktemp("clip_folder"))


def test_what_a_folder_has_itself_is_not_named_again(clip_folder, tmp_path):
    for model in (f"open_clip:{clip_folder}", f"hf:{clip_folder}"):
        with pytest.raises(InputError, match="has weights of its own"):
            load_encoder(model, weights="mine.safetensors")
    with pytest.raises(InputError, match="has a tokenizer of its own"):
        load_encoder(f"hf:{clip_folder}", weights="openai", tokenizer=tmp_path)


def test_random_weights_are_not_those_of_the_folder(clip_folder):
    own, random = (load_encoder(f"open_clip:{clip_folder}", weights=w) for w in ("openai", None))
    name = "text.token_embedding.weight"
    assert not torch.equal(own.weights()[name], random.weights()[name])


def test_a_folder_without_weights_is_refused(clip_folder, tmp_path):
    shutil.copy(clip_folder / "open_clip_config.json", tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_encoder(f"open_clip:{tmp_path}", weights="openai")


def test_weights_of_another_model_than_the_one_named_are_refused(clip_folder, monkeypatch):
    found = hub.open_folder(clip_folder)
    monkeypatch.setattr(hub, "fetch", lambda _: found)
    with pytest.raises(CheckpointError, match="the configuration of another model than ViT-B-32"):
        load_encoder("open_clip:ViT-B-32", weights="hf:somebody/else")


def test_the_same_weights_under_another_configuration_are_another_model(clip_folder, tmp_path):
    other = tmp_path / "quick"
    shutil.copytree(clip_folder, other)
    document = json.loads((other / "open_clip_config.json").read_text("utf-8"))
    document["model_cfg"]["quick_gelu"] = True
    (other / "open_clip_config.json").write_text(json.dumps(document), "utf-8")
    one, two = (
        load_encoder(f"open_clip:{each}", weights="openai") for each in (clip_folder, other)
    )
    assert all(map(torch.equal, one.weights().values(), two.weights().values()))
    assert one.facts.activation != two.facts.activation


def test_a_tokenizer_that_does_not_say_its_padding_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(external_models.sentencepiece_bpe(), "utf-8")
    with pytest.raises(CheckpointError, match="what texts are padded with"):
        load_encoder(
            "open_clip:ViT-B-32-SigLIP2-256",
            weights=None,
            tokenizer=tmp_path / "tokenizer.json",
        )


def test_weights_must_be_named_and_be_there(tmp_path):
    with pytest.raises(CheckpointError, match="has no weights of its own"):
        load_encoder("open_clip:ViT-B-32", weights="openai")
    with pytest.raises(CheckpointError, match="there is no file"):
        load_encoder("open_clip:ViT-B-32", weights=str(tmp_path / "none.pt"))


def test_weights_in_a_file_are_fed_as_open_clip_feeds_those_it_knows(tmp_path):
    """The configuration of SigLIP says nothing of squashing, nor does a file of weights."""
    tokenizer = tmp_path / "tokenizer.json"
    content = json.loads(external_models.sentencepiece_bpe())
    content["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_id": 0}
    content["padding"] |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "<pad>"}
    tokenizer.write_text(json.dumps(content), "utf-8")
    found = load_encoder("open_clip:ViT-B-32-SigLIP2-256", weights=None, tokenizer=tokenizer)
    assert found.facts.resizing == Resizing(mode="squash")
    assert (found.facts.mean, found.facts.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert found.facts.tokenization.cleaning == "canonical"
    assert found.facts.tokenization.vocab_size == 256_000


def test_weights_that_may_be_fed_in_two_ways_are_refused(tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="in 2 ways"):
        load_encoder("open_clip:ViT-L-14", weights=str(tmp_path / "weights.pt"))


def test_a_batch_of_mixed_lengths_has_the_ids_of_single_texts(encoder):
    facts, texts = encoder.facts, ["a cat", "a photo of two people and the old bridge over", "red"]
    plan = plan_texts(
        list(encode_usable(encoder, texts).values()),
        max_rows=8,
        buckets=(facts.context_length,),
        pad_id=facts.tokenization.pad_id,
    )
    (batch,) = plan.batches
    alone = np.concatenate([encoder.source.tokens([text]) for text in texts])
    np.testing.assert_array_equal(batch[plan.row_by_text], alone)
