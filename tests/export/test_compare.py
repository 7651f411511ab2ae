"""Comparing two served versions: figures worked out by hand, and verdicts of a real Triton."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny_clip as tiny
from exported import Exported, export_towers
from PIL import Image

from clip_rt.__main__ import main as clip_rt_main
from clip_rt.embedded.server import acquire_server
from clip_rt.errors import InputError
from export import compare, drift
from export.compare import CompareConfig, main
from export.drift import Flips, count_flips, judge, measure
from export.parity_report import Precision
from export.pipeline import fingerprint_of, make_manifest
from export.repository import publish, switch_version
from export.samples import NO_TEXT
from export.served import find_reference
from export.version_folder import CONFIG

served = pytest.mark.skipif(
    importlib.util.find_spec("pytriton") is None, reason="the embedded server is not installed"
)


def unit(rows) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def random_space(num_rows: int, dim: int = 16, *, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).standard_normal((num_rows, dim)))


def compared(a, b, *, text_a=None, text_b=None, right=None):
    none_a, none_b = np.empty((0, a.shape[1]), np.float32), np.empty((0, b.shape[1]), np.float32)
    return measure(
        "sample",
        image_a_NE=a,
        text_a_ME=none_a if text_a is None else text_a,
        image_b_NF=b,
        text_b_MF=none_b if text_b is None else text_b,
        right_N=np.full(len(a), NO_TEXT) if right is None else np.asarray(right),
    )


def nearest(query, index, own: int) -> set[int]:
    """The ten nearest, by a sort of Python's own."""
    others = [row for row in range(len(index)) if row != own]
    return set(sorted(others, key=lambda row: -float(query @ index[row]))[:10])


def test_overlaps_are_those_of_a_brute_force_search(monkeypatch):
    # More than one block, the last of them short.
    monkeypatch.setattr(drift, "_ROWS", 7)
    a = random_space(40)
    b = unit(a + 0.15 * random_space(40, seed=1))
    both = np.stack([(b if row % 2 else a)[row] for row in range(40)])
    expected = []
    for query, index in (b, b), (b, a), (b, both):
        shares = [
            len(nearest(a[row], a, row) & nearest(query[row], index, row)) / 10 for row in range(40)
        ]
        expected.append(np.mean(shares))
    found = compared(a, b)
    assert 0.3 < min(expected) <= max(expected) < 0.99
    assert [found.own_overlap, found.query_overlap, found.shared_overlap] == pytest.approx(expected)
    assert found.chance_overlap == pytest.approx(10 / 39)
    kept = found.kept()["neighbours of B's images in A's index"]
    assert kept == pytest.approx((expected[1] - 10 / 39) / (29 / 39))


def test_flips_are_counted_right():
    before, after = np.array([0, 1, 2, 3, 0, 1]), np.array([0, 2, 2, 1, 3, 0])
    right = np.array([0, 1, 1, 1, 0, NO_TEXT])
    # Kept right; right to wrong; kept wrong; wrong to right; right to wrong; not known.
    assert count_flips(before, after, right) == Flips(
        share=4 / 6, right_to_wrong=2, wrong_to_right=1
    )


def test_choices_of_old_images_by_new_texts():
    # Twelve images on two axes; B keeps the images and swaps what two of three texts say.
    images = unit([[1, 0, 0]] * 6 + [[0, 1, 0]] * 3 + [[0, 0, 1]] * 3)
    texts_a, texts_b = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[[0, 2, 1]]
    right = [0] * 6 + [1] * 3 + [1] * 2 + [NO_TEXT]
    found = compared(images, images, text_a=texts_a, text_b=texts_b, right=right)
    assert (found.num_texts, found.num_labelled) == (3, 11)
    assert found.top1_a == pytest.approx(9 / 11)
    assert found.top1_b == found.top1_mixed == pytest.approx(8 / 11)
    assert found.flips == Flips(share=0.5, right_to_wrong=3, wrong_to_right=2)
    # The images are the same: embedding them again would change nothing.
    assert found.mixed_flips == Flips(share=0.0, right_to_wrong=0, wrong_to_right=0)
    assert found.image_cosine.min == 1.0
    assert found.text_cosine.min == 0.0
    assert found.text_cosine.mean == pytest.approx(1 / 3)


def test_a_turned_space_keeps_its_neighbours_but_does_not_mix():
    a = random_space(200)
    turn, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((16, 16)))
    found = compared(a, (a @ turn).astype(np.float32))
    assert found.own_overlap > 0.999
    assert found.query_overlap < 0.2
    assert abs(found.kept()["neighbours of B's images in A's index"]) < 0.1


def test_copies_of_an_image_cost_nothing():
    a = np.repeat(random_space(10), 20, axis=0)
    b = unit(a + 1e-5 * random_space(200, seed=1))
    assert compared(a, b).own_overlap == compared(a, b).shared_overlap == 1.0


def test_a_space_that_tells_nothing_apart_keeps_nothing():
    a = unit(np.ones((50, 16)))
    assert set(compared(a, a).kept().values()) == {0.0}


def test_vectors_of_other_lengths_are_compared_by_what_they_find():
    a = random_space(120, 24)
    b = np.pad(a, ((0, 0), (0, 8)))
    texts = random_space(5, 24, seed=1)
    found = compared(a, b, text_a=texts, text_b=np.pad(texts, ((0, 0), (0, 8))))
    assert (found.own_overlap, found.flips.share) == (1.0, 0.0)
    assert found.image_cosine is found.text_cosine is found.query_overlap is None
    assert found.mixed_flips is None
    assert found.kept() == {}


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match=r"11 images.*at least 12"):
        compared(random_space(11), random_space(11))


def judge_kept(kept: float, manifests) -> tuple[str, float]:
    """Judge a comparison whose mixed overlap keeps `kept`."""
    base = compared(random_space(200), random_space(200))
    chance = base.chance_overlap
    each = replace(base, query_overlap=chance + kept * (1 - chance), shared_overlap=1.0)
    verdict = judge(*manifests, [base, each])
    return verdict.word, verdict.kept


def test_the_worst_measure_decides():
    a = make_manifest(tiny.make(tiny.VIT), "a", precision="fp32", weights_fingerprint="0" * 64)
    same, other = replace(a, precision="int8"), replace(a, fingerprint="1" * 64)
    words = {
        (kept, weights): judge_kept(kept, (a, b))[0]
        for kept in (0.79, 0.81, 0.94, 0.96)
        for weights, b in (("same", same), ("other", other))
    }
    assert words == {
        (0.79, "same"): "not mixable",
        (0.79, "other"): "not mixable",
        (0.81, "same"): "mixable",
        (0.81, "other"): "mixable",
        (0.94, "same"): "mixable",
        (0.94, "other"): "mixable",
        (0.96, "same"): "interchangeable",
        (0.96, "other"): "mixable",
    }
    assert judge_kept(0.9, (a, other))[1] == pytest.approx(0.9)
    few = compared(random_space(99), random_space(99))
    verdict = judge(a, other, [few])
    assert verdict.sentence().startswith("mixable with a loss of 0.0%: other weights")
    assert verdict.weak == ("sample has 99 images, fewer than 100",)


def add(models, name: str, exported: Exported, precision: Precision = "fp32") -> None:
    """Put a model into a repository, past the gate."""
    clip = exported.clip
    manifest = make_manifest(
        clip, name, precision=precision, weights_fingerprint=fingerprint_of(clip)
    )
    publish(models, manifest, image=exported.image, text=exported.text, keep_versions=9)


@pytest.fixture(scope="module")
def models(exported_vit, tmp_path_factory):
    """Two versions of a model, others with other weights, texts and dimensions."""
    folder = tmp_path_factory.mktemp("compare")
    models = folder / "models"
    clip = exported_vit.clip
    halved = export_towers(clip, folder / "halved", fp16_weights=True)
    add(models, "shop", halved, "fp16_weights")
    add(models, "shop", exported_vit)
    other = export_towers(tiny.make(tiny.VIT, seed=1), folder / "other")
    add(models, "other", other)
    wide = tiny.make(replace(tiny.VIT, embedding_dim=32))
    add(models, "wide", export_towers(wide, folder / "wide"))
    # What LiT makes: the image tower as it was, another text tower.
    locked = tiny.make(tiny.VIT, seed=1)
    locked.load_state_dict(
        {k: v for k, v in clip.state_dict().items() if k.startswith("visual.")}, strict=False
    )
    add(models, "locked", Exported(locked, image=exported_vit.image, text=other.text))
    return models


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of classes: six of twenty images, each class with a texture of its own."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("red", "blue", "green", "checked", "striped", "dotted")):
        (folder / name).mkdir()
        for index in range(20):
            grid = rng.integers(0, 256, (number + 2, number + 3, 3), np.uint8)
            Image.fromarray(grid).resize((50, 40)).save(folder / name / f"{index}.png")
    return folder


@served
def test_two_precisions_of_the_same_weights_are_interchangeable(models, photos, tmp_path):
    before = (models / "shop_image" / CONFIG).read_bytes()
    path = tmp_path / "report.json"
    assert main([
        *("shop:1", "shop", "--repository", str(models), "--samples", str(photos)),
        *("--report", str(path)),
    ]) == 0  # fmt: skip
    report = json.loads(path.read_text("utf-8"))
    assert report["verdict"]["word"] == "interchangeable", report["verdict"]
    assert report["verdict"]["weak"] == []
    assert [report[each]["reference"] for each in "ab"] == ["shop:1", "shop:2"]
    # Version 1 was served although version 2 is what the repository serves, and still does.
    assert [report[each]["precision"] for each in "ab"] == ["fp16_weights", "fp32"]
    assert (models / "shop_image" / CONFIG).read_bytes() == before
    (sample,) = report["samples"]
    assert (sample["num_images"], sample["num_texts"], sample["num_labelled"]) == (120, 6, 120)
    assert 0.9999 < sample["image_cosine"]["min"] < 1 - 1e-9


@served
@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("other", 2, "not mixable, embed the index again: other weights"),
        ("wide", 2, "A's vectors have 48 dimensions and B's 32"),
        ("locked", 0, "mixable with a loss of 0.0%: other weights"),
    ],
)
def test_other_models(models, photos, capsys, name, status, words):
    assert main(["shop", name, "--repository", str(models), "--samples", str(photos)]) == status
    assert words in capsys.readouterr().out


@served
def test_a_running_server_and_no_samples(models, capsys):
    server = acquire_server(models)
    try:
        url = f"grpc://{server.url}/shop"
        assert main([url, "shop:1", "--repository", str(models)]) == 0
        out = capsys.readouterr().out
        assert "interchangeable" in out
        assert "weak: probes are no photographs" in out
        with pytest.raises(SystemExit) as end:
            main([url.replace("shop", "shoes"), "shop", "--repository", str(models)])
        assert end.value.code == 1
        assert re.match("error: .*serves no shoes_image with shoes_text", capsys.readouterr().err)
    finally:
        server.stop()


@served
def test_models_for_other_sizes_get_the_same_images(models, photos, exported_resnet):
    add(models, "large", exported_resnet)
    config = CompareConfig(a="shop", b="large", repository=models, samples=(photos,))
    report = compare.compare(config)
    assert [each.side_px for each in report.manifests] == [32, 64]
    assert report.verdict.word == "not mixable"


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("shoes", "shop", "no model 'shoes'; it holds .*locked, other, shop, wide"),
        ("shop", "shop:3", "no version '3'.*it has 1, 2"),
        ("shop", "shop:new", "no version 'new'.*it has 1, 2"),
        ("shop", "shop:2", "both shop:2"),
        ("grpc://h:1/x", "grpc://h:1/x", "both grpc://h:1/x"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(models, a, b, message):
    with pytest.raises(InputError, match=message):
        compare.compare(CompareConfig(a=a, b=b, repository=models))


def test_a_name_is_the_version_that_is_served(models):
    assert find_reference("shop", models).version == 2
    switch_version(models, "shop", 1)
    try:
        assert find_reference("shop", models) == find_reference("shop:1", models)
    finally:
        switch_version(models, "shop", 2)


def test_few_images_a_damaged_one_and_a_mistyped_option_are_errors(
    models, photos, tmp_path, capsys
):
    few = tmp_path / "few" / "red"
    few.mkdir(parents=True)
    for index in range(11):
        (few / f"{index}.png").write_bytes((photos / "red" / f"{index}.png").read_bytes())
    command = ["shop:1", "shop:2", "--repository", str(models)]
    for wrong, message in (
        (["--samples", str(few.parent)], "few has 11 images; at least 12 are needed"),
        (["--num-images", "11"], "num_images is 11; it must be at least 12"),
        (["--report", str(tmp_path / "nowhere" / "r.json")], "there is no folder"),
        (["--sample"], ""),
    ):
        with pytest.raises(SystemExit) as end:
            main([*command, *wrong])
        assert end.value.code == 1
        said = " ".join(capsys.readouterr().err.split())
        assert message in said
        assert not message or said.startswith("error: ")


@served
def test_a_damaged_image_is_named(models, photos, tmp_path):
    bad = tmp_path / "bad" / "red"
    bad.mkdir(parents=True)
    for index in range(12):
        (bad / f"{index}.png").write_bytes((photos / "red" / f"{index}.png").read_bytes())
    (bad / "7.png").write_bytes(b"\x89PNG no more")
    config = CompareConfig(a="shop:1", b="shop:2", repository=models, samples=(bad.parent,))
    with pytest.raises(InputError, match=r"red/7\.png"):
        compare.compare(config)


@served
def test_a_verdict_lets_another_version_go_on_with_an_index(models, photos, tmp_path, capfd):
    """As docs/search.md prints it: compare, `index --accept-compare`, search."""
    mine = tmp_path / "models"
    shutil.copytree(models, mine)
    report = tmp_path / "change.json"
    index = ["--index", str(tmp_path / "index"), "--model", "shop"]
    index += ["--repository", str(mine), "--server", "in_process"]

    def clip_rt(*arguments: object) -> tuple[int, str, str]:
        try:
            status = clip_rt_main([*map(str, arguments), *index])
        except SystemExit as end:
            status = end.code
        return (status, *capfd.readouterr())

    compared = ["shop:2", "shop:1", "--repository", str(mine), "--samples", str(photos)]
    assert main([*compared, "--report", str(report)]) == 0
    assert clip_rt("index", photos)[0] == 0
    _, before, _ = clip_rt("search", photos / "red/1.png", "--json")
    switch_version(mine, "shop", 1)
    status, _, said = clip_rt("search", "red", "--json")
    assert status == 1
    assert "--accept-compare" in said
    (photos_more := tmp_path / "more").mkdir()
    Image.new("RGB", (40, 40), "red").save(photos_more / "new.png")
    status, _, said = clip_rt("index", photos_more, "--accept-compare", report)
    assert (status, "may go on with the index" in said) == (0, True)
    status, after, _ = clip_rt("search", photos / "red/1.png", "--json")
    assert status == 0
    paths = [[json.loads(line)["path"] for line in each.splitlines()] for each in (before, after)]
    assert paths[0][:5] == paths[1][:5]
    assert paths[0][0] == str(photos / "red/1.png")
