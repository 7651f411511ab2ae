"""Whatever is passed in, a right result or one of our errors comes out, and no neighbour suffers.

A short run of some 300 cases, always the same, is part of the suite. The long run takes others each
time, as many as asked for:

    CLIP_RT_FUZZ_CASES=10000 python -m pytest tests/clip_rt/test_fuzz.py

A case that fails is printed with a line `@reproduce_failure` that repeats it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from PIL import Image

import clip_rt
from clip_rt import testing
from clip_rt.inputs import prompts
from clip_rt.inputs.tokenizer import MAX_TEXT_CHARS

SHORT_RUN = 300
CASES = int(os.environ.get("CLIP_RT_FUZZ_CASES", SHORT_RUN))
SIDE_PX = 8


def fuzz(share: float) -> settings:
    """Give a test its share of the cases."""
    return settings(
        max_examples=max(1, round(CASES * share)),
        deadline=None,
        derandomize=CASES <= SHORT_RUN,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def fake() -> Iterator[testing.FakeServer]:
    with testing.FakeServer(embedding_dim=8, side_px=SIDE_PX, max_batch_size=4) as fake:
        yield fake


@pytest.fixture(scope="module")
def client(fake) -> Iterator[clip_rt.Client]:
    with clip_rt.Client(fake.url, timeout_s=10.0) as client:
        yield client


def attempt(call: Callable[..., Any], *args: object, **options: object) -> Any:
    """Return what a call returns, or the error of ours that it raises."""
    try:
        return call(*args, **options)
    except clip_rt.ClipRTError as error:
        return error


def expect_squares(images: object, count: int | None = None) -> None:
    squares = attempt(clip_rt.preprocess, images, side_px=SIDE_PX)
    if isinstance(squares, clip_rt.ImageError):
        return
    assert squares.dtype == np.uint8
    assert squares.shape[1:] == (SIDE_PX, SIDE_PX, 3)
    assert count is None or len(squares) == count


def encode(mode: str, file_format: str, **options: object) -> bytes:
    pixels = np.random.default_rng(7).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    image = Image.fromarray(pixels).convert(mode)
    others = [image.rotate(90)] if options.pop("animated", False) else []
    if others:
        options |= {"save_all": True, "append_images": others}
    image.save(stream, file_format, **options)
    return stream.getvalue()


FILES = (
    *(encode(mode, "PNG") for mode in ("RGB", "RGBA", "P", "L", "LA", "1")),
    encode("RGB", "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"),
    encode("CMYK", "JPEG"),
    encode("L", "JPEG", progressive=True),
    *(encode("RGBA", "WEBP", lossless=lossless) for lossless in (True, False)),
    encode("RGB", "WEBP", animated=True),
    encode("P", "GIF"),
    encode("P", "GIF", animated=True),
    encode("RGB", "PNG", animated=True),
    encode("RGB", "BMP"),
)
A_FILE = st.integers(0, len(FILES) - 1).map(FILES.__getitem__)
HEADS = (
    b"",
    *(file[:12] for file in FILES),
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"<svg ",
    b"II*\0",
    b"BM",
)


@fuzz(0.1)
@given(st.sampled_from(HEADS), st.binary(max_size=300))
def test_bytes_of_any_kind(head: bytes, tail: bytes) -> None:
    expect_squares(head + tail, count=1)


@st.composite
def damaged(draw: Callable[..., object]) -> bytes:
    """A real file with bytes changed, taken out, put in, repeated or cut off."""
    content = bytearray(draw(A_FILE))
    for _ in range(draw(st.integers(1, 6))):
        # The header is where a decoder believes what it reads.
        end = draw(st.sampled_from((16, 64, len(content))))
        place = draw(st.integers(0, max(0, min(end, len(content)) - 1)))
        how = draw(st.sampled_from(("change", "extreme", "remove", "insert", "repeat", "cut")))
        if how == "change":
            content[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif how == "extreme":
            content[place : place + 4] = draw(
                st.sampled_from((b"\0" * 4, b"\xff" * 4, b"\x7f" * 4))
            )
        elif how == "remove":
            del content[place : place + draw(st.integers(1, 16))]
        elif how == "insert":
            content[place:place] = draw(st.binary(max_size=16))
        elif how == "repeat":
            content[place:place] = content[place : place + draw(st.integers(1, 200))]
        else:
            del content[place:]
    return bytes(content)


@fuzz(0.25)
@given(damaged())
def test_damaged_files(content: bytes) -> None:
    expect_squares(content, count=1)


DTYPES = st.one_of(
    st.just(np.dtype(np.uint8)),
    numpy_st.scalar_dtypes(),
    numpy_st.array_dtypes(),
    st.just(np.dtype(object)),
)
SHAPES = st.one_of(
    numpy_st.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=5),
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from((0, 1, 2, 3, 4))),
)


@st.composite
def arrays(draw: Callable[..., object]) -> np.ndarray:
    """An array of any type and shape, seen in any way."""
    dtype, shape = draw(DTYPES), draw(SHAPES)
    array = np.zeros(shape, dtype)
    if dtype.kind in "iufb":
        array = draw(numpy_st.arrays(dtype, shape))
    view = draw(
        st.sampled_from(("as it is", "transposed", "reversed", "stretched", "frozen", "masked"))
    )
    if view == "transposed":
        array = array.T
    elif view == "reversed" and array.ndim:
        array = array[::-1, ...]
    elif view == "stretched":
        array = np.broadcast_to(array, (2, *array.shape))
    elif view == "frozen":
        array.flags.writeable = False
    elif view == "masked" and dtype.kind in "iuf":
        array = np.ma.masked_array(array, mask=array == 0)
    return array


@fuzz(0.15)
@given(arrays())
def test_arrays_of_any_kind(array: np.ndarray) -> None:
    before = array.copy()
    expect_squares(array)
    is_image = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
    if is_image and min(array.shape) > 0:
        expected = clip_rt.preprocess(Image.fromarray(np.ascontiguousarray(array)), side_px=SIDE_PX)
        np.testing.assert_array_equal(clip_rt.preprocess(array, side_px=SIDE_PX), expected)
    if array.dtype != object and not array.dtype.hasobject:
        assert array.tobytes() == before.tobytes()


CHARACTERS = st.characters(exclude_categories=())
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=60),
    st.text(st.sampled_from("{}%s&;<|>endoftx \0\t\n\ud800\udfff\u200d\u0345İß'"), max_size=40),
    st.builds(str.__mul__, st.text(CHARACTERS, min_size=1, max_size=4), st.integers(1, 3000)),
)


@fuzz(0.15)
@given(st.lists(TEXTS, max_size=3), st.booleans())
@example(["\ud800"], True)
@example(["a" * (MAX_TEXT_CHARS + 1)], True)
def test_texts_of_any_kind(texts: list[str], truncate: bool) -> None:
    tokens = attempt(clip_rt.tokenize, texts, truncate=truncate)
    if isinstance(tokens, clip_rt.TextError):
        assert texts[tokens.index] is not None
        assert not (truncate and isinstance(tokens, clip_rt.TextTooLongError))
        return
    assert tokens.shape == (len(texts), 77)
    assert ((tokens == 49406).sum(axis=1) == 1).all()
    assert ((tokens == 49407).sum(axis=1) == 1).all()


@fuzz(0.1)
@given(st.lists(TEXTS, max_size=3), TEXTS)
@example(["{0.__class__}"], "{}")
@example(["{:>9999999999}"], "{0.__init__.__globals__}")
def test_templates_and_labels_are_only_put_together(templates: list[str], label: str) -> None:
    try:
        found = prompts.find_templates(templates)
        filled = [prompts.fill(template, label) for template in found]
    except (clip_rt.TemplateError, clip_rt.TextError):
        is_sound = bool(templates) and all(each.count("{}") == 1 for each in templates)
        assert not (is_sound and label.strip())
        return
    for template, prompt in zip(templates, filled, strict=True):
        before, after = template.split("{}")
        assert prompt == before + label + after


class Empty:
    """Nothing in it to go by."""


class Liar:
    """Says it is long, and has nothing."""

    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> object:
        raise IndexError


class Pathlike:
    """A path that is none."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def __fspath__(self) -> object:
        return self._answer


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.binary(max_size=20),
    st.builds(bytearray, st.binary(max_size=20)),
    st.builds(memoryview, st.binary(max_size=20)),
    TEXTS,
    st.builds(PurePath, st.text(max_size=20)),
    st.builds(Pathlike, st.one_of(st.none(), st.text(max_size=9), st.binary(max_size=9))),
    st.builds(Empty),
    st.builds(Liar),
    st.just(Empty),
    st.just(len),
    st.sampled_from((np.float32(1), np.str_("red"), np.datetime64("2020-01-01"), ...)),
    st.builds(io.BytesIO, A_FILE),
    st.builds(io.StringIO, st.text(max_size=5)),
    st.just(Image.new("F", (4, 4))),
    st.just(Image.new("RGB", (0, 4))),
    st.just(Image.new("I", (4, 4), 70000)),
    arrays(),
)
JUNK = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.builds(tuple, st.lists(inner, max_size=3)),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(iter, st.lists(inner, max_size=3)),
        st.just({1, 2}),
        st.just(range(3)),
    ),
    max_leaves=6,
)
CALLS: dict[str, Callable[[clip_rt.Client, object], object]] = {
    "images": lambda client, junk: client.encode_images(junk),
    "texts": lambda client, junk: client.encode_texts(junk),
    "labels": lambda client, junk: client.class_embeddings(junk),
    "templates": lambda client, junk: client.class_embeddings(["red"], templates=junk),
    "zero-shot images": lambda client, junk: client.zero_shot(junk, ["red"]),
    "zero-shot labels": lambda client, junk: client.zero_shot(FILES[0], junk),
}


@fuzz(0.15)
@given(st.sampled_from(tuple(CALLS)), JUNK)
def test_the_client_takes_or_refuses_anything(
    client: clip_rt.Client, name: str, junk: object
) -> None:
    outcome = attempt(CALLS[name], client, junk)
    if isinstance(outcome, Exception):
        assert isinstance(outcome, clip_rt.InputError), outcome
        # It is as well as before.
        assert client.encode_texts("red").shape == (1, 8)


GOOD = tuple(
    np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8) for seed in range(6)
)
BAD = (b"", b"no image", FILES[0][:60], np.zeros((4, 4), np.float32), "/nonexistent", None, 7)
MIXED = st.lists(
    st.one_of(
        st.integers(0, len(GOOD) - 1),
        st.sampled_from([-1 - index for index in range(len(BAD))]),
    ),
    max_size=12,
)


@fuzz(0.05)
@given(MIXED)
def test_the_good_images_of_a_batch_are_embedded_as_alone(
    client: clip_rt.Client, mixed: list[int]
) -> None:
    images = [GOOD[index] if index >= 0 else BAD[-1 - index] for index in mixed]
    encoded = client.encode_images(images, on_error="skip")
    good = [place for place, index in enumerate(mixed) if index >= 0]
    assert encoded.indices.tolist() == good
    assert [failure.index for failure in encoded.failures] == [
        place for place, index in enumerate(mixed) if index < 0
    ]
    assert all(isinstance(failure, clip_rt.ImageError) for failure in encoded.failures)
    assert encoded.embeddings.shape == (len(good), 8)
    for row, place in zip(encoded.embeddings, good, strict=True):
        np.testing.assert_array_equal(row, client.encode_images(GOOD[mixed[place]])[0])


@fuzz(0.05)
@given(st.lists(st.one_of(TEXTS, st.none(), st.binary(max_size=3)), max_size=8))
def test_the_good_texts_of_a_batch_are_embedded_as_alone(
    client: clip_rt.Client, texts: list[object]
) -> None:
    encoded = client.encode_texts(texts, truncate=True, on_error="skip")
    failed = [failure.index for failure in encoded.failures]
    assert sorted([*encoded.indices.tolist(), *failed]) == list(range(len(texts)))
    for index, text in enumerate(texts):
        alone = attempt(client.encode_texts, [text], truncate=True)
        if isinstance(alone, clip_rt.TextError):
            assert index in failed
        else:
            (row,) = np.nonzero(encoded.indices == index)[0]
            np.testing.assert_array_equal(encoded.embeddings[row], alone[0])
