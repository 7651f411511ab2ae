"""The cases of each suite: which items go into a call. The same for every contender and run.

Pictures are of `benchmarks.photos`. Texts are sentences of everyday words, made so that they have
the number of tokens that a case is named for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks import photos
from benchmarks.contenders.implementation import TEMPLATES
from benchmarks.findings import CallKind
from benchmarks.photos import LARGE_PX, SMALL_PX
from clip_rt.inputs import prompts, tokenizer

NUM_LABELS = 100
"""Of zero_shot; they are known already when the time is taken."""
NUM_CLASSES = 8
"""Of the classifier that all make in every round."""
NOUNS = tuple(
    "cat dog horse cow sheep pig goat duck bird fish bear lion tiger wolf fox deer mouse rabbit "
    "frog snake boat ship train car bus truck bike plane house church bridge tower chair table "
    "bed lamp clock phone book pen cup plate bowl spoon knife fork bottle glass apple banana "
    "orange lemon cherry peach bread cheese cake pizza soup salad tree flower grass leaf rose "
    "sun moon star cloud rain snow storm beach river lake island mountain hill forest desert "
    "road street park garden farm city village castle school shop market kitchen hat shirt shoe "
    "dress coat ring watch ball guitar piano drum".split()
)
"""One token each, so that "a photo of a {}." has 8."""
ADJECTIVES = tuple(
    "red green blue black white yellow old new small large tall happy sad wet dry bright dark "
    "quiet wooden round".split()
)
PLACES = ("near", "behind", "under", "above", "beside", "with", "on", "in")


@dataclass(frozen=True)
class Case:
    """What a row is about."""

    suite: str
    name: str
    call: CallKind
    items: Any
    """pixels: uint8 (N, S, S, 3); jpegs: N files as bytes; texts: N strings; classifier: labels;
    zero_shot: (N files as bytes, labels)."""
    unit: Literal["images", "texts", "classes"]
    is_quick: bool = False
    """Whether it is among those of a quick run."""

    @property
    def num_items(self) -> int:
        """How many of `unit` one call answers."""
        return len(self.items[0]) if self.call == "zero_shot" else len(self.items)

    @property
    def key(self) -> str:
        """What a contender knows its items by."""
        return f"{self.suite}: {self.name}"


def photo_pixels(side_px: int, num: int) -> NDArray[np.uint8]:
    """Return photographs as a model reads them, uint8 (num, S, S, 3)."""
    return np.stack(list(clip_rt.preprocess(photos.jpegs(SMALL_PX, num), side_px=side_px)))


def image_cases(side_px: int) -> Iterable[Case]:
    """Make the cases of the suite `image`: pixels in batches."""
    pixels = photo_pixels(side_px, 64)
    for rows in (1, 8, 32, 64):
        yield Case("image", f"batch {rows}", "pixels", pixels[:rows], "images", rows <= 8)


def text_cases() -> Iterable[Case]:
    """Make the cases of the suite `text`: strings of few and many tokens."""
    short = short_texts(32)
    for name, texts in (
        ("1 of 8 tokens", short[:1]),
        ("32 of 8 tokens", short),
        ("32 of up to 16 tokens", texts_of(range(9, 17), 32)),
        ("32 of 17 to 32 tokens", texts_of(range(17, 33), 32)),
        ("8 of 77 tokens", texts_of(range(77, 78), 8)),
    ):
        # open_clip pads to 77 tokens; 32 of them would be a sixth of a quick run.
        yield Case("text", name, "texts", texts, "texts", is_quick=len(texts) == 1)


def jpeg_cases(*, with_large: bool) -> Iterable[Case]:
    """Make the cases of the suite `jpeg`: encoded files in, embeddings out."""
    sizes = [(SMALL_PX, 1, True), (SMALL_PX, 64, False)]
    if with_large:
        sizes.append((LARGE_PX, 8, False))
    for (wide, high), num, is_quick in sizes:
        files = photos.jpegs((wide, high), num)
        yield Case("jpeg", f"{num} of {wide}x{high}", "jpegs", files, "images", is_quick)


def zero_shot_cases() -> Iterable[Case]:
    """Make the cases of the suite `zero_shot`: encoded files against labels that are known."""
    for num in (1, 32):
        items = photos.jpegs(SMALL_PX, num), list(NOUNS[:NUM_LABELS])
        name = f"{num} of 640x480, {NUM_LABELS} labels"
        yield Case("zero_shot", name, "zero_shot", items, "images", is_quick=num == 1)


def classifier_case(labels: Sequence[str], num_classes: int) -> Case:
    """Make a case of the suite `classifier`: `num_classes` of the labels, from all over the list.

    Their prompts are as long as those of the list, so its whole takes in proportion as long.
    """
    chosen = np.linspace(0, len(labels), num_classes, endpoint=False, dtype=int)
    name = f"{num_classes} classes x {len(prompts.find_templates(TEMPLATES))}, cold"
    return Case("classifier", name, "classifier", [labels[row] for row in chosen], "classes")


def short_texts(num: int) -> list[str]:
    """Return `num` different texts of 8 tokens each, start and end included."""
    if num > len(NOUNS):
        raise ValueError(f"{num} short texts; there are {len(NOUNS)}.")
    return [f"a photo of a {noun}." for noun in NOUNS[:num]]


def texts_of(lengths: range, num: int) -> list[str]:
    """Return `num` different texts whose numbers of tokens are spread over `lengths`."""
    rng = np.random.default_rng(0)
    texts = []
    for number in range(num):
        wanted = lengths[number * len(lengths) // num]
        words = ["a", "photo", "of"]
        while len(words) < wanted:
            if len(words) > 3:
                words.append(str(rng.choice(PLACES)))
            words += ["a", str(rng.choice(ADJECTIVES)), str(rng.choice(NOUNS))]
        # Every word is one token; two more are the start and the end.
        texts.append(" ".join(words[: wanted - 2]))
    return texts


def count_tokens(texts: Sequence[str]) -> list[int]:
    """Return the tokens of each text, start and end included, without padding."""
    return [len(ids) for ids in tokenizer.encode(list(texts))]
