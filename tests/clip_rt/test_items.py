"""What is a list and what is none, for images, texts, labels and templates alike."""

from __future__ import annotations

import collections
import datetime
import math
import types
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from test_input_forms import Series

import clip_rt
from clip_rt import testing
from clip_rt.classification.zero_shot import classify
from clip_rt.inputs import prompts
from clip_rt.inputs.items import check_list, count_axes, describe_non_string

PIXELS = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def client() -> Iterator[clip_rt.Client]:
    with (
        testing.FakeServer(embedding_dim=16, side_px=8) as server,
        clip_rt.Client(server.url) as client,
    ):
        yield client


class Frame:
    """As pandas has it: iterating gives the names of the columns."""

    ndim = 2

    def __init__(self, columns: dict) -> None:
        self.columns = list(columns)
        self.shape = (3, len(columns))

    def __iter__(self):
        return iter(self.columns)

    def __len__(self):
        return self.shape[0]


class PolarsFrame(Frame):
    """Iterating gives the columns; no `ndim`."""

    ndim = None

    def __dataframe__(self):
        raise AssertionError("not needed")


class ArrowTable:
    """No iterator of its own, rows by number, columns of values that are no strings."""

    def __init__(self, columns: dict) -> None:
        self.column_names = list(columns)
        self.shape = (3, len(columns))

    def __getitem__(self, key):
        raise IndexError(key)

    def to_pylist(self):
        raise AssertionError("not needed")


def test_columns_are_named_and_how_to_pass_one():
    for table, way in (
        (Frame({"caption": 1, "n": 2}), r"texts\['caption'\]\. It has 'caption', 'n'\."),
        (PolarsFrame({"caption": 1}), r"texts\['caption'\]"),
        (ArrowTable({"caption": 1}), r"texts\['caption'\]\.to_pylist\(\)"),
        (Frame({0: 1}), r"texts\[0\]"),
        (Frame({f"c{n}": n for n in range(99)}), r"'c4', \.\.\.\."),
        (Frame({"x" * 5000: 1}), "texts"),
    ):
        with pytest.raises(clip_rt.TextError, match=way) as caught:
            clip_rt.tokenize(table)
        assert caught.value.index is None
        assert len(str(caught.value)) < 600


NO_LISTS = {
    "table": lambda: Frame({"caption": 1}),
    "table without axes": lambda: PolarsFrame({"caption": 1}),
    "table without an iterator": lambda: ArrowTable({"caption": 1}),
    "strings in rows": lambda: np.array([["a {}", "b {}"]]),
    "strings in a cube": lambda: np.array([[["a {}"]]]),
    "array without axes": lambda: np.array("a {}"),
    "dict": lambda: {"a {}": 1},
    "OrderedDict": lambda: collections.OrderedDict({"a {}": 1}),
    "Counter": lambda: collections.Counter(["a {}"]),
    "ChainMap": lambda: collections.ChainMap({"a {}": 1}),
    "read-only mapping": lambda: types.MappingProxyType({"a {}": 1}),
    "set": lambda: {"a {}"},
    "frozenset": lambda: frozenset({"a {}"}),
    "bytes": lambda: b"a {}",
    "bytearray": lambda: bytearray(b"a {}"),
    "number": lambda: 7,
    "function": lambda: len,
}


@pytest.mark.parametrize("kind", NO_LISTS)
def test_no_argument_takes_what_is_no_list(kind, client):
    for call in (client.encode_texts, client.class_embeddings, clip_rt.tokenize):
        with pytest.raises(clip_rt.TextError, match="no ordered, one-dimensional list"):
            call(NO_LISTS[kind]())
    with pytest.raises(clip_rt.TextError, match="labels is a"):
        client.zero_shot(PIXELS, NO_LISTS[kind]())
    with pytest.raises(clip_rt.TemplateError, match="templates is a"):
        client.class_embeddings(["cat"], templates=NO_LISTS[kind]())
    with pytest.raises(clip_rt.InputError, match="labels is a"):
        classify(np.eye(1, 4), np.eye(1, 4), NO_LISTS[kind](), logit_scale=1.0)
    for on_error in ("raise", "skip"):
        # NumPy's arrays and bytes are one image, and no good one.
        if not isinstance(NO_LISTS[kind](), (np.ndarray, bytes, bytearray)):
            with pytest.raises(clip_rt.ImageError, match="images is a") as caught:
                client.encode_images(NO_LISTS[kind](), on_error=on_error)
            assert caught.value.index is None


def test_a_table_of_images_is_not_read_as_names_of_files(client, tmp_path):
    # A column that happens to be called like a file.
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(path)
    for table in (Frame({str(path): 1}), PolarsFrame({str(path): 1})):
        with pytest.raises(clip_rt.ImageError, match="images is a"):
            client.encode_images(table, on_error="skip")


def test_a_string_alone_is_no_list_of_labels(client):
    with pytest.raises(clip_rt.TextError, match=r"\[label\]"):
        client.zero_shot(PIXELS, "cat")


class NA:
    """As pandas has it: it compares to nothing, and is neither true nor false."""

    def __eq__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")

    def __repr__(self):
        return "<NA>"

    __hash__ = object.__hash__


NA.__name__ = "NAType"


@pytest.mark.parametrize(
    "missing",
    [None, math.nan, np.nan, np.float32("nan"), np.datetime64("NaT", "s"), NA(), np.ma.masked],
    ids=repr,
)
def test_a_missing_value_is_named_by_its_index(missing, client):
    column = Series(["red", missing, "blue"])
    message = "1 is a missing value" if not isinstance(missing, np.datetime64) else "1 is a datet"
    for call in (client.encode_texts, client.class_embeddings, clip_rt.tokenize):
        with pytest.raises(clip_rt.TextError, match=message) as caught:
            call(column)
        assert caught.value.index == 1
    with pytest.raises(clip_rt.TextError, match=f"label {message}"):
        client.zero_shot(PIXELS, column)
    with pytest.raises(clip_rt.TemplateError, match="template 0 is a"):
        client.class_embeddings(["red"], templates=[missing])
    encoded = client.encode_texts(column, on_error="skip")
    assert encoded.indices.tolist() == [0, 2]
    assert [each.index for each in encoded.failures] == [1]


UNUSABLE = ["", " ", "\t\u3000\n", None, math.nan, 3, b"red", ["red"], "\ud800", "so " * 90, Image]


def test_every_text_that_cannot_be_used_is_skipped_as_images_are(client):
    texts = ["red", *UNUSABLE, "blue"]
    encoded = client.encode_texts(texts, on_error="skip")
    assert encoded.indices.tolist() == [0, len(texts) - 1]
    assert [each.index for each in encoded.failures] == list(range(1, len(texts) - 1))
    assert all(isinstance(each, clip_rt.TextError) for each in encoded.failures)
    np.testing.assert_array_equal(encoded.embeddings, client.encode_texts(["red", "blue"]))
    nothing = client.encode_texts(UNUSABLE, on_error="skip")
    assert nothing.embeddings.shape == (0, 16)
    assert len(nothing.failures) == len(UNUSABLE)
    assert client.encode_texts("", on_error="skip").embeddings.shape == (0, 16)
    for index, each in enumerate(UNUSABLE):
        with pytest.raises(clip_rt.TextError) as caught:
            client.encode_texts(["red"] * index + [each])
        assert caught.value.index == index


def test_values_of_arrow_are_told_to_be_made_strings():
    scalar = types.SimpleNamespace(as_py=lambda: "cat")
    with pytest.raises(clip_rt.TextError, match=r"\.to_pylist\(\)"):
        clip_rt.tokenize([scalar])


def test_what_lies_about_its_axes_is_not_believed_to_have_any():
    class Odd:
        @property
        def ndim(self):
            raise RuntimeError("no")

        def __iter__(self):
            return iter(["cat"])

    class Callable:
        def ndim(self):
            raise AssertionError("not called")

        shape = None

        def __iter__(self):
            return iter(["cat"])

    for odd in (Odd(), Callable()):
        assert count_axes(odd) is None
        assert list(check_list(odd, "texts", "strings", clip_rt.TextError)) == ["cat"]
    assert count_axes(np.ndarray) is None


def test_other_things_that_are_no_strings_are_told_what_they_are():
    assert describe_non_string(datetime.date(2026, 1, 1)) == "is a date; it must be a str."
    assert "decode" in describe_non_string(b"cat")


def test_labels_of_evaluation_follow_the_same_rule():
    with pytest.raises(clip_rt.TextError, match=r"labels\['name'\]"):
        prompts.check_labels(Frame({"name": 1}))
