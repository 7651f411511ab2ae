"""Which images names mean: folders, patterns, shards with captions, tables, URLs, stdin."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bulk_pictures import write_shard

from clip_rt.bulk import listing, sources
from clip_rt.bulk.listing import Item, Listing, find_image_items, find_text_items, in_shard
from clip_rt.bulk.sources import find_images, sort_names
from clip_rt.errors import InputError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode(errors="replace"))


def stdin(text: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(os.fsencode(text)), "ascii")


def names_of(folder: Path, *inputs: str) -> list[str]:
    return [each.name.removeprefix(f"{folder}/") for each in find_images(inputs)]


def find(*inputs: object) -> list[Item]:
    return list(find_image_items(map(str, inputs), image_column="image", caption_column="caption"))


def test_a_folder_is_searched_in_order_and_hidden_things_are_left_out(tmp_path):
    touch(tmp_path, "b.jpg", "a.PNG", "notes.txt", ".hidden.jpg", "z/1.webp", "c/2.gif", ".x/3.jpg")
    (tmp_path / "folder.jpg").mkdir()
    assert names_of(tmp_path, str(tmp_path)) == ["a.PNG", "b.jpg", "c/2.gif", "z/1.webp"]
    (found,) = find_images([str(tmp_path / "notes.txt")])
    assert found.read() == b"notes.txt"


def test_a_pattern_means_what_is_there(tmp_path):
    touch(tmp_path, "b/1.jpg", "a/2.jpg", "a/3.png")
    assert names_of(tmp_path, f"{tmp_path}/**/*.jpg") == ["a/2.jpg", "b/1.jpg"]
    with pytest.raises(InputError, match="nothing is named like"):
        names_of(tmp_path, f"{tmp_path}/*.gif")
    with pytest.raises(InputError, match="there is no file or folder"):
        names_of(tmp_path, f"{tmp_path}/gone")


def test_names_come_from_stdin(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "with space.jpg")
    monkeypatch.setattr("sys.stdin", stdin(f"{tmp_path}/with space.jpg\n\n{tmp_path}/a.jpg\n"))
    assert names_of(tmp_path, "-") == ["with space.jpg", "a.jpg"]
    # Names of files need not be UTF-8.
    touch(tmp_path, "\udcff.jpg")
    monkeypatch.setattr("sys.stdin", stdin(f"{tmp_path}/\udcff.jpg\n"))
    assert find("-")[0].file.read() == b"?.jpg"


def test_more_names_than_are_kept_in_memory_are_in_order(monkeypatch):
    monkeypatch.setattr(sources, "MAX_SORTED", 7)
    for num in (0, 6, 7, 8, 21, 50):
        names = [f"{number:03d}\n\udcff" for number in range(num)]
        shuffled = random.Random(0).sample(names, num)
        assert list(sort_names(shuffled)) == names


def test_the_images_of_a_shard_have_its_captions(tmp_path):
    long = json.dumps({"caption": "x" * sources.MAX_CAPTION_BYTES}).encode()
    shard = write_shard(
        tmp_path / "a.tar",
        {
            "0.jpg": b"zero",
            "0.txt": b" a text \n",
            "0.json": b'{"caption": "not this"}',
            "1.json": b'{"caption": "of JSON", "url": 1}',
            "1.left.png": b"left",
            "1.right.png": b"right",
            "folder/2.jpg": b"two",
            "3.jpg": b"three",
            "3.json": b"[",
            "3.cls": b"7",
            "4.json": long,
            "4.jpg": b"four",
        },
    )
    found = list(find_images([str(tmp_path)]))
    assert [(each.member, each.caption) for each in found] == [
        ("0.jpg", "a text"),
        ("1.left.png", "of JSON"),
        ("1.right.png", "of JSON"),
        ("folder/2.jpg", None),
        ("3.jpg", None),
        ("4.jpg", None),
    ]
    assert [each.read() for each in found] == [
        b"zero",
        b"left",
        b"right",
        b"two",
        b"three",
        b"four",
    ]
    assert found[3].name == f"{shard}/folder/2.jpg"


def test_a_shard_that_changed_or_is_cut_gives_no_other_image(tmp_path):
    path = write_shard(tmp_path / "a.tar", {"0.jpg": b"zero" * 500, "1.jpg": b"one!" * 500})
    first, second = find_images([str(path)])
    os.utime(path, ns=(1, 1))
    with pytest.raises(OSError, match="has changed since"):
        first.read()
    content = path.read_bytes()
    path.write_bytes(content[: second.offset_bytes + 10])
    whole, cut, broken = find_images([str(path)])
    assert whole.read() == b"zero" * 500
    with pytest.raises(OSError, match=r"ends within 1\.jpg"):
        cut.read()
    assert "cannot be read as a tar file to its end" in broken.problem
    with pytest.raises(OSError, match="cannot be read as a tar"):
        broken.read()


def test_what_cannot_be_searched_is_named_and_stops_nothing(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg", "b/2.jpg", "c/3.jpg")
    scan = os.scandir

    def refuse(folder):
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    # Root, who runs tests in containers, may enter any folder.
    monkeypatch.setattr("os.scandir", refuse)
    first, bad, last = find_images([str(tmp_path)])
    assert (first.path.name, bad.path.name, last.path.name) == ("1.jpg", "b", "3.jpg")
    assert bad.problem == "cannot be searched: Permission denied"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_has_paths_urls_and_captions(tmp_path, suffix):
    rows = [
        {"image": "a.jpg", "caption": "an a, with comma", "n": "1"},
        {"image": "https://images.example/b.jpg", "caption": None, "n": "2"},
        {"image": None, "caption": "lost", "n": "3"},
        {"image": "/elsewhere/c.jpg", "caption": "c", "n": "4"},
    ]
    path = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        comma = "," if suffix == ".csv" else "\t"
        lines = [comma.join(f'"{value or ""}"' for value in row.values()) for row in rows]
        path.write_text("\n".join([comma.join(rows[0]), *lines]) + "\n", "utf-8")
    first, second, third, fourth = find(path)
    assert (first.name, first.text) == (f"{tmp_path}/a.jpg", "an a, with comma")
    assert (second.name, second.text) == ("https://images.example/b.jpg", None)
    assert third.problem == "row 2 has no 'image'"
    assert (fourth.name, fourth.text, fourth.index) == ("/elsewhere/c.jpg", "c", 3)
    with pytest.raises(InputError, match="has no column 'picture'"):
        list(find_image_items([str(path)], image_column="picture", caption_column="caption"))
    (tmp_path / f"bad{suffix}").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"bad\.\w+ (cannot be read as a table|has no column)"):
        find(tmp_path / f"bad{suffix}")


def test_inputs_of_all_kinds_are_numbered_through(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "b/c.jpg")
    (tmp_path / "1.csv").write_text("image\nx.jpg\ny.jpg\n")
    (tmp_path / "2.csv").write_text("image\nz.jpg\n")
    monkeypatch.setattr("sys.stdin", stdin(f"{tmp_path}/b\nhttp://h/u.jpg\n{tmp_path}/gone\n"))
    found = find(tmp_path / "a.jpg", tmp_path / "*.csv", "-")
    assert [each.name.removeprefix(f"{tmp_path}/") for each in found] == [
        *("a.jpg", "x.jpg", "y.jpg", "z.jpg", "b/c.jpg", "http://h/u.jpg", "gone")
    ]
    assert [each.index for each in found] == list(range(7))
    with pytest.raises(InputError, match="there is no table"):
        find(tmp_path / "gone.csv")


def test_texts_come_from_lines_tables_and_stdin(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\r\n\n  \ntwo words\n", "utf-8")
    (tmp_path / "b.csv").write_text("text\nthree\n\n", "utf-8")
    monkeypatch.setattr("sys.stdin", stdin("four\n"))
    inputs = [str(tmp_path / "a.txt"), str(tmp_path / "b.csv"), "-"]
    found = [each.name for each in find_text_items(inputs, text_column="text")]
    assert found == ["one", "two words", "three", "four"]
    with pytest.raises(InputError, match="there is no file or folder"):
        list(find_text_items([str(tmp_path / "gone.txt")], text_column="text"))


def test_shards_are_disjoint_complete_even_and_whatever_the_order():
    items = [Item(number, f"folder/{number}.jpg") for number in range(2000)]
    shards = [list(in_shard(items, (number, 4))) for number in range(4)]
    assert sorted(each.index for shard in shards for each in shard) == list(range(2000))
    assert all(420 < len(shard) < 580 for shard in shards)
    again = set(in_shard(reversed(items), (2, 4)))
    assert again == set(shards[2])


def test_a_listing_is_read_from_any_item_on(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "ROW_GROUP", 8)
    items = [
        Item(
            number, f"{number}\udcff.jpg", "m\n", number, 2**40, 5, f"caption \ud800 {number}", "no"
        )
        for number in range(50)
    ]
    seen: list[int] = []
    listing.write(tmp_path / "listing", iter(items), seen.append)
    assert seen == [8, 16, 24, 32, 40, 48, 50]
    read = Listing(tmp_path / "listing")
    assert len(read) == 50
    for start, end in ((0, 50), (7, 9), (8, 16), (49, 50), (50, 50), (3, 41)):
        assert list(read.items(start, end)) == items[start:end]
    read.close()
    (tmp_path / "listing").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="begin anew"):
        Listing(tmp_path / "listing")
