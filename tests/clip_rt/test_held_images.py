"""Images as programs hold them: open files, uploads, tensors; and whose EXIF orientation counts."""

from __future__ import annotations

import asyncio
import copy
import io
import logging
import mmap
import pickle
import tempfile
import threading
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_input_forms import draw, encode, opened, orient

import clip_rt
from clip_rt import testing
from clip_rt.inputs import decoding, transform
from clip_rt.inputs.images import prepare_each
from clip_rt.inputs.transform import prepare

PNG = encode(draw())
EXPECTED = prepare(PNG, side_px=32)


def see(image, **options):
    (square,) = clip_rt.preprocess(image, side_px=32, **options)
    return square


# ---- open files


class Upload:
    """As web frameworks hand it over: a file with a name, no `seekable`."""

    def __init__(self, content: bytes) -> None:
        self.stream, self.filename = io.BytesIO(content), "a.png"

    def read(self, size=-1):
        return self.stream.read(size)

    def __iter__(self):
        return iter(self.stream)


class Trickle(Upload):
    """A few bytes at a time, as a socket gives them."""

    def read(self, size=-1):
        return self.stream.read(min(size, 7))


def spooled(content: bytes) -> tempfile.SpooledTemporaryFile:
    file = tempfile.SpooledTemporaryFile(max_size=64)  # rolls over to the disk  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file


def zipped(content: bytes):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writing:
        writing.writestr("a.png", content)
    return zipfile.ZipFile(archive).open("a.png")


def mapped(content: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(content))
    memory.write(content)
    memory.seek(0)
    return memory


FILES = {
    "BytesIO": io.BytesIO,
    "buffered": lambda content: io.BufferedReader(io.BytesIO(content)),
    "spooled": spooled,
    "in an archive": zipped,
    "memory map": mapped,
    "upload": Upload,
    "trickle": Trickle,
}


@pytest.mark.parametrize("kind", FILES)
def test_an_open_file_is_an_image(kind):
    alone, first, last = (FILES[kind](PNG) for _ in range(3))
    np.testing.assert_array_equal(see(alone), EXPECTED)
    found = clip_rt.preprocess([first, PNG, last], side_px=32, num_threads=3)
    np.testing.assert_array_equal(found, [EXPECTED] * 3)
    for file in (alone, first, last):
        getattr(file, "close", lambda: None)()


def test_a_file_on_the_disk_is_an_image(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with path.open("rb") as file, path.open("rb", buffering=0) as raw:
        np.testing.assert_array_equal(see(file), EXPECTED)
        np.testing.assert_array_equal(see(raw), EXPECTED)
        assert (file.tell(), raw.tell(), file.closed) == (0, 0, False)
    with pytest.raises(clip_rt.ImageError, match=r"cannot be read: .*closed"):
        see(file)


def test_a_file_is_read_from_where_it_stands_and_put_back():
    file = io.BytesIO(b"header" + PNG)
    file.seek(6)
    for _ in range(2):
        np.testing.assert_array_equal(see(file), EXPECTED)
        assert file.tell() == 6


def test_a_file_at_its_end_is_told_to_go_back():
    file = io.BytesIO()
    draw().save(file, "PNG")
    for images in (file, [file]):
        with pytest.raises(clip_rt.ImageError, match=r"at its end\..*\.seek\(0\)"):
            clip_rt.preprocess(images)
    file.seek(3)
    with pytest.raises(clip_rt.ImageError, match=r"no readable .* from byte 3,.*\.seek\(0\)"):
        see(file)
    with pytest.raises(clip_rt.ImageError, match=r"empty or at its end. Leave it out"):
        see(io.BytesIO())


def test_one_file_may_stand_in_a_list_many_times():
    file = io.BytesIO(PNG)
    found = clip_rt.preprocess([file] * 40, side_px=32, num_threads=8)
    np.testing.assert_array_equal(found, [EXPECTED] * 40)


def test_a_file_open_as_text_is_told_to_be_opened_as_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    wrapped = Upload(PNG)
    wrapped.read = lambda size: "text"
    with (
        tempfile.SpooledTemporaryFile(mode="w+", encoding="utf-8") as spool,
        path.open(encoding="utf-8") as text,
        path.open(encoding="latin-1") as latin,
    ):
        spool.write("text")
        spool.seek(0)
        for file in (text, latin, io.StringIO("text"), wrapped, spool):
            with pytest.raises(clip_rt.ImageError, match="'rb'"):
                see(file)


class AsyncUpload:
    def __init__(self, content: bytes) -> None:
        self.file = io.BytesIO(content)

    async def read(self, size=-1):
        return self.file.read(size)


def test_an_asynchronous_upload_is_told_to_be_awaited(recwarn):
    hidden = Upload(PNG)
    hidden.read = lambda size: asyncio.sleep(0)
    for upload in (AsyncUpload(PNG), hidden):
        with pytest.raises(clip_rt.ImageError, match=r"await file\.read\(\).*file\.file"):
            see(upload)
    assert not [each for each in recwarn if "never awaited" in str(each.message)]
    np.testing.assert_array_equal(see(AsyncUpload(PNG).file), EXPECTED)


def test_an_endless_stream_is_read_to_the_limit():
    class Endless:
        num_bytes = 0

        def read(self, size):
            part = b"x" * min(size, 1000)
            self.num_bytes += len(part)
            return part

    stream = Endless()
    with pytest.raises(clip_rt.ImageError, match=r"at most 5,000 .* raise max_bytes"):
        see(stream, max_bytes=5000)
    assert stream.num_bytes == 5001


@pytest.mark.parametrize("trouble", [OSError("gone"), RuntimeError("odd"), ValueError("closed")])
def test_what_a_file_raises_is_an_image_error(trouble):
    class Broken:
        def read(self, size):
            raise trouble

    with pytest.raises(clip_rt.ImageError, match=f"image 1 .*cannot be read: {trouble}") as caught:
        clip_rt.preprocess([PNG, Broken()])
    assert caught.value.__cause__ is trouble
    found = list(prepare_each([PNG, Broken(), PNG], num_threads=2, on_error="skip"))
    assert [type(each).__name__ for each in found] == ["ndarray", "ImageError", "ndarray"]


def test_what_holds_an_image_is_told_how_to_hand_it_over(tmp_path):
    class Response:
        content = PNG

    class Traversable:
        def read_bytes(self):
            return PNG

    for held, way in ((Response(), r"\.content"), (Traversable(), r"\.read_bytes\(\)")):
        with pytest.raises(clip_rt.ImageError, match=way):
            clip_rt.preprocess([held])


# ---- arrays of others


def tensor(of: np.ndarray):
    return pytest.importorskip("torch").from_numpy(of.copy())


def test_tensors_are_images():
    torch = pytest.importorskip("torch")
    pixels = np.asarray(draw())
    whole = tensor(pixels)
    turned = tensor(pixels.transpose(2, 0, 1)).permute(1, 2, 0)
    fortran = whole.transpose(0, 1).contiguous().transpose(0, 1)
    for each in (whole, turned, fortran, torch.nn.Parameter(whole, requires_grad=False)):
        np.testing.assert_array_equal(see(each), EXPECTED)
        np.testing.assert_array_equal(see([each, PNG][:1]), EXPECTED)
    batch = torch.stack([whole, whole.flip(0)])
    np.testing.assert_array_equal(clip_rt.preprocess(batch, side_px=32)[0], EXPECTED)
    assert clip_rt.preprocess(batch, side_px=32).shape == (2, 32, 32, 3)
    assert clip_rt.preprocess(batch[:0], side_px=32).shape == (0, 32, 32, 3)
    square = tensor(EXPECTED)
    found = see(square)
    found[:] = 0
    np.testing.assert_array_equal(square.numpy(), EXPECTED)


def test_tensors_that_are_no_images_are_told_the_call_that_makes_them_one():
    torch = pytest.importorskip("torch")
    chw = torch.zeros(3, 40, 50, dtype=torch.uint8)
    for each, way in (
        (chw, r"tensor\.permute\(1, 2, 0\)"),
        (chw.permute(1, 2, 0).float(), r"\(x \* 255\)\.round\(\)\.byte\(\)"),
        (chw.float(), r"\.byte\(\).*tensor\.permute\(1, 2, 0\)"),
        (chw.float().requires_grad_(), r"\.detach\(\)\.cpu\(\)\.byte\(\)\.numpy\(\)"),
        (chw.bfloat16(), r"\.numpy\(\)"),
        (torch.zeros(40, 50, 3, dtype=torch.uint8, device="meta"), r"\.cpu\(\)"),
        (torch.zeros(40, 50, dtype=torch.uint8), "np.stack"),
        (torch.zeros(9, 3, 40, 50, dtype=torch.uint8), r"image 0 .*permute\(1, 2, 0\)"),
    ):
        with pytest.raises(clip_rt.ImageError, match=way):
            clip_rt.preprocess(each)
    with pytest.raises(clip_rt.ImageError, match=r"tobytes\(\)"):
        clip_rt.preprocess([np.frombuffer(PNG, np.uint8)])
    with pytest.raises(clip_rt.ImageError, match="It is a batch"):
        clip_rt.preprocess([torch.zeros(1, 8, 8, 3, dtype=torch.uint8)])


class Interface:
    """Gives itself in one way only."""

    def __init__(self, way: str, of: np.ndarray) -> None:
        self.shape = of.shape
        self.__dict__["of"] = of
        self.way = way

    def __getattr__(self, name):
        if name == self.__dict__["way"]:
            return getattr(self.of, name)
        raise AttributeError(name)


@pytest.mark.parametrize("way", ["__array_interface__", "__dlpack__"])
def test_arrays_of_other_libraries_are_images(way):
    pixels = np.asarray(draw()).copy()
    if way == "__dlpack__":

        class Lent:
            shape = pixels.shape

            def __dlpack__(self, **options):
                return pixels.__dlpack__()

            def __dlpack_device__(self):
                return pixels.__dlpack_device__()

        held = Lent()
    else:
        held = Interface(way, pixels)
    np.testing.assert_array_equal(see(held), EXPECTED)
    np.testing.assert_array_equal(see([held]), EXPECTED)


# ---- whose orientation


STORED = orient(draw(), 6)
AS_STORED = prepare(STORED, side_px=32, exif=False)
UPRIGHT = prepare(STORED, side_px=32)


def thumbnail(image: Image.Image) -> Image.Image:
    image.thumbnail((60, 60))
    return image


def upright_in_place(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    return image


def drafted(image: Image.Image) -> Image.Image:
    image.draft("RGB", image.size)
    return image


@pytest.mark.parametrize("orientation", range(2, 9))
def test_what_its_owner_turned_upright_is_not_turned_again(orientation):
    stored = opened(orient(draw(), orientation))
    turn = transform._UPRIGHT[orientation]
    by_hand = stored.transpose(turn)
    assert by_hand.getexif()[0x0112] == orientation
    expected = prepare(np.asarray(by_hand), side_px=32)
    np.testing.assert_array_equal(see(by_hand), expected)
    np.testing.assert_array_equal(see(upright_in_place(stored.copy())), expected)
    np.testing.assert_array_equal(see(orient(draw(), orientation)), expected)
    if orientation in (3, 6, 8):
        degrees = {3: 180, 6: -90, 8: 90}[orientation]
        np.testing.assert_array_equal(see(stored.rotate(degrees, expand=True)), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda image: image,
        drafted,
        copy.deepcopy,
        lambda image: pickle.loads(pickle.dumps(image)),
    ],
    ids=["opened", "drafted", "copied deeply", "pickled"],
)
def test_an_opened_image_with_its_stored_pixels_is_turned(make):
    np.testing.assert_array_equal(see(make(opened(STORED))), UPRIGHT)
    np.testing.assert_array_equal(see(make(opened(STORED)), exif=False), AS_STORED)


def test_an_opened_image_that_was_changed_in_place_keeps_the_orientation_it_says():
    small = thumbnail(opened(STORED))
    assert small.size == (60, 41)
    np.testing.assert_array_equal(see(small), see(ImageOps.exif_transpose(small)))
    np.testing.assert_array_equal(see(upright_in_place(opened(STORED))), UPRIGHT)
    told = opened(STORED)
    told.getexif()[0x0112] = 1
    np.testing.assert_array_equal(see(told), AS_STORED)


@pytest.mark.parametrize(
    "make",
    [
        lambda image: image.copy(),
        lambda image: image.convert("RGB"),
        lambda image: image.convert("L"),
        lambda image: image.crop((0, 0, 50, 50)),
        lambda image: image.resize((50, 60)),
        lambda image: ImageOps.mirror(image),
    ],
    ids=["copy", "RGB", "L", "crop", "resize", "mirror"],
)
def test_an_image_made_from_it_is_taken_as_its_owner_sees_it(make):
    made = make(opened(STORED))
    expected = prepare(np.asarray(made.convert("RGB")), side_px=32)
    if made.mode == "RGB":
        np.testing.assert_array_equal(see(made), expected)
    np.testing.assert_array_equal(see(made), see(made, exif=False))


def test_an_orientation_that_is_not_followed_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(transform, "_num_left_as_they_are", iter(range(9)))
    with caplog.at_level(logging.WARNING, "clip_rt.inputs.images"):
        see(draw())
        see(opened(STORED))
        assert not caplog.records
        for _ in range(3):
            see(opened(STORED).convert("RGB"))
    (record,) = caplog.records
    assert "exif_transpose" in record.getMessage()


# ---- limits


def large(file_format: str, size: tuple[int, int]) -> bytes:
    return encode(Image.new("L", size), file_format)


@pytest.fixture(scope="module")
def server():
    with testing.FakeServer(embedding_dim=16, side_px=8) as server:
        yield server


def test_the_limits_of_the_client_can_be_raised_and_lowered(server):
    image = large("PNG", (300, 200))
    for limit, options in (
        ("max_pixels", {"max_pixels": 59_999}),
        ("max_bytes", {"max_bytes": len(image) - 1}),
    ):
        with clip_rt.Client(server.url, **options) as client:
            for carried in (client, pickle.loads(pickle.dumps(client))):
                with carried, pytest.raises(clip_rt.ImageError, match=f"raise {limit}"):
                    carried.encode_images(image)
    with clip_rt.Client(server.url, max_pixels=60_000, max_bytes=len(image)) as client:
        assert client.encode_images(image).shape == (1, 16)


def test_the_limits_of_the_asynchronous_client_are_the_same(server):
    async def ask(**options):
        async with clip_rt.AsyncClient(server.url, **options) as client:
            return await client.encode_images(large("PNG", (300, 200)))

    with pytest.raises(clip_rt.ImageError, match="raise max_pixels"):
        asyncio.run(ask(max_pixels=59_999))
    assert asyncio.run(ask(max_pixels=60_000)).shape == (1, 16)


@pytest.mark.slow
def test_a_photo_of_108_megapixels_and_one_beyond_pillow_s_limit_are_read_when_allowed(server):
    photos = [large("JPEG", (12_000, 9_000)), large("PNG", (16_320, 12_240))]
    with clip_rt.Client(server.url) as client:
        for photo in photos:
            with pytest.raises(clip_rt.ImageError, match=r"64,000,000 .* raise max_pixels"):
                client.encode_images(photo)
    with clip_rt.Client(server.url, max_pixels=200_000_000) as client, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert client.encode_images(photos).shape == (2, 16)


@pytest.mark.parametrize("limit", [0, -1, "many", None, float("nan"), [1]], ids=repr)
def test_what_bounds_nothing_is_refused(limit):
    for name in ("max_pixels", "max_bytes"):
        for make in (
            lambda **options: clip_rt.Client("127.0.0.1:9", **options),
            lambda **options: clip_rt.AsyncClient("127.0.0.1:9", **options),
            lambda **options: clip_rt.preprocess([], **options),
            lambda **options: prepare(PNG, **options),
            lambda **options: decoding.Limits(**options),
        ):
            with pytest.raises(clip_rt.InputError, match=name):
                make(**{name: limit})


def test_no_limit_is_a_limit_too(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    for image in (PNG, path, io.BytesIO(PNG)):
        found = see(image, max_pixels=float("inf"), max_bytes=float("inf"))
        np.testing.assert_array_equal(found, EXPECTED)


def test_a_file_that_waits_holds_up_no_other_image():
    is_read, may_end = threading.Event(), threading.Event()

    class Slow(Upload):
        def read(self, size=-1):
            is_read.set()
            assert may_end.wait(30)
            return super().read(size)

    squares = prepare_each([Slow(PNG), PNG], side_px=32, num_threads=2)
    thread = threading.Thread(target=lambda: list(squares))
    thread.start()
    assert is_read.wait(30)
    np.testing.assert_array_equal(see(io.BytesIO(PNG)), EXPECTED)
    may_end.set()
    thread.join(30)
    assert not thread.is_alive()
