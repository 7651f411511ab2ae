import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from training.augment import augment
from training.data import DrawingBatches, Drawings, caption, cut_tokens, load_drawings

SAMPLE = Path(__file__).resolve().parents[2] / "training/sample"


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return load_drawings([SAMPLE / "train/sample.tar"], progress=False)


def batches(drawings: Drawings, seed: int) -> DrawingBatches:
    return DrawingBatches(drawings, batch_size=16, emoji_fraction=0.5, context_length=77, seed=seed)


def test_the_same_seed_gives_the_same_batches(drawings: Drawings) -> None:
    for one, two in zip(
        islice(batches(drawings, 3), 2), islice(batches(drawings, 3), 2), strict=True
    ):
        assert torch.equal(one.image_BCSS, two.image_BCSS)
        assert torch.equal(one.tokens_BL, two.tokens_BL)
    other = next(iter(batches(drawings, 4)))
    assert not torch.equal(next(iter(batches(drawings, 3))).image_BCSS, other.image_BCSS)


def test_drawings_of_one_name_share_a_group() -> None:
    record = {"aliases": [], "keywords": [], "emoji": None, "palette": True}
    names = ["Alarm clock", "alarm-clock", "cat"]
    drawings = Drawings(
        np.zeros((3, 8, 8, 4), np.uint8), [{**record, "name": name} for name in names]
    )
    stream = DrawingBatches(drawings, batch_size=3, emoji_fraction=0, context_length=77, seed=0)
    group = sorted(next(iter(stream)).group_B.tolist())
    assert group == [0, 0, 1]


def test_captions_say_the_name_or_what_else_it_is_called() -> None:
    record = {"name": "pizza", "aliases": ["slice"], "keywords": ["food"], "emoji": "1F355"}
    texts = {caption(record, random.Random(seed)) for seed in range(300)}
    assert {"pizza", "slice", "pizza, food", "food", "an icon of pizza"} <= texts
    assert all(any(word in text for word in ("pizza", "slice", "food")) for text in texts)


def test_columns_that_only_pad_are_cut() -> None:
    tokens = cut_tokens(["a cat", "a very small cat"], context_length=77)
    assert tokens.shape == (2, 6)
    assert cut_tokens(["word " * 100], context_length=24).shape == (1, 24)


def test_augmentation_keeps_one_colour_drawings_visible() -> None:
    rgba = torch.zeros(64, 16, 16, 4, dtype=torch.uint8)
    rgba[:, 4:12, 4:12, 3] = 255  # a black square on nothing
    image = augment(rgba, torch.zeros(64, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert image.shape == (64, 3, 16, 16)
    assert torch.isfinite(image).all()
    contrast = image.amax(dim=(2, 3)) - image.amin(dim=(2, 3))
    assert (contrast.amax(dim=1) > 0.5).all()
