"""Each family of transformers: exported, gated, and fed as its own processor would feed it."""

from __future__ import annotations

import contextlib
import json
import shutil
import unicodedata
from dataclasses import replace

import external_models
import pytest
import torch

from clip_rt.errors import CheckpointError
from clip_rt.inputs import tokenizer_file
from clip_rt.inputs.tokenizer_file import FileTokenizer
from export import onnx_writer, parity, source_parity
from export.graphs import make_graphs
from export.parity_report import TOLERANCES
from export.probes import PROMPTS
from training.encoders.encoder import measure_any_length
from training.encoders.find import load_encoder
from training.encoders.tokenizer_source import read_tokenizer_file

# The fixture imports torchvision, which transformers reads images with.
pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("open_clip")]

LENGTH = external_models.CONTEXT_LENGTH
FAMILIES = ("siglip", "metaclip_2", "chinese_clip", "altclip", "blip", "align")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_model_and_is_fed_as_its_processor_feeds_it(family, tmp_path):
    folder = external_models.write_family(
        tmp_path / family, family, side_px=external_models.LARGE_PX
    )
    encoder = load_encoder(f"hf:{folder}", weights="openai")
    assert encoder.facts.name == f"hf:{family}"
    assert encoder.facts.context_length == LENGTH
    is_exact = measure_any_length(encoder, PROMPTS)
    assert is_exact == (family != "siglip")
    encoder.facts = replace(encoder.facts, is_any_length_exact=is_exact)
    files = {}
    for graph in make_graphs(encoder):
        files[graph.tower] = tmp_path / f"{graph.tower}.onnx"
        onnx_writer.write_onnx(graph, encoder.facts, files[graph.tower])
    runtimes = ("onnxruntime", "openvino") if family == "align" else ("onnxruntime",)
    report = parity.check_files(encoder, **files, precision="fp32", runtimes=runtimes)
    assert report.passed
    encode_images, encode_texts = parity.load_files(**files)
    found = source_parity.check_source(
        encoder,
        encode_images=encode_images,
        encode_texts=encode_texts,
        tolerance=TOLERANCES["fp32"],
    )
    assert found.max_levels <= 1.01
    assert min(found.min_image_cosine, found.min_text_cosine) > 0.9999
    assert encoder.facts.score == ("sigmoid" if family == "siglip" else "softmax")


@torch.inference_mode()
def test_pooling_whole_maps_is_aligns_own_pooling(tmp_path):
    """Its window is said otherwise, as OpenVINO 2026.4 crashes of it."""
    from transformers import AutoModel

    external_models.write_family(tmp_path, "align")
    pixels = torch.randn(2, 3, 64, 64)
    theirs = AutoModel.from_pretrained(tmp_path).eval().get_image_features(pixel_values=pixels)
    ours = load_encoder(f"hf:{tmp_path}", weights="openai").encode_image(pixels)
    torch.testing.assert_close(ours, theirs.pooler_output, rtol=0, atol=1e-6)


def test_siglips_own_tokenizer_becomes_a_tokenizer_json(tmp_path):
    """Its files are sentencepiece's, and transformers cleans texts and runs it in Python."""
    from transformers import SiglipTokenizer

    model = external_models.sentencepiece_unigram(tmp_path)
    theirs = SiglipTokenizer(str(model), model_max_length=LENGTH)
    content, cleaning = read_tokenizer_file(theirs)
    pad_id = theirs.pad_token_id
    described = tokenizer_file.describe(
        content, vocab_size=theirs.vocab_size, cleaning=cleaning, pad_id=pad_id
    )
    mine = FileTokenizer(content, described, context_length=LENGTH)
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    texts = [*source_parity.TEXTS[:-1], "ピザ゙がド", "ऩक़ोৌோ", "a\u037ab"]
    for text in [*texts, *(unicodedata.normalize("NFD", text) for text in texts)]:
        ids = mine.encode_text(text, truncate=True)
        assert ids + [pad_id] * (LENGTH - len(ids)) == theirs(text, **options)["input_ids"], text


def test_a_folder_of_another_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}), "utf-8")
    with pytest.raises(CheckpointError, match=r"'bert' in the words of its config\.json"):
        load_encoder(f"hf:{tmp_path}", weights="openai")


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    return external_models.write_family(tmp_path_factory.mktemp("siglip"), "siglip")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def test_weights_of_another_family_are_refused(siglip_folder, tmp_path):
    """transformers would leave random what is not there."""
    other = external_models.write_family(tmp_path / "other", "chinese_clip")
    shutil.copy(other / "model.safetensors", shutil.copytree(siglip_folder, tmp_path / "mixed"))
    with pytest.raises(CheckpointError, match=r"another model than its config\.json says"):
        load_encoder(f"hf:{tmp_path / 'mixed'}", weights="openai")


def test_weights_of_another_size_are_refused(siglip_folder, tmp_path):
    folder = tmp_path / "larger"
    shutil.copytree(siglip_folder, folder)
    said = json.loads((folder / "config.json").read_text("utf-8"))
    edit(folder / "config.json", text_config=said["text_config"] | {"vocab_size": 500})
    with pytest.raises(
        CheckpointError, match="1 weights are not in its files, or of another shape"
    ):
        load_encoder(f"hf:{folder}", weights="openai")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}),
        ("config.json", {"auto_map": {"AutoModel": "mine.Mine", "AutoConfig": "mine.Mine"}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}},
        ),
        (
            "processor_config.json",
            {"processor_class": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}},
        ),
        (
            "preprocessor_config.json",
            {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "mine.Mine"}},
        ),
    ],
    ids=["family", "model", "tokenizer", "processor", "images"],
)
def test_code_in_a_folder_is_never_run(siglip_folder, tmp_path, monkeypatch, file, changes):
    """Nor is anybody asked whether to."""
    folder = tmp_path / "mine"
    shutil.copytree(siglip_folder, folder)
    if not (folder / file).exists():
        (folder / file).write_text("{}", "utf-8")
    edit(folder / file, **changes)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", "utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    # Where transformers has a class of its own for it, it is taken.
    with contextlib.suppress(CheckpointError):
        load_encoder(f"hf:{folder}", weights="openai")
    assert not (tmp_path / "ran").exists()
