"""The linear probe: the paper's search, the fit, the file, and the command."""

from pathlib import Path

import numpy as np
import pytest
import tiny_clip
from PIL import Image
from safetensors.torch import save_file

from clip_rt.classification.probe import Probe
from clip_rt.errors import InputError
from clip_rt.specs import MODELS
from training.evaluation.embed import embed_images
from training.probe import (
    DEFAULT_L2,
    L2_GRID,
    ProbeConfig,
    find_l2,
    fit_logistic,
    fit_probe,
    run,
    search_l2,
    split_validation,
)
from training.weights.load import fingerprint


def test_the_grid_is_the_papers() -> None:
    assert len(L2_GRID) == 97  # 96 steps
    assert L2_GRID[[0, 8, 96]] == pytest.approx([1e-6, 1e-5, 1e6])


@pytest.mark.parametrize("peak", [0, 1, 37, 48, 55, 95, 96])
def test_the_search_finds_the_only_peak_with_few_fits(peak: int) -> None:
    asked = []

    def score(l2: float) -> float:
        asked.append(l2)
        return -abs(np.log10(l2) - np.log10(L2_GRID[peak]))

    assert search_l2(score) == L2_GRID[peak]
    assert asked[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert len(asked) == len(set(asked)) <= 7 + 2 * 4


def test_of_equal_penalties_the_stronger_wins() -> None:
    assert search_l2(lambda l2: float(l2 <= L2_GRID[48])) == L2_GRID[48]
    assert search_l2(lambda l2: 0.0) == L2_GRID[96]


def test_the_fit_satisfies_the_optimality_of_its_objective() -> None:
    rng = np.random.default_rng(0)
    right = np.arange(60) % 3
    images = (rng.normal(size=(60, 5)) + 2 * np.eye(5)[right]).astype(np.float32)
    l2 = 0.7
    weight, bias = fit_logistic(images, right, l2=l2)
    logits = images @ weight.T + bias
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    excess = probability - np.eye(3)[right]
    # Gradients of the summed cross-entropy + l2 / 2 |weight|^2: zero at the minimum.
    np.testing.assert_allclose(excess.T @ images + l2 * weight, 0, atol=2e-2)
    np.testing.assert_allclose(excess.sum(axis=0), 0, atol=2e-2)


def test_two_classes_give_two_rows_with_the_sigmoid_of_their_difference() -> None:
    images = np.array([[-1.0], [-0.5], [0.5], [1.0]], np.float32)
    right = np.array([0, 0, 1, 1])
    weight, bias = fit_logistic(images, right, l2=1.0)
    assert weight.shape == (2, 1)
    slope = float(weight[1, 0] - weight[0, 0])
    # By symmetry the bias is 0, and the slope solves s = sum |x| sigmoid(-s |x|).
    assert bias[1] - bias[0] == pytest.approx(0, abs=1e-3)
    expected = sum(2 * x / (1 + np.exp(slope * x)) for x in (0.5, 1.0))
    assert slope == pytest.approx(expected, rel=1e-3)


def test_classes_without_an_example_are_refused() -> None:
    images = np.eye(3, dtype=np.float32)
    with pytest.raises(InputError, match="2 of 3"):
        fit_logistic(images, np.array([0, 2, 2]), l2=1.0)
    with pytest.raises(InputError, match="1 of 1"):
        fit_logistic(images, np.array([0, 0, 0]), l2=1.0)


def test_validation_takes_a_share_of_each_class_and_never_all() -> None:
    right = np.repeat([0, 1, 2], [1, 2, 20])
    held = split_validation(right, fraction=0.25, rng=np.random.default_rng(0))
    assert [int(held[right == each].sum()) for each in range(3)] == [0, 1, 5]


def test_the_penalty_is_the_default_where_nothing_can_be_held_back() -> None:
    images, right = np.eye(3, dtype=np.float32), np.arange(3)
    nothing = np.empty((0, 3), np.float32)
    assert find_l2(images, right, nothing, np.empty(0, np.int64)) == DEFAULT_L2
    probe = fit_probe(
        images, right, labels=["a", "b", "c"], fingerprint="f", rng=np.random.default_rng(0)
    )
    assert probe.classify(images).best == ["a", "b", "c"]


def test_the_penalty_is_chosen_for_data_the_fit_has_not_seen() -> None:
    rng = np.random.default_rng(1)
    right = np.arange(40) % 2
    signal = np.where(right == 1, 0.6, -0.6)[:, None]
    images = np.hstack([signal + rng.normal(size=(40, 1)), rng.normal(size=(40, 60))])
    other = np.arange(400) % 2
    held = np.hstack(
        [
            np.where(other == 1, 0.6, -0.6)[:, None] + rng.normal(size=(400, 1)),
            rng.normal(size=(400, 60)),
        ]
    )
    l2 = find_l2(images.astype(np.float32), right, held.astype(np.float32), other)
    # Sixty numbers of noise fit forty examples perfectly: only a strong penalty generalises.
    assert l2 > 1


def test_the_command_makes_a_probe_of_the_weights_that_names_new_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_clip.make(tiny_clip.VIT)
    monkeypatch.setitem(MODELS, model.spec.name, model.spec)
    save_file(model.state_dict(), tmp_path / "w.safetensors", {"architecture": model.spec.name})
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3), ("test", 6)):
        for channel, colour in enumerate(("red_thing", "green_thing", "blue_thing")):
            for index in range(count):
                pixels = rng.integers(0, 90, (36, 40, 3), np.uint8)
                pixels[..., channel] += 160
                path = tmp_path / part / colour / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    out = tmp_path / "probe.npz"
    for validation in ((), (tmp_path / "val",)):
        config = ProbeConfig(
            checkpoint=tmp_path / "w.safetensors",
            data=(tmp_path / "train",),
            validation=validation,
            test=(tmp_path / "test",),
            out=out,
        )
        _, found = run(config)
        assert found is not None
        assert found.num_images == 18
        assert found.top1 > 0.9
        probe = Probe.load(out)
        assert f"on {24 + (9 if validation else 0)} images" in probe.method
    assert probe.labels == ("blue thing", "green thing", "red thing")
    assert probe.fingerprint == fingerprint(model.state_dict())
    image = embed_images(model, [tmp_path / "test/red_thing/0.png"])
    assert probe.classify(image).best == ["red thing"]
    (tmp_path / "train/blue_thing").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="'blue_thing'"):
        run(config)
