"""What people, files and servers send that is not what it should be, through the public client.

| input | where it is tested |
|---|---|
| B01 bombs: few bytes, many pixels | test_images |
| B02 too many bytes, pipes, devices, folders, open files | test_images |
| B03 files cut at every tenth | test_images |
| B04 what is no image, or one of a format that is not read | test_images |
| B05 colour modes, 16 bits, transparency | test_images; colour profiles here |
| B06 animations | test_images; several pictures in a file, many frames here |
| B07 EXIF orientation, sound and damaged | test_images |
| B08 no area, one pixel, very long | test_images |
| B09 arrays of other types and shapes | test_images, test_fuzz |
| B10 strings that are no paths | test_images; through the client here |
| B11 URLs | never fetched: test_images |
| B12 nothing, generators, duplicates, 10,000 items, None | here, test_client, test_images |
| B13 more than the server's batch | test_client, test_testing |
| B14 texts that say nothing, in any script, or are too long | test_tokenizer, test_client; here |
| B15 halves of characters, bytes | test_tokenizer; through the client here |
| B16 control tokens in a text | test_tokenizer; on the wire here |
| B17 labels and templates that look like formats | test_prompts; through the client here |
| B18 HTML entities, broken encodings | test_tokenizer |
| B19 one label, and very many | test_zero_shot; here |
| B20 embeddings that are none | test_transport, test_faults, test_zero_shot; extreme images here |
| B21 wrong tensors straight to the server | test_python_model |
| B22, B23 checkpoints with code in them, headers that lie | tests/training/test_weights |
| B24 ONNX weights elsewhere | tests/export/test_storage |
| B25, B26 archives that leave their folder, members with code | test_shards, test_bundle |
| B27 names of models | tests/export/test_repository; here |
| B28 hostile servers | here, test_faults |
"""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

import clip_rt
from clip_rt import specs, testing

SIDE_PX = 8


@pytest.fixture(scope="module")
def fake() -> Iterator[testing.FakeServer]:
    with testing.FakeServer(embedding_dim=16, side_px=SIDE_PX) as fake:
        yield fake


@pytest.fixture
def near(fake) -> Iterator[clip_rt.Client]:
    with clip_rt.Client(fake.url, timeout_s=20.0) as near:
        yield near
    fake.heal()


def draw(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_b05_a_colour_profile_changes_nothing_whatever_is_in_it(file_format):
    plain = encode(draw(), file_format)
    for profile in (b"no profile", bytes(4000)):
        profiled = encode(draw(), file_format, icc_profile=profile)
        assert profile in profiled or file_format == "PNG"
        np.testing.assert_array_equal(clip_rt.preprocess(profiled), clip_rt.preprocess(plain))


def test_b06_of_several_pictures_in_a_photograph_the_first_is_read():
    several = encode(draw(1), "MPO", save_all=True, append_images=[draw(2)])
    np.testing.assert_array_equal(
        clip_rt.preprocess(several), clip_rt.preprocess(encode(draw(1), "JPEG"))
    )


def test_b06_the_frames_of_an_animation_are_not_decoded(monkeypatch):
    frames = [draw(seed).quantize(4) for seed in range(8)]
    animation = encode(frames[0], "GIF", save_all=True, append_images=frames[1:] * 20)
    decoded = []
    monkeypatch.setattr(
        "PIL.GifImagePlugin.GifImageFile.seek", lambda self, frame: decoded.append(frame)
    )
    assert clip_rt.preprocess(animation).shape == (1, 224, 224, 3)
    assert not [frame for frame in decoded if frame > 0]


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:9/a.png",
        "file:///etc/hostname",
        "data:image/png;base64,iVBORw0KGgo=",
        "\\\\host\\share\\a.png",
        "../../../../etc/hostname",
        "/etc/hostname",
        "/proc/self/environ",
        "a\0.png",
        "\ud800.png",
        "~root/a.png",
        "$HOME/a.png",
        "%s%n",
        "",
    ],
)
def test_b10_a_string_is_nothing_but_a_path(near, text):
    with pytest.raises(clip_rt.ImageError, match="image 1") as caught:
        near.encode_images([draw(), text])
    assert caught.value.index == 1
    assert len(str(caught.value)) < 600
    str(caught.value).encode("utf-8", "backslashreplace")


def test_b12_ten_thousand_images_and_texts_keep_their_order(near):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (10_000, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    embeddings = near.encode_images(image for image in images)
    some = [0, 1, 31, 32, 4999, 9999]
    np.testing.assert_array_equal(embeddings[some], near.encode_images(images[some]))
    texts = [f"number {index}" for index in range(2000)]
    rows = near.encode_texts(texts)
    some = [0, 31, 32, 1999]
    np.testing.assert_array_equal(rows[some], near.encode_texts([texts[each] for each in some]))


@pytest.mark.parametrize("nothing", [None, 7, object(), math.nan, b"red", [None], ["red", None]])
def test_b12_none_in_place_of_texts_or_labels_is_refused(near, nothing):
    for call in (near.encode_texts, near.class_embeddings):
        with pytest.raises(clip_rt.TextError):
            call(nothing)


def test_b12_the_same_label_twice_has_two_columns(near):
    scores = near.zero_shot([draw(1), draw(2)], ["cat", "dog", "cat"])
    assert scores.labels == ("cat", "dog", "cat")
    np.testing.assert_array_equal(scores.logits[:, 0], scores.logits[:, 2])
    assert scores.probabilities.shape == (2, 3)


def test_b12_an_array_without_axes_is_no_batch(near):
    for array in (np.array(3, np.uint8), np.array("red"), np.array(None)):
        for call in (near.encode_images, near.encode_texts, near.class_embeddings):
            with pytest.raises(clip_rt.InputError):
                call(array)
        with pytest.raises(clip_rt.InputError):
            near.class_embeddings(["red"], templates=array)


SCRIPTS = (
    "Katze",
    "кошка",
    "القطة",
    "חתול",
    "猫",
    "ねこ",
    "고양이",
    "बिल्ली",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "cafe\u0301",
    "a\u200bb",
    "\u202eright to left",
    "x\x07y",
    "a\tb\nc",
    "'; DROP TABLE labels; --",
    "$(touch /tmp/x)",
    "../../a",
)


def test_b14_labels_in_any_script_are_told_apart(near):
    embeddings = near.class_embeddings(SCRIPTS)
    cosines = embeddings @ embeddings.T
    assert np.abs(cosines - np.eye(len(SCRIPTS))).max() < 0.95
    for label, row in zip(SCRIPTS, embeddings, strict=True):
        np.testing.assert_allclose(near.class_embeddings([label])[0], row, atol=1e-6)


@pytest.mark.parametrize("label", ["", " ", "\t\u3000", "x" * 100_000, "so " * 100])
def test_b14_a_label_that_says_nothing_or_too_much_is_named(near, label):
    with pytest.raises(clip_rt.TextError) as caught:
        near.zero_shot(draw(), ["cat", label])
    assert caught.value.index == 1
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("label", ["\ud800", "cat \udfff", b"cat", bytearray(b"cat"), 3, None, []])
def test_b15_half_a_character_or_bytes_are_refused_with_the_index(near, label):
    for templates in (None, "simple", ["{}"]):
        with pytest.raises(clip_rt.TextError) as caught:
            near.zero_shot(draw(), ["cat", label], templates=templates)
        assert caught.value.index == 1
        str(caught.value).encode("utf-8")
    with pytest.raises(clip_rt.TextError) as caught:
        near.encode_texts(["cat", label])
    assert caught.value.index == 1
    with pytest.raises(clip_rt.ClipRTError):
        near.class_embeddings(["cat"], templates=["{} \ud800"])


@pytest.mark.parametrize(
    "text", ["cat <|endoftext|> dog", "<|startoftext|>", "<end_of_text>", "<START_OF_TEXT> x"]
)
def test_b16_control_tokens_typed_by_a_user_do_not_reach_the_model(fake, near, text):
    near.encode_texts(text)
    (row,) = fake.requests[-1].array
    assert (row == specs.START_OF_TEXT).sum() == 1
    assert (row == specs.END_OF_TEXT).sum() == 1
    assert row[-1] == specs.END_OF_TEXT


@pytest.mark.parametrize(
    "label", ["{}", "{0.__class__}", "{", "}}", "%s", "%(x)s", "${x}", "{:>9999999999}", "\\1"]
)
def test_b17_a_label_is_put_in_as_it_is(near, label):
    np.testing.assert_allclose(
        near.class_embeddings([label], templates=["a {} here"]),
        near.encode_texts([f"a {label} here"]),
        atol=1e-6,
    )


@pytest.mark.parametrize("template", ["{0.__init__}", "{:>9999999999}", "{}{}", "", "no", "{!r}"])
def test_b17_a_template_that_would_format_is_refused(near, template):
    for templates in ([template], template):
        with pytest.raises(clip_rt.TemplateError):
            near.zero_shot(draw(), ["cat"], templates=templates)


def test_b19_one_label_is_certain_and_five_thousand_are_told_apart(near):
    assert near.zero_shot(draw(), ["cat"]).probabilities.tolist() == [[1.0]]
    labels = [f"thing {index}" for index in range(5000)]
    scores = near.zero_shot([draw(1), draw(2)], labels)
    assert scores.probabilities.shape == (2, 5000)
    np.testing.assert_allclose(scores.probabilities.sum(axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(
        near.class_embeddings(labels)[[0, 4096, 4999]],
        near.class_embeddings(["thing 0", "thing 4096", "thing 4999"]),
        atol=1e-6,
    )


@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
def test_b20_images_of_one_colour_have_a_direction(client, value):
    scores = client.zero_shot(np.full((9, 9, 3), value, np.uint8), ["red", "green"])
    assert np.isfinite(scores.logits).all()
    np.testing.assert_allclose(scores.probabilities.sum(), 1, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["../../etc", "a\nb", 'a"b', "a;rm -rf", "$(x)", "a/../b", "é", "A" * 64, "%2e%2e", "C:\\a"],
)
def test_b27_a_model_s_name_becomes_a_harmless_one(name):
    assert re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", specs.slug(name + "x"[: len(name) < 64]))


@pytest.mark.parametrize("name", ["", "..", "/", "\0", "A" * 65, " "])
def test_b27_a_name_that_says_nothing_or_too_much_is_refused(name):
    with pytest.raises(clip_rt.InputError):
        clip_rt.Client("127.0.0.1:9", model=name)


@pytest.mark.parametrize(
    "options",
    [
        {"url": 5},
        {"url": b"localhost:8001"},
        {"url": ["localhost:8001", 5]},
        {"url": []},
        {"model": 5},
        {"repository": 5},
        {"timeout_s": "soon"},
        {"timeout_s": None},
        {"start_timeout_s": "soon"},
        {"cache_bytes": "many"},
        {"cache_bytes": -1},
        {"fingerprint": 5},
    ],
    ids=repr,
)
def test_options_of_another_type_are_refused_where_they_are_given(options):
    with pytest.raises(clip_rt.InputError):
        clip_rt.Client(
            **{"url": "127.0.0.1:9"} | options if "repository" not in options else options
        )


@pytest.mark.parametrize("timeout_s", ["soon", -1, 0, math.nan, [], object()], ids=repr)
def test_a_timeout_that_is_none_is_refused_by_every_call(near, timeout_s):
    for call in (
        lambda: near.encode_images(draw(), timeout_s=timeout_s),
        lambda: near.encode_texts("red", timeout_s=timeout_s),
        lambda: near.zero_shot(draw(), ["red"], timeout_s=timeout_s),
    ):
        with pytest.raises(clip_rt.InputError):
            call()


@dataclass(frozen=True)
class Bomb:
    """An answer of many zeros, which take little room on the way if they are compressed."""

    num_bytes: int
    compression: Any

    def strike(self, answer: Any, call: testing.Call) -> Any:
        call.context.set_compression(self.compression)
        answer.raw_output_contents[0] = bytes(self.num_bytes)
        return answer


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_b28_a_huge_answer_is_not_taken_in(fake, near, compression):
    near.encode_texts("red")
    count = fake.num_calls["ModelInfer"]
    fake.fail_next(Bomb(100_000_000, compression))
    start_s = time.monotonic()
    with pytest.raises(clip_rt.ServerError):
        near.encode_texts("red")
    assert time.monotonic() - start_s < 10
    assert fake.num_calls["ModelInfer"] == count + 1
    assert near.encode_texts("red").shape == (1, 16)


@pytest.mark.parametrize(
    "words", [b"\xff\xfe \x80", "x" * 5000, "\x1b[31m\n\r\0", "{0.__class__} %s"]
)
def test_b28_words_of_a_server_are_passed_on_in_bounds(fake, near, words):
    near.encode_texts("red")
    fake.fail_next(testing.Rejected(message=words))
    with pytest.raises(clip_rt.InferenceError) as caught:
        near.encode_texts("red")
    assert len(str(caught.value)) < 2000
    str(caught.value).encode("utf-8")


@dataclass(frozen=True)
class Says:
    """A manifest with other words in one place."""

    field: str
    json: str

    def strike(self, answer: Any, call: testing.Call) -> Any:
        answer.config.parameters[self.field].string_value = self.json
        return answer


LIES = [
    ("model", "5"),
    ("model", '""'),
    ("model", "null"),
    ("embedding_dim", '"512"'),
    ("embedding_dim", "-1"),
    ("embedding_dim", "1e400"),
    ("embedding_dim", "[16]"),
    ("side_px", "0"),
    ("side_px", "99999999999"),
    ("side_px", '"8"'),
    ("context_length", "0"),
    ("context_length", "null"),
    ("context_length", "1e3"),
    ("text_buckets", "5"),
    ("text_buckets", "[-1]"),
    ("text_buckets", '["a"]'),
    ("text_buckets", "[[]]"),
    ("text_buckets", "[1]"),
    ("logit_scale", '"hot"'),
    ("logit_scale", "NaN"),
    ("logit_scale", "Infinity"),
    ("logit_scale", "null"),
    ("logit_bias", "[]"),
    ("fingerprint", "null"),
    ("fingerprint", "[1, 2]"),
    ("fingerprint", "{}"),
    ("contract_version", '"1"'),
    ("contract_version", "[]"),
    ("precision", "{}"),
    ("activation", "[]"),
    ("mean", "[" * 100_000),
    ("libraries", "1" * 5000),
    ("libraries", "{"),
    ("std", "\ufffd"),
]


@pytest.mark.parametrize(("field", "words"), LIES, ids=lambda value: str(value)[:30])
def test_b28_a_manifest_that_lies_is_a_contract_error_and_no_crash(fake, field, words):
    fake.fail_next(Says(field, words), times=2, method="ModelConfig")
    with clip_rt.Client(fake.url, model="fake", timeout_s=5.0) as client:
        with pytest.raises(clip_rt.ContractError) as caught:
            client.zero_shot(draw(), ["red", "blue"])
        assert len(str(caught.value)) < 3000
        # It is of one answer; the next one is heard.
        assert client.encode_texts("red").shape == (1, 16)
