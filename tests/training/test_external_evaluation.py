"""Models of other libraries in every command that measures a model or fits something to it."""

from __future__ import annotations

import json

import external_models
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from clip_rt.classification.probe import Probe
from clip_rt.errors import CheckpointError, InputError
from training import coop, few_shot, probe
from training.coop import CoopConfig, context_probe, embed_prompts, learn_context
from training.encoders.find import load_encoder
from training.evaluate import EvaluateConfig, evaluate
from training.evaluation.embed import class_embeddings, embed_images, embed_texts, open_model
from training.evaluation.metrics import accuracy, retrieval
from training.evaluation.tune import Recipe, tune_image, tune_text
from training.weights.load import fingerprint

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("open_clip")]

COLOURS = ("blue", "green", "red")
PER_CLASS = 6
RIGHT_N = np.repeat(np.arange(3), PER_CLASS)


@pytest.fixture(scope="module", params=external_models.KINDS)
def named(request, open_clip, tmp_path_factory):
    return external_models.write_kind(tmp_path_factory.mktemp("model") / "m", request.param)


@pytest.fixture(scope="module")
def model(named):
    return open_model(None, model=named)


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    found = []
    for channel in (2, 1, 0):
        for _ in range(PER_CLASS):
            pixels = rng.integers(0, 90, (30, 47, 3), np.uint8)
            pixels[..., channel] += 150
            found.append(Image.fromarray(pixels))
    return found


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index, photo in enumerate(photos):
        path = folder / COLOURS[RIGHT_N[index]] / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        photo.save(path)
    return folder


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """Short ones: the small models read 16 tokens."""
    file = tmp_path_factory.mktemp("templates") / "templates.txt"
    file.write_text("a photo of a {}.\nthe {}\n", "utf-8")
    return str(file)


@torch.inference_mode()
def by_library(model, images=(), texts=()):
    """Embed by the library's own preprocessing, tokenizer and model."""
    if len(images):
        rows = model.encode_image(torch.from_numpy(model.source.pixels(images)))
    else:
        rows = model.encode_text(torch.from_numpy(model.source.tokens(texts)))
    return functional.normalize(rows, dim=-1).numpy()


def test_accuracy_is_that_of_the_librarys_own_path(model, named, photos, data, templates):
    found = evaluate(EvaluateConfig(model=named, data=(data,), templates=templates))
    image_NE = by_library(model, photos)
    # One level of 255 in the pixels.
    np.testing.assert_allclose(embed_images(model, photos), image_NE, atol=5e-3)
    prompts = [f"a photo of a {colour}." for colour in COLOURS]
    text_CE = by_library(model, texts=prompts)
    np.testing.assert_allclose(class_embeddings(model, COLOURS), text_CE, atol=1e-5)
    expected = accuracy(image_NE @ text_CE.T, RIGHT_N)
    one_prompt = found.accuracy["one prompt, 'a photo of a {}.'"]
    # Of random weights the nearest two may be as near as a level of the pixels.
    assert abs(one_prompt.top1 - expected.top1) <= 1 / len(photos)


def test_retrieval_is_that_of_the_librarys_own_path(
    model, named, photos, data, templates, tmp_path
):
    words = ("a cat", "two dogs and a car", "the old bridge over a house")
    captions = [f"{words[i % 3]} {COLOURS[RIGHT_N[i]]}, {i}" for i in range(len(photos))]
    files = sorted(data.rglob("*.png"))
    rows = [
        json.dumps({"image": str(path.relative_to(data)), "caption": caption})
        for path, caption in zip(files, captions, strict=True)
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows), "utf-8")
    found = evaluate(
        EvaluateConfig(
            model=named,
            data=(data,),
            captions=tmp_path / "captions.jsonl",
            templates=templates,
        )
    )
    text_NE = by_library(model, texts=captions)
    np.testing.assert_allclose(embed_texts(model, captions, truncate=True), text_NE, atol=1e-5)
    expected = retrieval(by_library(model, photos), text_NE, np.arange(len(photos)))
    assert found.retrieval.num_texts == len(photos)
    for k, recall in expected.text_at.items():
        assert abs(found.retrieval.text_at[k] - recall) <= 2 / len(photos)


def test_a_probe_is_of_the_weights_that_an_export_names(model, named, data, tmp_path):
    out = tmp_path / "probe.npz"
    fitted, found = probe.run(probe.ProbeConfig(model=named, data=(data,), out=out, test=(data,)))
    assert fitted.labels == COLOURS
    assert found.top1 > 0.9
    assert Probe.load(out).fingerprint == fingerprint(model.weights())


@torch.no_grad()
def test_a_context_of_words_embeds_as_the_words_do(model):
    ids = model.text_tokenizer.encode_text("a photo of a")
    start, end = coop._count_ends(model)
    assert end >= 1
    inner = ids[start : len(ids) - end]
    labels = ["cat", "old bridge"]
    found = embed_prompts(model, model.embed_tokens().weight[inner], labels).numpy()
    if model.facts.tokenization.kind == "openai":
        # Elsewhere a word is split otherwise where it begins a text.
        expected = embed_texts(model, [f"a photo of a {label}." for label in labels])
        np.testing.assert_allclose(found, expected, atol=1e-5)
    wrong = embed_prompts(model, model.embed_tokens().weight[inner[:1]], labels).numpy()
    assert np.abs(found - wrong).max() > 1e-3


def test_learned_context_tells_the_examples_apart_and_changes_no_weight(model, photos):
    image_NE = embed_images(model, photos)
    before = fingerprint(model.weights())
    recipe = Recipe(num_steps=15, peak_lr=3e-2)
    context_MD = learn_context(model, image_NE, RIGHT_N, COLOURS, num_context=4, recipe=recipe)

    def loss(context_MD):
        found = context_probe(model, context_MD, COLOURS).classify(image_NE).probabilities
        return -np.log(found[np.arange(len(RIGHT_N)), RIGHT_N]).mean()

    recipe = Recipe(num_steps=1, peak_lr=1e-9)
    start_MD = learn_context(model, image_NE, RIGHT_N, COLOURS, num_context=4, recipe=recipe)
    assert loss(context_MD) < loss(start_MD) - 0.005
    assert fingerprint(model.weights()) == before
    assert not model.embed_tokens()._forward_hooks


def test_coop_saves_a_probe_of_the_model(model, named, data, tmp_path):
    found = coop.run(
        CoopConfig(
            model=named, data=(data,), out=tmp_path / "p.npz", shots=2, num_context=3, num_steps=2
        )
    )
    assert found.fingerprint == fingerprint(model.weights())
    assert found.method == "CoOp, 3 context vectors"


def test_tuning_moves_one_tower_and_no_table(model, photos):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    image_NE = embed_images(model, photos)
    recipe = Recipe(num_steps=20, peak_lr=1e-3)

    def moved(tuned):
        return {n for n, t in tuned.state_dict().items() if not torch.equal(t, before[n])}

    tuned = tune_text(model, image_NE, RIGHT_N, COLOURS, recipe, templates=["{}"])
    changed = moved(tuned)
    assert {tuned.tower_of(name) for name in changed} == {"text"}
    table = tuned.embed_tokens().weight
    (name,) = (n for n, parameter in tuned.named_parameters() if parameter is table)
    assert name not in changed
    class_CE = class_embeddings(model, COLOURS, templates=["{}"])
    tuned_CE = class_embeddings(tuned, COLOURS, templates=["{}"])
    assert margin(image_NE @ tuned_CE.T) > margin(image_NE @ class_CE.T)

    side = model.facts.side_px
    pixels_NSSC = np.stack([np.asarray(photo.resize((side, side))) for photo in photos])
    tuned, head_CE = tune_image(model, pixels_NSSC, RIGHT_N, class_CE, recipe)
    assert {tuned.tower_of(name) for name in moved(tuned)} == {"image"}
    assert margin(embed_images(tuned, pixels_NSSC) @ head_CE.T) > margin(image_NE @ class_CE.T)
    assert not moved(model)


def margin(logits_NC):
    """Return by how much the right class is before the mean of all."""
    return float((logits_NC[np.arange(len(RIGHT_N)), RIGHT_N] - logits_NC.mean(axis=1)).mean())


def test_few_shot_measures_every_method(named, data, templates, tmp_path, monkeypatch):
    for name in ("COOP_RECIPE", "TEXT_RECIPE", "IMAGE_RECIPE"):
        monkeypatch.setattr(few_shot, name, Recipe(num_steps=2, peak_lr=1e-3))
    few_shot.main(
        few_shot.FewShotConfig(
            model=named,
            data=(data,),
            templates=templates,
            shots=(1,),
            num_seeds=1,
            out=tmp_path / "p.png",
            json_file=tmp_path / "p.json",
        )
    )
    curves = json.loads((tmp_path / "p.json").read_text())["curves"]
    assert set(curves) == {few_shot.ZERO_SHOT, *few_shot.METHODS}


def test_what_means_nothing_for_a_model_is_refused(named, tmp_path):
    with pytest.raises(InputError, match="leave --activation out"):
        open_model(None, model=named, activation="gelu")
    with pytest.raises(InputError, match=r"pass --checkpoint"):
        open_model(None, model="ViT-B/32")
    with pytest.raises(InputError, match="is for models of open_clip"):
        open_model("x.safetensors", model="ViT-B/32", tokenizer=tmp_path)
    with pytest.raises(InputError, match=r"no file that training\.run wrote"):
        open_model(tmp_path / "none.safetensors", model=named)


def test_random_weights_are_asked_for_by_name(named, model):
    found = open_model("random", model=named)
    assert fingerprint(found.weights()) != fingerprint(model.weights())
    with pytest.raises(CheckpointError, match="no weights of its own"):
        load_encoder("open_clip:ViT-B-32", weights="openai")
