"""`clip-rt moderate`, `calibrate` and `fairness` with the bundled model and real drawings."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
from asking import BUNDLED, MODEL, PICTURES, ask
from labelled_drawings import KINDS, choose, write_folder, write_table
from PIL import Image
from policies_made_up import make_policy

import clip_rt
from clip_rt.moderation.decisions import SEVERITY
from clip_rt.moderation.policy import Policy, list_starters

FETCHED = re.compile(r"(?:src|href)=(?![\"']?data:)|@import|url\(")
"""What a browser would load."""


@pytest.fixture(scope="module", autouse=True)
def client():
    """Keeps the model loaded for the commands of this module."""
    with clip_rt.Client(repository=BUNDLED, server="in_process") as client:
        client.zero_shot(PICTURES[:1], ["rocket"])
        yield client


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIP_RT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of each kind of drawings, and one of others."""
    folder = tmp_path_factory.mktemp("kinds")
    write_folder(folder, choose(20, 60))
    return folder


@pytest.fixture
def policy(client, tmp_path):
    make_policy(client.manifest).save(tmp_path / "policy.json")
    return tmp_path / "policy.json"


class TestModerate:
    def test_decides_as_the_client_does(self, capfd, client, policy):
        done = ask(capfd, "moderate", *PICTURES, "--policy", policy, *MODEL)
        found = client.moderate(PICTURES, Policy.load(policy))
        assert [row["image"] for row in done.rows] == [str(each) for each in PICTURES]
        for row, decision in zip(done.rows, found.decisions, strict=True):
            assert row["action"] == decision.action
            assert row["error"] is None
            if decision.reasons:
                reason = decision.reasons[0]
                assert (row["label"], row["threshold"]) == (reason.label, reason.threshold)
                assert row["probability"] == round(reason.probability, 6)
                assert row["reasons"].startswith(f"{reason.label} {reason.probability:.1%} (from")
            else:
                assert row["label"] is row["probability"] is row["reasons"] is None
        counts = {each: found.actions.count(each) for each in SEVERITY}
        assert counts["block"] == 1
        assert done.err == ", ".join(f"{counts[each]} {each}" for each in SEVERITY) + "\n"

    @pytest.mark.parametrize(
        ("options", "status"),
        [((), 0), (("--fail-on", "block"), 4), (("--fail-on", "review"), 4)],
    )
    def test_exits_with_4_where_it_is_told_to(self, capfd, policy, options, status):
        done = ask(capfd, "moderate", *PICTURES, "--policy", policy, *options, *MODEL)
        assert done.status == status

    def test_exits_with_0_where_nothing_is_as_severe(self, capfd, policy):
        owl = next(each for each in PICTURES if each.stem == "owl")
        pizza = next(each for each in PICTURES if each.stem == "pizza")
        for picture, limit, status in (
            (owl, "review", 0),
            (pizza, "block", 0),
            (pizza, "review", 4),
        ):
            asked = ("moderate", picture, "--policy", policy, "--fail-on", limit, *MODEL)
            assert ask(capfd, *asked).status == status

    def test_goes_on_after_images_that_cannot_be_used(self, capfd, policy, tmp_path):
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"no image")
        done = ask(capfd, "moderate", bad, PICTURES[0], "--policy", policy, *MODEL)
        assert done.status == 3
        first, second = done.rows
        assert first["action"] is None
        assert first["error"].startswith("is no readable JPEG")
        assert second["error"] is None
        assert "1 of 2 images could not be used" in done.err

    def test_writes_every_format_and_pictures(self, capfd, policy, tmp_path):
        asked = ("moderate", *PICTURES, "--policy", policy, *MODEL)
        rows = ask(capfd, *asked).rows
        parquet, sheet, page = (tmp_path / each for each in ("o.parquet", "o.png", "o.html"))
        ask(capfd, *asked, "--parquet", parquet, "--sheet", sheet, "--html", page)
        assert pyarrow.parquet.read_table(parquet).to_pylist() == rows
        found = list(csv.DictReader(io.StringIO(ask(capfd, *asked, "--csv").out)))
        assert [row["action"] for row in found] == [row["action"] for row in rows]
        with Image.open(sheet) as image:
            assert image.size > (300, 300)
        text = page.read_text("utf-8")
        assert text.count("<figure>") == len(PICTURES)
        assert "block" in text
        assert not FETCHED.search(text)

    def test_refuses_a_starter_and_says_how_it_is_fitted(self, capfd):
        asked = ("moderate", *PICTURES, "--policy", "weapons", *MODEL)
        done = ask(capfd, *asked)
        assert (done.status, done.out) == (2, "")
        assert "clip-rt calibrate TABLE --policy weapons --out policy.json" in done.err
        done = ask(capfd, *asked, "--allow-uncalibrated")
        assert done.status == 0
        assert "warning: the policy 'weapons' is not calibrated" in done.err
        assert {row["action"] for row in done.rows} <= {"allow", "review"}

    @pytest.mark.parametrize("command", ["moderate", "calibrate", "fairness"])
    def test_names_every_starter_in_its_help(self, capfd, command):
        text = ask(capfd, command, "--help").out
        assert [each for each in list_starters() if each not in text] == []

    def test_refuses_a_policy_of_another_model(self, capfd, policy):
        replace(Policy.load(policy), fingerprint="f" * 64).save(policy)
        done = ask(capfd, "moderate", *PICTURES, "--policy", policy, *MODEL)
        assert (done.status, done.out) == (1, "")
        assert "clip-rt calibrate" in done.err

    @pytest.mark.parametrize(
        ("image", "policy", "said"),
        [
            (PICTURES[0], "nowhere.json", "there is no policy 'nowhere.json'"),
            ("nowhere.png", "weapons", "no file or folder 'nowhere.png'"),
        ],
    )
    def test_refuses_what_is_not_there(self, capfd, image, policy, said):
        done = ask(capfd, "moderate", image, "--policy", policy, *MODEL)
        assert (done.status, done.out) == (2, "")
        assert said in done.err


class TestCalibrate:
    OPTIONS = ("--labels", ",".join(KINDS), "--templates", "{}", "--target", "recall=0.8")

    def test_fits_what_moderate_then_decides_by(self, capfd, client, folder, tmp_path):
        out, report, png = (tmp_path / each for each in ("p.json", "r.html", "r.png"))
        done = ask(
            capfd,
            *("calibrate", folder, *self.OPTIONS, "--out", out, "--report", report, "--png", png),
            *MODEL,
        )
        assert done.status == 0
        policy = Policy.load(out)
        assert policy.name == "p"
        assert policy.is_calibrated
        assert policy.fingerprint == client.manifest.fingerprint
        assert policy.data.num_images == 120
        assert policy.data.size_bytes == sum(each.stat().st_size for each in folder.rglob("*.png"))
        error = policy.calibration_error
        assert error.after < error.before
        assert f"expected calibration error: {error.before:.3f} before" in done.err
        assert [row["label"] for row in done.rows] == list(KINDS)
        for row, label in zip(done.rows, policy.labels, strict=True):
            assert row["promised"] is label.measured.is_target_met is True
            assert row["threshold"] == round(label.review_threshold, 6)
            assert row["images"] == label.measured.num_true == 20
        text = report.read_text("utf-8")
        assert not FETCHED.search(text)
        assert "default-src 'none'" in text
        assert text.count("<tr>") == 1 + len(KINDS)
        with Image.open(png) as image:
            assert image.format == "PNG"
        rows = ask(capfd, "moderate", folder / "clock", "--policy", out, *MODEL).rows
        flagged = [row for row in rows if row["action"] == "review"]
        assert len(flagged) > len(rows) / 2

    def test_gives_the_same_policy_again(self, capfd, folder, tmp_path):
        for name in ("a.json", "b.json"):
            ask(capfd, "calibrate", folder, *self.OPTIONS, "--out", tmp_path / name, *MODEL)
        first, second = (Policy.load(tmp_path / each) for each in ("a.json", "b.json"))
        assert replace(first, name="b") == second

    def test_reads_tables_with_several_labels_for_an_image(self, capfd, folder, tmp_path):
        drawings = choose(20, 60)
        rows = write_folder(tmp_path / "images", drawings)
        paths = [f"images/{path}" for path, _ in rows]
        kinds = [kind for _, kind in rows]
        twice = [[path, kind] for path, kind in zip(paths, kinds, strict=True)]
        twice += [
            [path, "round"] for path, kind in zip(paths, kinds, strict=True) if kind == "clock"
        ]
        listed = [
            [path, json.dumps(["clock", "round"]) if kind == "clock" else kind]
            for path, kind in zip(paths, kinds, strict=True)
        ]
        write_table(tmp_path / "twice.csv", twice, ("image", "label"))
        write_table(tmp_path / "listed.csv", listed, ("file", "shows"))
        cells = [["clock", "round"] if kind == "clock" else [kind][: bool(kind)] for kind in kinds]
        table = pyarrow.table({"image": paths, "label": cells})
        pyarrow.parquet.write_table(table, tmp_path / "lists.parquet")
        policies = []
        for name, more in (
            ("twice.csv", ()),
            ("listed.csv", ("--image-column", "file", "--label-column", "shows")),
            ("lists.parquet", ()),
        ):
            options = ("--labels", ",".join([*KINDS, "round"]), "--out", tmp_path / "p.json")
            done = ask(capfd, "calibrate", tmp_path / name, *options, *more, *MODEL)
            assert done.status == 0, done.err
            policies.append(Policy.load(tmp_path / "p.json"))
        assert policies[0] == policies[1] == policies[2]
        counts = [label.measured.num_true for label in policies[0].labels]
        assert counts == [20, 20, 20, 20]
        assert policies[0].data.num_images == len(rows)

    def test_fits_a_softmax_with_none_of_these(self, capfd, folder, tmp_path):
        options = ("--kind", "softmax", "--none-of-these", "--out", tmp_path / "p.json")
        done = ask(capfd, "calibrate", folder, *self.OPTIONS, *options, *MODEL)
        assert done.status == 0, done.err
        policy = Policy.load(tmp_path / "p.json")
        assert policy.temperature > 0
        assert policy.none_of_these
        assert policy.is_calibrated

    def test_fits_the_labels_of_a_starter(self, capfd, client, tmp_path):
        drawings = choose(20, 60)
        folder = tmp_path / "people"
        write_folder(
            folder, [("face" if kind == "face" else None, data) for kind, data in drawings]
        )
        out = tmp_path / "p.json"
        asked = ("calibrate", folder, "--policy", "people-present", "--out", out, *MODEL)
        done = ask(capfd, *asked)
        policy = Policy.load(out)
        assert policy.name == "people-present"
        face = next(each for each in policy.labels if each.name == "face")
        assert face.prompts == ("a face", "a portrait", "a selfie")
        assert face.calibration is not None
        # Of a crowd there is no image, so nothing was fitted.
        assert "'crowd' has no threshold that is promised: it fits 0 of 120 images" in done.err
        assert not policy.is_calibrated
        done = ask(capfd, "moderate", *PICTURES, "--policy", out, *MODEL)
        assert (done.status, done.out) == (2, "")
        assert "is not calibrated for 'person', 'child', 'crowd'" in done.err

    def test_says_that_images_are_too_few(self, capfd, folder, tmp_path):
        out, report = tmp_path / "p.json", tmp_path / "r.html"
        options = ("--labels", "clock", "--others-are-none", "--out", out, "--report", report)
        done = ask(capfd, "calibrate", folder, *options, *MODEL)
        assert done.status == 0
        (row,) = done.rows
        assert row["promised"] is False
        said = "it fits 20 of the 120 images; a precision of 0.95 takes at least 82 that it fits"
        assert row["shortfall"] == said
        assert f"warning: 'clock' has no threshold that is promised: {said}" in done.err
        assert Policy.load(out).shortfalls == {"clock": said}
        assert said in report.read_text("utf-8")

    def test_leaves_images_out_that_cannot_be_used(self, capfd, folder, tmp_path):
        rows = [[path, path.parent.name] for path in sorted(folder.rglob("*.png"))]
        (tmp_path / "bad.png").write_bytes(b"no image")
        table = write_table(
            tmp_path / "t.csv",
            [*rows, ["bad.png", "clock"], ["gone.png", "flag"]],
            ("image", "label"),
        )
        done = ask(capfd, "calibrate", table, *self.OPTIONS, "--out", tmp_path / "p.json", *MODEL)
        assert done.status == 3
        assert "bad.png is no readable JPEG" in done.err
        assert "gone.png No such file" in done.err
        assert Policy.load(tmp_path / "p.json").data.num_images == 120

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--labels", "clock"), "has the label 'face', which is none of 'clock'"),
            (("--labels", "clock", "--policy", "weapons"), "by one of --labels"),
            (("--labels", "clock", "--target", "precision=2"), "--target is 'precision=2'"),
            (("--labels", "clock", "--target", "f1=0.9"), "--target is 'f1=0.9'"),
            (("--policy", "weapons", "--kind", "softmax"), "--policy says itself"),
            (("--labels", "clock", "--none-of-these"), "only a policy of kind 'softmax'"),
            (("--labels", "clock", "--report", "r.pdf"), "--report is r.pdf; it must end in .html"),
            (("--labels", "clock", "--png", "no/r.png"), "--png: there is no folder no"),
        ],
    )
    def test_refuses_what_cannot_be(self, capfd, folder, tmp_path, options, said):
        out = tmp_path / "p.json"
        done = ask(capfd, "calibrate", folder, *options, "--out", out, *MODEL)
        assert (done.status, done.out) == (2, "")
        assert said in " ".join(done.err.split())
        assert not out.exists()

    def test_refuses_tables_that_say_nothing(self, capfd, tmp_path):
        for content, said in (
            ("image,label\n", "names no image"),
            ("image,label\n,clock\n", "row 1 of"),
            ("file,label\nx.png,clock\n", "no column 'image'"),
            ('image,label\nx.png,"[1]"\n', "must be a list of texts"),
            ('image,label\nx.png,"[clock"\n', "no JSON list"),
        ):
            table = tmp_path / "t.csv"
            table.write_text(content)
            options = ("--labels", "clock", "--out", tmp_path / "p.json")
            done = ask(capfd, "calibrate", table, *options, *MODEL)
            assert (done.status, done.out) == (2, "")
            assert said in done.err


class TestFairness:
    @pytest.fixture
    def table(self, tmp_path):
        rows = write_folder(tmp_path / "images", choose(20, 60))
        grouped = [
            [f"images/{path}", "round" if kind in ("clock", "face") else "other"]
            for path, kind in rows
        ]
        return write_table(tmp_path / "t.csv", [*grouped, ["images/x.png", ""]], ("image", "shape"))

    def test_finds_groups_that_differ(self, capfd, table, tmp_path):
        page, png = tmp_path / "f.html", tmp_path / "f.png"
        options = ("--group", "shape", "--labels", "clock,flag,apple", "--templates", "{}")
        asked = ("fairness", table, *options, "--html", page, "--png", png, *MODEL)
        done = ask(capfd, *asked)
        assert done.status == 0
        assert "1 images have no group" in done.err
        rows = {(row["label"], row["group"]): row for row in done.rows}
        assert set(rows) == {
            (label, group) for label in ("clock", "flag", "apple") for group in ("other", "round")
        }
        clock = rows["clock", "round"]
        assert (clock["images"], rows["clock", "other"]["images"]) == (40, 80)
        assert clock["rate"] == clock["given"] / 40 > rows["clock", "other"]["rate"]
        assert clock["differs_from"] == "other"
        assert "warning: 'clock' is given to" in done.err
        for group in ("other", "round"):
            given = sum(row["given"] for (_, each), row in rows.items() if each == group)
            assert given == rows["clock", group]["images"]
        text = page.read_text("utf-8")
        assert "&#x27;clock&#x27; is given to" in text
        assert not FETCHED.search(text)
        with Image.open(png) as image:
            assert image.format == "PNG"

    def test_counts_what_a_policy_flags(self, capfd, table, policy):
        done = ask(capfd, "fairness", table, "--group", "shape", "--policy", policy, *MODEL)
        assert done.status == 0
        assert [row["label"] for row in done.rows] == ["rocket", "rocket", "pizza", "pizza"]
        done = ask(capfd, "fairness", table, "--group", "shape", "--policy", "weapons", *MODEL)
        assert (done.status, done.out) == (2, "")
        assert "is not calibrated" in done.err

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (("--group", "size", "--labels", "a"), "no column 'size'"),
            (("--group", "image", "--labels", "a", "--html", "x.txt"), "--html is x.txt"),
        ],
    )
    def test_refuses_what_cannot_be(self, capfd, table, options, said):
        done = ask(capfd, "fairness", table, *options, *MODEL)
        assert (done.status, done.out) == (2, "")
        assert said in done.err

    def test_refuses_folders_and_a_single_group(self, capfd, folder, tmp_path):
        done = ask(capfd, "fairness", folder, "--group", "g", "--labels", "a,b", *MODEL)
        assert done.status == 2
        assert "groups need a table" in done.err
        rows = [[each, "all"] for each in PICTURES]
        table = write_table(tmp_path / "one.csv", rows, ("image", "g"))
        done = ask(capfd, "fairness", table, "--group", "g", "--labels", "a,b", *MODEL)
        assert done.status == 2
        assert "one group, 'all'" in done.err
