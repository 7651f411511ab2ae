"""What CLIP models get wrong, measured on the bundled one: people, written words, details, counts.

    python -m benchmarks.studies.mistakes

Each part is a small task on drawings of a style that the model never saw: drawings of men and women
with the same profession or occupation (Radford et al. 2021, section 7.1), drawings with the word
for something else written on them (Goh et al. 2021, "Multimodal Neurons in Artificial Neural
Networks"), things told from others of their kind, and one to five of a thing. Every embedding comes
from the real Triton through `clip_rt.Client`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import clip_rt
from benchmarks.record import save
from benchmarks.studies.common import ROOT, show
from benchmarks.studies.drawings import TEMPLATES, pictures
from benchmarks.studies.emoji import kind_by_hexcode, load_style, names
from clip_rt.calibration.groups import compare_groups
from clip_rt.moderation.curve import measure_share
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.data.drawing_batches import Drawings

STYLE = "openmoji"
GROUPS = ("man", "woman")
NUM_WORDS = 100
"""Labels of the task with written words."""
MAX_WORD = 8
"""Letters that can still be read on an image of the bundled model, which is 64 px wide."""
COUNTS = ("one", "two", "three", "four", "five")
NUM_NOUNS = 100
SIDE_PX = 256
"""Of images that are drawn on, before the client makes them small."""
Picture = NDArray[np.uint8]
Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MistakesConfig:
    """Measure, print a table, and write a dated JSON."""

    repository: Path = ROOT / "model_repository"
    """Model repository to serve."""
    seed: int = 0
    """Of the words and nouns that are drawn."""


def share(is_right: Sequence[bool] | NDArray[np.bool_]) -> Figures:
    """Return a share with its 95 % interval and its number of images."""
    found = measure_share(int(np.sum(is_right)), len(is_right))
    assert found is not None
    return {"share": found.value, "low": found.low, "high": found.high, "images": len(is_right)}


def answer(client: clip_rt.Client, images: Sequence[Picture], labels: Sequence[str]) -> list[str]:
    """Return the best label of each image."""
    return client.zero_shot(list(images), labels, templates=TEMPLATES).best


def measure_people(client: clip_rt.Client, images: dict[str, Picture]) -> Figures:
    """Return how often drawings of men and of women get the right occupation, and each label.

    Of drawings of the same occupations that are of neither, how often they are called a man.
    """
    occupations = [
        name.removeprefix("man ")
        for name in images
        if name.startswith("man ") and f"woman {name.removeprefix('man ')}" in images
    ]
    shown = [(group, each) for group in GROUPS for each in occupations]
    answers = answer(client, [images[f"{group} {each}"] for group, each in shown], occupations)
    is_right = np.array([given == each for given, (_, each) in zip(answers, shown, strict=True)])
    group_N = np.array([group for group, _ in shown])
    given_NC = np.array(answers)[:, None] == np.array(occupations)
    labels = compare_groups(given_NC, occupations, group_N.tolist())
    right = compare_groups(is_right[:, None], ["right"], group_N.tolist())
    neutral = [
        images[name] for each in occupations for name in (each, f"person {each}") if name in images
    ]
    called = np.array(answer(client, neutral, GROUPS))
    gaps = np.abs(labels.num_given[0] - labels.num_given[1])
    widest = int(gaps.argmax())
    return {
        "occupations": len(occupations),
        **{f"right of {group}": share(is_right[group_N == group]) for group in GROUPS},
        "right: p of equal rates": float(right.p_values[0, 1, 0]),
        "neutral, called a man": share(called == "man"),
        "labels that differ": int(labels.differs[0, 1].sum()),
        "widest gap": {
            "label": occupations[widest],
            **dict(zip(labels.groups, labels.num_given[:, widest].tolist(), strict=True)),
        },
    }


def enlarge(image: Picture) -> Image.Image:
    """Return a drawing as an image to draw on."""
    return Image.fromarray(image).resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)


def write_word(image: Picture, word: str) -> Picture:
    """Write a word in black on a white band across the lower part; "" leaves the band empty."""
    picture = enlarge(image)
    pen = ImageDraw.Draw(picture)
    top = SIDE_PX * 5 // 8
    pen.rectangle((0, top, SIDE_PX, SIDE_PX), "white")
    if word:
        size = 90.0
        while pen.textlength(word, ImageFont.load_default(size)) > SIDE_PX - 16:
            size -= 2
        font = ImageFont.load_default(size)
        pen.text((SIDE_PX / 2, (top + SIDE_PX) / 2), word, "black", font, anchor="mm")
    return np.asarray(picture)


def measure_words(
    client: clip_rt.Client, images: dict[str, Picture], rng: np.random.Generator
) -> Figures:
    """Return what a written word does to answers, beside an empty band of the same size."""
    short = sorted(name for name in images if name.isalpha() and len(name) <= MAX_WORD)
    labels = rng.choice(short, min(NUM_WORDS, len(short)), replace=False).tolist()
    # Each has the word for the next.
    words = [*labels[1:], labels[0]]
    pairs = list(zip(labels, words, strict=True))
    answers = {
        "plain": answer(client, [images[each] for each in labels], labels),
        "empty band": answer(client, [write_word(images[each], "") for each in labels], labels),
        "word": answer(client, [write_word(images[each], word) for each, word in pairs], labels),
    }
    return {
        way: {
            "right": share([g == each for g, each in zip(given, labels, strict=True)]),
            "the written word": share([g == word for g, word in zip(given, words, strict=True)]),
        }
        for way, given in answers.items()
    }


def measure_details(
    client: clip_rt.Client, drawings: Drawings, rng: np.random.Generator
) -> Figures:
    """Return how often names of the same kind are told apart, and as many of other kinds."""
    kinds, kind_by_code = kind_by_hexcode()
    called = names(drawings)
    kind_N = np.array([kind_by_code.get(record["emoji"], -1) for record in drawings.records])
    cosine_NN = (
        client.encode_images(pictures(drawings))
        @ client.class_embeddings(called, templates=TEMPLATES).T
    )
    found: Figures = {}
    all_same: list[bool] = []
    all_other: list[bool] = []
    for number, kind in enumerate(kinds):
        members, strangers = np.flatnonzero(kind_N == number), np.flatnonzero(kind_N != number)
        same, other = [], []
        for row in members:
            rest = members[members != row]
            drawn = rng.choice(strangers, len(rest), replace=False)
            own = cosine_NN[row, row]
            same.append(bool((cosine_NN[row, rest] < own).all()))
            other.append(bool((cosine_NN[row, drawn] < own).all()))
        found[kind] = {"among its kind": share(same), "among others": share(other)}
        all_same += same
        all_other += other
    return {"all kinds": {"among its kind": share(all_same), "among others": share(all_other)}} | (
        found
    )


def repeat(image: Picture, count: int) -> Picture:
    """Return an image with a drawing once or several times, in rows of three at most."""
    side = SIDE_PX // 3
    small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
    rows = [range(start, min(start + 3, count)) for start in range(0, count, 3)]
    top = (SIDE_PX - side * len(rows)) // 2
    for number, row in enumerate(rows):
        left = (SIDE_PX - side * len(row)) // 2
        for place in range(len(row)):
            picture.paste(small, (left + side * place, top + side * number))
    return np.asarray(picture)


def measure_counts(
    client: clip_rt.Client, images: dict[str, Picture], rng: np.random.Generator
) -> Figures:
    """Return how often the number of things is right, of one to five."""
    nouns = sorted(name for name in images if name.isalpha() and name.islower())
    nouns = rng.choice(nouns, min(NUM_NOUNS, len(nouns)), replace=False).tolist()
    is_right: list[list[bool]] = [[] for _ in COUNTS]
    for noun in nouns:
        labels = [f"{word} {noun}{'s' if index else ''}" for index, word in enumerate(COUNTS)]
        shown = [repeat(images[noun], index + 1) for index in range(len(COUNTS))]
        for index, given in enumerate(answer(client, shown, labels)):
            is_right[index].append(given == labels[index])
    return {
        **{word: share(rows) for word, rows in zip(COUNTS, is_right, strict=True)},
        "all": share(np.array(is_right).ravel()),
        "chance": 1 / len(COUNTS),
    }


def main(config: MistakesConfig) -> None:
    """Measure each part, print it, and write all."""
    drawings = load_style(STYLE)
    images = dict(zip(names(drawings), pictures(drawings), strict=True))
    rng = np.random.default_rng(config.seed)
    with clip_rt.Client(repository=config.repository, timeout_s=300.0) as client:
        results = {
            "people": measure_people(client, images),
            "written words": measure_words(client, images, rng),
            "details": measure_details(client, drawings, rng),
            "counts": measure_counts(client, images, rng),
        }
    for part, figures in results.items():
        show(("what", "figure"), _flatten(figures), title=part)
    document = {"style": STYLE, "templates": TEMPLATES, "results": results}
    packages = ("numpy", "pillow", "scipy", "onnxruntime", "openvino")
    save("studies.mistakes", document, packages=packages)


def _flatten(figures: Figures, before: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in figures.items():
        if isinstance(value, dict) and "share" in value:
            text = "{share:.3f} ({low:.3f} to {high:.3f}), {images} images".format(**value)
            rows.append((before + name, text))
        elif isinstance(value, dict):
            rows += _flatten(value, f"{before}{name}: ")
        else:
            rows.append((before + name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return rows


if __name__ == "__main__":
    with command():
        main(tyro.cli(MistakesConfig, prog=program(__spec__.name), description=__doc__))
