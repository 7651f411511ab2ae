"""Few examples: interpolation, learned prompts, tuned towers, and the curves drawn from them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clip_rt.classification.probe import Probe
from clip_rt.classification.zero_shot import classify
from clip_rt.errors import CheckpointError, InputError, TrainingError
from clip_rt.inputs import tokenizer
from clip_rt.specs import MODELS
from training import coop, few_shot, interpolate
from training.coop import CoopConfig, context_probe, embed_prompts, learn_context
from training.evaluation.embed import class_embeddings, embed_images, embed_texts
from training.evaluation.tune import Recipe, descend, tune_image, tune_text
from training.interpolate import (
    InterpolateConfig,
    interpolate_probes,
    zero_shot_probe,
)
from training.model import CLIP

LABELS = ["red", "green", "blue"]
RECIPE = Recipe(num_steps=12, peak_lr=1e-2)
TOWER_RECIPE = Recipe(num_steps=40, peak_lr=1e-3)


@pytest.fixture(scope="module")
def model() -> CLIP:
    return tiny_clip.make(tiny_clip.VIT)


@pytest.fixture(scope="module", name="pixels_NSSC")
def make_pixels() -> np.ndarray:
    """Eight noisy pictures of each colour, class by class."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (24, 32, 32, 3), np.uint8)
    for channel in range(3):
        pixels[8 * channel : 8 * channel + 8, ..., channel] += 180
    return pixels


RIGHT_N = np.repeat(np.arange(3), 8)


def top1(logits: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == RIGHT_N).mean())


# interpolation


def test_weights_are_mixed_by_their_shares_and_counters_taken_over() -> None:
    first = {"w": torch.tensor([0.0, 4.0]), "count": torch.tensor(1)}
    second = {"w": torch.tensor([8.0, 0.0]), "count": torch.tensor(7)}
    mixed = interpolate.interpolate(first, second, 0.25)
    assert mixed["w"].tolist() == [2.0, 3.0]
    assert mixed["count"].item() == 7
    assert interpolate.interpolate(first, second, 0.0)["w"].tolist() == [0.0, 4.0]
    assert interpolate.interpolate(first, second, 1.0)["w"].tolist() == [8.0, 0.0]


@pytest.mark.parametrize(
    "other", [{}, {"w": torch.zeros(3)}, {"w": torch.zeros(2), "v": torch.zeros(1)}]
)
def test_weights_of_two_architectures_are_not_mixed(other: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"'[wv]'"):
        interpolate.interpolate({"w": torch.zeros(2)}, other, 0.5)


def test_a_mixed_classifier_gives_the_mixed_logits(model: CLIP) -> None:
    zero = zero_shot_probe(model, LABELS)
    rng = np.random.default_rng(0)
    fitted = replace(zero, weight=rng.normal(size=zero.weight.shape), bias=np.array([1.0, 2, 3]))
    image = rng.normal(size=(5, 48)).astype(np.float32)
    mixed = interpolate_probes(zero, fitted, 0.25).classify(image).logits
    expected = 0.75 * zero.classify(image).logits + 0.25 * fitted.classify(image).logits
    np.testing.assert_allclose(mixed, expected, atol=1e-4)
    with pytest.raises(InputError, match="equal labels"):
        interpolate_probes(zero, replace(zero, fingerprint="other"), 0.5)


def test_the_zero_shot_classifier_as_a_probe_scores_as_zero_shot(model: CLIP) -> None:
    image = embed_images(model, np.zeros((2, 32, 32, 3), np.uint8))
    expected = classify(
        image,
        class_embeddings(model, LABELS, templates="simple"),
        LABELS,
        logit_scale=float(model.logit_scale.exp()),
    )
    found = zero_shot_probe(model, LABELS, templates="simple").classify(image)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)


def test_the_command_measures_each_alpha_and_keeps_the_best(
    model: CLIP, pixels_NSSC: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, model.spec.name, model.spec)
    write_folders(tmp_path / "data", pixels_NSSC)
    image_NE = embed_images(model, pixels_NSSC)
    tuned = tune_text(model, image_NE, RIGHT_N, LABELS, TOWER_RECIPE)
    for name, clip in (("zero", model), ("tuned", tuned)):
        metadata = {"architecture": model.spec.name}
        save_file(clip.state_dict(), tmp_path / f"{name}.safetensors", metadata)
    config = InterpolateConfig(
        zero_shot=tmp_path / "zero.safetensors",
        fine_tuned=tmp_path / "tuned.safetensors",
        alphas=(0.0, 0.5, 1.0),
        data=(tmp_path / "data",),
        out=tmp_path / "mixed.safetensors",
    )
    found = interpolate.run(config)
    for alpha, clip in ((0.0, model), (1.0, tuned)):
        classes = class_embeddings(clip, LABELS)
        assert found[alpha].top1 == pytest.approx(top1(image_NE @ classes.T))
    assert found[1.0].top1 > found[0.0].top1
    best = max(found, key=lambda alpha: found[alpha].top1)
    mixed = load_file(config.out)
    expected = interpolate.interpolate(model.state_dict(), tuned.state_dict(), best)
    assert all(torch.equal(mixed[name], tensor) for name, tensor in expected.items())
    with pytest.raises(InputError, match="--data"):
        replace(config, data=())
    with pytest.raises(InputError, match="within 0 and 1"):
        replace(config, alphas=(1.5,))


def write_folders(root: Path, pixels_NSSC: np.ndarray) -> None:
    for index, pixels in enumerate(pixels_NSSC):
        path = root / LABELS[RIGHT_N[index]] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


# learned prompts


@torch.no_grad()
def test_a_context_of_words_embeds_as_the_words_do(model: CLIP) -> None:
    words = "a photo of a"
    ids = tokenizer.encode([words])[0][1:-1]
    labels = ["cat", "very long haired guinea pig"]
    found = embed_prompts(model, model.token_embedding.weight[ids], labels).numpy()
    expected = embed_texts(model, [f"{words} {label}." for label in labels])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_learned_context_names_the_examples_better_and_changes_no_weight(
    model: CLIP, pixels_NSSC: np.ndarray
) -> None:
    image_NE = embed_images(model, pixels_NSSC)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context_MD = learn_context(model, image_NE, RIGHT_N, LABELS, num_context=4, recipe=RECIPE)
    again_MD = learn_context(model, image_NE, RIGHT_N, LABELS, num_context=4, recipe=RECIPE)
    assert torch.equal(context_MD, again_MD)
    assert context_MD.shape == (4, 64)
    learned = context_probe(model, context_MD, LABELS)
    zero = zero_shot_probe(model, LABELS)
    assert cross_entropy(learned, image_NE) < 0.9 * cross_entropy(zero, image_NE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def cross_entropy(probe: Probe, image_NE: np.ndarray) -> float:
    probabilities = probe.classify(image_NE).probabilities
    return float(-np.log(probabilities[np.arange(len(RIGHT_N)), RIGHT_N]).mean())


def test_context_shrinks_to_the_room_there_is(model: CLIP) -> None:
    label = " ".join(["word"] * 70)
    image_NE = np.eye(2, 48, dtype=np.float32)
    one = Recipe(num_steps=1, peak_lr=1e-3)
    # 77 tokens: start, 70 words, the full stop and the end leave room for 4.
    context_MD = learn_context(model, image_NE, np.array([0, 1]), [label, "a"], recipe=one)
    assert len(context_MD) == 4
    with pytest.raises(InputError, match=r"are 82; the model reads 77"):
        embed_prompts(model, torch.zeros(9, 64), [label])
    with pytest.raises(InputError, match="room"):
        learn_context(model, image_NE, np.array([0, 1]), ["word " * 74, "a"], recipe=one)


def test_the_command_saves_a_probe_learned_from_the_shots(
    model: CLIP, pixels_NSSC: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, model.spec.name, model.spec)
    write_folders(tmp_path / "data", pixels_NSSC)
    metadata = {"architecture": model.spec.name}
    save_file(model.state_dict(), tmp_path / "w.safetensors", metadata)
    config = CoopConfig(
        checkpoint=tmp_path / "w.safetensors",
        data=(tmp_path / "data",),
        out=tmp_path / "p.npz",
        shots=4,
        num_context=4,
        num_steps=5,
    )
    coop.main(config)
    probe = Probe.load(config.out)
    assert probe.labels == ("blue", "green", "red")
    # Class embeddings times the temperature: each row is as long as the temperature.
    lengths = np.linalg.norm(probe.weight, axis=1)
    np.testing.assert_allclose(lengths, float(model.logit_scale.exp()), rtol=1e-4)
    with pytest.raises(InputError, match="has 8"):
        coop.run(replace(config, shots=9))


# tuned towers


def test_descending_reaches_the_minimum_of_a_parabola() -> None:
    x = torch.nn.Parameter(torch.tensor([3.0]))
    seen = []

    def loss_of(rows_B: torch.Tensor) -> torch.Tensor:
        seen.append(rows_B.tolist())
        return (x - 1).square().sum()

    descend([x], loss_of, num_rows=5, recipe=Recipe(num_steps=200, peak_lr=0.1, batch_size=3))
    assert x.item() == pytest.approx(1, abs=0.05)
    assert x.grad is None
    assert all(len(set(rows)) == 3 for rows in seen)


def test_a_loss_that_is_not_finite_ends_the_tuning() -> None:
    x = torch.nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(TrainingError, match="step 1 of 2"):
        descend([x], lambda _: x.sum() * torch.nan, num_rows=1, recipe=replace(RECIPE, num_steps=2))


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"peak_lr": 0.0}, {"batch_size": 0}])
def test_a_recipe_that_does_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="above 0"):
        replace(RECIPE, **wrong)


def test_tuning_the_image_tower_moves_it_and_nothing_else(pixels_NSSC: np.ndarray) -> None:
    model = tiny_clip.make(replace(tiny_clip.RESNET, side_px=32))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    class_CE = class_embeddings(model, LABELS)
    tuned, head_CE = tune_image(model, pixels_NSSC, RIGHT_N, class_CE, TOWER_RECIPE)
    changed = {n for n, t in tuned.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all(name.startswith("visual.") for name in changed)
    # Statistics of a few examples do not replace those of the training.
    assert not any("running" in name or "num_batches" in name for name in changed)
    assert not np.array_equal(head_CE, class_CE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert top1(embed_images(tuned, pixels_NSSC) @ head_CE.T) > 0.9


def test_tuning_the_text_tower_leaves_the_images_alone(
    model: CLIP, pixels_NSSC: np.ndarray
) -> None:
    image_NE = embed_images(model, pixels_NSSC)
    tuned = tune_text(model, image_NE, RIGHT_N, LABELS, TOWER_RECIPE, templates=["{}", "the {}"])
    before = model.state_dict()
    changed = {n for n, t in tuned.state_dict().items() if not torch.equal(t, before[n])}
    assert "text_projection" in changed
    assert not any(name.startswith(("visual.", "logit", "token")) for name in changed)
    classes = class_embeddings(tuned, LABELS, templates=["{}", "the {}"])
    assert top1(image_NE @ classes.T) > top1(image_NE @ class_embeddings(model, LABELS).T)


# curves


def test_curves_average_over_seeds_on_images_no_method_learned_from(
    model: CLIP, pixels_NSSC: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COOP_RECIPE", "TEXT_RECIPE", "IMAGE_RECIPE"):
        monkeypatch.setattr(few_shot, name, Recipe(num_steps=2, peak_lr=1e-3))
    task = few_shot.make_task(model, pixels_NSSC, RIGHT_N, LABELS, ["{}"])
    learned, tested = set(), set()
    fit = few_shot._fit_all

    def spy(model, task, rows, test, *, seed):  # type: ignore[no-untyped-def]
        learned.update((seed, row) for row in rows.tolist())
        tested.update((seed, row) for row in test.tolist())
        return fit(model, task, rows, test, seed=seed)

    monkeypatch.setattr(few_shot, "_fit_all", spy)
    curves = few_shot.measure(model, task, shots=(1, 3), seeds=(0, 1), progress=False)
    assert not learned & tested
    assert len(learned) == 2 * 9
    assert len(tested) == 2 * 15
    assert set(curves) == {few_shot.ZERO_SHOT, *few_shot.METHODS}
    assert all(len(curves[name][k]) == 2 for name in few_shot.METHODS for k in (1, 3))
    test = sorted(row for seed, row in tested if seed == 0)
    logits = task.image_NE[test] @ class_embeddings(model, LABELS, templates=["{}"]).T
    right = RIGHT_N[test]
    # Five images of each class are tested, so that mean recall is top-1.
    expected = (logits.argmax(axis=1) == right).mean()
    assert curves[few_shot.ZERO_SHOT][0][0] == pytest.approx(expected)
    few_shot.draw(curves, tmp_path / "p.png", title="title", subtitle="subtitle")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 500
    with pytest.raises(InputError, match="rarest class has 8"):
        few_shot.measure(model, task, shots=(8,), seeds=(0,), progress=False)


def test_summaries_are_mean_and_deviation() -> None:
    found = few_shot.summarise({"a": {2: [0.2, 0.4]}})
    assert found == {"a": {2: {"mean": pytest.approx(0.3), "std": pytest.approx(0.1)}}}


def test_the_command_draws_the_plot_of_a_folder(
    model: CLIP,
    pixels_NSSC: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(MODELS, model.spec.name, model.spec)
    for name in ("COOP_RECIPE", "TEXT_RECIPE", "IMAGE_RECIPE"):
        monkeypatch.setattr(few_shot, name, Recipe(num_steps=2, peak_lr=1e-3))
    write_folders(tmp_path / "data", pixels_NSSC)
    metadata = {"architecture": model.spec.name}
    save_file(model.state_dict(), tmp_path / "w.safetensors", metadata)
    config = few_shot.FewShotConfig(
        checkpoint=tmp_path / "w.safetensors",
        data=(tmp_path / "data",),
        shots=(1, 2),
        num_seeds=1,
        out=tmp_path / "p.png",
        json_file=tmp_path / "p.json",
    )
    few_shot.main(config)
    assert config.out.read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((tmp_path / "p.json").read_text())["summary"]["CoOp"]) == {"1", "2"}
    assert "WiSE-FT" in capsys.readouterr().out
