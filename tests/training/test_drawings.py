import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.drawing_batches import load_drawings
from training.drawings import (
    NAMES_HELD_OUT_ONE_IN,
    Drawing,
    Emoji,
    letters,
    plain_name,
    thin_out,
    write_shard,
)
from training.render import line_svg, render

SAMPLE = Path(__file__).resolve().parents[2] / "training/sample"
RED = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10" width="20" height="10">'
    '<rect x="2" y="2" width="16" height="6" fill="#f00"/></svg>'
)


@pytest.mark.parametrize(
    ("file_name", "affixes", "name"),
    [
        ("arrow-left-bold-duotone", ["bold-duotone", "linear"], "arrow left"),
        ("document-dismiss-48-filled", ["48-filled"], "document dismiss"),
        ("outline-chevron-left", [], "chevron left"),
        ("table-cell-2", [], "table cell"),
        ("bold", [], "bold"),
        ("24-hours", [], "24 hours"),
    ],
)
def test_a_name_says_what_is_drawn_not_how(file_name: str, affixes: list[str], name: str) -> None:
    assert plain_name(file_name, affixes) == name


def test_rendering_keeps_the_shape_and_the_colour() -> None:
    with Image.open(io.BytesIO(render(RED, background=None))) as image:
        rgba = np.asarray(image.convert("RGBA"))
    assert rgba.shape == (64, 64, 4)
    assert tuple(rgba[32, 32]) == (255, 0, 0, 255)
    assert rgba[4, 32, 3] == 0, "a wide drawing leaves the top of the square empty"


def test_lines_are_black_and_not_filled() -> None:
    with Image.open(io.BytesIO(render(line_svg(RED), background="white"))) as image:
        rgb = np.asarray(image.convert("RGB"))
    assert (rgb[32, 32] == 255).all(), "the inside is empty"
    assert rgb.min() < 80, "the outline is dark"
    assert np.ptp(rgb.astype(int), axis=2).max() == 0, "without any colour"
    with Image.open(io.BytesIO(render(line_svg(RED, over=True), background="white"))) as image:
        assert image.convert("RGB").getpixel((32, 32)) == (255, 0, 0), "inked over the picture"


def test_a_set_keeps_few_drawings_of_one_name() -> None:
    drawings = [Drawing("set", f"cat-{number}", "cat") for number in range(9)]
    kept = thin_out(drawings)
    assert len(kept) == 2
    assert kept == thin_out(drawings[::-1]), "whatever their order"


def test_shards_hold_what_was_drawn(tmp_path: Path) -> None:
    good = Drawing("set", "box", "red box", keywords=["shape"], palette=True, svg=RED)
    broken = Drawing("set", "broken", "broken", svg="<svg")
    assert write_shard(tmp_path / "set.tar", [good, broken], background=None) == 1
    drawings = load_drawings([tmp_path / "set.tar"], progress=False)
    assert drawings.pixels.shape == (1, 64, 64, 4)
    assert drawings.records[0]["name"] == "red box"
    assert [path.name for path in tmp_path.iterdir()] == ["set.tar"]


def records(path: Path) -> list[dict[str, str]]:
    with tarfile.open(path) as tar:
        members = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
        return [json.load(member) for member in members if member is not None]


def test_the_sample_keeps_apart_what_the_model_must_not_see() -> None:
    train = records(SAMPLE / "train/sample.tar")
    assert len(train) > 1000
    styles = {
        record["set_name"] for path in SAMPLE.glob("styles/*.tar") for record in records(path)
    }
    assert styles == {"openmoji", "openmoji-black", "iconoir", "flat-color-icons"}
    assert not styles & {record["set_name"] for record in train}

    unseen = {
        letters(record["name"]) for path in SAMPLE.glob("names/*.tar") for record in records(path)
    }
    assert len(unseen) > 80
    assert not unseen & {letters(record["name"]) for record in train}


def test_held_out_names_are_one_in_twenty_by_hash() -> None:
    emoji = [
        Emoji(record["emoji"], record["name"], ())
        for record in records(SAMPLE / "styles/openmoji.tar")
    ]
    assert len(emoji) == 1923
    held_out = [item for item in emoji if item.held_out]
    assert 0.5 < len(held_out) * NAMES_HELD_OUT_ONE_IN / len(emoji) < 1.5
    digest = hashlib.sha256(held_out[0].hexcode.encode()).digest()
    assert int.from_bytes(digest[:4], "big") % NAMES_HELD_OUT_ONE_IN == 0
