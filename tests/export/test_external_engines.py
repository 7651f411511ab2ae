"""Engines of models of other libraries, by the real compiler of TensorRT for RTX."""

from __future__ import annotations

import hashlib
import json

import external_models
import pytest

from clip_rt.errors import InputError, UnknownModelError
from clip_rt.wire.manifest import Manifest
from export.repository import publish
from export.triton_config import Serving, read_config
from export.trt import TrtConfig, export

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("open_clip")]

SIGLIP = {
    "text": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    | {"tokenizer_kwargs": {"clean": "canonicalize"}},
    "preprocessing": {"resize_mode": "squash"},
    "bias": -10.0,
}
LENGTH = external_models.CONTEXT_LENGTH


def config(folder, tmp_path, **changes) -> TrtConfig:
    values = {"model": f"open_clip:{folder}", "name": "other", "runtime": "rtx"}
    places = {"repository": tmp_path / "models", "cache": tmp_path / "cache"}
    return TrtConfig(**{**values, **places, "engines": tmp_path / "engines", **changes})


def engines_of(tmp_path) -> tuple[dict[str, object], Manifest, set[str]]:
    made = tmp_path / "engines/other"
    facts = json.loads((made / "export.json").read_text())
    manifest = Manifest.from_parameters(facts["manifest"], served="other")
    return facts, manifest, {path.name for path in made.iterdir()}


def test_a_siglip_gets_engines_for_one_length_and_its_tokenizer(tmp_path):
    content = external_models.sentencepiece_bpe()
    folder = external_models.write_open_clip(tmp_path / "siglip", tokenizer=content, **SIGLIP)
    report = export(config(folder, tmp_path))
    facts, manifest, names = engines_of(tmp_path)
    assert names == {"image.engine", "text.engine", "export.json", "tokenizer.json"}
    tokenizer = (tmp_path / "engines/other/tokenizer.json").read_bytes()
    assert hashlib.sha256(tokenizer).hexdigest() == manifest.tokenization.sha256
    assert (manifest.text_buckets, manifest.score, manifest.precision) == (
        (LENGTH,),
        "sigmoid",
        "fp16",
    )
    assert report.passed
    assert {case.name for case in report.cases if case.tower == "text"} >= {
        f"{size} texts of {LENGTH} by ONNX Runtime" for size in (1, 2, 3)
    }
    assert facts["source"]["num_texts"] > 20
    assert not (tmp_path / "models").exists()
    # As engines of TensorRT itself are published, which are built on a GPU only.
    made = tmp_path / "engines/other"
    serving = Serving(backend="tensorrt", device="gpu")
    engines = {"image": made / "image.engine", "text": made / "text.engine"}
    _, text = publish(
        tmp_path / "models", manifest, **engines, serving=serving, tokenizer_file=tokenizer
    )
    served = read_config(text)
    assert ([*served.instance_group[0].profile], [*served.input[0].dims]) == (["0"], [LENGTH])
    assert read_config(tmp_path / "models/other_tokenizer_file").backend == "python"


def test_a_clip_gets_engines_for_buckets_up_to_its_context(tmp_path):
    folder = external_models.write_open_clip(
        tmp_path / "clip", text={"context_length": 40, "vocab_size": 49408}
    )
    assert export(config(folder, tmp_path)).passed
    _, manifest, names = engines_of(tmp_path)
    assert names == {"image.engine", "text.engine", "export.json"}
    assert (manifest.text_buckets, manifest.score) == ((16, 32, 40), "softmax")


def test_islands_of_a_model_whose_layers_are_not_known_are_refused(tmp_path):
    with pytest.raises(InputError, match="islands are layers of clip_rt's own"):
        config("ViT-B-32", tmp_path, find_islands=True)


def test_an_unknown_model_is_refused_and_a_dry_run_loads_none(tmp_path, capsys):
    with pytest.raises(UnknownModelError, match="ViT-B-33"):
        export(config("ViT-B-33", tmp_path, weights="random"))
    assert export(config("ViT-B-33", tmp_path, weights="random", dry_run=True)) is None
    assert "open_clip:ViT-B-33" in capsys.readouterr().out
