from pathlib import Path

import pytest
from tar_shards import encode

from clip_rt.errors import InputError
from training.data.folders import CaptionFolder, ClassFolder
from training.data.pairs import MAX_CAPTION_BYTES, BadSampleError

JPEG = encode((200, 10, 10))


def write(folder: Path, *names: str, content: bytes = JPEG) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_class_is_its_folders_name_in_every_template(tmp_path: Path) -> None:
    folder = write(tmp_path, "polar_bear/1.jpg", "polar_bear/deep/2.PNG", "cat/1.webp", "cat/x.pkl")
    images = ClassFolder(folder, templates=["a {}", "my {}."])
    assert images.labels == ["cat", "polar bear"]
    pairs = [images[i] for i in range(len(images))]
    assert [pair.label for pair in pairs] == ["cat", "polar bear", "polar bear"]
    assert pairs[1].captions == ("a polar bear", "my polar bear.")
    assert [pair.image.name for pair in pairs] == ["1.webp", "1.jpg", "2.PNG"]


def test_labels_may_be_given_for_folders_with_numbers_for_names(tmp_path: Path) -> None:
    folder = write(tmp_path, "n01440764/1.jpg", "n02/1.jpg", "loose.jpg")
    labels = {"n01440764": "tench", "n02": "robin", "n03": "unused"}
    images = ClassFolder(folder, labels=labels)
    assert [images[i].captions for i in range(2)] == [
        ("a photo of a tench.",), ("a photo of a robin.",),
    ]  # fmt: skip
    assert dict(images.skips.counts) == {"image in no class folder": 1}
    with pytest.raises(InputError, match=r"1 classes of .* have no label, such as 'n02'"):
        ClassFolder(folder, labels={"n01440764": "tench"})


def test_captions_stand_in_text_files_beside_the_images(tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg")
    write(tmp_path, "a/1.txt", content=b"a red square\n")
    write(tmp_path, "c.txt", content=b"x" * (MAX_CAPTION_BYTES + 1))
    write(tmp_path, "d.txt", content=b"\xff")
    (tmp_path / "e.txt").mkdir()
    images = CaptionFolder(tmp_path)
    assert images[4].captions == ("a red square",)
    reasons = []
    for index in range(4):
        with pytest.raises(BadSampleError) as caught:
            images[index]
        reasons.append(caught.value.reason)
    assert reasons == ["no caption", "caption too long", "caption is not UTF-8", "no caption"]


def test_links_that_leave_the_folder_are_refused_unless_allowed(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", "secret.jpg", "secret.txt")
    (tmp_path / "data/cat").mkdir(parents=True)
    for suffix in ("jpg", "txt"):
        (tmp_path / f"data/cat/1.{suffix}").symlink_to(outside / f"secret.{suffix}")
    for source in (ClassFolder, CaptionFolder):
        with pytest.raises(BadSampleError, match="path leaves its folder"):
            source(tmp_path / "data")[0]
    allowed = ClassFolder(tmp_path / "data", allow_outside=True)
    assert allowed[0].image == outside / "secret.jpg"


def test_folders_without_images_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        ClassFolder(tmp_path / "none")
    write(tmp_path, "loose.jpg")
    with pytest.raises(InputError, match="no folders of images"):
        ClassFolder(tmp_path)
    with pytest.raises(InputError, match="no images"):
        CaptionFolder(write(tmp_path / "texts", "a.txt"))
