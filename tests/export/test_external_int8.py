"""INT8 of another library's model: calibrated and measured on images and texts fed as it feeds."""

from __future__ import annotations

import external_models
import numpy as np
import pytest
from PIL import Image

import clip_rt
from clip_rt import served_tokenizer
from clip_rt.inputs.tokenizer import pad
from export import int8, source_parity
from export.onnx import OnnxConfig, export
from training.encoders.find import load_encoder

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.usefixtures("open_clip")]

CAPTIONS = ("A red CAR", "two_people & a dog", "the old bridge", "красная машина, и кот")
LENGTH = external_models.CONTEXT_LENGTH


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = external_models.write_open_clip(
        tmp_path_factory.mktemp("siglip"),
        text={"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        | {"tokenizer_kwargs": {"clean": "canonicalize"}},
        tokenizer=external_models.sentencepiece_bpe(),
        preprocessing={"resize_mode": "squash", "interpolation": "bilinear"},
        bias=-10.0,
    )
    return f"open_clip:{folder}"


def write_table(folder, *, seed):
    """A table of images, none of them square, and captions."""
    folder.mkdir()
    lines = ["image,caption"]
    for index, caption in enumerate(CAPTIONS):
        image = source_parity.draw(60 + 31 * index + seed, 90)
        image.save(folder / f"{index}.png")
        lines.append(f'{index}.png,"{caption}"')
    (folder / "table.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "table.csv"


def test_it_is_calibrated_measured_and_served_as_its_library_feeds_it(model, tmp_path, monkeypatch):
    seen = []
    write = int8.write_int8

    def look(onnx_file, batches, path):
        seen.append(batches)
        write(onnx_file, batches, path)

    monkeypatch.setattr(int8, "write_int8", look)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    served_tokenizer._loaded.clear()
    calibration = write_table(tmp_path / "calibration", seed=0)
    report = export(
        OnnxConfig(
            model=model,
            name="siglip",
            precision="int8",
            calibration=(calibration,),
            samples=(write_table(tmp_path / "samples", seed=7),),
            repository=tmp_path / "models",
            cache=tmp_path / "cache",
        )
    )
    assert report.passed
    encoder = load_encoder(model, weights="openai")
    images, texts = (np.concatenate(batches) for batches in seen)
    drawn = [Image.open(each) for each in sorted(calibration.parent.glob("*.png"))]
    theirs = 255 * (0.5 * encoder.source.pixels(drawn).transpose(0, 2, 3, 1) + 0.5)
    assert {each.tobytes() for each in images} == {
        each.tobytes() for each in theirs.round().astype(np.uint8)
    }
    # Padded to the one length that the model reads, with its own id.
    ids = [encoder.text_tokenizer.encode_text(text) for text in CAPTIONS]
    expected = pad(ids, length_tokens=LENGTH, pad_id=encoder.facts.tokenization.pad_id)
    assert {each.tobytes() for each in expected} <= {each.tobytes() for each in texts}
    assert texts.shape[1] == LENGTH
    with clip_rt.Client(repository=tmp_path / "models", timeout_s=120) as client:
        assert client.manifest.precision == "int8"
        found = client.encode_texts(list(CAPTIONS))
        fp32 = encoder.source.tokens(list(CAPTIONS))
    np.testing.assert_allclose((found * unit(encoder, fp32)).sum(axis=1), 1, atol=2e-2)


def unit(encoder, tokens):
    import torch

    with torch.inference_mode():
        rows = encoder.encode_text(torch.from_numpy(tokens))
        return torch.nn.functional.normalize(rows, dim=-1).numpy()
