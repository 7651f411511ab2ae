"""Good and hostile shards; B25 and B26 of the list of bad inputs."""

import io
import json
import os
import pickle
import tarfile
from itertools import islice
from pathlib import Path

import pytest
from tar_shards import encode, write_pairs, write_tar

from clip_rt.errors import InputError
from training.data import pairs
from training.data.pairs import BadSampleError
from training.data.shards import PipedShards, TarShards
from training.data.sources import open_sources
from training.evaluation.labelled import read_samples

JPEG = encode((200, 10, 10))


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def reasons(shards: TarShards) -> dict[str, int]:
    return dict(shards.skips.counts)


def test_braces_name_many_shards_read_at_random(tmp_path: Path) -> None:
    for number in range(3):
        write_pairs(tmp_path / f"{number:02}.tar", [f"shard {number} pair {i}" for i in range(4)])
    shards = TarShards(f"{tmp_path}/{{00..02}}.tar")
    assert len(shards) == 12
    assert shards[5].captions == ("shard 1 pair 1",)
    assert shards[5].image == encode((21, 21, 21))
    assert [shards[i].captions for i in (11, 0)] == [("shard 2 pair 3",), ("shard 0 pair 0",)]
    assert not shards.skips.total


def test_captions_come_from_txt_or_else_from_json(tmp_path: Path) -> None:
    members = {
        "a.jpg": JPEG, "a.txt": b" plain ", "a.json": b'{"caption": "not this"}',
        "b.JPG": JPEG, "b.json": b'{"caption": "from json", "url": "x"}',
        "c.json": json.dumps({"caption": ["one", "two"]}).encode(), "c.webp": JPEG,
        "d/e.jpeg": JPEG, "d/e.txt": "größer".encode(),
    }  # fmt: skip
    shards = TarShards(write_tar(tmp_path / "a.tar", members))
    captions = [shards[i].captions for i in range(4)]
    assert captions == [("plain",), ("from json",), ("one", "two"), ("größer",)]


@pytest.mark.parametrize(
    "member",
    [
        "../../evil.jpg",
        "/etc/evil.jpg",
        "a/../../evil.jpg",
        "..\\evil.jpg",
        special("evil.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("evil.jpg", tarfile.LNKTYPE, "good.jpg"),
        special("evil.jpg", tarfile.CHRTYPE),
        special("evil.jpg", tarfile.FIFOTYPE),
    ],
    ids=str,
)
def test_links_devices_and_names_that_leave_are_refused_and_counted(
    tmp_path: Path, member: str | tarfile.TarInfo
) -> None:
    stem = (member if isinstance(member, str) else member.name).removesuffix(".jpg")
    path = write_tar(
        tmp_path / "a.tar",
        [(member, JPEG), (f"{stem}.txt", b"evil"), ("good.jpg", JPEG), ("good.txt", b"good")],
    )
    before = sorted(tmp_path.parent.rglob("*"))
    shards = TarShards(path)
    assert [shards[i].captions for i in range(len(shards))] == [("good",)]
    (reason,) = reasons(shards)
    assert reason.startswith(("link, device", "member name leaves"))
    assert sorted(tmp_path.parent.rglob("*")) == before


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["CLIP_RT_TRAP"],)


def test_members_that_could_run_code_are_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "sprung"
    monkeypatch.setenv("CLIP_RT_TRAP", str(trap))
    payload = pickle.dumps(Trap())
    kinds = ("pkl", "pyd", "pth", "npy", "pickle")
    members = [(f"a.{kind}", payload) for kind in kinds]
    path = write_tar(
        tmp_path / "a.tar",
        [*members, ("a.jpg", JPEG), ("a.txt", b"fine"), ("b.pkl", payload), ("b.txt", b"pickled")],
    )
    shards = TarShards(path)
    assert [shards[i].captions for i in range(len(shards))] == [("fine",)]
    assert shards.skips.ignored == {".pkl": 2, ".pyd": 1, ".pth": 1, ".npy": 1, ".pickle": 1}
    assert reasons(shards) == {"no image": 1}
    assert not trap.exists()
    pickle.loads(payload)  # the trap is one
    assert trap.exists()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.txt": b"no picture"}, "no image"),
        ({"a.jpg": JPEG}, "no caption"),
        ([("a.jpg", JPEG), ("a.jpg", JPEG), ("a.txt", b"twice")], "two members of one name"),
        ({"a.jpg": JPEG, "a.txt": b"x" * (pairs.MAX_CAPTION_BYTES + 1)}, "txt too large"),
        ({"a.jpg": JPEG, "a.json": b" " * (pairs.MAX_JSON_BYTES + 1)}, "json too large"),
    ],
)
def test_samples_known_to_be_bad_are_left_out_of_the_index(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    good = [("good.jpg", JPEG), ("good.txt", b"good")]
    listed = list(members.items()) if isinstance(members, dict) else members
    shards = TarShards(write_tar(tmp_path / "a.tar", [*listed, *good]))
    assert len(shards) == 1
    assert reasons(shards) == {reason: 1}
    assert "'a'" in shards.skips.examples[reason][0]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.txt": b"  \n"}, "no caption"),
        ({"a.txt": b""}, "no caption"),
        ({"a.txt": b"a\0b"}, "caption holds NUL"),
        ({"a.txt": b"\xff\xfe"}, "caption is not UTF-8"),
        ({"a.txt": b"y" * 10_001}, "caption too long"),
        ({"a.json": b'{"caption": "\\ud800"}'}, "caption is no valid Unicode"),
        ({"a.json": b'{"text": "elsewhere"}'}, "no caption"),
        ({"a.json": b'{"caption": 7}'}, "no caption"),
        ({"a.json": b'{"caption": []}'}, "no caption"),
        ({"a.json": b'["caption"]'}, "JSON is no object"),
        ({"a.json": b"[" * 100_000}, "damaged JSON"),
        ({"a.json": b'{"n": ' + b"9" * 5000 + b"}"}, "damaged JSON"),
        ({"a.json": b"\xff"}, "damaged JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_captions_that_are_none_are_bad_samples(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    shards = TarShards(write_tar(tmp_path / "a.tar", {"a.jpg": JPEG, **members}))
    with pytest.raises(BadSampleError) as caught:
        shards[0]
    assert caught.value.reason == reason
    assert "a.tar" in caught.value.example


def test_a_truncated_shard_gives_what_is_whole(tmp_path: Path) -> None:
    whole = write_pairs(tmp_path / "whole.tar", ["one", "two", "three"])
    content = whole.read_bytes()
    with tarfile.open(whole) as tar:
        ends = [header.offset for header in tar][2::2]  # where a sample ends
    for size in range(0, len(content), 512):
        for odd in (0, 100):
            cut = tmp_path / "cut.tar"
            cut.write_bytes(content[: size + odd])
            is_whole = not any(content[size + odd :])  # all that is missing are zeros
            try:
                shards = TarShards(cut)
            except InputError:
                assert not any(end < size + odd for end in ends)
                continue
            known = [shards[i].captions[0] for i in range(len(shards))]
            assert known == ["one", "two", "three"][: len(known)]
            assert len(known) >= sum(end < size + odd for end in ends[:-1])
            assert is_whole or shards.skips.total


def test_a_damaged_header_ends_its_shard_and_is_counted(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.tar", ["one", "two", "three"])
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        second = tar.getmembers()[2].offset
    content[second : second + 100] = os.urandom(100)
    path.write_bytes(content)
    shards = TarShards(path)
    assert [shards[i].captions for i in range(len(shards))] == [("one",)]
    assert shards.skips.counts["damaged shard"] == 1


def pax_with(records: bytes) -> bytes:
    """A member whose extended header claims something, then a good one."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        extended = tarfile.TarInfo("pax")
        extended.type, extended.size = tarfile.XHDTYPE, len(records)
        tar.addfile(extended, io.BytesIO(records))
        for name, content in (("a.jpg", JPEG), ("a.txt", b"text")):
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return file.getvalue()


def test_sizes_that_lead_back_do_not_loop_for_ever(tmp_path: Path) -> None:
    negative = bytearray(tarfile.TarInfo("a.jpg").tobuf())
    negative[124:136] = (-512 & (2**96 - 1)).to_bytes(12, "big")  # base-256, as GNU writes it
    checksum = sum(negative[:148]) + 8 * 32 + sum(negative[156:])
    negative[148:156] = f"{checksum:06o}\0 ".encode()
    for content in (pax_with(b"16 size=-100000\n"), bytes(negative) + bytes(10240)):
        path = tmp_path / "loop.tar"
        path.write_bytes(content)
        with pytest.raises(InputError, match="no pair"):
            TarShards(path)


def test_extended_headers_are_not_read_without_bound(tmp_path: Path) -> None:
    huge = tarfile.TarInfo("long")
    huge.type, huge.size = tarfile.GNUTYPE_LONGNAME, 10 * 2**30
    path = tmp_path / "long.tar"
    with path.open("wb") as file:
        file.write(huge.tobuf(tarfile.GNU_FORMAT))
        file.truncate(11 * 2**30)  # sparse: no bytes on disk
    with pytest.raises(InputError, match="10737418240 bytes"):
        TarShards(path)


def test_names_that_are_no_local_shard_are_refused(tmp_path: Path) -> None:
    for name in ("pipe:touch sprung", "https://example.org/a.tar", "file:///etc/passwd"):
        with pytest.raises(InputError, match="no local file"):
            TarShards(name)
    with pytest.raises(InputError, match="cannot be expanded"):
        TarShards("shard{000..tar")
    with pytest.raises(InputError, match="there is no shard"):
        TarShards(tmp_path / "none.tar")
    gzipped = write_tar(tmp_path / "a.tar.gz", {"a.jpg": JPEG, "a.txt": b"a"}, mode="w:gz")
    with pytest.raises(InputError, match="only uncompressed tars"):
        TarShards(gzipped)


def test_commands_run_only_when_they_are_allowed(tmp_path: Path) -> None:
    for url in ("pipe:touch sprung", "PIPE:touch sprung"):
        with pytest.raises(InputError, match="allow_commands=True"):
            PipedShards(["https://example.org/a.tar", url])
    with pytest.raises(InputError, match="no URL"):
        PipedShards(str(tmp_path / "a.tar"))


def test_piped_shards_give_every_pair_once_per_epoch_in_a_fixed_order(tmp_path: Path) -> None:
    for number in range(4):
        write_pairs(tmp_path / f"{number}.tar", [f"{number} {i}" for i in range(5)])
    piped = PipedShards(f"pipe:cat {tmp_path}/{{0..3}}.tar", allow_commands=True, buffer_samples=3)

    def read(count: int, **how: int) -> list[str]:
        return [pair.captions[0] for pair in islice(piped.stream(**how), count)]

    one, two = read(40, seed=1), read(40, seed=1)
    assert one == two
    assert one != read(40, seed=2)
    # The buffer holds back three pairs, so an epoch ends up to three places later.
    assert len(set(one[:23])) == 20
    ranks = [read(10, seed=1, rank=rank, world_size=2) for rank in range(2)]
    assert not {text[0] for text in ranks[0][:7]} & {text[0] for text in ranks[1][:7]}
    with pytest.raises(InputError, match="cannot be shared by 5"):
        read(1, seed=1, rank=0, world_size=5)


def test_piped_shards_survive_failing_commands_and_hostile_members(tmp_path: Path) -> None:
    good = write_pairs(tmp_path / "good.tar", ["good"])
    write_tar(tmp_path / "bad.tar", [("../b.jpg", JPEG), ("c.jpg", JPEG), ("d.jpg", JPEG)])
    cut = tmp_path / "cut.tar"
    cut.write_bytes(good.read_bytes()[:1000])
    zipped = write_tar(tmp_path / "z.tar.gz", {"z.jpg": JPEG, "z.txt": b"zipped"}, mode="w:gz")
    commands = ["exit 3", f"cat {cut}", f"cat {tmp_path}/bad.tar", "echo garbage"]
    commands += [f"cat {good}", f"cat {zipped}"]
    piped = PipedShards([f"pipe:{command}" for command in commands], allow_commands=True,
                        buffer_samples=1)  # fmt: skip
    texts = {pair.captions[0] for pair in islice(piped.stream(seed=0), 8)}
    assert texts == {"good", "zipped"}
    assert {"unreadable shard", "no caption", "member name leaves its folder"} <= set(
        piped.skips.counts
    )


def test_piped_shards_without_any_pair_are_an_error() -> None:
    piped = PipedShards(["pipe:true", "pipe:exit 1"], allow_commands=True)
    with pytest.raises(InputError, match="gave no pair in epoch 0"):
        next(piped.stream(seed=0))


@pytest.mark.parametrize("read", ["at random", "piped", "to evaluate"])
def test_the_largest_image_of_a_shard_is_what_is_asked_for(tmp_path: Path, read: str) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": JPEG, "a.txt": b"a cat", "a.cls": b"0"})

    def open_shard(max_bytes: int) -> object:
        if read == "to evaluate":
            (sample,) = read_samples([path], max_bytes=max_bytes)
            return sample.image
        if read == "piped":
            options = {"allow_commands": True, "buffer_samples": 1, "max_bytes": max_bytes}
            return next(PipedShards(f"pipe:cat {path}", **options).stream(seed=0)).image
        (shards,) = open_sources([str(path)], max_bytes=max_bytes)
        return shards[0].image

    assert open_shard(len(JPEG)) == JPEG
    with pytest.raises(InputError, match=r"jpg too large \(--max-bytes\)"):
        open_shard(len(JPEG) - 1)
