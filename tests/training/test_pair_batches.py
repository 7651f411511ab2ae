import gc
import multiprocessing
import os
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tar_shards import encode, write_pairs, write_tar

from clip_rt.errors import InputError
from clip_rt.inputs.tokenizer import OpenAITokenizer, tokenize
from clip_rt.specs import CLIP_MEAN, CLIP_STD, EncoderFacts
from training.data.batches import Batch
from training.data.folders import ClassFolder
from training.data.pair_batches import PairBatches, normalise_pixels
from training.data.pairs import Source
from training.data.photos import PhotoAugmentation
from training.data.shards import PipedShards, TarShards

JITTER = PhotoAugmentation(scale=(0.5, 1), jitter=(0.3, 0.3, 0.3, 0.1), flip_probability=0.5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TarShards:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(2):
        captions = [f"a drawing of number {number * 20 + i}" for i in range(20)]
        write_pairs(folder / f"{number}.tar", captions, first=number * 20)
    # One in six is bad, in as many ways.
    bad = [("x.jpg", b"no image"), ("x.txt", b"x"), ("y.jpg", encode((1, 1, 1))), ("y.txt", b" ")]
    for number in range(6):
        bad += [(f"z{number}.jpg", encode((9, 9, 9))[:200]), (f"z{number}.txt", b"cut off")]
    write_tar(folder / "2.tar", bad)
    return TarShards(f"{folder}/{{0..2}}.tar")


def make(source: Source | list[Source] | PipedShards, **how: object) -> PairBatches:
    settings = {"batch_size": 12, "side_px": 16, "context_length": 77, "seed": 0}
    settings |= {"augmentation": JITTER, "max_bad_share": 0.5, **how}
    fed = {name: settings.pop(name) for name in ("side_px", "context_length")}
    facts = EncoderFacts(name="tiny", embedding_dim=8, activation="gelu", **fed)
    tokenizer = OpenAITokenizer(facts.context_length)
    return PairBatches(source, facts=facts, tokenizer=tokenizer, **settings)


def same(one: Batch, two: Batch) -> bool:
    return (
        torch.equal(one.image_BCSS, two.image_BCSS)
        and torch.equal(one.tokens_BL, two.tokens_BL)
        and torch.equal(one.group_B, two.group_B)
    )


def test_a_batch_is_what_the_image_and_text_towers_read(shards: TarShards) -> None:
    batch = next(make(shards).stream(0))
    assert batch.image_BCSS.shape == (12, 3, 16, 16)
    assert batch.image_BCSS.dtype == torch.float32
    assert batch.group_B.dtype == torch.int64
    texts = [f"a drawing of number {i}" for i in range(40)]
    rows = {tuple(row) for row in tokenize(texts)[:, : batch.tokens_BL.shape[1]].tolist()}
    assert {tuple(row) for row in batch.tokens_BL.tolist()} <= rows


def test_pixels_are_normalised_as_open_clip_does() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    image = pixels.permute(0, 3, 1, 2).double() / 255
    wanted = (image - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[
        :, None, None
    ]
    torch.testing.assert_close(normalise_pixels(pixels).double(), wanted, atol=1e-6, rtol=0)


def test_picture_and_caption_stay_together(shards: TarShards) -> None:
    batches = make(shards, augmentation=PhotoAugmentation(), batch_size=40)
    batch = next(batches.stream(0))
    red = batch.image_BCSS[:, 0].mean(dim=(1, 2)) * CLIP_STD[0] + CLIP_MEAN[0]
    level = (red * 255 - 3.5 - 20).round().int()  # encode() adds noise of 3.5 on average
    texts = tokenize([f"a drawing of number {i}" for i in level.tolist()])
    np.testing.assert_array_equal(texts[:, : batch.tokens_BL.shape[1]], batch.tokens_BL)


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_a_batch_does_not_depend_on_what_was_read_before(shards: TarShards, step: int) -> None:
    batches = make(shards)
    wanted = next(islice(batches.stream(step - 1), 1, None))
    assert same(wanted, next(batches.stream(step)))
    assert same(wanted, next(make(shards).stream(step)))
    assert not same(wanted, next(make(shards, seed=1).stream(step)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(
    shards: TarShards, num_workers: int
) -> None:
    alone, helped = make(shards), make(shards, num_workers=num_workers)
    stream = helped.stream(2)
    for one, two in zip(islice(alone.stream(2), 5), stream, strict=False):
        assert same(one, two)
    assert alone.skips == helped.skips


@pytest.mark.parametrize("world_size", [2, 3, 12])
def test_ranks_read_the_batch_of_a_single_process_bit_for_bit(
    shards: TarShards, world_size: int
) -> None:
    whole = next(make(shards).stream(3))
    for rank in range(world_size):
        part = next(make(shards).stream(3, rank=rank, world_size=world_size))
        assert torch.equal(part.image_BCSS, whole.image_BCSS[rank::world_size])
        assert torch.equal(part.group_B, whole.group_B[rank::world_size])
        used = part.tokens_BL.shape[1]
        assert torch.equal(part.tokens_BL, whole.tokens_BL[rank::world_size, :used])
        assert not whole.tokens_BL[rank::world_size, used:].any()


def test_bad_samples_are_replaced_counted_and_named(shards: TarShards) -> None:
    batches = make(shards, batch_size=48)  # an epoch: 40 good ones and 8 bad
    batch = next(batches.stream(0))
    assert len(batch.group_B) == 48
    assert set(batches.skips.counts) == {"unusable image", "no caption"}
    assert batches.skips.total >= 8
    assert batches.num_read == 48 + batches.skips.total
    assert "2.tar" in batches.skips.examples["unusable image"][0]


def test_drawing_batches_leaves_torchs_own_randomness_alone(shards: TarShards) -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    for num_workers in (0, 1):
        next(make(shards, num_workers=num_workers).stream(0))
    assert torch.equal(torch.rand(3), wanted)


def test_equal_captions_are_one_group_on_every_rank(tmp_path: Path) -> None:
    captions = ["A  cat", "a cat", "a &amp; b", "a & b", "dog"]
    shards = TarShards(write_pairs(tmp_path / "a.tar", captions))
    group_by_tokens: dict[tuple[int, ...], set[int]] = {}
    for rank in range(5):
        batch = next(make(shards, batch_size=5).stream(0, rank=rank, world_size=5))
        text = tuple(token for token in batch.tokens_BL[0].tolist() if token)
        group_by_tokens.setdefault(text, set()).add(batch.group_B.item())
    assert len(group_by_tokens) == 3
    assert len(set.union(*group_by_tokens.values())) == 3


def test_pictures_of_one_class_are_one_group_whatever_the_template(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for number in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number}.jpg").write_bytes(encode((9, 9, 9)))
    batch = next(make(ClassFolder(tmp_path, templates="openai_imagenet"), batch_size=8).stream(0))
    assert torch.unique(batch.group_B, return_counts=True)[1].tolist() == [4, 4]
    assert len(torch.unique(batch.tokens_BL, dim=0)) > 2


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    sources = [
        TarShards(write_pairs(tmp_path / f"{name}.tar", [name] * 5)) for name in ("cat", "dog")
    ]
    batches = make(sources, weights=[3, 1], batch_size=500)
    counts = torch.unique(next(batches.stream(0)).group_B, return_counts=True)[1]
    assert abs(counts.max().item() - 375) < 40
    with pytest.raises(InputError, match="weights are"):
        make(sources, weights=[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_of_which_too_much_is_bad_is_an_error_with_examples(
    tmp_path: Path, num_workers: int
) -> None:
    members = []
    for number in range(40):
        image = b"html" if number % 3 else encode((9, 9, 9))
        members += [(f"{number}.jpg", image), (f"{number}.txt", b"a text")]
    shards = TarShards(write_tar(tmp_path / "a.tar", members))
    batches = make(shards, batch_size=50, max_bad_share=0.2, num_workers=num_workers)
    with pytest.raises(
        InputError, match=r"26 of the first 40 samples are bad.*26 x unusable image.*a\.tar"
    ):
        list(islice(batches.stream(0), 100))
    hopeless = TarShards(write_tar(tmp_path / "b.tar", {"a.jpg": b"html", "a.txt": b"a"}))
    with pytest.raises(InputError, match=r"1 of the first 1 samples are bad.*1 x unusable"):
        next(make(hopeless, batch_size=1).stream(0))


def test_piped_shards_resume_where_they_stood_on_any_number_of_workers(tmp_path: Path) -> None:
    for number in range(3):
        write_pairs(tmp_path / f"{number}.tar", [f"pair {number} {i}" for i in range(9)])
    write_tar(tmp_path / "3.tar", {"bad.jpg": b"html", "bad.txt": b"bad"})

    def piped() -> PipedShards:
        url = f"pipe:cat {tmp_path}/{{0..3}}.tar"
        return PipedShards(url, allow_commands=True, buffer_samples=10)

    whole = list(islice(make(piped(), batch_size=8).stream(0), 8))
    assert all(len(batch.group_B) == 8 for batch in whole)
    for num_workers in (0, 2):
        resumed = make(piped(), batch_size=8, num_workers=num_workers).stream(5)
        for one, two in zip(whole[5:], resumed, strict=False):
            assert same(one, two)
    with pytest.raises(InputError, match="cannot be mixed"):
        make([piped(), piped()])


def test_workers_end_with_their_stream(shards: TarShards) -> None:
    stream = make(shards, num_workers=2).stream(0)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    gc.collect()
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_an_error_and_no_hang(shards: TarShards) -> None:
    stream = make(shards, num_workers=1).stream(0)
    next(stream)
    (worker,) = multiprocessing.active_children()

    def go_on_without_it() -> None:
        # torch raises when its parent learns of the end, which may be before the next line.
        os.kill(worker.pid, signal.SIGKILL)
        list(islice(stream, 50))

    started_s = time.monotonic()
    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly"):
        go_on_without_it()
    assert time.monotonic() - started_s < 20


def test_batches_that_cannot_be_are_refused(shards: TarShards) -> None:
    for name in ("batch_size", "side_px"):
        with pytest.raises(InputError, match=f"{name} is 0"):
            make(shards, **{name: 0})
    with pytest.raises(InputError, match="multiple of 5"):
        make(shards).stream(0, rank=0, world_size=5)
