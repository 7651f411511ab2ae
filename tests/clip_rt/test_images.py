"""`preprocess` against open_clip's transform, and against everything that is not a good image."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from clip_rt.errors import ImageError, InputError
from clip_rt.inputs.images import iterate, prepare_each, preprocess
from clip_rt.inputs.transform import MAX_SIDE_PX, prepare

SIZES = (
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 40),
    (40, 1),
    (3, 5),
    (13, 7),
    (63, 65),
    (64, 64),
    (223, 224),
    (225, 223),
    (224, 224),
    (336, 336),
    (337, 225),
    (341, 512),
    (640, 479),
    (90, 1111),
    (2000, 90),
)
SIDES = (64, 224, 336)
CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3}


def draw(mode: str, width: int, height: int) -> Image.Image:
    """Waves and noise: anything a filter, an offset or a rounding gets wrong shows."""
    rng = np.random.default_rng([width, height, len(mode), ord(mode[0])])
    y, x, channel = np.ogrid[:height, :width, : CHANNELS[mode]]
    waves = 128 + 70 * np.sin(x / 9 + channel) + 50 * np.cos(y / 5 - 2 * channel)
    noise = rng.normal(0, 25, (height, width, CHANNELS[mode]))
    pixels = np.clip(waves + noise, 0, 255).astype(np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def reference(open_clip):
    """open_clip's validation transform, as uint8, without its last two steps."""

    def transform(image: Image.Image, side_px: int) -> np.ndarray:
        steps = open_clip.image_transform(side_px, is_train=False).transforms
        assert [type(step).__name__ for step in steps] == [
            "Resize",
            "CenterCrop",
            "MaybeConvertMode",
            "MaybeToTensor",
            "Normalize",
        ]
        for step in steps[:-2]:
            image = step(image)
        return np.asarray(image)

    return transform


# Equal to the reference


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_png_equals_open_clip_exactly(reference, mode):
    for width, height in SIZES:
        encoded = encode(draw(mode, width, height), "PNG")
        for side_px in SIDES:
            expected = reference(Image.open(io.BytesIO(encoded)), side_px)
            found = prepare(encoded, side_px=side_px)
            np.testing.assert_array_equal(found, expected, err_msg=f"{width}x{height}")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "YCbCr"])
def test_pillow_images_equal_open_clip_exactly(reference, mode):
    for width, height in SIZES:
        image = draw(mode, width, height)
        np.testing.assert_array_equal(prepare(image), reference(image, 224))


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA")],
)
def test_jpeg_and_webp_equal_open_clip_within_one_level(reference, file_format, mode):
    for width, height in SIZES:
        encoded = encode(draw(mode, width, height), file_format, quality=85)
        for side_px in SIDES:
            expected = reference(Image.open(io.BytesIO(encoded)), side_px).astype(int)
            found = prepare(encoded, side_px=side_px).astype(int)
            assert np.abs(found - expected).max() <= 1, (width, height, side_px)


def test_arrays_equal_open_clip_whatever_their_strides(reference):
    image = draw("RGB", 300, 200)
    array = np.asarray(image)
    expected = reference(image, 224)
    np.testing.assert_array_equal(prepare(array), expected)
    np.testing.assert_array_equal(prepare(np.asfortranarray(array)), expected)
    mirrored = np.ascontiguousarray(array[:, ::-1])
    np.testing.assert_array_equal(prepare(mirrored[:, ::-1]), expected)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 130))
def test_every_size_rounds_as_open_clip_does(reference, width, height, side_px):
    long, short = max(width, height), min(width, height)
    if long > 60 * short:
        height = width = long
    image = draw("L", width, height)
    np.testing.assert_array_equal(prepare(image, side_px=side_px), reference(image, side_px))


# The deliberate deviations


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 256, 2))])
@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palette_images_become_rgb_before_the_resize(reference, transparency, file_format):
    image = draw("RGB", 301, 200).quantize(128)
    if transparency is not None and not (file_format == "GIF" and transparency != 3):
        image.info["transparency"] = transparency
    encoded = encode(image, file_format)
    opened = Image.open(io.BytesIO(encoded))
    assert opened.mode == "P"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference(opened.convert("RGB"), 224)
        nearest = reference(opened, 224)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = prepare(encoded)
    np.testing.assert_array_equal(found, expected)
    assert (nearest != expected).any()


@pytest.mark.parametrize("mode", ["1", "PA"])
def test_one_bit_and_palette_alpha_images_become_rgb_before_the_resize(reference, mode):
    image = draw("L", 301, 200).convert("1")
    if mode == "PA":
        image = draw("RGB", 301, 200).quantize(64).convert("PA")
    assert image.mode == mode
    np.testing.assert_array_equal(prepare(image), reference(image.convert("RGB"), 224))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_unless_turned_off(reference, orientation, file_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(draw("RGB", 120, 71), file_format, exif=exif.tobytes())
    opened = Image.open(io.BytesIO(encoded))
    upright = ImageOps.exif_transpose(opened)
    np.testing.assert_array_equal(prepare(encoded, side_px=64), reference(upright, 64))
    np.testing.assert_array_equal(prepare(opened, side_px=64), reference(upright, 64))
    np.testing.assert_array_equal(
        prepare(encoded, side_px=64, exif=False), reference(Image.open(io.BytesIO(encoded)), 64)
    )


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\x00\x07" * 9,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x05\0\0\0\xff\xff\0\0\0\0\0\0",
        b"garbage" * 99,
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_counts_as_none(exif):
    image = draw("RGB", 40, 30)
    encoded = encode(image, "JPEG", exif=exif)
    np.testing.assert_array_equal(prepare(encoded), prepare(encode(image, "JPEG")))


def test_sixteen_bit_greys_are_scaled_and_not_clipped():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(ramp / 257).astype(np.uint8)
    encoded = encode(Image.fromarray(ramp), "PNG")
    assert Image.open(io.BytesIO(encoded)).mode == "I;16"
    for image in (encoded, Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):
        square = prepare(image, side_px=256)
        np.testing.assert_array_equal(square, np.stack([expected] * 3, axis=-1))


def test_eight_bits_written_as_sixteen_come_back_exactly(reference):
    grey = draw("L", 90, 70)
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    np.testing.assert_array_equal(prepare(wide, side_px=64), reference(grey, 64))


@pytest.mark.parametrize("value", [-1, 65536])
def test_greys_beyond_sixteen_bits_are_refused(value):
    image = Image.fromarray(np.array([[0, value]], dtype=np.int32))
    with pytest.raises(ImageError, match=r"0 to 65535"):
        prepare(image)


def test_floating_point_pillow_images_are_refused():
    with pytest.raises(ImageError, match="mode F"):
        prepare(Image.new("F", (4, 4)))


# Decoded fast


def is_close(fast: np.ndarray, exact: np.ndarray) -> bool:
    """Whether they show the same, as libjpeg scales it; half a pixel off is 1.5 levels or more."""
    return bool(np.abs(fast.astype(int) - exact).mean() < 0.7)


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    """Blobs of colour, 1201 x 903 px: neither side can be divided by 2."""
    noise = np.random.default_rng(4).integers(0, 256, (20, 27, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((1201, 903), Image.Resampling.BICUBIC)


def decoded_sizes(monkeypatch) -> list[tuple[int, int]]:
    """Note the size that each image has when it comes to the resize."""
    from clip_rt.inputs import transform

    sizes, make_resizable = [], transform._make_resizable

    def note(image):
        sizes.append(image.size)
        return make_resizable(image)

    monkeypatch.setattr(transform, "_make_resizable", note)
    return sizes


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("side_px", "expected"),
    [(64, (151, 113)), (74, (151, 113)), (75, (301, 226)), (224, (601, 452)), (302, (1201, 903))],
)
def test_fast_decodes_no_more_than_the_square_needs(scene, monkeypatch, side_px, expected, turned):
    image = scene.transpose(Image.Transpose.ROTATE_90) if turned else scene
    encoded = encode(image, "JPEG", quality=90)
    sizes = decoded_sizes(monkeypatch)
    fast = prepare(encoded, side_px=side_px, decode="fast")
    exact = prepare(encoded, side_px=side_px)
    assert sizes == [expected[::-1] if turned else expected, image.size]
    assert min(expected) >= 1.5 * side_px
    assert is_close(fast, exact)
    assert (fast != exact).any() == (expected != scene.size)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1201, 903), (903, 1201)])
def test_fast_shows_the_same_part_the_same_way_up(scene, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(scene.resize(size), "JPEG", quality=90, exif=exif.tobytes())
    for side_px in (64, 101):
        for upright in (True, False):
            fast = prepare(encoded, side_px=side_px, exif=upright, decode="fast")
            assert is_close(fast, prepare(encoded, side_px=side_px, exif=upright))


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCCK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_fast_knows_every_kind_of_jpeg(scene, monkeypatch, mode, progressive):
    image = scene.convert("CMYK" if mode == "YCCK" else mode)
    encoded = bytearray(encode(image, "JPEG", quality=90, progressive=progressive))
    if mode == "YCCK":
        # Pillow does not write it. Adobe's marker says so, and the colours become odd ones.
        encoded[encoded.index(b"Adobe") + 11] = 2
        assert Image.open(io.BytesIO(encoded)).info["adobe_transform"] == 2
    sizes = decoded_sizes(monkeypatch)
    fast = prepare(encoded, side_px=64, decode="fast")
    assert sizes == [(151, 113)]
    assert is_close(fast, prepare(encoded, side_px=64))


def test_fast_reads_the_first_of_several_pictures(scene, monkeypatch):
    other = scene.transpose(Image.Transpose.ROTATE_180)
    encoded = encode(scene, "MPO", save_all=True, append_images=[other], quality=90)
    assert Image.open(io.BytesIO(encoded)).format == "MPO"
    sizes = decoded_sizes(monkeypatch)
    fast = prepare(encoded, side_px=64, decode="fast")
    assert sizes == [(151, 113)]
    assert is_close(fast, prepare(encoded, side_px=64))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_fast_is_exact_for_small_jpegs(mode):
    for width, height in SIZES:
        encoded = encode(draw(mode, width, height), "JPEG", quality=85)
        np.testing.assert_array_equal(prepare(encoded, decode="fast"), prepare(encoded))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "BMP"])
def test_fast_is_exact_for_other_formats(scene, file_format):
    encoded = encode(scene, file_format)
    np.testing.assert_array_equal(
        prepare(encoded, side_px=64, decode="fast"), prepare(encoded, side_px=64)
    )


def test_fast_leaves_what_the_caller_opened_as_it_is(scene):
    encoded = encode(scene, "JPEG", quality=90)
    opened = Image.open(io.BytesIO(encoded))
    found = prepare(opened, side_px=64, decode="fast")
    assert opened.size == scene.size
    np.testing.assert_array_equal(found, prepare(encoded, side_px=64))


def test_fast_reads_the_sizes_that_are_in_the_header(scene):
    encoded = encode(scene, "JPEG")
    with pytest.raises(ImageError, match="1201 x 903 px"):
        prepare(encoded, side_px=64, decode="fast", max_pixels=1_000_000)


def test_fast_refuses_truncated_files(scene):
    for progressive in (False, True):
        encoded = encode(scene, "JPEG", progressive=progressive)
        for tenth in range(10):
            with pytest.raises(ImageError, match="image 4"):
                prepare(encoded[: len(encoded) * tenth // 10], index=4, decode="fast")


def test_batches_are_decoded_fast_too(scene):
    encoded = encode(scene, "JPEG", quality=90)
    expected = prepare(encoded, side_px=64, decode="fast")
    for num_threads in (1, 2):
        found = preprocess([encoded] * 3, side_px=64, decode="fast", num_threads=num_threads)
        assert (found == expected).all()


# What a batch is


def test_a_batch_keeps_its_order_and_mixes_kinds(tmp_path):
    images = [draw("RGB", 50 + n, 60) for n in range(7)]
    path = tmp_path / "a.png"
    path.write_bytes(encode(images[2], "PNG"))
    png = encode(images[3], "PNG")
    mixed = [images[0], np.asarray(images[1]), path, png, bytearray(encode(images[4], "PNG"))]
    mixed += [memoryview(encode(images[5], "PNG")), images[6]]
    found = preprocess((each for each in mixed), side_px=32)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert found.flags.writeable
    np.testing.assert_array_equal(found, preprocess(images, side_px=32))
    assert len({square.tobytes() for square in found}) == 7


def test_one_image_alone_is_a_batch_of_one(tmp_path):
    image = draw("RGB", 40, 30)
    path = tmp_path / "a.png"
    path.write_bytes(encode(image, "PNG"))
    singles = [image, np.asarray(image), path, str(path), path.read_bytes()]
    singles += [bytearray(path.read_bytes()), memoryview(path.read_bytes())]
    for single in singles:
        np.testing.assert_array_equal(preprocess(single), preprocess([image]))


def test_an_array_of_four_axes_is_a_batch():
    array = np.stack([np.asarray(draw("RGB", 30, 20)), np.zeros((20, 30, 3), np.uint8)])
    assert preprocess(array, side_px=16).shape == (2, 16, 16, 3)


@pytest.mark.parametrize("nothing", [[], (), iter(()), np.empty((0, 9, 9, 3), np.uint8)])
def test_an_empty_batch_gives_an_empty_array(nothing):
    found = preprocess(nothing, side_px=96)
    assert found.shape == (0, 96, 96, 3)
    assert found.dtype == np.uint8


def test_images_stream_one_at_a_time():
    asked = []

    def endless():
        while True:
            asked.append(None)
            yield np.zeros((8, 8, 3), np.uint8)

    stream = prepare_each(endless(), side_px=8)
    assert [next(stream).shape for _ in range(3)] == [(8, 8, 3)] * 3
    assert len(asked) == 3


def test_the_input_is_left_as_it_was():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = draw("RGB", 40, 30)
    image.info["exif"] = exif.tobytes()
    before = image.tobytes(), image.size, dict(image.info)
    array = np.asarray(image).copy()
    array.flags.writeable = False
    square = prepare(array, side_px=30)
    square[:] = 0
    prepare(image)
    assert (image.tobytes(), image.size, dict(image.info)) == before
    assert array.any()


@pytest.mark.parametrize("images", [None, 3, {"a": 1}, {b"a"}, object()])
def test_what_is_no_collection_is_refused(images):
    with pytest.raises(ImageError, match="Pass a list") as caught:
        preprocess(images)
    assert caught.value.index is None


@pytest.mark.parametrize("image", [None, 3, object(), [], np.uint8(3)])
def test_what_is_no_image_is_refused_with_its_index(image):
    with pytest.raises(ImageError, match=r"image 1 .*is no image. Pass") as caught:
        preprocess([np.zeros((4, 4, 3), np.uint8), image])
    assert caught.value.index == 1


def test_an_open_file_is_not_read_as_lines(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(draw("RGB", 40, 30), "PNG"))
    with path.open("rb") as file:
        assert len(list(file)) > 1
        with pytest.raises(ImageError, match=r"image 0 \(BufferedReader\) .* its end"):
            preprocess(file)
        file.seek(0)
        np.testing.assert_array_equal(preprocess(file), preprocess(path))


def test_iterate_and_prepare_go_on_past_a_bad_image():
    good = np.zeros((4, 4, 3), np.uint8)
    found = []
    for index, image in enumerate(iterate([good, b"bad", good])):
        try:
            found.append(prepare(image, side_px=4, index=index).shape)
        except ImageError as error:
            found.append(error.index)
    assert found == [(4, 4, 3), 1, (4, 4, 3)]


@pytest.mark.parametrize("side_px", [0, -1, 2.5, "224", None, MAX_SIDE_PX + 1])
def test_a_bad_side_is_refused_even_for_no_images(side_px):
    with pytest.raises(InputError, match="side_px"):
        preprocess([], side_px=side_px)


# Arrays that are no images


@pytest.mark.parametrize(
    ("array", "way_out"),
    [
        (np.zeros((8, 8, 3), np.float32), "0..255"),
        (np.full((8, 8, 3), np.nan), "0..255"),
        (np.zeros((8, 8, 3), np.uint16), "uint16"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.zeros((8, 8, 3), bool), "bool"),
        (np.zeros((8, 8, 3), object), "object"),
        (np.zeros((3, 8, 8), np.uint8), "transpose"),
        (np.zeros((8, 8), np.uint8), "np.stack"),
        (np.zeros((8, 8, 4), np.uint8), r"\.\.\., :3"),
        (np.zeros((8, 8, 1), np.uint8), "np.stack"),
        (np.zeros((0, 8, 3), np.uint8), "no area"),
        (np.zeros((), np.uint8), "height, width, 3"),
        (np.broadcast_to(np.uint8(0), (100_000, 100_000, 3)), "max_pixels"),
    ],
)
def test_arrays_that_are_no_images_say_how_to_convert(array, way_out):
    with pytest.raises(ImageError, match=way_out):
        prepare(array)


# Files


def test_paths_that_are_no_regular_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.png", "/dev/zero", "/dev/null"):
        with pytest.raises(ImageError, match=r"image 0 \("):
            preprocess([path])


def test_a_device_is_not_even_opened(monkeypatch):
    def refuse(*_):
        raise AssertionError("it was opened")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ImageError, match="no regular file"):
        prepare("/dev/zero")


def test_strings_are_paths_and_nothing_is_fetched(monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", None)
    for text in (
        "http://127.0.0.1/a.png",
        "file:///etc/hostname",
        "data:image/png;base64,AAAA",
        "a\0b",
        "\ud800",
        "",
        "x" * 9999,
    ):
        with pytest.raises(ImageError, match="URLs are not fetched"):
            prepare(text)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    found = []

    def read():
        try:
            prepare(path)
        except ImageError as error:
            found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert "no regular file" in str(found[0])


def test_a_link_to_a_file_is_followed(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(draw("RGB", 40, 30), "PNG"))
    link = tmp_path / "link"
    link.symlink_to(path)
    np.testing.assert_array_equal(prepare(link), prepare(path))


def test_large_files_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        file.truncate(50 * 1024**3)
    start_s = time.process_time()
    with pytest.raises(ImageError, match=r"53,687,091,200 bytes .* 33,554,432 .* max_bytes"):
        prepare(path)
    assert time.process_time() - start_s < 1


def test_a_file_that_hides_its_length_is_read_to_one_byte_past_the_limit(tmp_path, monkeypatch):
    from clip_rt.inputs import decoding

    path = tmp_path / "grows.png"
    path.write_bytes(b"x" * 5000)
    # As for a file under /proc, or one that grows after it was looked at.
    monkeypatch.setattr(decoding, "_check_file", lambda status, *, max_bytes: None)
    with pytest.raises(ImageError, match="has 1,001 bytes or more; at most 1,000"):
        prepare(path, max_bytes=1000)


def test_bytes_over_the_limit_are_refused():
    encoded = encode(draw("RGB", 40, 30), "PNG")
    prepare(encoded, max_bytes=len(encoded))
    for image in (encoded, memoryview(encoded)):
        with pytest.raises(ImageError, match="max_bytes"):
            prepare(image, max_bytes=len(encoded) - 1)


def test_no_file_stays_open(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(draw("RGB", 40, 30), "PNG"))
    bad = tmp_path / "b.png"
    bad.write_bytes(b"bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        descriptor = os.dup(0)
        os.close(descriptor)
        for each in (path, bad, tmp_path):
            try:
                prepare(each)
            except ImageError:
                assert each != path
        after = os.dup(0)
        os.close(after)
    assert after == descriptor


# Bytes that are no good image


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_of(width: int, height: int) -> bytes:
    """A whole 1-bit PNG, or beyond 10,000 px only its header and a little data."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = bytes((width // 8 + 1) * min(height, 10_000 if width <= 10_000 else 9))
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def webp_of(width: int, height: int) -> bytes:
    """An animation of one 16 px frame on a canvas of the given size."""
    frame = encode(Image.new("RGBA", (16, 16), "red"), "WEBP", lossless=True)[12:]
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    place = bytes(6) + (15).to_bytes(3, "little") * 2 + bytes(4)
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x12\0\0\0" + size
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", 16 + len(frame)) + place + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_of(width: int, height: int) -> bytes:
    small = encode(Image.new("P", (1, 1)), "GIF")
    return small[:6] + struct.pack("<HH", width, height) + small[10:]


def bmp_of(width: int, height: int) -> bytes:
    small = encode(Image.new("RGB", (1, 1)), "BMP")
    return small[:18] + struct.pack("<ii", width, height) + small[26:]


def jpeg_of(width: int, height: int) -> bytes:
    small = encode(Image.new("L", (8, 8)), "JPEG")
    at = small.index(b"\xff\xc0") + 5
    return small[:at] + struct.pack(">HH", height, width) + small[at + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("make", [png_of, webp_of, gif_of, bmp_of, jpeg_of])
def test_bombs_are_refused_from_their_header(make):
    for width, height in ((9_000, 9_000), (12_000, 12_000), (16_000, 16_000)):
        with pytest.raises(ImageError, match=r"pixels.*64,000,000 are read. Make it smaller"):
            prepare(make(width, height))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory")
def test_bombs_cost_no_memory(tmp_path):
    paths = []
    for name, bomb in {
        "a.png": png_of(50_000, 50_000),
        "b.png": png_of(9_000, 9_000),
        "c.webp": webp_of(12_000, 12_000),
        "d.gif": gif_of(60_000, 60_000),
    }.items():
        assert len(bomb) < 100_000
        paths.append(str(tmp_path / name))
        Path(paths[-1]).write_bytes(bomb)
    program = """if True:
        import resource, sys, warnings
        import numpy
        from clip_rt import errors
        from clip_rt.inputs import images
        warnings.simplefilter("ignore")
        images.prepare(numpy.zeros((8, 8, 3), numpy.uint8))
        peak_kib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak_kib()
        refused = 0
        for path in sys.argv[1:]:
            try:
                images.prepare(path)
            except errors.ImageError:
                refused += 1
        print(refused, peak_kib() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", program, *paths],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    refused, grown_kib = map(int, done.stdout.split())
    assert refused == len(paths)
    assert grown_kib < 50 * 1024


def test_the_pixel_limit_can_be_raised_and_lowered():
    encoded = encode(Image.new("1", (300, 200)), "PNG")
    prepare(encoded, max_pixels=60_000)
    for image in (encoded, Image.new("L", (300, 200)), np.zeros((200, 300, 3), np.uint8)):
        with pytest.raises(ImageError, match="300 x 200 px, 60,000 pixels; at most 59,999"):
            prepare(image, max_pixels=59_999)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("size", [(1, 300), (300, 1), (2, 1001), (905, 3), (1, 1200)])
def test_long_thin_images_equal_open_clip_exactly(reference, mode, size):
    image = draw(mode, *size)
    np.testing.assert_array_equal(prepare(image), reference(image, 224))


def test_long_thin_images_are_refused_before_they_grow():
    # 200 times as long as wide is resized under any limit.
    assert prepare(Image.new("L", (200, 1)), side_px=224, max_pixels=200).shape == (224, 224, 3)
    for size in ((201, 1), (1, 10_000)):
        image = Image.new("L", size)
        assert prepare(image, side_px=16).shape == (16, 16, 3)
        num_pixels = 16 * 16 * max(size)
        prepare(image, side_px=16, max_pixels=num_pixels)
        with pytest.raises(ImageError, match=f"{num_pixels:,} pixels, and .* raise max_pixels"):
            prepare(image, side_px=16, max_pixels=num_pixels - 1)
    with pytest.raises(ImageError, match="raise max_pixels"):
        prepare(Image.new("L", (1, 1_000_000)))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_area_is_refused(size):
    with pytest.raises(ImageError, match="no area"):
        prepare(Image.new("RGB", size))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_files_are_refused(file_format):
    encoded = encode(draw("RGB", 120, 90), file_format)
    prepare(encoded)
    for tenth in range(10):
        with pytest.raises(ImageError, match="image 4") as caught:
            prepare(encoded[: len(encoded) * tenth // 10], index=4)
        assert caught.value.index == 4
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html><body>404</body></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
        b"%PDF-1.7\n",
        b"SIMPLE  =                    T" + b" " * 2850,
        b"II*\0\x08\0\0\0" + bytes(99),
        b"P6 4 4 255 " + bytes(48),
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"BM" + bytes(60),
    ],
)
def test_what_the_five_decoders_do_not_read_is_refused(content):
    with pytest.raises(ImageError):
        prepare(content)


@pytest.mark.parametrize("file_format", ["TIFF", "EPS", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused_as_bytes_and_as_opened_images(file_format):
    encoded = encode(draw("RGB", 40, 30), file_format)
    with pytest.raises(ImageError, match="Convert it"):
        prepare(encoded)
    opened = Image.open(io.BytesIO(encoded))
    with pytest.raises(ImageError, match=r"image.copy\(\)"):
        prepare(opened)
    if file_format != "EPS":
        prepare(opened.copy())


def test_a_bad_file_does_not_load_pillow_s_other_decoders():
    program = """if True:
        import sys
        from clip_rt import errors
        from clip_rt.inputs import images
        try:
            images.prepare(b"%!PS-Adobe-3.0 EPSF-3.0")
        except errors.ImageError:
            loaded = [f"PIL.{name}ImagePlugin" in sys.modules for name in ("Eps", "Tiff", "Fits")]
            print(any(loaded))
    """
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"


def test_the_first_frame_of_an_animation_is_read(reference):
    frames = [draw("RGB", 60, 50), draw("RGB", 60, 50).transpose(Image.Transpose.ROTATE_180)]
    for file_format in ("GIF", "WEBP", "PNG", "MPO"):
        encoded = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
        opened = Image.open(io.BytesIO(encoded))
        assert opened.n_frames == 2
        expected = reference(opened.convert("RGB"), 64)
        np.testing.assert_array_equal(prepare(encoded, side_px=64), expected)


def test_a_text_chunk_bomb_in_a_png_is_refused():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    encoded = encode(Image.new("L", (4, 4)), "PNG", pnginfo=info)
    with pytest.raises(ImageError, match="cannot be decoded"):
        prepare(encoded)


def test_an_opened_image_whose_file_is_closed_is_refused(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(draw("RGB", 40, 30), "PNG"))
    image = Image.open(path)
    image.close()
    with pytest.raises(ImageError, match="cannot be decoded"):
        prepare(image)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=12),
    st.sampled_from(["exact", "fast"]),
)
def test_damaged_bytes_give_a_square_or_an_image_error(file_format, damages, decode):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif.tobytes()} if file_format in ("JPEG", "PNG", "WEBP") else {}
    damaged = bytearray(encode(Image.new("RGB", (20, 11), "orange"), file_format, **options))
    for place, value in damages:
        damaged[int(place * (len(damaged) - 1))] = value
    with contextlib.suppress(ImageError):
        square = prepare(damaged, side_px=4, max_pixels=10_000, decode=decode)
        assert square.shape == (4, 4, 3)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"]), st.binary()
)
def test_random_bytes_give_an_image_error(prefix, content):
    with pytest.raises(ImageError):
        prepare(prefix + content, max_pixels=10_000)
