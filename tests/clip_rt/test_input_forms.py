"""Every form of input that is taken, one line each, against a plain reference.

What stands here is taken for good: a form that is refused one day, or gives other pixels or tokens,
breaks a program that somebody runs.
"""

from __future__ import annotations

import collections
import io
import itertools
import os
import pathlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, ImageSequence

import clip_rt
from clip_rt import testing

SIDE_PX = 32
WIDTH, HEIGHT = 90, 61


def draw(mode: str = "RGB", seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Waves and noise; anything a filter, an offset or a rounding gets wrong shows."""
    num_channels = len(Image.new(mode, (1, 1)).getbands())
    y, x, channel = np.ogrid[:height, :width, :num_channels]
    waves = 128 + 70 * np.sin(x / 9 + channel + seed) + 50 * np.cos(y / 5 - 2 * channel)
    noise = np.random.default_rng(seed).normal(0, 15, (height, width, num_channels))
    pixels = np.clip(waves + noise, 0, 255).astype(np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def square(image: Image.Image) -> np.ndarray:
    """The shortest side resized to `SIDE_PX`, the centre cropped, then RGB: what CLIP is fed."""
    width, height = image.size
    if width <= height:
        size = SIDE_PX, int(SIDE_PX * height / width)
    else:
        size = int(SIDE_PX * width / height), SIDE_PX
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE_PX) / 2), round((size[1] - SIDE_PX) / 2)
    return np.asarray(image.crop((left, top, left + SIDE_PX, top + SIDE_PX)).convert("RGB"))


def array(seed: int = 0) -> np.ndarray:
    return np.asarray(draw(seed=seed))


def orient(image: Image.Image, orientation: int, file_format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, file_format, exif=exif.tobytes())


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def loaded(content: bytes) -> Image.Image:
    image = opened(content)
    image.load()
    return image


def animation(file_format: str) -> bytes:
    frames = [draw(seed=seed) for seed in range(3)]
    if file_format == "GIF":
        frames = [frame.quantize(16) for frame in frames]
    return encode(frames[0], file_format, save_all=True, append_images=frames[1:])


def palette_with_transparency() -> Image.Image:
    image = draw().quantize(16)
    image.info["transparency"] = 3
    return image


class Text(str):
    """A string of one's own."""


class PathLike:
    """What only says which path it is."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


class Series:
    """A column of a table, as pandas has it: one-dimensional, with an index and a dtype."""

    ndim = 1

    def __init__(self, values: list[Any]) -> None:
        self.values = values
        self.shape = (len(values),)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __getitem__(self, key: int) -> Any:
        return self.values[key]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype or object)


class Images:
    """A collection that is nothing but iterable."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)


@dataclass(frozen=True)
class Stack:
    """What a file of arrays is, as h5py has it: four axes, read one after another."""

    arrays: np.ndarray

    @property
    def ndim(self) -> int:
        return self.arrays.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.arrays.shape

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, key: int) -> np.ndarray:
        return self.arrays[key]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.arrays)


def read_only(of: np.ndarray) -> np.ndarray:
    of = of.copy()
    of.flags.writeable = False
    return of


def mapped(folder: pathlib.Path, of: np.ndarray) -> np.ndarray:
    np.save(folder / "mapped.npy", of)
    return np.load(folder / "mapped.npy", mmap_mode="r")


def saved(folder: pathlib.Path, content: bytes) -> pathlib.Path:
    path = folder / "image"
    path.write_bytes(content)
    return path


def objects(images: list[Any]) -> np.ndarray:
    found = np.empty(len(images), object)
    found[:] = images
    return found


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


PNG = encode(draw())
JPEG = encode(draw(), "JPEG")

# One image each: what is passed, given a folder, and what it must be seen as.
ONE: dict[str, tuple[Callable[[pathlib.Path], Any], Callable[[], Image.Image]]] = {
    "array": (lambda _: array(), draw),
    "array, read only": (lambda _: read_only(array()), draw),
    "array, columns first in memory": (lambda _: np.asfortranarray(array()), draw),
    "array, mirrored view": (lambda _: array()[:, ::-1], lambda: ImageOps.mirror(draw())),
    "array, every second pixel": (
        lambda _: array()[::2, ::2],
        lambda: Image.fromarray(np.ascontiguousarray(array()[::2, ::2])),
    ),
    "array, channels reversed": (
        lambda _: array()[..., ::-1],
        lambda: Image.fromarray(np.ascontiguousarray(array()[..., ::-1])),
    ),
    "array, one colour broadcast": (
        lambda _: np.broadcast_to(np.uint8([9, 99, 199]), (40, 50, 3)),
        lambda: Image.new("RGB", (50, 40), (9, 99, 199)),
    ),
    "array of the model's size": (
        lambda _: np.asarray(draw(width=SIDE_PX, height=SIDE_PX)),
        lambda: draw(width=SIDE_PX, height=SIDE_PX),
    ),
    "array, a subclass": (lambda _: array().view(type("Mine", (np.ndarray,), {})), draw),
    "memory map": (lambda folder: mapped(folder, array()), draw),
    "one pixel": (lambda _: np.uint8([[[1, 2, 3]]]), lambda: Image.new("RGB", (1, 1), (1, 2, 3))),
    "bytes": (lambda _: PNG, draw),
    "bytearray": (lambda _: bytearray(PNG), draw),
    "memoryview": (lambda _: memoryview(PNG), draw),
    "memoryview of a part": (lambda _: memoryview(b"__" + PNG + b"__")[2:-2], draw),
    "bytes with more after the end": (lambda _: PNG + b"trailing", draw),
    "Path": (lambda folder: saved(folder, PNG), draw),
    "path as a string": (lambda folder: str(saved(folder, PNG)), draw),
    "path as a string of one's own": (lambda folder: Text(saved(folder, PNG)), draw),
    "path as a NumPy string": (lambda folder: np.str_(saved(folder, PNG)), draw),
    "os.PathLike": (lambda folder: PathLike(saved(folder, PNG)), draw),
    "path relative": (lambda folder: os.path.relpath(saved(folder, PNG)), draw),
    "JPEG": (lambda _: JPEG, lambda: opened(JPEG)),
    "JPEG, progressive": (
        lambda _: encode(draw(), "JPEG", progressive=True),
        lambda: opened(encode(draw(), "JPEG", progressive=True)),
    ),
    "JPEG, grey": (
        lambda _: encode(draw("L"), "JPEG"),
        lambda: opened(encode(draw("L"), "JPEG")),
    ),
    "JPEG, CMYK": (
        lambda _: encode(draw("CMYK"), "JPEG"),
        lambda: opened(encode(draw("CMYK"), "JPEG")),
    ),
    "WebP": (
        lambda _: encode(draw(), "WEBP", quality=80),
        lambda: opened(encode(draw(), "WEBP", quality=80)),
    ),
    "WebP with alpha": (
        lambda _: encode(draw("RGBA"), "WEBP", lossless=True, exact=True),
        lambda: draw("RGBA"),
    ),
    "BMP": (lambda _: encode(draw(), "BMP"), draw),
    "GIF": (
        lambda _: encode(draw().quantize(16), "GIF"),
        lambda: draw().quantize(16).convert("RGB"),
    ),
    "animated GIF": (
        lambda _: animation("GIF"),
        lambda: draw(seed=0).quantize(16).convert("RGB"),
    ),
    "animated WebP": (
        lambda _: encode(
            draw(), "WEBP", save_all=True, append_images=[draw(seed=1)], lossless=True
        ),
        draw,
    ),
    "animated PNG": (lambda _: animation("PNG"), draw),
    "MPO": (lambda _: animation("MPO"), lambda: opened(JPEG)),
    "MPO, opened": (lambda _: opened(animation("MPO")), lambda: opened(JPEG)),
    **{
        f"file with orientation {orientation}, {file_format}": (
            lambda _, o=orientation, f=file_format: orient(draw(), o, f),
            lambda o=orientation, f=file_format: ImageOps.exif_transpose(
                opened(orient(draw(), o, f))
            ),
        )
        for orientation in range(1, 9)
        for file_format in ("JPEG", "PNG", "WEBP")
    },
    "opened with orientation": (
        lambda _: opened(orient(draw(), 6)),
        lambda: ImageOps.exif_transpose(opened(orient(draw(), 6))),
    ),
    "opened and loaded with orientation": (
        lambda _: loaded(orient(draw(), 6)),
        lambda: ImageOps.exif_transpose(opened(orient(draw(), 6))),
    ),
    "opened from a path with orientation": (
        lambda folder: Image.open(saved(folder, orient(draw(), 6))),
        lambda: ImageOps.exif_transpose(opened(orient(draw(), 6))),
    ),
    "opened with orientation, pickled": (
        lambda _: pickle.loads(pickle.dumps(opened(orient(draw(), 8)))),
        lambda: ImageOps.exif_transpose(opened(orient(draw(), 8))),
    ),
    "turned upright by ImageOps": (
        lambda _: ImageOps.exif_transpose(opened(orient(draw(), 6))),
        lambda: ImageOps.exif_transpose(opened(orient(draw(), 6))),
    ),
    "frame of an animation": (
        lambda _: seek(opened(animation("PNG")), 2),
        lambda: draw(seed=2),
    ),
    **{
        f"PIL image, {mode}": (lambda _, m=mode: draw(m), lambda m=mode: draw(m))
        for mode in ("RGB", "L", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
    },
    "PIL image, palette": (
        lambda _: draw().quantize(16),
        lambda: draw().quantize(16).convert("RGB"),
    ),
    "PIL image, palette with transparency": (
        lambda _: palette_with_transparency(),
        lambda: palette_with_transparency().convert("RGBA").convert("RGB"),
    ),
    "PNG, palette with transparency": (
        lambda _: encode(draw().quantize(16), transparency=3),
        lambda: draw().quantize(16).convert("RGB"),
    ),
    "PIL image, palette with alpha": (
        lambda _: draw().quantize(16).convert("PA"),
        lambda: draw().quantize(16).convert("RGB"),
    ),
    "PIL image, 1 bit": (
        lambda _: draw("L").convert("1"),
        lambda: draw("L").convert("1").convert("RGB"),
    ),
    "PNG, 1 bit": (
        lambda _: encode(draw("L").convert("1")),
        lambda: draw("L").convert("1").convert("RGB"),
    ),
    "PIL image, 16 bits": (lambda _: deep(draw("L"), np.uint16), lambda: draw("L")),
    "PNG, 16 bits": (lambda _: encode(deep(draw("L"), np.uint16)), lambda: draw("L")),
    "PIL image, 32 bits": (lambda _: deep(draw("L"), np.int32), lambda: draw("L")),
    "PIL image from a parser": (lambda _: parse(PNG), draw),
    "PIL image, cropped": (
        lambda _: draw().crop((3, 5, 63, 55)),
        lambda: draw().crop((3, 5, 63, 55)),
    ),
    "PIL image, cropped beyond its edge": (
        lambda _: draw().crop((-9, -9, 63, 55)),
        lambda: draw().crop((-9, -9, 63, 55)),
    ),
}


def seek(image: Image.Image, frame: int) -> Image.Image:
    image.seek(frame)
    return image


def deep(image: Image.Image, dtype: Any) -> Image.Image:
    """The same greys in 16 bits: 0..255 times 257."""
    return Image.fromarray(np.asarray(image).astype(dtype) * dtype(257))


def parse(content: bytes) -> Image.Image:
    parser = ImageFile.Parser()
    parser.feed(content)
    return parser.close()


@pytest.mark.parametrize("form", ONE)
def test_a_form_of_one_image(form, tmp_path):
    give, see = ONE[form]
    expected = square(see())
    for images in (give(tmp_path), [give(tmp_path)]):
        np.testing.assert_array_equal(
            clip_rt.preprocess(images, side_px=SIDE_PX), expected[None], err_msg=form
        )


THREE = [array(seed) for seed in range(3)]

# A batch of THREE each.
MANY: dict[str, Callable[[pathlib.Path], Any]] = {
    "list": lambda _: list(THREE),
    "tuple": lambda _: tuple(THREE),
    "generator": lambda _: (each for each in THREE),
    "iterator": lambda _: iter(THREE),
    "map": lambda _: map(np.copy, THREE),
    "first of zipped pairs": lambda _: (each for each, _ in zip(THREE, "abc", strict=True)),
    "slice of an endless generator": lambda _: itertools.islice(itertools.cycle(THREE), 3),
    "deque": lambda _: collections.deque(THREE),
    "values of a dict": lambda _: dict(enumerate(THREE)).values(),
    "keys of a dict": lambda folder: dict.fromkeys(write_all(folder)).keys(),
    "values of a Mapping": lambda _: collections.ChainMap(dict(enumerate(THREE))).values(),
    "UserList": lambda _: collections.UserList(THREE),
    "nothing but iterable": lambda _: Images(THREE),
    "array of four axes": lambda _: np.stack(THREE),
    "array of four axes, not contiguous": lambda _: np.stack(THREE, axis=-1).transpose(3, 0, 1, 2),
    "memory map of four axes": lambda folder: mapped(folder, np.stack(THREE)),
    "array of objects": lambda _: objects(list(map(Image.fromarray, THREE))),
    "array of paths": lambda folder: np.array(list(map(str, write_all(folder)))),
    "Series": lambda _: Series(list(THREE)),
    "Series of paths": lambda folder: Series(write_all(folder)),
    "file of arrays": lambda _: Stack(np.stack(THREE)),
    "sorted paths of a folder": lambda folder: sorted(
        write_all(folder)[0].parent.glob("three-*.png")
    ),
    "mixture": lambda folder: [THREE[0], encode(Image.fromarray(THREE[1])), write_all(folder)[2]],
    "frames of an animation": lambda _: ImageSequence.Iterator(opened(animation("PNG"))),
}


def write_all(folder: pathlib.Path) -> list[pathlib.Path]:
    paths = [folder / f"three-{index}.png" for index in range(3)]
    for path, each in zip(paths, THREE, strict=True):
        Image.fromarray(each).save(path)
    return paths


@pytest.mark.parametrize("form", MANY)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_form_of_several_images(form, num_threads, tmp_path):
    found = clip_rt.preprocess(MANY[form](tmp_path), side_px=SIDE_PX, num_threads=num_threads)
    np.testing.assert_array_equal(found, [square(Image.fromarray(each)) for each in THREE])


WORDS = ["red cat", "Ünïcode &amp; ☕", "red cat", "a dog"]

TEXTS: dict[str, Callable[[], Any]] = {
    "list": lambda: list(WORDS),
    "tuple": lambda: tuple(WORDS),
    "generator": lambda: (each for each in WORDS),
    "iterator": lambda: iter(WORDS),
    "map": lambda: map(str, WORDS),
    "deque": lambda: collections.deque(WORDS),
    "values of a dict": lambda: dict(enumerate(WORDS)).values(),
    "UserList": lambda: collections.UserList(WORDS),
    "nothing but iterable": lambda: Images(WORDS),
    "array of strings": lambda: np.array(WORDS),
    "array of objects": lambda: np.array(WORDS, object),
    "array, every second of a longer one": lambda: np.array([[each, "x"] for each in WORDS])[:, 0],
    "NumPy strings": lambda: [np.str_(each) for each in WORDS],
    "strings of one's own": lambda: [Text(each) for each in WORDS],
    "Series": lambda: Series(WORDS),
}


@pytest.fixture(scope="module")
def client() -> Iterator[clip_rt.Client]:
    with (
        testing.FakeServer(embedding_dim=16, side_px=8) as server,
        clip_rt.Client(server.url) as client,
    ):
        yield client


@pytest.mark.parametrize("form", TEXTS)
def test_a_form_of_texts(form, client):
    give = TEXTS[form]
    np.testing.assert_array_equal(clip_rt.tokenize(give()), clip_rt.tokenize(WORDS))
    np.testing.assert_array_equal(client.encode_texts(give()), client.encode_texts(WORDS))
    client.cache.clear()
    expected = np.stack([client.class_embeddings([each])[0] for each in WORDS])
    client.cache.clear()
    np.testing.assert_allclose(client.class_embeddings(give()), expected, atol=1e-6)
    assert list(client.zero_shot(array(), give()).labels) == WORDS


def test_lines_of_a_file_are_texts(client):
    lines = io.StringIO("\n".join(WORDS))
    np.testing.assert_array_equal(client.encode_texts(lines), client.encode_texts(WORDS))


def test_keys_of_a_dict_are_labels(client):
    labels = dict.fromkeys(WORDS)
    assert client.zero_shot(array(), labels.keys()).labels == tuple(labels)


@pytest.mark.parametrize(
    "templates",
    [
        None,
        ["a photo of a {}."],
        ("a photo of a {}.",),
        np.array(["a photo of a {}."]),
        Series(["a photo of a {}."]),
        {1: "a photo of a {}."}.values(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_form_of_templates(templates, client):
    expected = client.class_embeddings(["cat"])
    client.cache.clear()
    np.testing.assert_allclose(
        client.class_embeddings(["cat"], templates=templates), expected, atol=1e-6
    )


def test_a_string_alone_is_one_text(client):
    assert clip_rt.tokenize("cat").shape[0] == 1
    assert client.encode_texts(np.str_("cat")).shape == (1, 16)
