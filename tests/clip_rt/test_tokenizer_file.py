"""A tokenizer.json of anybody's: its ids, its limits, and what is not one."""

from __future__ import annotations

import hashlib
import json
import pickle
import time
from dataclasses import replace
from types import SimpleNamespace

import external_models
import numpy as np
import pytest
from tokenizers import Tokenizer

import clip_rt
from clip_rt import served_tokenizer
from clip_rt.deadline import Deadline
from clip_rt.errors import ContractError, InputError, TextError, TextTooLongError
from clip_rt.inputs import tokenizer_file
from clip_rt.inputs.cleaning import clean
from clip_rt.inputs.tokenizer import pad
from clip_rt.inputs.tokenizer_file import FileTokenizer
from clip_rt.requests.batches import plan_texts
from clip_rt.requests.dynamic_batching import PendingBatch, Request
from clip_rt.specs import MAX_TOKENIZER_BYTES, Resizing, Tokenization
from clip_rt.testing import FakeServer
from clip_rt.wire.transport import Transport

GEMMA = external_models.sentencepiece_bpe().encode()
BERT = external_models.word_piece().encode()


def make(content=GEMMA, *, context_length=16, **options):
    settings = {"vocab_size": 400, "cleaning": "none", "pad_id": 0} | options
    described = tokenizer_file.describe(content, **settings)
    return FileTokenizer(content, described, context_length=context_length)


def test_ids_are_those_of_the_library_with_its_own_ends():
    mine, theirs = make(), Tokenizer.from_str(GEMMA.decode())
    for text in ("a photo of a cat", "красная машина", "\U0001f680 12"):
        assert mine.encode_text(text) == theirs.encode(text).ids
    mine, theirs = make(BERT), Tokenizer.from_str(BERT.decode())
    ids = mine.encode_text("A photo of TWO dogs")
    assert ids == theirs.encode("A photo of TWO dogs").ids
    assert (ids[0], ids[-1]) == (2, 3)


def test_a_text_that_is_too_long_is_refused_with_its_length_or_cut_with_its_end():
    text = "a photo of a cat " * 20
    whole = len(Tokenizer.from_str(GEMMA.decode()).encode(text).ids)
    with pytest.raises(TextTooLongError) as caught:
        make().encode_text(text, index=3)
    assert (caught.value.num_tokens, caught.value.context_length) == (whole, 16)
    assert caught.value.index == 3
    ids = make().encode_text(text, truncate=True)
    assert len(ids) == 16
    assert ids[-1] == 1


def test_a_control_token_stays_a_text_in_another_process_too():
    mine = make()
    ids = mine.encode_text("a<eos>a")
    assert ids.count(1) == 1
    assert pickle.loads(pickle.dumps(mine)).encode_text("a<eos>a") == ids


def test_a_template_that_says_a_text_twice_cannot_pass_the_context():
    content = json.loads(GEMMA)
    part = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"]["single"] = [part, part, part]
    with pytest.raises(ContractError, match="and the model reads 16"):
        make(json.dumps(content).encode()).encode_text("a photo of a cat dog red blue")


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_a_text_that_says_nothing_is_refused(text):
    with pytest.raises(TextError, match="says nothing"):
        make().encode_text(text)


def test_punctuation_alone_says_nothing_to_a_model_that_reads_none():
    with pytest.raises(TextError, match="says nothing"):
        make(cleaning="canonical").encode_text("?!...")


def test_a_special_token_in_a_text_is_text():
    assert 1 not in make().encode_text("a <eos> b")[:-1]
    assert 3 not in make(BERT).encode_text("a [SEP] b")[:-1]


def test_an_erased_id_becomes_zero():
    assert make(BERT, erased_id=3).encode_text("a cat")[-1] == 0


def test_an_id_beyond_the_model_is_refused():
    with pytest.raises(TextError, match="the model knows 0 to 9"):
        make(vocab_size=10).encode_text("a cat")


def test_texts_are_padded_with_the_id_of_the_model_to_the_one_length():
    ids = [make(pad_id=7).encode_text(text) for text in ("a cat", "a photo of a dog")]
    plan = plan_texts(ids, max_rows=8, buckets=(16,), pad_id=7)
    (batch,) = plan.batches
    alone = [pad([each], length_tokens=16, pad_id=7)[0] for each in ids]
    np.testing.assert_array_equal(batch[plan.row_by_text], alone)
    assert (batch[0, len(ids[0]) :] == 7).all()


def test_joined_requests_are_padded_with_the_id_of_the_model():
    """A tower that masks padding would read any other id as text."""
    deadline = Deadline.after(5.0)
    batches = [
        PendingBatch(np.array([ids], np.int32), deadline) for ids in ([5, 2], [5, 6, 7, 8, 2])
    ]
    replica = SimpleNamespace(generation=0)
    stacked = Request(batches, replica, None).stack(pad_id=1)
    np.testing.assert_array_equal(stacked, [[5, 2, 1, 1, 1], [5, 6, 7, 8, 2]])


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"model": {"type": "BPE"}}', GEMMA[:-20]],
    ids=["empty", "object", "nested", "no_text", "half", "cut"],
)
def test_what_is_no_tokenizer_is_a_contract_error(content):
    said = Tokenization(
        kind="tokenizer.json",
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=max(1, len(content)),
        vocab_size=400,
    )
    with pytest.raises(ContractError, match=r"tokenizer\.json cannot be read"):
        FileTokenizer(content, said, context_length=16)


def test_a_file_beyond_the_limit_is_not_read():
    with pytest.raises(ContractError, match="at most"):
        tokenizer_file.parse(bytes(MAX_TOKENIZER_BYTES + 1))


def test_another_file_than_the_manifest_names_is_refused():
    described = tokenizer_file.describe(GEMMA, vocab_size=400, cleaning="none", pad_id=0)
    with pytest.raises(ContractError, match="sha256"):
        FileTokenizer(BERT, described, context_length=16)


def test_a_context_that_its_ends_fill_is_refused():
    with pytest.raises(ContractError, match="nothing is left for the text"):
        make(BERT, context_length=2)


def test_settings_of_the_file_for_batches_do_not_matter():
    content = json.loads(GEMMA)
    content["padding"] = {"strategy": {"Fixed": 12}, "direction": "Left"}
    content["padding"] |= {"pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["truncation"] |= {"direction": "Left"}
    other = json.dumps(content).encode()
    assert make(other).encode_text("a photo of a cat") == make().encode_text("a photo of a cat")


def test_a_server_that_does_not_hand_it_out_is_a_contract_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    described = tokenizer_file.describe(GEMMA, vocab_size=400, cleaning="none", pad_id=0)
    with FakeServer(model="siglip") as server:
        server.manifest = replace(server.manifest, tokenization=described)
        with (
            clip_rt.Client(server.url, timeout_s=5.0) as client,
            pytest.raises(ContractError, match="Put the folder siglip_tokenizer_file"),
        ):
            client.encode_texts(["a cat"])


def test_who_waits_for_a_tokenizer_waits_no_longer_than_the_call_may_take(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    described = tokenizer_file.describe(GEMMA, vocab_size=400, cleaning="none", pad_id=8)
    with FakeServer(model="siglip") as server:
        server.manifest = replace(server.manifest, tokenization=described)
        with clip_rt.Client(server.url, timeout_s=5.0) as client, served_tokenizer._lock:
            start_s = time.monotonic()
            with pytest.raises(clip_rt.ServerTimeoutError, match="still loading a tokenizer"):
                client.encode_texts(["a cat"], timeout_s=0.5)
            assert time.monotonic() - start_s < 2.0


def test_a_part_that_a_silent_server_keeps_comes_from_another(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    described = tokenizer_file.describe(GEMMA, vocab_size=400, cleaning="none", pad_id=6)
    asked = []

    def read_chunk(transport, name, index, deadline):
        asked.append(transport.url)
        if len(asked) == 1:
            raise clip_rt.ServerUnavailableError(f"{transport.url} is away", was_reached=True)
        return GEMMA

    monkeypatch.setattr(Transport, "read_chunk", read_chunk)
    with FakeServer(model="siglip") as one, FakeServer(model="siglip") as other:
        for server in (one, other):
            server.manifest = replace(one.manifest, tokenization=described)
        with clip_rt.Client([one.url, other.url], timeout_s=5.0) as client:
            assert len(client.encode_texts(["a cat"])) == 1
    assert len(set(asked)) == 2


def test_parts_that_came_before_an_error_do_not_come_again(tmp_path, monkeypatch):
    """Several are asked for at a time, and put together in order."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(served_tokenizer, "TOKENIZER_CHUNK_BYTES", 100)
    described = tokenizer_file.describe(GEMMA, vocab_size=400, cleaning="none", pad_id=5)
    num_chunks = -(-len(GEMMA) // 100)
    asked = []

    def read_chunk(transport, name, index, deadline):
        asked.append(index)
        if asked.count(index) == 1 and index == num_chunks // 2:
            raise clip_rt.InferenceError("the disk is away", index=None)
        time.sleep(0.02 if index % 2 else 0.0)
        return GEMMA[100 * index : 100 * (index + 1)]

    monkeypatch.setattr(Transport, "read_chunk", read_chunk)
    with FakeServer(model="siglip") as server:
        server.manifest = replace(server.manifest, tokenization=described)
        with clip_rt.Client(server.url, timeout_s=5.0) as client:
            with pytest.raises(ContractError, match="the disk is away"):
                client.encode_texts(["a cat"])
            begun = len(asked)
            assert len(client.encode_texts(["a cat"])) == 1
    assert min(asked[begun:]) == num_chunks // 2
    assert set(asked) == set(range(num_chunks))


def test_a_kept_file_needs_no_server_and_no_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    described = tokenizer_file.describe(GEMMA, vocab_size=400, cleaning="none", pad_id=9)
    kept = tmp_path / "clip_rt/tokenizers" / f"{described.sha256}.json"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(GEMMA)
    with FakeServer(model="siglip") as server:
        server.manifest = replace(server.manifest, tokenization=described)
        with clip_rt.Client(server.url, timeout_s=5.0) as client:
            assert client.encode_texts(["a cat"]).shape == (1, server.manifest.embedding_dim)


@pytest.mark.parametrize(
    ("cleaning", "expected"),
    [
        ("none", " A_b &amp; C!\u3000"),
        ("whitespace", "A_b & C!"),
        ("lower", "a_b & c!"),
        ("canonical", "a b c"),
        ("no_punctuation", "ab amp c"),
    ],
)
def test_cleaning(cleaning, expected):
    assert clean(" A_b &amp; C!\u3000", cleaning) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "stretch"},
        {"interpolation": "nearest"},
        {"crop_rounding": "up"},
        {"resize_px": 0},
        {"resize_px": 2.5},
        {"fill": (0, 0)},
        {"fill": 3},
        {"fill": (0, 0, 256)},
    ],
    ids=str,
)
def test_a_way_to_resize_that_nobody_knows_is_refused(settings):
    with pytest.raises(InputError):
        Resizing(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "pickle"},
        {"cleaning": "spotless"},
        {"vocab_size": 0},
        {"pad_id": -1},
        {"pad_id": 49408},
        {"erased_id": "x"},
        {"kind": "tokenizer.json", "sha256": "../../etc/passwd", "num_bytes": 1},
        {"kind": "tokenizer.json", "sha256": "a" * 64, "num_bytes": 0},
        {"kind": "tokenizer.json", "sha256": "a" * 64, "num_bytes": 2**40},
    ],
    ids=str,
)
def test_a_tokenizer_that_nobody_knows_is_refused(settings):
    with pytest.raises(InputError):
        Tokenization(**settings)
