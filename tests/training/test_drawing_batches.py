import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tar_shards import write_tar

from clip_rt.errors import InputError
from training.data.augment import Dice, augment
from training.data.batches import Batch
from training.data.drawing_batches import DrawingBatches, Drawings, caption, load_drawings

SAMPLE = Path(__file__).resolve().parents[2] / "training/sample"


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return load_drawings([SAMPLE / "train/sample.tar"], progress=False)


def make_batches(drawings: Drawings, seed: int, batch_size: int = 16) -> DrawingBatches:
    return DrawingBatches(
        drawings, batch_size=batch_size, emoji_fraction=0.5, context_length=77, seed=seed
    )


def same(one: Batch, two: Batch) -> bool:
    return (
        torch.equal(one.image_BCSS, two.image_BCSS)
        and torch.equal(one.tokens_BL, two.tokens_BL)
        and torch.equal(one.group_B, two.group_B)
    )


def test_the_same_seed_gives_the_same_batches(drawings: Drawings) -> None:
    ones, twos = (list(islice(make_batches(drawings, 3).stream(0), 2)) for _ in range(2))
    assert same(ones[0], twos[0])
    assert same(ones[1], twos[1])
    assert not same(ones[0], ones[1])
    assert not same(ones[0], next(make_batches(drawings, 4).stream(0)))


@pytest.mark.parametrize("step", [1, 15, 700])  # 15: long captions; 700: another epoch
def test_a_batch_does_not_depend_on_what_was_read_before(drawings: Drawings, step: int) -> None:
    batches = make_batches(drawings, 3)
    wanted = next(islice(batches.stream(step - 1), 1, None))
    assert same(wanted, next(batches.stream(step)))
    assert same(wanted, next(make_batches(drawings, 3).stream(step)))


@pytest.mark.parametrize("world_size", [2, 3, 24])
def test_ranks_read_the_batch_of_a_single_process_bit_for_bit(
    drawings: Drawings, world_size: int
) -> None:
    batches = make_batches(drawings, 5, batch_size=48)
    for step in (0, 15):
        whole = next(batches.stream(step))
        for rank in range(world_size):
            part = next(make_batches(drawings, 5, batch_size=48).stream(
                step, rank=rank, world_size=world_size
            ))  # fmt: skip
            assert torch.equal(part.image_BCSS, whole.image_BCSS[rank::world_size])
            assert torch.equal(part.group_B, whole.group_B[rank::world_size])
            used = part.tokens_BL.shape[1]
            assert torch.equal(part.tokens_BL, whole.tokens_BL[rank::world_size, :used])
            assert not whole.tokens_BL[rank::world_size, used:].any()


def test_an_epoch_shows_every_drawing_once(drawings: Drawings) -> None:
    few = Drawings(drawings.pixels[:32], [{**r, "emoji": None} for r in drawings.records[:32]])
    batches = DrawingBatches(few, batch_size=8, emoji_fraction=0, context_length=77, seed=0)
    groups = torch.cat([batch.group_B for batch in islice(batches.stream(0), 4)])
    names = torch.unique(batches._group, return_counts=True)[1]
    assert torch.equal(torch.unique(groups, return_counts=True)[1], names)


def test_a_set_without_emoji_fills_the_batch_with_icons(drawings: Drawings) -> None:
    icons = [i for i, record in enumerate(drawings.records) if record["emoji"] is None]
    few = Drawings(drawings.pixels[icons], [drawings.records[i] for i in icons])
    assert len(next(make_batches(few, 0).stream(0)).group_B) == 16


def test_drawings_of_one_name_share_a_group() -> None:
    record = {"aliases": [], "keywords": [], "emoji": None, "palette": True}
    names = ["Alarm clock", "alarm-clock", "cat"]
    drawings = Drawings(
        np.zeros((3, 8, 8, 4), np.uint8), [{**record, "name": name} for name in names]
    )
    batches = DrawingBatches(drawings, batch_size=3, emoji_fraction=0, context_length=77, seed=0)
    assert sorted(next(batches.stream(0)).group_B.tolist()) == [0, 0, 1]


def test_captions_say_the_name_or_what_else_it_is_called() -> None:
    record = {"name": "pizza", "aliases": ["slice"], "keywords": ["food"], "emoji": "1F355"}
    texts = {caption(record, random.Random(seed)) for seed in range(300)}
    assert {"pizza", "slice", "pizza, food", "food", "an icon of pizza"} <= texts
    assert all(any(word in text for word in ("pizza", "slice", "food")) for text in texts)


def test_augmentation_keeps_one_colour_drawings_visible() -> None:
    rgba = torch.zeros(64, 16, 16, 4, dtype=torch.uint8)
    rgba[:, 4:12, 4:12, 3] = 255  # a black square on nothing
    dice = Dice(torch.Generator().manual_seed(0), batch_size=64)
    image = augment(rgba, torch.zeros(64, dtype=torch.bool), dice)
    assert image.shape == (64, 3, 16, 16)
    assert torch.isfinite(image).all()
    contrast = image.amax(dim=(2, 3)) - image.amin(dim=(2, 3))
    assert (contrast.amax(dim=1) > 0.5).all()


def test_a_shard_of_drawings_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes((SAMPLE / "train/sample.tar").read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"cut\.tar is damaged .*damaged shard"):
        load_drawings([cut], progress=False)


def test_a_shard_of_something_else_is_an_error(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "texts.tar", {"a.txt": b"no drawing"})
    with pytest.raises(InputError, match="'a' is no drawing"):
        load_drawings([shard], progress=False)
