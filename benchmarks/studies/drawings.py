"""How well the bundled model names drawings, as served, beside simple baselines.

    python -m benchmarks.studies.drawings          # the model, on what is held out
    python -m benchmarks.studies.drawings --baselines data/drawings/train    # and its baselines

Every embedding comes from the real Triton through `clip_rt.Client`. The shards of what was held
out come with the code (`training/sample`); the baselines also need the training shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

import clip_rt
from benchmarks.record import save
from benchmarks.studies.common import ROOT, show
from benchmarks.studies.emoji import HELD_OUT_DIR, load, load_style, names
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.data.drawing_batches import Drawings, load_drawings
from training.drawings import EMOJI_SETS, FLAG_SETS, HELD_OUT_ICON_SETS
from training.evaluation.embed import on_white
from training.evaluation.metrics import accuracy

TEMPLATES = ["{}", "an emoji of {}", "a drawing of {}"]
EMOJI_STYLES = ("openmoji", "openmoji-black")
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class DrawingsConfig:
    """Measure, print a table, and write a dated JSON."""

    repository: Path = ROOT / "model_repository"
    """Model repository to serve."""
    baselines: Path | None = None
    """Folder of the training shards; measures baselines too."""


def pictures(drawings: Drawings) -> list[NDArray[np.uint8]]:
    """Return the RGB images of drawings on white."""
    return [np.ascontiguousarray(rgba[:, :, :3]) for rgba in drawings.pixels]


def zero_shot(
    client: clip_rt.Client, drawings: Drawings, labels: Sequence[str]
) -> dict[str, float]:
    """Measure zero-shot accuracy of drawings whose names are among `labels`."""
    index = {label: position for position, label in enumerate(labels)}
    right_N = np.array([index[name] for name in names(drawings)])
    class_CE = client.class_embeddings(labels, templates=TEMPLATES)
    found = accuracy(client.encode_images(pictures(drawings)) @ class_CE.T, right_N)
    return {
        "top1": found.top1,
        "top5": found.top5,
        "images": found.num_images,
        "classes": found.num_classes,
        "chance": found.chance,
    }


def measure_model(client: clip_rt.Client) -> Figures:
    """Measure every held-out style, every held-out name, and retrieval in held-out icon sets."""
    styles = {style: load_style(style) for style in EMOJI_STYLES}
    labels = names(styles["openmoji"])
    seen_styles = [load(path) for path in sorted((HELD_OUT_DIR / "names").glob("*.tar"))]
    unseen = sorted({name for drawings in seen_styles for name in names(drawings)})
    results = {}
    for style, drawings in styles.items():
        results[f"{style}, all names"] = zero_shot(client, drawings, labels)
        results[f"{style}, unseen names among themselves"] = zero_shot(
            client, only(drawings, unseen), unseen
        )
    seen = Drawings(
        np.concatenate([drawings.pixels for drawings in seen_styles]),
        [record for drawings in seen_styles for record in drawings.records],
    )
    results["seen hands, unseen names among themselves"] = zero_shot(client, seen, unseen)
    for icon_set in HELD_OUT_ICON_SETS:
        drawings = load_style(icon_set)
        labels = sorted(set(names(drawings)))
        results[f"{icon_set}, name of a drawing"] = zero_shot(client, drawings, labels)
    return results


def only(drawings: Drawings, wanted: Sequence[str]) -> Drawings:
    """Keep the drawings of some names."""
    keep = [row for row, name in enumerate(names(drawings)) if name in set(wanted)]
    return Drawings(drawings.pixels[keep], [drawings.records[row] for row in keep])


def measure_baselines(train_dir: Path) -> Figures:
    """Fit each baseline on the emoji and flags the model learned from; test on the new styles."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

    wanted = {*EMOJI_SETS, *FLAG_SETS}
    train = load_drawings(sorted(path for path in train_dir.glob("*.tar") if path.stem in wanted))
    train_y = np.array(names(train))
    white = list(on_white(train.pixels))
    features = {"16x16 pixels": small_pixels, "HOG": hog_features}
    train_x = {name: make(white) for name, make in features.items()}
    classifiers: dict[str, tuple[str, Any]] = {
        "nearest neighbour on 16x16 pixels": ("16x16 pixels", KNeighborsClassifier(1)),
        "nearest centroid of HOG": ("HOG", NearestCentroid()),
        "linear classifier on HOG": ("HOG", RidgeClassifier(alpha=10.0)),
    }
    results = {}
    for title, (feature, classifier) in classifiers.items():
        classifier.fit(train_x[feature], train_y)
        for style in EMOJI_STYLES:
            test = load_style(style)
            right = classifier.predict(features[feature](pictures(test))) == np.array(names(test))
            results[f"{style}, {title}"] = {"top1": float(right.mean()), "images": len(right)}
    return results


def small_pixels(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Shrink each image to 16x16 and flatten it; float32 (N, 768) in [0, 1]."""
    small = [np.asarray(Image.fromarray(image).resize((16, 16))) for image in images]
    return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255


def hog_features(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Histograms of oriented gradients of the grey image, 8 px cells; float32 (N, 1764)."""
    from skimage.feature import hog

    cells = {"pixels_per_cell": (8, 8), "cells_per_block": (2, 2)}
    grey = (np.asarray(Image.fromarray(image).convert("L")) for image in images)
    rows = [hog(each, **cells) for each in track(grey, "HOG", total=len(images))]
    return np.stack(rows).astype(np.float32)


def main(config: DrawingsConfig) -> None:
    """Measure the model, and the baselines where there are training shards."""
    with clip_rt.Client(repository=config.repository, model="drawings", timeout_s=300.0) as client:
        results = measure_model(client)
    if config.baselines:
        results |= measure_baselines(config.baselines)
    formats = {"top1": ".3f", "top5": ".3f", "chance": ".4f", "images": ""}
    show(
        ("what", "top-1", "top-5", "chance", "images"),
        [
            (what, *(format(row[key], form) if key in row else "" for key, form in formats.items()))
            for what, row in results.items()
        ],
        title="named drawings",
    )
    packages = ("numpy", "onnxruntime", "pillow", "tritonclient", "nvidia-pytriton")
    save("studies.drawings", {"templates": TEMPLATES, "results": results}, packages=packages)


if __name__ == "__main__":
    with command():
        main(tyro.cli(DrawingsConfig, prog=program(__spec__.name), description=__doc__))
