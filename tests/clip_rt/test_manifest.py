"""What a model says about itself: both contracts, and what is neither."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from clip_rt.errors import ContractError
from clip_rt.specs import CLIP_MEAN, CLIP_STD, Resizing, Tokenization
from clip_rt.wire.manifest import Manifest

CLIP = Manifest(
    model="shop",
    architecture="ViT-B/32",
    fingerprint="f" * 64,
    embedding_dim=512,
    side_px=224,
    context_length=77,
    text_buckets=(),
    logit_scale=100.0,
    logit_bias=0.0,
    activation="quick_gelu",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    precision="fp32",
    libraries={"torch": "2"},
)
SIGLIP = replace(
    CLIP,
    architecture="open_clip:ViT-B-16-SigLIP2",
    context_length=64,
    text_buckets=(64,),
    resizing=Resizing(mode="squash", interpolation="bilinear", fill=(1, 2, 3)),
    tokenization=Tokenization(
        kind="tokenizer.json",
        sha256="a" * 64,
        num_bytes=10,
        vocab_size=256_000,
        cleaning="canonical",
        pad_id=5,
        erased_id=3,
    ),
    score="sigmoid",
    matryoshka_dimensions=(64, 256),
)


@pytest.mark.parametrize("manifest", [CLIP, SIGLIP], ids=["contract_1", "contract_2"])
def test_a_manifest_comes_back_as_it_was(manifest):
    assert Manifest.from_parameters(manifest.to_parameters(), served="m") == manifest


def test_what_contract_1_can_say_is_said_in_it():
    parameters = CLIP.to_parameters()
    assert json.loads(parameters["contract_version"]) == 1
    assert not {"resizing", "tokenization", "score"} & set(parameters)
    assert json.loads(SIGLIP.to_parameters()["contract_version"]) == 2


def test_a_parameter_of_contract_2_means_nothing_in_contract_1():
    parameters = CLIP.to_parameters() | {"score": '"sigmoid"'}
    assert Manifest.from_parameters(parameters, served="m").score == "softmax"


@pytest.mark.parametrize("version", ["3", "0", "2.0", "true", '"2"', "null"])
def test_a_later_contract_is_refused(version):
    parameters = SIGLIP.to_parameters() | {"contract_version": version}
    with pytest.raises(ContractError, match="obeys contract"):
        Manifest.from_parameters(parameters, served="m")


@pytest.mark.parametrize("name", ["resizing", "tokenization", "score"])
def test_contract_2_leaves_nothing_out(name):
    parameters = SIGLIP.to_parameters()
    del parameters[name]
    with pytest.raises(ContractError, match=f"missing: {name}"):
        Manifest.from_parameters(parameters, served="m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resizing", "[]"),
        ("resizing", '{"mode": "shortest", "colour": "red"}'),
        ("resizing", '{"mode": ["shortest"]}'),
        ("resizing", '{"fill": [0, 0, "x"]}'),
        ("resizing", '{"resize_px": 100}'),
        ("tokenization", "null"),
        ("tokenization", '{"kind": "tokenizer.json", "sha256": "../x", "num_bytes": 1}'),
        ("tokenization", '{"vocab_size": 1e400}'),
        ("score", '"best"'),
        ("score", "[]"),
        ("matryoshka_dimensions", "[0]"),
        ("matryoshka_dimensions", "[256, 64]"),
        ("matryoshka_dimensions", "[64, 64]"),
        ("matryoshka_dimensions", "[64, 512]"),
        ("matryoshka_dimensions", "64"),
        ("matryoshka_dimensions", "[1.5]"),
    ],
)
def test_a_lie_is_a_contract_error(name, value):
    parameters = SIGLIP.to_parameters() | {name: value}
    with pytest.raises(ContractError, match="Export"):
        Manifest.from_parameters(parameters, served="m")
