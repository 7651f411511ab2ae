"""Zero-shot accuracy and retrieval of a real model on real files in the layouts that exist."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tar_shards import write_tar

from clip_rt.classification.zero_shot import classify
from clip_rt.errors import CheckpointError, ImageError, InputError, NonFiniteEmbeddingError
from clip_rt.inputs.images import preprocess
from clip_rt.specs import MODELS
from training.data.drawing_batches import load_drawings
from training.evaluate import EvaluateConfig, evaluate, main
from training.evaluation.class_names import (
    NameTable,
    describe_layout,
    name_classes,
    read_name_table,
    read_templates,
)
from training.evaluation.embed import (
    class_embeddings,
    embed_drawings,
    embed_images,
    embed_texts,
    evaluating,
    on_white,
    open_model,
)
from training.evaluation.labelled import read_captions, read_samples
from training.evaluation.metrics import accuracy, rank, retrieval
from training.evaluation.source import choose_shots, find_classes
from training.evaluation.zero_shot import zero_shot_accuracy
from training.model import CLIP

SAMPLE = Path(__file__).resolve().parents[2] / "training/sample"
COLOURS = {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250)}


@pytest.fixture(scope="module")
def model() -> CLIP:
    return tiny_clip.make(tiny_clip.VIT)


@pytest.fixture
def checkpoint(model: CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(MODELS, model.spec.name, model.spec)
    path = tmp_path / "tiny.safetensors"
    save_file(model.state_dict(), path, metadata={"architecture": model.spec.name})
    return path


def paint(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 36), colour).save(path)


def folders(root: Path, names: dict[str, str]) -> Path:
    """One picture of a colour for each class folder."""
    for folder, colour in names.items():
        paint(root / folder / "a.png", COLOURS[colour])
    return root


def shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for index, sample in enumerate(samples):
            for suffix, data in sample.items():
                member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 36), COLOURS[colour]).save(stream, "PNG")
    return stream.getvalue()


# metrics


def test_accuracies_are_those_counted_by_hand() -> None:
    scores = np.array(
        [
            [6, 5, 4, 3, 2, 1],  # right class 0: rank 0
            [6, 5, 4, 3, 2, 1],  # right class 1: rank 1
            [6, 5, 4, 3, 2, 1],  # right class 5: rank 5
            [9, 0, 0, 0, 0, 0],  # right class 0: rank 0
        ]
    )
    found = accuracy(scores, np.array([0, 1, 5, 0]))
    assert (found.top1, found.top5) == (0.5, 0.75)
    # Class 0 has a recall of 1, classes 1 and 5 of 0; classes 2, 3 and 4 have no image.
    assert found.mean_per_class == pytest.approx(1 / 3)
    assert (found.num_images, found.num_classes, found.chance) == (4, 6, 1 / 6)


def test_a_model_that_answers_one_value_or_nan_is_not_right_by_accident() -> None:
    right = np.array([0, 1, 2])
    assert rank(np.zeros((3, 3)), right).tolist() == [0, 1, 2]
    assert rank(np.full((3, 3), np.nan), right).tolist() == [2, 2, 2]
    assert rank(np.array([[1.0, np.nan]]), np.array([0])).tolist() == [1]


def test_accuracy_of_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="at least one"):
        accuracy(np.empty((0, 3)), np.empty(0, np.int64))


def test_retrieval_counts_any_of_an_images_texts_and_each_text_once() -> None:
    angle = np.radians([0.0, 40.0, 90.0])
    images = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    turn = np.radians([35.0, 1.0, 42.0, 91.0])  # image 0 has two texts; the first is nearer to 1
    texts = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    found = retrieval(images, texts, np.array([0, 0, 1, 2]), ks=(1, 2, 3))
    assert found.text_at == {1: 1.0, 2: 1.0, 3: 1.0}
    assert found.image_at == {1: 0.75, 2: 1.0, 3: 1.0}
    assert (found.num_images, found.num_texts) == (3, 4)


def test_images_without_texts_are_distractors_only() -> None:
    images = np.eye(3)
    found = retrieval(images, images[[2, 0]], np.array([1, 0]), ks=(1,))
    assert found.num_images == 2
    assert found.image_at == {1: 0.5}  # the first text is nearest to an image without one


def test_retrieval_does_not_depend_on_how_many_rows_are_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(20, 8)), rng.normal(size=(45, 8))
    own = rng.permutation(np.arange(45) % 20)
    whole = retrieval(images, texts, own)
    monkeypatch.setattr("training.evaluation.metrics.ROWS_AT_ONCE", 7)
    assert retrieval(images, texts, own) == whole
    assert 0 < whole.text_at[10] < 1


# embeddings


def test_images_and_texts_are_embedded_as_the_towers_do(model: CLIP) -> None:
    images = [Image.new("RGB", (50, 40), colour) for colour in COLOURS.values()] * 50
    found = embed_images(model, iter(images))
    assert found.shape == (150, model.spec.embedding_dim)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    from training.data.augment import normalise

    pixels = torch.from_numpy(preprocess(images[:3], side_px=32)).permute(0, 3, 1, 2)
    with torch.no_grad():
        rows = model.encode_image(normalise(pixels.float() / 255))
    expected = torch.nn.functional.normalize(rows, dim=-1).numpy()
    np.testing.assert_allclose(found[147:], expected, atol=1e-5)
    texts = ["a cat", "something much longer than that", "a cat"]
    rows = embed_texts(model, texts)
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_allclose(rows[1], embed_texts(model, texts[1:2])[0], atol=1e-5)
    assert embed_texts(model, []).shape == embed_images(model, []).shape == (0, 48)


def test_class_embeddings_are_the_normalised_mean_of_their_prompts(model: CLIP) -> None:
    prompts = embed_texts(model, ["a cat", "the cat", "a dog", "the dog"]).reshape(2, 2, -1)
    mean = prompts.mean(axis=1)
    found = class_embeddings(model, ["cat", "dog"], templates=["a {}", "the {}"])
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1)[:, None], atol=1e-6)


def test_evaluation_leaves_every_module_in_its_own_mode(model: CLIP) -> None:
    clip = CLIP(model.spec).train()
    clip.visual.eval()  # as a locked tower is
    with evaluating(clip):
        assert not clip.training
        assert not torch.is_grad_enabled()
    assert clip.training
    assert not clip.visual.training
    assert torch.is_grad_enabled()


def test_drawings_on_nothing_are_seen_on_white() -> None:
    rgba = np.array([[[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]]], np.uint8)
    assert on_white(rgba).tolist() == [[[[255, 255, 255], [10, 20, 30], [204, 204, 204]]]]


def test_drawings_are_classified_by_the_code_that_serves() -> None:
    model = tiny_clip.make(replace(tiny_clip.VIT, side_px=64))
    drawings = load_drawings([SAMPLE / "names/fxemoji.tar"], progress=False)
    labels = [record["name"] for record in drawings.records]
    found = zero_shot_accuracy(model, drawings, labels)
    logits = classify(
        embed_drawings(model, drawings), class_embeddings(model, labels), labels, logit_scale=1.0
    ).logits
    assert found.top1 == (logits.argmax(axis=1) == np.arange(len(labels))).mean()
    assert found.num_classes == len(labels)


def test_a_model_that_broke_is_an_error_and_no_score(model: CLIP) -> None:
    broken = CLIP(model.spec)
    broken.text_projection.data.fill_(torch.nan)
    with pytest.raises(NonFiniteEmbeddingError):
        class_embeddings(broken, ["cat"])


def test_a_checkpoint_names_its_architecture_or_the_caller_does(
    checkpoint: Path, model: CLIP, tmp_path: Path
) -> None:
    assert open_model(checkpoint).spec == model.spec
    bare = tmp_path / "bare.safetensors"
    save_file(model.state_dict(), bare)
    with pytest.raises(CheckpointError, match="--model"):
        open_model(bare)
    assert open_model(bare, model="tiny-ViT", activation="gelu").spec.activation == "gelu"


# class names and layouts


def test_names_come_as_ids_with_names_or_in_order(tmp_path: Path) -> None:
    (tmp_path / "w.tsv").write_text("n00000002\tcat\nn00000001\tdog\n")
    (tmp_path / "n.txt").write_text("dog\ncat\n")
    (tmp_path / "w.json").write_text('{"n00000002": "cat", "n00000001": "dog"}')
    (tmp_path / "n.json").write_text('["dog", "cat"]')
    tables = {path.name: read_name_table(path) for path in tmp_path.iterdir()}
    assert tables["w.tsv"] == tables["w.json"]
    assert tables["n.txt"] == tables["n.json"]
    for table in tables.values():
        assert name_classes(["0", "1"], table) == ["dog", "cat"]
        assert name_classes(["n00000001", "n00000002"], table) == ["dog", "cat"]
    assert name_classes(["1"], tables["w.tsv"]) == ["cat"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mixed.tsv", "n1\tcat\ndog\n"),
        ("empty.txt", "\n"),
        ("twice.tsv", "a\tcat\na\tdog\n"),
        ("broken.json", "{"),
        ("number.json", "3"),
        ("numbers.json", "[1, 2]"),
        ("blank.tsv", "a\t \n"),
    ],
)
def test_unusable_name_files_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="class"):
        read_name_table(tmp_path / name)


def test_wnids_and_numbers_need_a_table_that_has_them_all() -> None:
    for ids in (["n00000001"], ["0", "7"]):
        with pytest.raises(InputError, match="--class-names"):
            name_classes(ids, None)
    with pytest.raises(InputError, match="'n00000009'"):
        name_classes(["n00000009"], NameTable({"n00000001": "dog"}, ("dog",)))
    with pytest.raises(InputError, match="'7'"):
        name_classes(["0", "7"], NameTable({}, ("dog", "cat")))
    assert name_classes(["golden_retriever"], None) == ["golden retriever"]


def test_known_layouts_are_recognised() -> None:
    wnids = [f"n{index:08d}" for index in range(1000)]
    assert describe_layout(wnids).startswith("ImageNet (1000 wnids")
    assert describe_layout(wnids[:200]).startswith("200 wnids")
    assert describe_layout([str(index) for index in range(1000)]).endswith("(as ImageNet-V2)")
    assert describe_layout(["cat", "dog"]) == "2 named classes"


def test_templates_come_from_a_set_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("a {}\nthe {}\n")
    assert read_templates(str(path)) == ("a {}", "the {}")
    assert len(read_templates("openai_imagenet")) == 80
    with pytest.raises(InputError, match="no template set"):
        read_templates(str(tmp_path / "missing.txt"))


# data


def test_folders_are_classes_and_archives_with_one_folder_are_stepped_into(tmp_path: Path) -> None:
    folders(tmp_path / "sketch", {"n00000001": "red", "n00000002": "blue"})
    paint(tmp_path / "sketch/n00000002/deeper/b.JPG", COLOURS["blue"])
    (tmp_path / "sketch/n00000002/notes.txt").write_text("no image")
    found = [(sample.key, sample.label) for sample in read_samples([tmp_path])]
    assert found == [
        ("n00000001/a.png", "n00000001"),
        ("n00000002/a.png", "n00000002"),
        ("n00000002/deeper/b.JPG", "n00000002"),
    ]


def test_a_single_class_folder_is_a_class_and_not_a_wrapper(tmp_path: Path) -> None:
    folders(tmp_path, {"cat": "red"})
    assert [sample.label for sample in read_samples([tmp_path])] == ["cat"]


def test_shards_have_numbers_names_and_captions(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        [
            {"png": png("red"), "cls": b"2", "txt": b"one\n\n two \n"},
            {"png": png("red"), "json": b'{"name": "cat", "captions": ["three", " "]}'},
            {"txt": b"no image"},
        ],
    )
    first, second = read_samples([path])
    assert (first.label, first.captions) == ("2", ("one", "two"))
    assert (second.label, second.captions) == ("cat", ("three",))


@pytest.mark.parametrize(
    "sample", [{"cls": b"two"}, {"json": b"{"}, {"txt": b"\xff"}], ids=["cls", "json", "txt"]
)
def test_unreadable_members_are_named(tmp_path: Path, sample: dict[str, bytes]) -> None:
    path = shard(tmp_path / "a.tar", [{"png": png("red"), **sample}])
    with pytest.raises(InputError, match=r"a\.tar:0000"):
        list(read_samples([path]))


def test_a_truncated_shard_is_an_error(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [{"png": png("red"), "cls": b"0"}] * 3)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match="damaged"):
        list(read_samples([path]))


def test_a_table_gives_each_image_once_with_its_label_and_captions(tmp_path: Path) -> None:
    paint(tmp_path / "images/a.png", COLOURS["red"])
    path = tmp_path / "t.csv"
    path.write_text("image,label,caption\nimages/a.png,cat,one\nb.png,,\nimages/a.png,cat,two\n")
    first, second = read_samples([path])
    assert (first.label, first.captions) == ("cat", ("one", "two"))
    assert first.image == tmp_path / "images/a.png"
    assert (second.label, second.captions) == (None, ())
    path.write_text("image,label,caption\na.png,,one\na.png,cat,two\na.png,,three\n")
    (only,) = read_samples([path])
    assert (only.label, only.captions) == ("cat", ("one", "two", "three"))
    path.write_text("image,label\na.png,cat\na.png,dog\n")
    with pytest.raises(InputError, match=r"line 3: the label is 'dog', and was 'cat' before"):
        list(read_samples([path]))
    path.write_text("image,label\n../a.png,cat\n")
    with pytest.raises(InputError, match="path leaves its folder"):
        list(read_samples([path]))
    path.write_text("file,label\na.png,cat\n")
    with pytest.raises(InputError, match=r"t\.csv, line 2: no image"):
        list(read_samples([path]))


def test_a_shard_that_cannot_be_trusted_is_not_evaluated_on(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"../a.png": png("red"), "../a.cls": b"0"})
    with pytest.raises(InputError, match="member name leaves its folder"):
        list(read_samples([path]))
    code = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    path = write_tar(tmp_path / "b.tar", {"a.png": png("red"), "a.cls": b"0", "a.pkl": code})
    assert [sample.label for sample in read_samples([path])] == ["0"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["png", "txt"])
def test_a_link_out_of_a_folder_is_followed_only_where_that_is_asked_for(
    tmp_path: Path, suffix: str
) -> None:
    for folder in ("data", "elsewhere"):
        (tmp_path / folder).mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "data" / name).write_bytes(png("red"))
        (tmp_path / "data" / name).with_suffix(".txt").write_text("a red square")
    inside, outside = (tmp_path / f"{each}/a.{suffix}" for each in ("data", "elsewhere"))
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(InputError, match=rf"a\.{suffix}.*--allow-outside permits it"):
        list(read_samples([tmp_path / "data"]))
    samples = list(read_samples([tmp_path / "data"], allow_outside=True))
    assert [sample.captions for sample in samples] == [("a red square",)] * 2
    (tmp_path / "link").symlink_to("data")  # What is named may be a link itself.
    inside.unlink()
    inside.symlink_to(f"b.{suffix}")
    assert len(list(read_samples([tmp_path / "link"]))) == 2


def test_nothing_to_evaluate_names_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image"):
        list(read_samples([tmp_path]))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="neither a folder"):
        list(read_samples([tmp_path / "notes.txt"]))
    with pytest.raises(InputError, match="missing' does not exist"):
        list(read_samples([tmp_path / "missing"]))
    with pytest.raises(InputError, match="does not exist"):
        list(read_samples([Path(f"pipe:touch {tmp_path}/ran.tar")]))
    assert not (tmp_path / "ran.tar").exists()


def test_captions_of_an_image_may_stand_in_several_rows(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('image,caption\na.png,"one, two"\nb.png,x\na.png,three\n')
    expected = {"a.png": ("one, two", "three"), "b.png": ("x",)}
    assert read_captions(tmp_path / "c.csv") == expected
    (tmp_path / "c.jsonl").write_text(
        '{"image": "a.png", "caption": ["one, two", "three"]}\n{"image": "b.png", "caption": "x"}'
    )
    assert read_captions(tmp_path / "c.jsonl") == expected
    (tmp_path / "bad.csv").write_text("image,text\na.png,one\n")
    with pytest.raises(InputError, match=r"bad\.csv, line 2: no caption"):
        read_captions(tmp_path / "bad.csv")


def test_shots_are_nested_balanced_and_reproducible() -> None:
    right = np.repeat([0, 1, 2], [5, 9, 7])
    four = choose_shots(right, 4, rng=np.random.default_rng(1))
    two = choose_shots(right, 2, rng=np.random.default_rng(1))
    assert four[:6].tolist() == two.tolist()
    assert right[four].tolist() == [0, 1, 2] * 4
    assert len(set(four.tolist())) == 12
    with pytest.raises(InputError, match="class 0 has 5"):
        choose_shots(right, 6, rng=np.random.default_rng(1))


def test_classes_are_numbered_in_the_order_of_their_ids() -> None:
    classes = find_classes(["10", None, "9", "10"], NameTable({"9": "cat", "10": "dog"}, ()))
    assert classes.ids == ["9", "10"]
    assert classes.names == ["cat", "dog"]
    assert classes.rows_N.tolist() == [0, 2, 3]
    assert classes.right_N.tolist() == [1, 0, 1]


# the command


def run(checkpoint: Path, data: Path, **options: object) -> dict[str, object]:
    out = checkpoint.with_name("out.json")
    config = EvaluateConfig(
        checkpoint=checkpoint, data=(data,), templates="simple", json_file=out, **options
    )
    main(config)
    return json.loads(out.read_text())


def test_single_prompt_and_ensemble_are_both_reported_and_right(
    checkpoint: Path, model: CLIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folders(tmp_path / "data", {name: name for name in COLOURS})
    document = run(checkpoint, data)
    one, many = document["accuracy"].values()
    images = embed_images(model, [data / name / "a.png" for name in sorted(COLOURS)])
    for found, templates in ((one, None), (many, "simple")):
        classes = class_embeddings(model, sorted(COLOURS), templates=templates)
        best = (images @ classes.T).argmax(axis=1)
        assert found["top1"] == pytest.approx((best == np.arange(3)).mean())
        assert found["top5"] == 1
    assert "ensemble of 7" in document["accuracy"]
    assert "top-1" in capsys.readouterr().out


def test_r_is_scored_among_its_own_wnids_and_on_request_among_all(
    checkpoint: Path, tmp_path: Path
) -> None:
    names = tmp_path / "names.tsv"
    names.write_text("".join(f"n{index:08d}\tthing {index}\n" for index in range(10)))
    data = folders(tmp_path / "data", {"n00000003": "red", "n00000008": "blue"})
    among = {
        all_classes: next(
            iter(
                run(checkpoint, data, class_names=names, all_classes=all_classes)[
                    "accuracy"
                ].values()
            )
        )["num_classes"]
        for all_classes in (False, True)
    }
    assert among == {False: 2, True: 10}


def test_v2_numbers_mean_the_wnids_in_their_order(checkpoint: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.tsv"
    names.write_text("n00000009\tblue\nn00000001\tred\nn00000005\tgreen\n")
    wnids = {"n00000001": "red", "n00000005": "green", "n00000009": "blue"}
    numbers = {"0": "red", "1": "green", "2": "blue"}
    by_wnid = run(checkpoint, folders(tmp_path / "val", wnids), class_names=names)
    by_number = run(checkpoint, folders(tmp_path / "v2", numbers), class_names=names)
    assert by_number["accuracy"] == by_wnid["accuracy"]
    assert by_number["layout"] == "3 class numbers"


def test_shards_with_captions_are_retrieved(checkpoint: Path, model: CLIP, tmp_path: Path) -> None:
    texts = {"red": b"red\na red one", "green": b"green", "blue": b"blue"}
    path = shard(tmp_path / "a.tar", [{"png": png(c), "txt": t} for c, t in texts.items()])
    found = run(checkpoint, path)["retrieval"]
    assert (found["num_images"], found["num_texts"]) == (3, 4)
    assert set(found["text_at"]) == {"1", "5", "10"}
    assert found["text_at"]["5"] == found["image_at"]["5"] == 1
    images = embed_images(model, [png(colour) for colour in texts])
    rows = embed_texts(model, ["red", "a red one", "green", "blue"])
    own = np.array([0, 0, 1, 2])
    assert found["image_at"]["1"] == ((rows @ images.T).argmax(axis=1) == own).mean()


def test_captions_of_a_folder_name_its_images(checkpoint: Path, tmp_path: Path) -> None:
    data = folders(tmp_path / "data", {"red": "red", "blue": "blue"})
    captions = tmp_path / "captions.csv"
    captions.write_text("image,caption\nred/a.png,red\n")
    assert run(checkpoint, data, captions=captions)["retrieval"]["num_texts"] == 1
    captions.write_text("image,caption\nred/b.png,red\n")
    with pytest.raises(InputError, match=r"red/b\.png"):
        run(checkpoint, data, captions=captions)


def test_an_unreadable_image_is_named(checkpoint: Path, tmp_path: Path) -> None:
    data = folders(tmp_path / "data", {"red": "red"})
    (data / "red" / "b.png").write_bytes(b"not a picture")
    with pytest.raises(ImageError, match=r"red/b\.png"):
        evaluate(EvaluateConfig(checkpoint=checkpoint, data=(data,), templates="simple"))


def test_images_with_neither_class_nor_caption_are_nothing_to_evaluate(
    checkpoint: Path, tmp_path: Path
) -> None:
    paint(tmp_path / "data" / "a.png", COLOURS["red"])
    with pytest.raises(InputError, match="neither classes nor captions"):
        evaluate(EvaluateConfig(checkpoint=checkpoint, data=(tmp_path / "data",)))
