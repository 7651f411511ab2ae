"""Training and evaluation see the same images and classes in a folder, and nothing vanishes."""

import io
import logging
import os
from pathlib import Path

import pytest
from PIL import Image
from tar_shards import write_tar

from clip_rt.errors import InputError
from training.data.folders import CaptionFolder, ClassFolder
from training.data.shards import TarShards
from training.data.sources import open_sources
from training.data.tree import LEFTOVER, read_tree
from training.evaluation.labelled import read_samples


def picture(kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (200, 10, 10)).save(buffer, kind)
    return buffer.getvalue()


JPEG = picture()


def write(root: Path, *names: str, content: bytes = JPEG) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def open_one(root: Path, **options: object) -> ClassFolder | CaptionFolder:
    (source,) = open_sources([str(root)], **options)
    return source


def trained(source: ClassFolder) -> list[tuple[str, str]]:
    pairs = [source[index] for index in range(len(source))]
    return sorted((str(pair.image), pair.label) for pair in pairs)


def evaluated(root: Path) -> list[tuple[str, str]]:
    samples = read_samples([root])
    return sorted((os.path.realpath(each.image), each.label) for each in samples)


@pytest.mark.parametrize(
    "leftovers",
    [
        (".ipynb_checkpoints/0.jpg", "@eaDir/0.jpg", "__MACOSX/0.jpg"),
        ("cat/.ipynb_checkpoints/0-checkpoint.jpg", "dog/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg"),
        ("cat/._0.jpg", "._cat/0.jpg", "__MACOSX/cat/._0.jpg"),
        ("cat/deep/.thumbnails/0.png", ".Trash-1000/files/0.jpg", "cat/.hidden.jpg"),
        ("lost+found/0.jpg", "$RECYCLE.BIN/0.jpg", "__macosx/0.jpg"),
    ],
)
def test_what_programs_leave_behind_is_no_class_and_is_counted(
    tmp_path: Path, leftovers: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "cat/0.jpg", "dog/0.jpg", *leftovers)
    caplog.set_level(logging.WARNING)
    source = open_one(tmp_path)
    assert source.labels == ["cat", "dog"]
    assert dict(source.skips.counts) == {LEFTOVER: len(leftovers)}
    assert evaluated(tmp_path) == trained(source)
    assert LEFTOVER in caplog.text


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", "cat/Thumbs.db"])
def test_their_files_that_are_no_images_cost_no_sample(tmp_path: Path, name: str) -> None:
    write(tmp_path, "cat/0.jpg", "dog/0.jpg")
    write(tmp_path, name, content=b"\0\0\0\1Bud1")
    source = open_one(tmp_path)
    assert source.skips.total == 0
    assert source.skips.ignored == {LEFTOVER: 1}
    assert name in str(source.skips)
    assert evaluated(tmp_path) == trained(source)


@pytest.mark.parametrize("ending", ["jfif", "jpe", "JPG", "JFIF", "pjpeg", "Jpeg"])
def test_jpeg_by_any_of_its_names_is_read(tmp_path: Path, ending: str) -> None:
    write(tmp_path, f"cat/0.{ending}", f"dog/0.{ending}")
    source = open_one(tmp_path)
    assert len(source) == 2
    assert evaluated(tmp_path) == trained(source)


@pytest.mark.parametrize("ending", ["heic", "TIF", "tiff", "avif", "jp2", "NEF", ""])
def test_an_image_that_is_not_read_is_counted_and_never_vanishes(
    tmp_path: Path, ending: str
) -> None:
    odd = "cat/1" + (f".{ending}" if ending else "")
    write(tmp_path, "cat/0.jpg", "dog/0.jpg", odd)
    source = open_one(tmp_path)
    assert len(source) + source.skips.total == 3
    assert odd in str(source.skips)
    with pytest.raises(InputError, match=rf"{odd}.*Convert them to PNG or JPEG"):
        list(read_samples([tmp_path]))


def test_a_file_without_an_ending_that_is_no_image_is_nobodys_business(tmp_path: Path) -> None:
    write(tmp_path, "cat/0.jpg", "dog/0.jpg")
    write(tmp_path, "LICENSE", "cat/README", content=b"CC0")
    assert not str(open_one(tmp_path).skips)
    assert len(list(read_samples([tmp_path]))) == 2


@pytest.mark.parametrize("text", ["README.txt", "classes.txt", "cat/boxes.txt", "dog/0_box.txt"])
def test_a_text_that_is_no_images_makes_no_captions(tmp_path: Path, text: str) -> None:
    write(tmp_path, "cat/0.jpg", "cat/1.jpg", "dog/0.jpg")
    write(tmp_path, text, content=b"from the web, CC0")
    source = open_one(tmp_path)
    assert isinstance(source, ClassFolder)
    assert evaluated(tmp_path) == trained(source)
    assert not any(sample.captions for sample in read_samples([tmp_path]))


def test_images_with_their_texts_are_pairs_in_training_and_evaluation(tmp_path: Path) -> None:
    write(tmp_path, *(f"{folder}/{n}.jpg" for folder in "ab" for n in range(4)))
    write(tmp_path, *(f"a/{n}.txt" for n in range(4)), content=b"a red square")
    write(tmp_path, *(f"b/{n}.txt" for n in range(3)), content=b"a red square")
    source = open_one(tmp_path)
    assert isinstance(source, CaptionFolder)
    assert [source[index].captions for index in range(7)] == [("a red square",)] * 7
    found = [sample.captions for sample in read_samples([tmp_path])]
    assert found == [("a red square",)] * 7 + [()]


def test_what_could_be_either_is_refused_and_both_readings_named(tmp_path: Path) -> None:
    write(tmp_path, *(f"{folder}/{n}.jpg" for folder in ("cat", "dog") for n in range(4)))
    write(tmp_path, "cat/0.txt", "dog/3.txt", content=b"12 12 40 40")
    with pytest.raises(
        InputError, match=r"2 of the 8 images .*'cat/0.jpg'.*folder-kind classes.*folder-kind capti"
    ):
        open_one(tmp_path)
    source = open_one(tmp_path, folder_kind="classes")
    assert source.labels == ["cat", "dog"]
    assert evaluated(tmp_path) == trained(source)
    assert isinstance(open_one(tmp_path, folder_kind="captions"), CaptionFolder)


def test_loose_images_of_which_few_have_texts_can_only_be_pairs(tmp_path: Path) -> None:
    write(tmp_path, *(f"{n}.jpg" for n in range(9)))
    write(tmp_path, "0.txt", content=b"a red square")
    assert isinstance(open_one(tmp_path), CaptionFolder)


def test_a_folder_around_the_folder_of_classes_is_stepped_into_by_both(tmp_path: Path) -> None:
    write(tmp_path, "archive/train/cat/0.jpg", "archive/train/dog/0.jpg")
    write(tmp_path, "archive/README.txt", "archive/.DS_Store", content=b"x")
    source = open_one(tmp_path)
    assert source.labels == ["cat", "dog"]
    assert evaluated(tmp_path) == trained(source)


def test_a_class_without_images_and_a_class_alone_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "cat/0.jpg", "cat/more/1.jpg")
    (tmp_path / "dog").mkdir()
    with caplog.at_level(logging.WARNING):
        source = open_one(tmp_path)
    assert source.labels == ["cat"]
    assert source.skips.ignored == {"class folder without an image": 1}
    assert "one class only, 'cat'" in caplog.text
    assert evaluated(tmp_path) == trained(source)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path, "data/cat/0.jpg", "data/dog/0.jpg")
    (tmp_path / "data/tabby").symlink_to("cat")
    (tmp_path / "data/cat/around").symlink_to("..")
    tree = read_tree(tmp_path / "data")
    assert tree.images == ("cat/0.jpg", "dog/0.jpg", "tabby/0.jpg")
    assert set(tree.skips.ignored) == {"link to a folder around it"}


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, "cat/0.jpg", "dog/0.jpg")
    (tmp_path / "dog/1.jpg").symlink_to("gone.jpg")
    assert len(open_one(tmp_path)) == 3
    assert len(list(read_samples([tmp_path]))) == 3


def test_shards_count_what_they_leave_out_too(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        {
            "0.jfif": JPEG,
            "0.txt": b"a",
            "1.heic": JPEG,
            "2.tif": JPEG,
            "2.txt": b"b",
            "._0.jpg": JPEG,
            "__MACOSX/._1.jpg": JPEG,
            "@eaDir/3.jpg": JPEG,
            "@eaDir/3.txt": b"",
        },
    )
    shards = TarShards(path)
    assert len(shards) == 1
    assert dict(shards.skips.counts) == {
        "image of a kind that is not read (.heic)": 1,
        "image of a kind that is not read (.tif)": 1,
        LEFTOVER: 3,
    }
    with pytest.raises(InputError, match=r"not read here: .*\.heic"):
        list(read_samples([path]))
    path = write_tar(tmp_path / "b.tar", {"0.jpe": JPEG, "0.cls": b"4", "._0.jpe": JPEG})
    assert [sample.label for sample in read_samples([path])] == ["4"]


@pytest.mark.parametrize("name", ["T.CSV", "T.JsonL"])
def test_a_table_may_be_named_in_capitals(tmp_path: Path, name: str) -> None:
    write(tmp_path, "0.jpg")
    row = '{"image": "0.jpg", "label": "cat"}' if "J" in name else "image,label\n0.jpg,cat"
    (tmp_path / name).write_text(row)
    assert open_one(tmp_path / name)[0].label == "cat"
    assert [sample.label for sample in read_samples([tmp_path / name])] == ["cat"]


@pytest.mark.parametrize("name", ["gone", "gone/cat", "gone.tgz"])
def test_what_is_not_there_is_said_not_to_be_there(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match=f"{name}' does not exist"):
        open_one(path)
    with pytest.raises(InputError, match=f"{name}' does not exist"):
        list(read_samples([path]))
