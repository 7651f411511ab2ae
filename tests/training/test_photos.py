import io
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tar_shards import encode

import clip_rt
from clip_rt.errors import ImageError, InputError
from training.data.photos import PhotoAugmentation, random_box

WHOLE = PhotoAugmentation(scale=(1, 1), ratio=(1, 1))


def png(array: np.ndarray, *, mode: str | None = None, **how: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, "PNG", **how)
    return file.getvalue()


def square(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (60, 60, 3)).astype(np.uint8)


def oriented(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    file = io.BytesIO()
    Image.fromarray(square(3)).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    "image",
    [
        png(square(0)),
        png(square(1, 60, 60)),
        png(square(2, 60, 60, 4)),
        png(square(0), mode="1"),
        png(square(0), mode="P"),
        png(square(0), mode="P", transparency=3),
        png(square(0), mode="LA"),
        png((square(4, 60, 60).astype(np.uint16) * 257) | 5),
        *map(oriented, range(1, 9)),
    ],
    ids=lambda image: str(Image.open(io.BytesIO(image)).mode),
)
def test_a_crop_of_everything_is_what_serving_sees(image: bytes) -> None:
    mine = WHOLE(image, side_px=32, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(mine, clip_rt.preprocess([image], side_px=32)[0])


def reference_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """RandomResizedCrop(scale=(0.9, 1)) as documented: area, then shape, then place; 10 times."""
    for _ in range(10):
        target = rng.uniform(0.9, 1.0) * height * width
        shape = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            top = rng.integers(0, height - h, endpoint=True)
            left = rng.integers(0, width - w, endpoint=True)
            return left, top, w, h
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * 4 / 3), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 500), (640, 360), (900, 100)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    ours, theirs = np.random.default_rng(0), np.random.default_rng(1)
    boxes = [
        random_box(*size, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), rng=ours) for _ in range(4000)
    ]
    mine = np.array([(left, top, r - left, b - top) for left, top, r, b in boxes], float)
    wanted = np.array([reference_box(*size, theirs) for _ in range(4000)], float)
    for column in range(4):
        # Two-sample Kolmogorov-Smirnov; 0.043 is exceeded once in 1,000 by equal distributions.
        grid = np.union1d(mine[:, column], wanted[:, column])
        ranks = [
            np.searchsorted(np.sort(x[:, column]), grid, "right") / 4000 for x in (mine, wanted)
        ]
        assert np.abs(ranks[0] - ranks[1]).max() < 0.0437


def test_a_crop_lies_within_the_image_even_when_none_fits() -> None:
    rng = np.random.default_rng(0)
    for width, height in [(1, 1), (1, 200), (200, 1), (3, 2), (5000, 30)]:
        for _ in range(50):
            box = random_box(width, height, scale=(0.9, 1), ratio=(3 / 4, 4 / 3), rng=rng)
            left, top, right, bottom = box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def test_the_default_changes_no_colour_and_mirrors_nothing() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = (255, 0, 0)  # right half red
    for seed in range(20):
        crop = PhotoAugmentation()(png(image), side_px=32, rng=np.random.default_rng(seed))
        assert crop[:, 0].max() == 0
        np.testing.assert_array_equal(crop[:, -1], np.tile([255, 0, 0], (32, 1)))


def test_colours_change_only_as_asked() -> None:
    image = png(square(7))
    plain = WHOLE(image, side_px=32, rng=np.random.default_rng(0))

    def run(seed: int = 0, **how: object) -> np.ndarray:
        changed = PhotoAugmentation(scale=(1, 1), ratio=(1, 1), **how)
        return changed(image, side_px=32, rng=np.random.default_rng(seed))

    assert np.ptp(run(grey_probability=1), axis=2).max() == 0
    np.testing.assert_array_equal(run(flip_probability=1), plain[:, ::-1])
    for part in range(4):
        jitter = tuple(0.4 if part == each else 0.0 for each in range(4))
        jittered = run(jitter=jitter)
        assert not np.array_equal(jittered, plain)
        np.testing.assert_array_equal(jittered, run(jitter=jitter))
        np.testing.assert_array_equal(plain, run(jitter=jitter, jitter_probability=0))
    brighter = np.mean([run(seed, jitter=(0.4, 0, 0, 0)).mean() for seed in range(50)])
    assert abs(brighter / plain.mean() - 1) < 0.1
    # Turning the hue leaves the brightest channel as bright as it was.
    turned = run(jitter=(0, 0, 0, 0.5)).max(axis=2).astype(int)
    assert np.abs(turned - plain.max(axis=2)).max() <= 1


def bomb() -> bytes:
    content = bytearray(png(np.zeros((1, 1), np.uint8)))
    content[16:24] = (50_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    "image",
    [
        bomb(),
        b"",
        b"<svg/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        encode((1, 2, 3), size=(300, 200))[:2000],
        Path("/dev/zero"),
        Path("/nonexistent.jpg"),
    ],
    ids=lambda image: repr(image)[:20],
)
def test_images_that_cannot_be_decoded_are_typed_errors(image: bytes | Path) -> None:
    with pytest.raises(ImageError):
        PhotoAugmentation()(image, side_px=32, rng=np.random.default_rng(0))


@pytest.mark.parametrize("size", [(2000, 4), (4, 2000)])
def test_a_long_thin_image_is_cropped_as_any_other(size: tuple[int, int]) -> None:
    image = encode((1, 2, 3), size=size)
    found = PhotoAugmentation()(image, side_px=32, rng=np.random.default_rng(0))
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - (1, 2, 3)).max() <= 20


@pytest.mark.parametrize(
    "setting",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 1.5)},
        {"ratio": (2.0, 1.0)},
        {"jitter": (0.1, 0.1, 0.1, 0.6)},
        {"flip_probability": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, object]) -> None:
    (name,) = setting
    with pytest.raises(InputError, match=f"{name} is"):
        PhotoAugmentation(**setting)
