"""A tokenizer.json of which Rust would abort, or a text take minutes, is refused before."""

from __future__ import annotations

import base64
import json
import time

import external_models
import pytest
from tokenizers import Tokenizer

from clip_rt.errors import ContractError, TextError
from clip_rt.inputs import tokenizer_file, tokenizer_limits
from clip_rt.inputs.tokenizer import MAX_TEXT_CHARS
from clip_rt.inputs.tokenizer_file import FileTokenizer, parse
from clip_rt.inputs.tokenizer_limits import count_open_repeats

GEMMA = json.loads(external_models.sentencepiece_bpe())
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gemma(**parts):
    return json.dumps(GEMMA | parts).encode()


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(*normalizers):
    return {"type": "Sequence", "normalizers": list(normalizers)}


def splitters(*pretokenizers):
    return {"type": "Sequence", "pretokenizers": list(pretokenizers)}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def charsmap(trie_bytes, content=b""):
    packed = base64.b64encode(trie_bytes.to_bytes(4, "little") + content).decode()
    return {"type": "Precompiled", "precompiled_charsmap": packed}


def make(content):
    described = tokenizer_file.describe(content, vocab_size=400, cleaning="none", pad_id=0)
    return FileTokenizer(content, described, context_length=16)


@pytest.mark.parametrize("pattern", [GPT2, CLIP, GPT4, " {2,}", "^▁+$", " +▁", "[[:alpha:]\\]]+"])
def test_patterns_of_real_tokenizers_are_read(pattern):
    assert count_open_repeats(pattern) <= tokenizer_limits.MAX_OPEN_REPEATS
    assert make(gemma(pre_tokenizer=split(pattern))).encode_text("a photo")


@pytest.mark.parametrize(
    "pattern",
    [
        "^(a+)+$",
        "(a|aa)+$",
        "(a|a)*!",
        "(?:a+){1,1000}!",
        "a{1,1000}+!",
        "(a)(?:\\1)!",
        "(?<x>a\\g<x>?)!",
        "(?~a)",
        "(?x)(a+) +!",
        "a*a*!",
        "x|a+a+(?=[!?])",
        "(?:a*|b)a*!",
        "(?:a+)(?:a+)!",
        "a{9}a{1,9}b",
        "a?" * 20 + "[bc]",
        "a{1,8}a{1,8}[bc]",
        "(?:a|b|a)" * 40 + "c",
        "a" * 5000,
    ],
)
def test_patterns_that_may_take_minutes_are_refused(pattern):
    for parts in (
        {"pre_tokenizer": split(pattern)},
        {"normalizer": replace("b", Regex=pattern)},
        {"normalizer": sequence(sequence(replace("b", Regex=pattern)))},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(pattern)]}},
    ):
        with pytest.raises(ContractError, match=r"regular expression|repetitions in a row"):
            parse(gemma(**parts))


@pytest.mark.parametrize("pattern", ["((", "[a", "a\\"])
def test_patterns_that_are_none_are_refused(pattern):
    with pytest.raises(ContractError, match="xport the model"):
        parse(gemma(pre_tokenizer=split(pattern)))


def test_the_longest_text_is_soon_split_by_what_is_read():
    """A repetition that never meets what must follow, from every character on: the worst left."""
    made = make(gemma(pre_tokenizer=split("a+(?=[!?])")))
    start_s = time.monotonic()
    made.encode_text("a" * MAX_TEXT_CHARS, truncate=True)
    assert time.monotonic() - start_s < 10.0


def test_where_a_regular_expression_gives_up_the_text_is_refused(monkeypatch):
    """Rust panics then, which is no Exception in Python."""
    monkeypatch.setattr(tokenizer_limits, "count_open_repeats", lambda pattern: 0)
    made = make(gemma(pre_tokenizer=split("^(a+)+$")))
    with pytest.raises(TextError, match="text 3 cannot be split into tokens"):
        made.encode_text("a" * 40 + "!", index=3)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"normalizer": sequence(*[replace("a" * 100)] * 4)}, "characters made of one"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 2**20}}, "characters before each"),
        ({"normalizer": charsmap(2**32 - 1)}, "its trie has 4,294,967,295 bytes"),
        ({"normalizer": charsmap(0, b"a" * 10**6 + b"\0")}, "characters made of one"),
        ({"normalizer": sequence(*[BYTES] * 8)}, "characters made of one"),
        ({"pre_tokenizer": splitters(*[BYTES] * 8)}, "characters made of one"),
        ({"normalizer": sequence(*[replace("a", Regex="(?=.)")] * 12)}, "characters made of one"),
        ({"normalizer": sequence(*[{"type": "Lowercase"}] * 40)}, "steps before its tokens"),
        ({"model": GEMMA["model"] | {"dropout": 0.5}}, "dropout"),
        (
            {
                "added_tokens": [
                    {**GEMMA["added_tokens"][0], "content": f"{i}x"} for i in range(2**15)
                ]
            },
            "added tokens",
        ),
    ],
    ids=[
        *("replace", "prepend", "trie", "rules", "bytes", "split into bytes", "between letters"),
        *("steps", "dropout", "added"),
    ],
)
def test_what_would_take_all_memory_or_change_ids_is_refused(parts, said):
    with pytest.raises(ContractError, match=said):
        parse(gemma(**parts))


def test_a_name_cannot_hide_behind_an_escape():
    content = gemma(normalizer=charsmap(2**32 - 1)).replace(b"compiled_c", b"compiled\\u005fc")
    with pytest.raises(ContractError, match="hides a letter"):
        parse(content)


def test_a_token_that_is_an_escape_is_none():
    """Tokenizers that learned from source code have such."""
    vocab = GEMMA["model"]["vocab"] | {"\\u0041": 400, "\\": 401, "\\\\u0041": 402}
    parse(gemma(model=GEMMA["model"] | {"vocab": vocab}))


def test_a_file_of_millions_of_empty_lists_is_not_read():
    content = b"[" + b"[]," * (tokenizer_limits.MAX_PARTS // 2 + 1) + b"[]]"
    with pytest.raises(ContractError, match="lists, objects and commas"):
        parse(content)


def test_a_word_as_long_as_a_text_is_not_looked_up_in_every_split():
    content = json.loads(external_models.word_piece())
    content["model"]["max_input_chars_per_word"] = 10**9
    with pytest.raises(ContractError, match="characters of a word"):
        parse(json.dumps(content).encode())


@pytest.mark.parametrize(
    ("merges", "is_read"),
    [
        ([["a", "nothing"]], False),
        ([["<unk>"]], False),
        (["a"], False),
        ([[]], False),
        (GEMMA["model"]["merges"] * 10, True),
    ],
    ids=["unknown", "one", "text", "none", "again"],
)
def test_merges_of_what_is_not_there_are_refused(merges, is_read):
    content = gemma(model=GEMMA["model"] | {"merges": merges})
    if is_read:
        assert make(content).encode_text("a b") == Tokenizer.from_buffer(content).encode("a b").ids
        return
    with pytest.raises(ContractError, match="xport the model"):
        parse(content)


def test_what_a_file_of_two_normalizers_does_is_looked_at():
    """The second counts, and it is not the one that stands where it should."""
    content = (
        gemma()[:-1]
        + b', "normalizer": '
        + json.dumps(sequence(*[replace("a" * 100)] * 4)).encode()
        + b"}"
    )
    with pytest.raises(ContractError):
        parse(content)
