"""What `decode="fast"` saves and what it changes, and what threads bring, for large JPEGs.

    python -m benchmarks.studies.decoding

Speed: photographs of 12 megapixels, made as `benchmarks.photos` says, exact and fast, on one and on
two threads, by turns. Difference: pixels, embeddings of the bundled model, and embeddings of
ViT-B/32 with random weights, for photographs of three sizes, since the size decides how much is
left out. Both for other values of `clip_rt.inputs.transform.FAST_OVERSAMPLING` too. Accuracy:
drawings that the bundled model never saw, enlarged and saved as JPEG, are named by the client.
"""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image

import clip_rt
from benchmarks import photos
from benchmarks.record import save
from benchmarks.studies.common import show, write_towers
from benchmarks.studies.drawings import TEMPLATES
from benchmarks.studies.emoji import STYLES_DIR, load_style, names
from benchmarks.timing import scaled, speeds, take_rounds, time_each
from clip_rt.embedded.bundled import find_model_repository
from clip_rt.inputs import transform
from clip_rt.inputs.decoding import Decode
from clip_rt.inputs.images import preprocess
from clip_rt.inputs.transform import FAST_OVERSAMPLING
from clip_rt.specs import find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.parity import Encoder, onnx_encoder
from export.pipeline import random_clip
from training.evaluation.embed import on_white

OTHER_OVERSAMPLINGS = (1.0, 2.0)
SIZES = (photos.LARGE_PX, (1920, 1080), photos.SMALL_PX)
SIDE_PX = 224
"""Side of the squares that are timed."""
DRAWING_PX = 1024
"""Side of the enlarged drawings."""
DECODES: tuple[Decode, ...] = ("exact", "fast")
ENCODERS = {"drawings": 64, "ViT-B/32, random weights": SIDE_PX}
"""Side that each encoder reads."""


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """Measure, print tables, and write a dated JSON."""

    num_photos: int = 12
    """Of each size."""
    num_rounds: int = 7
    """Timed rounds of each way."""
    max_drawings: int = 10_000
    """Of each style."""


@contextmanager
def oversampling(factor: float) -> Iterator[None]:
    """Decode fast with another `FAST_OVERSAMPLING`."""
    transform.FAST_OVERSAMPLING = factor
    try:
        yield
    finally:
        transform.FAST_OVERSAMPLING = FAST_OVERSAMPLING


def load_encoders(folder: Path) -> dict[str, Encoder]:
    """Load both, the random one through a file in `folder`."""
    clip = random_clip(find_spec("ViT-B/32"))
    file = write_towers(clip, folder, ["image"])["image"]
    bundled = find_model_repository() / "drawings_image/1/model.onnx"
    return dict(zip(ENCODERS, map(onnx_encoder, (bundled, file)), strict=True))


def measure_speed(files: list[bytes], num_rounds: int) -> dict[str, Any]:
    """Prepare all files in each way, by turns."""
    settings: dict[str, tuple[Decode, int, float]] = {
        f"{decode}, {num_threads} thread{'s' * (num_threads > 1)}": (
            decode,
            num_threads,
            FAST_OVERSAMPLING,
        )
        for decode, num_threads in product(DECODES, (1, 2))
    }
    settings |= {f"fast at {each:g}, 1 thread": ("fast", 1, each) for each in OTHER_OVERSAMPLINGS}

    def prepare(decode: Decode, num_threads: int, factor: float) -> None:
        with oversampling(factor):
            preprocess(files, side_px=SIDE_PX, decode=decode, num_threads=num_threads)

    ways = {name: time_each(partial(prepare, *each)) for name, each in settings.items()}
    times_s = take_rounds(ways, num_rounds)
    return {
        name: {
            "median_ms_per_image": round(scaled(time_s, 1e3 / len(files)).median, 2),
            "speed": round(speed.median, 2),
        }
        for name, (time_s, speed) in speeds(times_s, next(iter(ways))).items()
    }


def compare(
    exact_NSSC: NDArray[np.uint8], fast_NSSC: NDArray[np.uint8], encode: Encoder
) -> dict[str, Any]:
    """Compare pixels, in levels of 255, and embeddings."""
    levels = np.abs(fast_NSSC.astype(np.int16) - exact_NSSC)
    cosines = np.sum(encode(exact_NSSC) * encode(fast_NSSC), axis=1)
    return {
        "mean_levels": round(float(levels.mean()), 3),
        "max_levels": int(levels.max()),
        "bit_equal": round(float(np.mean(levels.max(axis=(1, 2, 3)) == 0)), 3),
        "median_cosine": round(float(np.median(cosines)), 6),
        "min_cosine": round(float(cosines.min()), 6),
    }


def measure_difference(num_photos: int) -> list[dict[str, Any]]:
    """Compare fast with exact for each size, encoder and oversampling."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        encoders = load_encoders(Path(folder))
        for size in SIZES:
            files = photos.jpegs(size, num_photos)
            for name, side_px in ENCODERS.items():
                exact_NSSC = preprocess(files, side_px=side_px)
                for factor in sorted((FAST_OVERSAMPLING, *OTHER_OVERSAMPLINGS)):
                    with oversampling(factor):
                        fast_NSSC = preprocess(files, side_px=side_px, decode="fast")
                    found = compare(exact_NSSC, fast_NSSC, encoders[name])
                    about = {"size_px": size, "encoder": name, "side_px": side_px}
                    rows.append(about | {"oversampling": factor} | found)
    return rows


def enlarge(pixels_NSSC: NDArray[np.uint8]) -> Iterator[bytes]:
    """Yield drawings on white as large JPEGs."""
    for pixels_SSC in pixels_NSSC:
        large = Image.fromarray(pixels_SSC).resize(
            (DRAWING_PX, DRAWING_PX), Image.Resampling.BICUBIC
        )
        file = io.BytesIO()
        large.save(file, "JPEG", quality=photos.JPEG_QUALITY, subsampling="4:2:0")
        yield file.getvalue()


def measure_accuracy(max_drawings: int) -> dict[str, Any]:
    """Name the drawings of each held-out style among all names of the style."""
    results = {}
    for style in sorted(path.stem for path in STYLES_DIR.glob("*.tar")):
        drawings = load_style(style)
        labels = sorted(set(names(drawings)))
        right_N = np.array([labels.index(name) for name in names(drawings)])[:max_drawings]
        white_NSSC = on_white(drawings.pixels[:max_drawings])
        guesses_N, embeddings_NE = {}, {}
        for decode in DECODES:
            with clip_rt.Client(repository=find_model_repository(), decode=decode) as client:
                classes_CE = client.class_embeddings(labels, templates=TEMPLATES, timeout_s=600)
                found_NE = client.encode_images(enlarge(white_NSSC), timeout_s=3600)
            embeddings_NE[decode] = found_NE
            guesses_N[decode] = np.argmax(found_NE @ classes_CE.T, axis=1)
        cosines_N = np.sum(embeddings_NE["exact"] * embeddings_NE["fast"], axis=1)
        results[style] = {
            "num_drawings": len(right_N),
            "num_labels": len(labels),
            **{
                f"top1_{decode}": round(float(np.mean(guesses_N[decode] == right_N)), 4)
                for decode in DECODES
            },
            "same_guess": round(float(np.mean(guesses_N["exact"] == guesses_N["fast"])), 4),
            "median_cosine": round(float(np.median(cosines_N)), 6),
            "min_cosine": round(float(cosines_N.min()), 6),
        }
    return results


def main(config: DecodingConfig) -> None:
    """Measure speed, difference and accuracy."""
    torch.set_num_threads(2)
    files = photos.jpegs(SIZES[0], config.num_photos)
    speed = measure_speed(files, config.num_rounds)
    show(("way", "ms", "speed"), [(name, *row.values()) for name, row in speed.items()])
    difference = measure_difference(config.num_photos)
    figures = ("side_px", "oversampling", "mean_levels", "min_cosine")
    show(
        ("photograph", "side", "oversampling", "levels", "cosine, least"),
        [
            ("x".join(map(str, row["size_px"])), *(row[each] for each in figures))
            for row in difference
        ],
    )
    accuracy = measure_accuracy(config.max_drawings)
    show(
        ("style", "top-1 exact", "top-1 fast", "same guess"),
        [
            (name, row["top1_exact"], row["top1_fast"], row["same_guess"])
            for name, row in accuracy.items()
        ],
    )
    document = {
        "photos": photos.describe(),
        "mean_megabytes": round(statistics.mean(map(len, files)) / 1e6, 2),
        "num_photos": config.num_photos,
        "oversampling": FAST_OVERSAMPLING,
        "side_px": SIDE_PX,
        "speed": speed,
        "difference": difference,
        "drawing_px": DRAWING_PX,
        "accuracy": accuracy,
    }
    packages = ("numpy", "onnxruntime", "pillow", "scikit-image")
    save("studies.decoding", document, packages=packages)


if __name__ == "__main__":
    with command():
        main(tyro.cli(DecodingConfig, prog=program(__spec__.name), description=__doc__))
