"""`clip-rt classify` with the bundled model and real drawings."""

from __future__ import annotations

import csv
import io
import os
import pty
import shutil
import signal
import subprocess
import sys
import tarfile

import pyarrow.parquet
import pytest
from asking import BUNDLED, LABELS, MODEL, PICTURES, ROOT, SAMPLES, ask

import clip_rt
from clip_rt.bulk.sources import ImageFile, find_images
from clip_rt.commands.files import embed_files

AMONG = ("--labels", ",".join(LABELS), *MODEL)


@pytest.fixture(scope="module", autouse=True)
def client():
    """Keeps the model loaded for the commands of this module."""
    with clip_rt.Client(repository=BUNDLED, server="in_process") as client:
        client.zero_shot(PICTURES[:1], LABELS)
        yield client


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIP_RT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def pictures(tmp_path):
    """A folder with some drawings, and what is no image."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    shutil.copy(PICTURES[0], folder / "a.png")
    (folder / "b.jpg").write_bytes(PICTURES[1].read_bytes()[:300])
    shutil.copy(PICTURES[2], folder / "more/c.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def of_client(client, images, *, none_of_these=False, top=3):
    """The rows that the scores of a client are, without their errors."""
    scores = client.zero_shot(images, LABELS, none_of_these=none_of_these)
    rows = []
    for image, best in zip(images, scores.top(top), strict=True):
        row = {"image": str(image), "error": None}
        for rank, (label, probability) in enumerate(best):
            end = f"_{rank + 1}" if rank else ""
            row |= {f"label{end}": label, f"probability{end}": round(probability, 6)}
            if label in LABELS:
                cosine = scores.similarities[len(rows), LABELS.index(label)]
                row[f"similarity{end}"] = round(float(cosine), 6)
            else:
                row[f"similarity{end}"] = None
        rows.append(row)
    return rows


class TestAnswers:
    @pytest.mark.parametrize("none_of_these", [False, True])
    def test_are_those_of_the_client_to_the_last_digit(self, capfd, client, none_of_these):
        flags = ["--none-of-these"] if none_of_these else []
        done = ask(capfd, "classify", *PICTURES, "--json", "--top", "9", *flags, *AMONG)
        assert (done.status, done.err) == (0, "")
        assert done.rows == of_client(client, PICTURES, none_of_these=none_of_these, top=9)

    @pytest.mark.slow
    def test_of_a_whole_shard_are_those_of_the_client(self, capfd, client):
        shard = SAMPLES / "styles/openmoji.tar"
        done = ask(capfd, "classify", shard, *AMONG)
        with tarfile.open(shard) as tar:
            members = [each for each in tar if each.name.endswith(".webp")]
            images = [tar.extractfile(each).read() for each in members]
        assert len(done.rows) == len(images) > 1900
        expected = of_client(client, images)
        for row, member, other in zip(done.rows, members, expected, strict=True):
            assert row == other | {"image": f"{shard}/{member.name}"}

    def test_are_the_right_ones(self, capfd):
        done = ask(capfd, "classify", *PICTURES, *AMONG, "--templates", "an emoji of {}")
        found = {row["image"]: row["label"] for row in done.rows}
        for picture in PICTURES:
            if picture.stem in LABELS:
                assert found[str(picture)] == picture.stem

    def test_of_a_set_of_templates_are_those_of_the_client(self, capfd, client):
        done = ask(capfd, "classify", PICTURES[0], *AMONG, "--templates", "simple", "--top", "1")
        scores = client.zero_shot(PICTURES[0], LABELS, templates="simple")
        label, probability = scores.top(1)[0][0]
        assert done.rows[0]["label"] == label
        assert done.rows[0]["probability"] == round(probability, 6)

    def test_of_several_templates_are_those_of_the_client(self, capfd, client):
        templates = ["{}", "an emoji of {}"]
        options = [each for one in templates for each in ("--templates", one)]
        done = ask(capfd, "classify", PICTURES[0], *AMONG, *options)
        scores = client.zero_shot(PICTURES[0], LABELS, templates=templates)
        assert done.rows[0]["probability"] == round(scores.top(1)[0][0][1], 6)

    def test_below_the_threshold_are_left_out(self, capfd, client):
        images = PICTURES
        rows = of_client(client, images)
        shares = sorted(row["probability_2"] for row in rows)
        threshold = shares[len(shares) // 2]
        done = ask(capfd, "classify", *images, *AMONG, "--threshold", threshold)
        for row, full in zip(done.rows, rows, strict=True):
            is_there = full["probability_2"] >= threshold
            assert row["label_2"] == (full["label_2"] if is_there else None)
        done = ask(capfd, "classify", *images, *AMONG, "--threshold", "1")
        assert done.status == 0
        assert all(row["error"] is None for row in done.rows)
        assert any(row["label"] is row["probability"] is None for row in done.rows)

    def test_less_similar_than_asked_are_left_out(self, capfd, client):
        rows = of_client(client, PICTURES)
        limit = sorted(row["similarity"] for row in rows)[len(rows) // 2]
        done = ask(capfd, "classify", *PICTURES, *AMONG, "--min-similarity", limit - 1e-7)
        labels = [row["label"] if row["similarity"] >= limit else None for row in rows]
        assert [row["label"] for row in done.rows] == labels
        assert 0 < labels.count(None) < len(labels)

    def test_need_labels_of_a_file_one_a_line(self, capfd, client, tmp_path):
        file = tmp_path / "labels.txt"
        file.write_bytes(b"\xef\xbb\xbfrocket\r\n\n  pizza \nsalt, pepper\n")
        done = ask(capfd, "classify", PICTURES[0], "--labels-file", file, *MODEL)
        found = {done.rows[0][each] for each in ("label", "label_2", "label_3")}
        assert found == {"rocket", "pizza", "salt, pepper"}

    def test_come_with_what_a_cache_holds_of_earlier_commands(self, capfd):
        first = ask(capfd, "classify", PICTURES[0], *AMONG)
        shown = ask(capfd, "cache").rows[0]
        assert (shown["embeddings"], shown["files"]) == (len(LABELS), 1)
        assert ask(capfd, "classify", PICTURES[0], *AMONG).out == first.out
        assert ask(capfd, "cache").rows == [shown]


class TestBadImages:
    def test_are_rows_with_an_error_and_stop_nothing(self, capfd, pictures):
        done = ask(capfd, "classify", pictures, pictures / "notes.txt", *AMONG)
        assert done.status == 3
        assert done.err == "warning: 2 of 4 images could not be used\n"
        names = ("a.png", "b.jpg", "more/c.png", "notes.txt")
        assert [row["image"] for row in done.rows] == [str(pictures / each) for each in names]
        good, cut, also_good, text = done.rows
        assert good["error"] is also_good["error"] is None
        assert good["label"] in LABELS
        assert cut["error"].startswith("cannot be decoded: ")
        assert text["error"].startswith("is no readable JPEG, PNG")
        assert cut["label"] is cut["probability"] is text["label_3"] is None

    def test_are_names_on_stdin_that_nothing_has(self, capfd, pictures):
        listed = f"{pictures}/a.png\n\n{pictures}/nowhere.png\r\n{pictures}/more/*.png\n"
        done = ask(capfd, "classify", "-", *AMONG, stdin=listed.encode())
        names = ("a.png", "nowhere.png", "more/c.png")
        assert [row["image"] for row in done.rows] == [str(pictures / each) for each in names]
        assert [row["error"] is None for row in done.rows] == [True, False, True]
        assert done.rows[1]["error"] == "No such file or directory"
        assert done.status == 3

    def test_are_shards_that_are_damaged(self, capfd, pictures):
        whole = (SAMPLES / "names/noto.tar").read_bytes()
        (pictures / "cut.tar").write_bytes(whole[: 512 * 41 + 100])
        done = ask(capfd, "classify", pictures, *AMONG)
        assert done.status == 3
        of_shard = [row for row in done.rows if "cut.tar" in row["image"]]
        assert len(of_shard) > 3
        assert of_shard[0]["error"] is None
        assert of_shard[-1]["image"] == str(pictures / "cut.tar")
        assert of_shard[-1]["error"].startswith("cannot be read as a tar file")
        assert done.rows[-1]["image"] == str(pictures / "more/c.png")
        assert done.rows[-1]["error"] is None

    def test_have_names_that_are_no_text(self, capfd, pictures, tmp_path):
        name = os.fsdecode(b"not-utf8-\xe9.png")
        shutil.copy(PICTURES[0], pictures / name)
        listed = os.fsencode(pictures / name) + b"\n"
        done = ask(capfd, "classify", "-", *AMONG, stdin=listed)
        assert (done.status, done.rows[0]["image"]) == (0, str(pictures / name))
        done = ask(capfd, "classify", "-", *AMONG, "--csv", stdin=listed)
        assert r"not-utf8-\udce9.png" in done.out
        table = tmp_path / "out.parquet"
        assert ask(capfd, "classify", "-", *AMONG, "--parquet", table, stdin=listed).status == 0
        (name,) = pyarrow.parquet.read_table(table)["image"].to_pylist()
        assert name.endswith(r"not-utf8-\udce9.png")


class TestOutput:
    def test_is_the_same_in_every_format(self, capfd, pictures, tmp_path):
        rows = ask(capfd, "classify", pictures, *AMONG, "--json").rows
        columns = ["image"]
        for end in ("", "_2", "_3"):
            columns += [f"{name}{end}" for name in ("label", "probability", "similarity")]
        columns.append("error")
        assert list(rows[0]) == columns
        found = list(
            csv.DictReader(io.StringIO(ask(capfd, "classify", pictures, *AMONG, "--csv").out))
        )
        assert found == [
            {name: "" if value is None else str(value) for name, value in row.items()}
            for row in rows
        ]
        path = tmp_path / "out.parquet"
        done = ask(capfd, "classify", pictures, *AMONG, "--parquet", path)
        assert (done.status, done.out) == (3, "")
        assert pyarrow.parquet.read_table(path).to_pylist() == rows
        assert {each.name for each in tmp_path.iterdir()} == {"pictures", "out.parquet"}

    def test_parquet_is_written_some_rows_at_a_time(self, capfd, pictures, tmp_path, monkeypatch):
        monkeypatch.setattr("clip_rt.commands.output.ROWS_AT_ONCE", 2)
        rows = ask(capfd, "classify", pictures, *AMONG).rows
        path = tmp_path / "out.parquet"
        ask(capfd, "classify", pictures, *AMONG, "--parquet", path)
        file = pyarrow.parquet.ParquetFile(path)
        assert file.num_row_groups == 2
        assert file.read().to_pylist() == rows

    def test_parquet_has_the_same_types_when_no_row_has_a_value(self, capfd, tmp_path):
        bad, path = tmp_path / "bad.png", tmp_path / "out.parquet"
        bad.write_bytes(b"")
        assert ask(capfd, "classify", bad, *AMONG, "--parquet", path).status == 3
        of_bad = pyarrow.parquet.read_schema(path)
        assert ask(capfd, "classify", PICTURES[0], *AMONG, "--parquet", path).status == 0
        assert pyarrow.parquet.read_schema(path) == of_bad

    def test_an_empty_folder_is_said(self, capfd, tmp_path):
        done = ask(capfd, "classify", tmp_path, *AMONG)
        assert (done.status, done.out) == (0, "")
        assert done.err == "warning: no images were found\n"

    @pytest.mark.slow
    def test_memory_is_flat(self, client):
        num_read = num_answered = most_waiting = 0

        def images():
            nonlocal num_read
            for image in find_images([str(SAMPLES / "styles/openmoji.tar")]):
                num_read += 1
                yield image

        for part in embed_files(client, client.manifest, images()):
            num_answered += len(part.images)
            most_waiting = max(most_waiting, num_read - num_answered)
        assert num_answered > 1900
        assert most_waiting < 500


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--labels", "a"], "name images"),
            ([PICTURES[0]], "--labels and --labels-file"),
            ([PICTURES[0], "--labels", "a", "--labels-file", "x"], "--labels and --labels-file"),
            ([PICTURES[0], "--labels", " , "], "names nothing"),
            ([PICTURES[0], "--labels-file", "nowhere.txt"], "--labels-file cannot be read"),
            ([PICTURES[0], "--labels", "a", "--templates", "imagenet"], "openai_imagenet"),
            ([PICTURES[0], "--labels", "a", "--templates", "{} {}"], "exactly one"),
            ([PICTURES[0], "--labels", "a", "--top", "0"], "--top is 0"),
            ([PICTURES[0], "--labels", "a", "--threshold", "2"], "--threshold is 2"),
            ([PICTURES[0], "--labels", "a", "--min-similarity", "-2"], "--min-similarity is -2"),
            ([PICTURES[0], "--labels", "a", "--json", "--csv"], "exclude each other"),
            ([PICTURES[0], "--labels", "a", "--sheet", "out.pdf"], "--sheet is out.pdf"),
            ([PICTURES[0], "--labels", "a", "--html", "nowhere/x.html"], "no folder nowhere"),
            ([PICTURES[0], "nowhere.png", "--labels", "a"], "no file or folder 'nowhere.png'"),
            (["*.nothing", "--labels", "a"], "nothing is named like '*.nothing'"),
            ([PICTURES[0], "--labels", "none of these,a", "--none-of-these"], "label 0 is"),
            ([PICTURES[0], "--labels", "a", "--model", "other"], "drawings"),
            ([PICTURES[0], "--labels", "a", "--timeout-s", "0"], "--timeout-s is 0"),
        ],
    )
    def test_that_cannot_be_used_are_said_before_anything_is_written(self, capfd, arguments, words):
        done = ask(capfd, "classify", *arguments, *MODEL)
        assert (done.status, done.out) == (2, "")
        assert done.err.startswith("error: ")
        assert words in done.err
        assert done.err.count("\n") == 1

    def test_that_are_not_known_are_said(self, capfd):
        assert ask(capfd, "classify", PICTURES[0], "--label", "a").status == 2

    def test_a_server_that_is_not_there_is_an_error(self, capfd):
        nowhere = ("--url", "127.0.0.1:1", "--timeout-s", "1")
        done = ask(capfd, "classify", PICTURES[0], "--labels", "a", "--csv", *nowhere)
        assert (done.status, done.out) == (1, "")
        assert "127.0.0.1:1" in done.err

    def test_help_is_quick_and_needs_nothing_of_a_model(self):
        program = (
            "import sys; from clip_rt.__main__ import main\n"
            "try: main(['classify', '--help'])\n"
            "except SystemExit: pass\n"
            "print({'numpy', 'PIL', 'grpc', 'tokenizers', 'rich', 'pyarrow'} & set(sys.modules))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.splitlines()[-1] == "set()", done.stderr


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "clip_rt", "classify", *map(str, arguments), *AMONG],
        cwd=ROOT,
        **options,
    )


@pytest.mark.slow
class TestProcess:
    def test_a_reader_that_has_enough_ends_it_without_a_word(self):
        shard = SAMPLES / "styles/openmoji.tar"
        with start(shard, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert b"label" in process.stdout.readline()
            process.stdout.close()
            assert process.wait(60) == 141
            assert process.stderr.read() == b""

    def test_ctrl_c_ends_it_and_keeps_what_was_written(self):
        with start(
            "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            # Many batches; then nothing comes, and nothing ends.
            process.stdin.write(os.fsencode(SAMPLES / "styles/openmoji.tar") + b"\n")
            process.stdin.flush()
            assert b"label" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read() == b""
            assert all(line.endswith(b"}\n") for line in process.stdout)

    def test_people_see_a_table_and_how_far_it_is(self, pictures):
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
        shard = SAMPLES / "names/noto.tar"
        with start(pictures, shard, stdout=theirs, stderr=theirs, env=environment) as process:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    shown += os.read(ours, 65536)
                except OSError:  # What Linux says when the other side is closed.
                    break
            assert process.wait(60) == 3
        os.close(ours)
        text = shown.decode()
        assert "images" in text
        assert "/91" in text
        assert "1 bad" in text
        assert "/s" in text
        lines = text.split("\r\n")
        (row,) = [line for line in lines if "a.png" in line and "%" in line]
        assert row.count("%") == 3
        assert any("b.jpg" in line and "error: cannot be decoded" in line for line in lines)
        assert "warning: 1 of 91 images could not be used" in text


class TestImageFile:
    def test_reads_a_file_and_a_member(self, tmp_path):
        file = tmp_path / "a.tar"
        with tarfile.open(file, "w") as tar:
            for name in ("x.png", "y.txt", "z.PNG"):
                info = tarfile.TarInfo(name)
                info.size = 3
                tar.addfile(info, io.BytesIO(name[:3].encode()))
        found = list(find_images([str(file)]))
        assert [each.name for each in found] == [f"{file}/x.png", f"{file}/z.PNG"]
        assert [each.read() for each in found] == [b"x.p", b"z.P"]
        assert [each.to_input() for each in found] == [b"x.p", b"z.P"]
        assert ImageFile(PICTURES[0]).to_input() == PICTURES[0]
        assert ImageFile(PICTURES[0]).read() == PICTURES[0].read_bytes()

    def test_a_pattern_finds_each_file_once(self, pictures):
        found = [each.path.name for each in find_images([f"{pictures}/**"])]
        assert sorted(found) == ["a.png", "b.jpg", "c.png", "notes.txt"]
        found = [each.path.name for each in find_images([f"{pictures}/*"])]
        assert sorted(found) == ["a.png", "b.jpg", "c.png", "notes.txt"]

    def test_a_file_whose_name_looks_like_a_pattern_is_that_file(self, tmp_path):
        shutil.copy(PICTURES[0], tmp_path / "a[1].png")
        (found,) = find_images([str(tmp_path / "a[1].png")])
        assert found.path.name == "a[1].png"

    def test_what_is_missing_is_said_before_anything_is_found(self):
        with pytest.raises(clip_rt.InputError, match="nowhere"):
            next(find_images([str(PICTURES[0]), "nowhere"]))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
    def test_a_folder_that_cannot_be_searched_is_an_image_that_fails(self, pictures):
        (pictures / "more").chmod(0)
        found = list(find_images([str(pictures)]))
        (pictures / "more").chmod(0o700)
        assert found[-1].path == pictures / "more"
        with pytest.raises(OSError, match="cannot be searched"):
            found[-1].read()
