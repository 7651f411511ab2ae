"""Contact sheets and pages: what is in them, and what people are spared."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from asking import LABELS, MODEL, PICTURES, ask
from PIL import Image

from clip_rt.commands import page, sheet
from clip_rt.commands.pictures import PictureOptions, make_thumbnail
from clip_rt.commands.sheet import Caption

NASTY = "<script>alert('&')</script>\"x"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_RT_CACHE_DIR", str(tmp_path / "cache"))


class Reader(HTMLParser):
    """What a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        self.texts.append(data)


def decode(source):
    head, _, encoded = source.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def make(tmp_path, rows, title="Title"):
    """Write both pictures of (name, image, captions) rows, and return them."""
    options = PictureOptions(sheet=tmp_path / "out.png", html=tmp_path / "out.html")
    with options.begin(title) as gallery:
        for name, image, captions in rows:
            gallery.add(name, lambda image=image: image, captions)
    with Image.open(options.sheet) as drawn:
        return drawn.convert("RGB"), Reader(options.html.read_text("utf-8"))


def solid(colour, size=(400, 300), **options):
    written = io.BytesIO()
    Image.new("RGB", size, colour).save(written, "PNG", **options)
    return written.getvalue()


def test_classify_writes_them_beside_its_rows(capfd, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    pictures = ("--sheet", tmp_path / "out.png", "--html", tmp_path / "out.html")
    labels = ("--labels", ",".join(LABELS))
    done = ask(capfd, "classify", *PICTURES, bad, *labels, *pictures, *MODEL)
    assert done.status == 3
    found = Reader((tmp_path / "out.html").read_text("utf-8"))
    assert [each["alt"] for each in found.images] == [str(each) for each in PICTURES]
    for row in done.rows[:-1]:
        assert f"{row['probability']:.1%} {row['label']}" in found.texts
    assert done.rows[-1]["error"] in found.texts
    assert "7 images" in found.texts
    with Image.open(tmp_path / "out.png") as image:
        width, height = sheet.THUMBNAIL_PX
        assert image.width > 5 * width
        assert image.height > 2 * (height + 3 * sheet.LINE_PX)


def test_images_are_where_they_belong(tmp_path):
    drawn, found = make(
        tmp_path, [("red.png", solid("red"), [Caption("50 % red", 0.5)]), ("none", b"", [])]
    )
    pixels = np.asarray(drawn).astype(int)
    red = np.argwhere((pixels == (255, 0, 0)).all(axis=2))
    height, width = red.max(axis=0) - red.min(axis=0) + 1
    assert (width, height) == sheet.THUMBNAIL_PX
    # The bar is half as wide as the image.
    bar = np.argwhere((pixels == tuple(bytes.fromhex(sheet.BAR[1:]))).all(axis=2))
    assert np.ptp(bar[:, 1]) + 1 == sheet.THUMBNAIL_PX[0] // 2
    (image,) = found.images
    colour = np.asarray(decode(image["src"])).reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(colour, (255, 0, 0), atol=3)
    assert found.tags.count("figure") == 2


def test_texts_are_shown_and_not_obeyed(tmp_path):
    rows = [(NASTY, solid("blue"), [Caption(NASTY, 0.3), Caption(NASTY, is_error=True)])]
    _, found = make(tmp_path, rows, title=NASTY)
    assert "script" not in found.tags
    assert found.images[0]["alt"] == NASTY
    assert sum(NASTY in text for text in found.texts) == 5


def test_a_page_needs_nothing_else(tmp_path):
    make(tmp_path, [("a", solid("blue"), [])])
    text = (tmp_path / "out.html").read_text("utf-8")
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text


def test_there_are_not_more_than_people_see(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "MAX_TILES", 2)
    monkeypatch.setattr(page, "MAX_TILES", 3)
    num_read = 0

    def read():
        nonlocal num_read
        num_read += 1
        return solid("blue")

    options = PictureOptions(sheet=tmp_path / "out.png", html=tmp_path / "out.html")
    with options.begin("Title") as gallery:
        for index in range(5):
            gallery.add(str(index), read, [])
    assert num_read == 3
    found = Reader(options.html.read_text("utf-8"))
    assert found.tags.count("figure") == 3
    assert "3 images; 2 more are not shown" in found.texts


def test_an_error_leaves_no_picture_behind(tmp_path):
    options = PictureOptions(sheet=tmp_path / "out.png", html=tmp_path / "out.html")

    def fail():
        with options.begin("Title") as gallery:
            gallery.add("a", lambda: solid("blue"), [])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_photograph_stands_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned by a quarter.
    written = io.BytesIO()
    Image.new("RGB", (400, 200), "green").save(written, "JPEG", exif=exif)
    thumbnail = make_thumbnail(written.getvalue)
    assert thumbnail.height == 2 * thumbnail.width


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    written = io.BytesIO()
    image = Image.new("RGBA", (300, 300), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 150, 300))
    image.convert(mode).save(written, "PNG")
    thumbnail = make_thumbnail(written.getvalue)
    assert thumbnail.mode == "RGB"
    assert thumbnail.getpixel((thumbnail.width - 5, 50)) == (255, 255, 255)
    assert thumbnail.getpixel((5, 50)) != (255, 255, 255)


def test_what_cannot_be_decoded_has_an_empty_place():
    assert make_thumbnail(lambda: b"no image") is None
    assert make_thumbnail(lambda: PICTURES[0].read_bytes()[:200]) is None

    def fail():
        raise OSError

    assert make_thumbnail(fail) is None
