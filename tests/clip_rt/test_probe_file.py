"""Probes: what they answer, what they refuse to read, and how the real server serves them."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_repository
from PIL import Image

from clip_rt.classification.probe import FORMAT, Probe
from clip_rt.client import Client
from clip_rt.errors import CheckpointError, ContractError, ImageError, InputError


def make(**changes: object) -> Probe:
    fields: dict[str, object] = {
        "weight": np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], np.float32),
        "bias": np.array([0.0, 0.0, 0.5], np.float32),
        "labels": ("left", "up", "neither"),
        "fingerprint": "a" * 64,
        "method": "by hand",
    }
    return Probe(**(fields | changes))  # type: ignore[arg-type]


def write(path: Path, *, facts: object = None, compress: bool = False, **arrays: object) -> Path:
    good = {"format": FORMAT, "labels": ["a", "b"], "fingerprint": "f", "method": ""}
    text = json.dumps(good if facts is None else facts).encode()
    members = {
        "weight": np.eye(2, dtype=np.float32),
        "bias": np.zeros(2, np.float32),
        "facts": np.frombuffer(text, np.uint8),
    }
    save = np.savez_compressed if compress else np.savez
    save(path, **(members | arrays))
    return path


def test_scores_are_the_affine_function_and_its_softmax() -> None:
    scores = make().classify(np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]], np.float32))
    expected = [[2, 0, 0.5], [1.2, 0.8, 0.5], [-2, 0, 0.5]]
    np.testing.assert_allclose(scores.logits, expected, atol=1e-6)
    weights = np.exp(expected)
    np.testing.assert_allclose(
        scores.probabilities, weights / weights.sum(axis=1, keepdims=True), atol=1e-6
    )
    assert scores.best == ["left", "left", "neither"]


def test_no_image_gives_no_score_and_another_width_is_refused() -> None:
    assert make().classify(np.empty((0, 2), np.float32)).logits.shape == (0, 3)
    with pytest.raises(InputError, match="do not fit"):
        make().classify(np.ones((1, 3), np.float32))


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ("left", "up")},
        {"bias": np.zeros(2, np.float32)},
        {"weight": np.zeros((0, 2)), "bias": np.zeros(0), "labels": ()},
        {"weight": np.full((3, 2), np.nan)},
    ],
    ids=["labels", "bias", "empty", "nan"],
)
def test_a_probe_that_does_not_fit_itself_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"fit|finite"):
        make(**changes)


def test_a_probe_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    probe = make(labels=("naïve", 'with "quotes"', "日本\0"))
    probe.save(tmp_path / "p.npz")
    found = Probe.load(tmp_path / "p.npz")
    np.testing.assert_array_equal(found.weight, probe.weight)
    np.testing.assert_array_equal(found.bias, probe.bias)
    assert (found.labels, found.fingerprint, found.method) == (
        probe.labels,
        probe.fingerprint,
        "by hand",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]


def test_saving_says_what_is_wrong_with_the_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.npz"):
        make().save(tmp_path / "probe.bin")
    with pytest.raises(CheckpointError, match="cannot be written"):
        make().save(tmp_path / "missing" / "probe.npz")


def test_what_is_no_probe_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    good = {"format": FORMAT, "labels": ["a", "b"], "fingerprint": "f", "method": ""}
    cases = [
        lambda: path.write_bytes(b"no archive"),
        lambda: path.write_bytes(write(path).read_bytes()[:300]),
        lambda: write(path, extra=np.zeros(1)),
        lambda: write(path, weight=np.array([{"a": 1}], object)),
        lambda: write(path, weight=np.eye(2)),
        lambda: write(path, weight=np.eye(3, dtype=np.float32)),
        lambda: write(path, facts=good | {"format": "other/1"}),
        lambda: write(path, facts=good | {"labels": [1, 2]}),
        lambda: write(path, facts=["a"]),
        lambda: write(path, facts={}),
    ]
    with pytest.raises(CheckpointError, match=r"p\.npz"):
        Probe.load(path)
    for damage in cases:
        damage()
        with pytest.raises(CheckpointError, match=r"p\.npz"):
            Probe.load(path)
    assert Probe.load(write(path)).labels == ("a", "b")


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (ran,)

    path = tmp_path / "p.npz"
    write(path, weight=np.array([Trap()], object))
    with pytest.raises(CheckpointError):
        Probe.load(path)
    assert not ran.exists()


def test_a_small_file_that_unpacks_to_much_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "p.npz", weight=np.zeros((2, 4_000_000), np.float32), compress=True)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr("clip_rt.classification.probe.MAX_BYTES", 1_000_000)
    with pytest.raises(CheckpointError, match="unpacks to 32,"):
        Probe.load(path)


def test_a_member_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.npz")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("bias.npy", b"")
    with pytest.raises(CheckpointError, match="4 members"):
        Probe.load(path)


def served_probe(client: Client) -> Probe:
    """Classify by which channel is strongest: the tiny model's first three numbers are colours."""
    weight = np.zeros((3, tiny_repository.EMBEDDING_DIM), np.float32)
    weight[[0, 1, 2], [0, 1, 2]] = 5
    return Probe(
        weight=weight,
        bias=np.array([0, 0, 0.25], np.float32),
        labels=("reddish", "greenish", "bluish"),
        fingerprint=client.manifest.fingerprint,
    )


def test_the_server_serves_a_probe_as_a_classifier(client: Client, tmp_path: Path) -> None:
    served_probe(client).save(tmp_path / "p.npz")
    probe = Probe.load(tmp_path / "p.npz")
    colours = [(5, 5, 250), (250, 5, 5), (5, 250, 5)]
    images = [Image.new("RGB", (80, 70), colour) for colour in colours]
    scores = client.classify(images, probe)
    assert scores.best == ["bluish", "reddish", "greenish"]
    embeddings = client.encode_images(images)
    np.testing.assert_allclose(scores.logits, embeddings @ probe.weight.T + probe.bias, atol=1e-5)
    assert client.classify([], probe).logits.shape == (0, 3)


def test_a_probe_of_other_weights_is_a_contract_error_before_any_image_is_read(
    client: Client,
) -> None:
    probe = replace(served_probe(client), fingerprint="b" * 64)
    with pytest.raises(ContractError, match="bbbbbbbbbbbb") as caught:
        client.classify(["no such file"], probe)
    assert caught.value.expected == "b" * 64
    assert caught.value.found == client.manifest.fingerprint


def test_a_bad_image_keeps_its_index(client: Client) -> None:
    images = [Image.new("RGB", (64, 64)), b"not an image"]
    with pytest.raises(ImageError) as caught:
        client.classify(images, served_probe(client))
    assert caught.value.index == 1
