"""How well the bundled model names drawings, as served, beside simple baselines.

    python -m benchmarks.drawings                                   # the model, on what is held out
    python -m benchmarks.drawings --baselines data/drawings/train   # and what it is held against

Every embedding comes from the real Triton through `clip_rt.Client`. The shards of what was held
out come with the code (`training/sample`); the baselines also need the training shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

import clip_rt
from benchmarks.record import save
from training.data.drawing_batches import Drawings, load_drawings
from training.drawings import EMOJI_SETS, FLAG_SETS, HELD_OUT_ICON_SETS

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT_DIR = ROOT / "training/sample"
TEMPLATES = ["{}", "an emoji of {}", "a drawing of {}"]
EMOJI_STYLES = ("openmoji", "openmoji-black")
CHUNK = 256


def pictures(drawings: Drawings) -> list[NDArray[np.uint8]]:
    """Return the RGB images of drawings on white."""
    return [np.ascontiguousarray(rgba[:, :, :3]) for rgba in drawings.pixels]


def names(drawings: Drawings) -> list[str]:
    """Return what each drawing is called."""
    return [record["name"] for record in drawings.records]


def accuracy(
    images: NDArray[np.float32], classes: NDArray[np.float32], right: NDArray[np.int64]
) -> dict[str, float]:
    """Rank classes for each image; `right` is the row of its own class."""
    cosine = images @ classes.T
    rank = (cosine > cosine[np.arange(len(right)), right][:, None]).sum(axis=1)
    return {
        "top1": float((rank < 1).mean()),
        "top5": float((rank < 5).mean()),
        "images": len(right),
        "classes": len(classes),
        "chance": 1 / len(classes),
    }


def zero_shot(
    client: clip_rt.Client, drawings: Drawings, labels: Sequence[str]
) -> dict[str, float]:
    """Measure zero-shot accuracy of drawings whose names are among `labels`."""
    index = {label: position for position, label in enumerate(labels)}
    right = np.array([index[name] for name in names(drawings)])
    classes = client.class_embeddings(labels, templates=TEMPLATES)
    return accuracy(client.encode_images(pictures(drawings)), classes, right)


def measure_model(client: clip_rt.Client) -> dict[str, dict[str, float]]:
    """Measure every held-out style, every held-out name, and retrieval in held-out icon sets."""
    styles = {style: load(HELD_OUT_DIR / f"styles/{style}.tar") for style in EMOJI_STYLES}
    labels = names(styles["openmoji"])
    hands = {path.stem: load(path) for path in sorted((HELD_OUT_DIR / "names").glob("*.tar"))}
    unseen = sorted({name for drawings in hands.values() for name in names(drawings)})
    results = {}
    for style, drawings in styles.items():
        results[f"{style}, all names"] = zero_shot(client, drawings, labels)
        results[f"{style}, unseen names among themselves"] = zero_shot(
            client, only(drawings, unseen), unseen
        )
    seen_hands = Drawings(
        np.concatenate([drawings.pixels for drawings in hands.values()]),
        [record for drawings in hands.values() for record in drawings.records],
    )
    results["seen hands, unseen names among themselves"] = zero_shot(client, seen_hands, unseen)
    for icon_set in HELD_OUT_ICON_SETS:
        drawings = load(HELD_OUT_DIR / f"styles/{icon_set}.tar")
        labels = sorted(set(names(drawings)))
        results[f"{icon_set}, name of a drawing"] = zero_shot(client, drawings, labels)
    return results


def load(path: Path) -> Drawings:
    """Read one shard."""
    return load_drawings([path], progress=False)


def only(drawings: Drawings, wanted: Sequence[str]) -> Drawings:
    """Keep the drawings of some names."""
    keep = [row for row, name in enumerate(names(drawings)) if name in set(wanted)]
    return Drawings(drawings.pixels[keep], [drawings.records[row] for row in keep])


def measure_baselines(train_dir: Path) -> dict[str, dict[str, float]]:
    """Fit each baseline on the emoji and flags the model learned from; test on the new hands."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

    wanted = {*EMOJI_SETS, *FLAG_SETS}
    train = load_drawings(sorted(path for path in train_dir.glob("*.tar") if path.stem in wanted))
    train_y = np.array(names(train))
    white = [on_white(rgba) for rgba in train.pixels]
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
            test = load(HELD_OUT_DIR / f"styles/{style}.tar")
            guesses = classifier.predict(features[feature](pictures(test)))
            right = guesses == np.array(names(test))
            results[f"{style}, {title}"] = {"top1": float(right.mean()), "images": len(right)}
    return results


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Flatten a drawing on nothing onto white."""
    canvas = Image.new("RGBA", (rgba.shape[1], rgba.shape[0]), "white")
    canvas.alpha_composite(Image.fromarray(rgba, "RGBA"))
    return np.asarray(canvas.convert("RGB"))


def small_pixels(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Shrink each image to 16x16 and flatten it; float32 (N, 768) in [0, 1]."""
    small = [np.asarray(Image.fromarray(image).resize((16, 16))) for image in images]
    return np.stack(small).reshape(len(small), -1).astype(np.float32) / 255


def hog_features(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Histograms of oriented gradients of the grey image, 8 px cells; float32 (N, 1764)."""
    from skimage.feature import hog

    rows = [
        hog(
            np.asarray(Image.fromarray(image).convert("L")),
            pixels_per_cell=(8, 8),
            cells_per_block=(2, 2),
        )
        for image in track(images, description="HOG")
    ]
    return np.stack(rows).astype(np.float32)


def show(results: dict[str, dict[str, float]]) -> None:
    """Print a table of the figures."""
    table = Table("what", "top-1", "top-5", "chance", "images", title="named drawings")
    for title, row in results.items():
        cells = [f"{row[key]:.3f}" if key in row else "" for key in ("top1", "top5")]
        chance = f"{row['chance']:.4f}" if "chance" in row else ""
        table.add_row(title, *cells, chance, str(row["images"]))
    Console().print(table)


def main(
    repository: Annotated[Path, typer.Option(help="Model repository to serve.")] = ROOT
    / "model_repository",
    baselines: Annotated[
        Path | None, typer.Option(help="Folder of the training shards; measures baselines too.")
    ] = None,
) -> None:
    """Measure, print a table, and write a dated JSON."""
    with clip_rt.Client(repository=repository, model="drawings", timeout_s=300.0) as client:
        results = measure_model(client)
    if baselines:
        results |= measure_baselines(baselines)
    show(results)
    path = save(
        "drawings",
        {"templates": TEMPLATES, "results": results},
        packages=("numpy", "onnxruntime", "pillow", "tritonclient", "nvidia-pytriton"),
    )
    Console().print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
