import json
import os
from pathlib import Path

import pytest
from tar_shards import encode

from clip_rt.errors import InputError
from training.data.folders import ClassFolder
from training.data.pairs import MAX_JSON_BYTES, BadSampleError
from training.data.tables import Table


def fill(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "images/a.jpg").write_bytes(encode((9, 9, 9)))
    return folder


def write_jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_csv_rows_become_pairs(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path)
    comma = "," if suffix == ".csv" else "\t"
    path = tmp_path / f"t{suffix}"
    rows = ["text,size,file", '"a, ""big"" cat\nsits",3,images/a.jpg', "größer,4,images/b.jpg"]
    text = "\ufeff" + "\r\n".join(row.replace(",", comma) for row in rows)
    path.write_bytes(text.encode())
    table = Table(path, image_column="file", caption_column="text")
    assert len(table) == 2
    assert table[0].captions == (f'a{comma} "big" cat\nsits',)
    assert table[0].image == tmp_path / "images/a.jpg"
    assert table[1].captions == ("größer",)


def test_labels_are_captioned_by_templates_where_no_caption_is_given(tmp_path: Path) -> None:
    path = fill(tmp_path) / "t.csv"
    path.write_text("image,label,caption\nimages/a.jpg,cat,\nimages/a.jpg,cat,my cat\n,cat,x\n")
    table = Table(path, templates=["a {}.", "the {}"])
    assert [(table[i].captions, table[i].label) for i in range(len(table))] == [
        (("a cat.", "the cat"), "cat"), (("my cat",), "cat"),
    ]  # fmt: skip
    assert dict(table.skips.counts) == {"no image": 1}
    rows = [
        {"image": "a.jpg", "label": 3},
        {"image": "a.jpg", "label": {}},
        {"image": "a.jpg", "caption": ["one", "two"]},
    ]
    table = Table(write_jsonl(tmp_path, *rows), templates=["{}"])
    assert [(table[i].captions, table[i].label) for i in range(len(table))] == [
        (("3",), "3"), (("one", "two"), None),
    ]  # fmt: skip


def test_rows_of_another_encoding_are_counted_and_not_guessed(tmp_path: Path) -> None:
    path = fill(tmp_path) / "t.csv"
    rows = "image,label,caption\nimages/a.jpg,café,x\nimages/a.jpg,,naïve\nimages/a.jpg,cat,a cat\n"
    path.write_bytes(rows.encode("latin-1"))
    table = Table(path)
    assert len(table) == 1
    assert dict(table.skips.counts) == {"caption is no valid Unicode": 2}


def test_jsonl_rows_become_pairs_and_damaged_ones_are_counted(tmp_path: Path) -> None:
    path = fill(tmp_path) / "table.jsonl"
    good = b'{"image": "images/a.jpg", "caption": "fine"}'
    lines = [
        good, b"{damaged", b"[1]", b"", b'{"image": "images/a.jpg"}', b'{"caption": "no image"}',
        b'{"image": "a\\u0000.jpg", "caption": "NUL"}', b"[" * 90_000, b"\xff\xfe",
        b'{"image": "images/a.jpg", "caption": "' + b"x" * MAX_JSON_BYTES + b'"}', good,
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    table = Table(path)
    assert [table[i].captions for i in range(len(table))] == [("fine",), ("fine",)]
    assert dict(table.skips.counts) == {
        "damaged JSON": 3, "JSON is no object": 1, "no caption": 1, "no image": 1,
        "no usable path": 1, "line too long": 1,
    }  # fmt: skip
    assert "line 2" in table.skips.examples["damaged JSON"][0]


def test_a_quote_that_never_ends_costs_rows_but_not_the_table(tmp_path: Path) -> None:
    path = fill(tmp_path) / "t.csv"
    filler = "images/a.jpg,text\n" * 10_000
    path.write_text(f'image,caption\nimages/a.jpg,good\nimages/a.jpg,"open\n{filler}')
    table = Table(path)
    assert table[0].captions == ("good",)
    assert any(reason.startswith("damaged row") for reason in table.skips.counts)


@pytest.mark.parametrize("name", ["../secret.jpg", "images/../../secret.jpg", "link/secret.jpg"])
def test_paths_that_leave_the_tables_folder_are_refused_unless_allowed(
    tmp_path: Path, name: str
) -> None:
    folder = fill(tmp_path / "data")
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(encode((1, 2, 3)))
    (folder / "link").symlink_to(tmp_path)
    for each in (name, str(secret)):
        path = write_jsonl(folder, {"image": each, "caption": "x"})
        with pytest.raises(BadSampleError, match="path leaves its folder"):
            Table(path)[0]
        assert Table(path, allow_outside=True)[0].image == Path(os.path.realpath(secret))


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    (folder / "b.jpg").symlink_to("images/a.jpg")
    table = Table(write_jsonl(folder, {"image": "b.jpg", "caption": "x"}))
    assert table[0].image == folder / "images/a.jpg"


def test_tables_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read: No such file"):
        Table(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"no \.csv, \.tsv or \.jsonl"):
        Table(tmp_path / "table.parquet")
    (tmp_path / "t.csv").write_text("path,caption\na,b\n")
    with pytest.raises(InputError, match=r"no row with 'image' .* columns are 'path', 'caption'"):
        Table(tmp_path / "t.csv")
    with pytest.raises(InputError, match=r"no row .* 1 x no caption"):
        Table(write_jsonl(tmp_path, {"image": "a.jpg"}))


def hub_cache(place: Path) -> Path:
    """A data set as `snapshot_download` leaves it: every file a link to a blob."""
    (place / "blobs").mkdir(parents=True)
    (place / "snapshots/abc/train/cat").mkdir(parents=True)
    for number in range(2):
        (place / f"blobs/b{number}").write_bytes(encode((number, 9, 9)))
        link = place / f"snapshots/abc/train/cat/{number}.jpg"
        link.symlink_to(f"../../../../blobs/b{number}")
    return place / "snapshots/abc"


def test_a_snapshot_of_the_hub_may_link_to_its_own_blobs(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path / "datasets--x--y")
    for root in (folder, folder / "train"):
        assert ClassFolder(root)[0].image == tmp_path / "datasets--x--y/blobs/b0"
    table = Table(write_jsonl(folder, {"image": "train/cat/1.jpg", "caption": "x"}))
    assert table[0].image == tmp_path / "datasets--x--y/blobs/b1"


@pytest.mark.parametrize(
    "target", ["../../../../../secret.jpg", "../../../../refs/main", "../../../../blobs/x/deep"]
)
def test_a_snapshot_of_the_hub_may_link_to_nothing_else(tmp_path: Path, target: str) -> None:
    folder = hub_cache(tmp_path / "datasets--x--y")
    (folder / "train/cat/2.jpg").symlink_to(target)
    (tmp_path / "secret.jpg").write_bytes(encode((1, 1, 1)))
    with pytest.raises(BadSampleError, match="path leaves its folder"):
        ClassFolder(folder)[2]


def test_a_table_in_a_snapshot_names_no_blob_by_a_path_of_its_own(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path / "datasets--x--y")
    for name in ("../../blobs/b0", str(tmp_path / "datasets--x--y/blobs/b0")):
        with pytest.raises(BadSampleError, match="path leaves its folder"):
            Table(write_jsonl(folder, {"image": name, "caption": "x"}))[0]
