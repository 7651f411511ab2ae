r"""Texts in, the token ids that CLIP's text tower reads out; equal id for id to OpenAI's tokenizer.

No string in a text is ever a control token: `<|endoftext|>` or `<end_of_text>` typed by a user is
plain text here, where the references would end the text at it and ignore the rest.

Source: openai/CLIP `clip/simple_tokenizer.py` and open_clip 3.3.0 `tokenizer.py`. Rust `tokenizers`
splits and merges; it knows the letters and digits of Unicode 16, so a character that came later may
be split otherwise than by a reference whose `regex` is newer. Mojibake may hold one: ftfy makes
U+0558 of "\xd5\x98".
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ClipRTError, InputError, TextError, TextTooLongError
from clip_rt.inputs.cleaning import clean
from clip_rt.inputs.items import check_list, describe_non_string
from clip_rt.specs import CONTEXT_LENGTH, END_OF_TEXT, START_OF_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TEXT_CHARS = 10_000
"""Longest text looked at; hostile text of this length takes 0.2 s to clean."""
CLEANING_VERSION = 1
"""Raised whenever the same text may give other ids than before."""

Texts: TypeAlias = str | Iterable[str]
"""A batch: any iterable of strings; one string alone is a batch of one."""

_VOCABULARY = Path(__file__).with_name("data") / "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
# The file holds more merges than were used (openai/CLIP `simple_tokenizer.py`): 49152 symbols, less
# 256 bytes, the same 256 at the end of a word, and 2 control tokens, as OpenAI counted.
_NUM_MERGES = 49152 - 256 - 2
_END_OF_WORD = "</w>"
# The references match without regard to case, in text that is lower-case already. That leaves two
# traces: long s is an s in 's, and U+0345, a mark whose capital is a letter, is in no class.
_WORD = "'[sſ]|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}\u0345]+"


class TextTokenizer(Protocol):
    """What makes ids of the texts of one model."""

    def encode_text(
        self,
        text: str,
        *,
        index: int | None = None,
        truncate: bool = False,
        may_be_empty: bool = False,
    ) -> list[int]:
        """Return the ids of a text without padding; see `encode_text`."""

    def fingerprint(self) -> str:
        """Return a sha256 (hex) that changes whenever the ids of a text may change."""


@dataclass(frozen=True)
class OpenAITokenizer:
    """CLIP's own."""

    context_length: int = CONTEXT_LENGTH

    def encode_text(
        self,
        text: str,
        *,
        index: int | None = None,
        truncate: bool = False,
        may_be_empty: bool = False,
    ) -> list[int]:
        """Return the ids of a text without padding; see `encode_text`."""
        return encode_text(
            text,
            index=index,
            context_length=self.context_length,
            truncate=truncate,
            may_be_empty=may_be_empty,
        )

    def fingerprint(self) -> str:
        """Return a sha256 (hex) that changes whenever the ids of a text may change."""
        return fingerprint()


def tokenize(
    texts: Texts, *, context_length: int = CONTEXT_LENGTH, truncate: bool = False
) -> NDArray[np.int32]:
    """Turn a batch of texts into the array a text tower reads.

    Args:
        texts: Any iterable of strings, or one string. It is read once, in order.
        context_length: Tokens the model reads, start and end of text included; at least 3.
        truncate: Cut a text that is too long and keep its end-of-text token, instead of refusing.

    Returns:
        int32 (N, context_length), zeros after the end of each text. N = 0 gives an empty array.

    Raises:
        TextTooLongError: a text needs more tokens and `truncate` is off; carries its index.
        TextError: a text is no usable string; carries its index.
        InputError: `context_length` is below 3.
    """
    token_ids = encode(texts, context_length=context_length, truncate=truncate)
    return pad(token_ids, length_tokens=context_length)


def encode(
    texts: Texts, *, context_length: int = CONTEXT_LENGTH, truncate: bool = False
) -> list[list[int]]:
    """Return the ids of each text without padding; otherwise as `tokenize`."""
    return [
        encode_text(text, index=index, context_length=context_length, truncate=truncate)
        for index, text in enumerate(iterate(texts))
    ]


def encode_text(
    text: str,
    *,
    index: int | None = None,
    context_length: int = CONTEXT_LENGTH,
    truncate: bool = False,
    may_be_empty: bool = False,
) -> list[int]:
    """Return the ids of one text, from start of text to end of text, at most `context_length`.

    `index` is the text's position in the caller's batch, for the error; a text that says nothing is
    refused unless it `may_be_empty`; the rest is as in `tokenize`.
    """
    if context_length < 3:
        raise InputError(
            f"context_length is {context_length}; 3 is the least that holds a start, a token and "
            "an end."
        )
    check_text(text, index)
    ids: list[int] = _load().encode(clean(text, "lower"), add_special_tokens=False).ids
    if not ids and not may_be_empty:
        raise make_empty_error(text, index)
    num_tokens = len(ids) + 2
    if num_tokens > context_length:
        if not truncate:
            raise make_length_error(text, index, num_tokens, context_length)
        ids = ids[: context_length - 2]
    return [START_OF_TEXT, *ids, END_OF_TEXT]


def pad(
    token_ids: Sequence[Sequence[int]], *, length_tokens: int, pad_id: int = 0
) -> NDArray[np.int32]:
    """Stack ids into int32 (N, length_tokens), `pad_id` after each text; none may be longer."""
    padded = np.full((len(token_ids), length_tokens), pad_id, dtype=np.int32)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
    return padded


def fingerprint() -> str:
    """Return a sha256 (hex) that changes whenever the ids of a text may change.

    It covers the vocabulary and all that cleans and splits a text: this module's version, the
    versions of ftfy and `tokenizers`, and Python's own tables of Unicode.
    """
    import ftfy
    import tokenizers

    parts = (
        _VOCABULARY_SHA256,
        CLEANING_VERSION,
        ftfy.__version__,
        tokenizers.__version__,
        unicodedata.unidata_version,
    )
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def iterate(texts: Texts) -> Iterable[str]:
    """Return a batch to loop over without looking at its items; one string becomes a batch of one.

    Raises:
        TextError: it is no list, as `items` has it.
    """
    if isinstance(texts, str):
        return (texts,)
    return check_list(texts, "texts", "strings", TextError)


def check_text(text: str, index: int | None) -> None:
    """Refuse what is no text, or too much of it, before anything works on it.

    Raises:
        TextError: says what is wrong; carries the index.
    """
    name = _name(index)
    if not isinstance(text, str):
        raise TextError(f"{name} {describe_non_string(text)}", index=index)
    if len(text) > MAX_TEXT_CHARS:
        raise TextError(
            f"{name} has {len(text):,} characters; at most {MAX_TEXT_CHARS:,} are looked at, with "
            f"truncate=True as well: {_first_words(text)} Shorten it.",
            index=index,
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"{name} has a lone surrogate, {text[error.start]!a}, at character {error.start}; that "
            "is half a character. Decode its source with errors='replace'.",
            index=index,
        ) from error


def make_empty_error(text: str, index: int | None) -> TextError:
    """Return the error of a text that nothing is left of."""
    return TextError(
        f"{_name(index)} is {text[:20]!r} and says nothing. Leave it out.", index=index
    )


def make_length_error(
    text: str, index: int | None, num_tokens: int, context_length: int
) -> TextTooLongError:
    """Return the error of a text that the model cannot read to its end."""
    return TextTooLongError(
        f"{_name(index)} has {num_tokens} tokens, start and end included; the model reads "
        f"{context_length}: {_first_words(text)} Shorten it or pass truncate=True.",
        index=index,
        num_tokens=num_tokens,
        context_length=context_length,
    )


def _name(index: int | None) -> str:
    return "text" if index is None else f"text {index}"


def _first_words(text: str) -> str:
    return f"{text[:60]!r}{'...' if len(text) > 60 else '.'}"


# Without a lock: threads that come at once each load it and one result stays, while a lock held
# by another thread at a fork would never open in the child.
@cache
def _load() -> Tokenizer:
    """Build the Rust tokenizer from the packaged vocabulary; about 0.15 s, once."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    merges = _read_merges()
    alphabet = _byte_alphabet()
    symbols = [*alphabet, *(symbol + _END_OF_WORD for symbol in alphabet)]
    symbols += (first + second for first, second in merges)
    token_id_by_symbol = {symbol: token_id for token_id, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(BPE(token_id_by_symbol, merges, end_of_word_suffix=_END_OF_WORD))
    words = Split(Regex(_WORD), behavior="removed", invert=True)
    to_alphabet = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = PreTokenizers([words, to_alphabet])
    return tokenizer


def _read_merges() -> list[tuple[str, str]]:
    compressed = _VOCABULARY.read_bytes()
    if hashlib.sha256(compressed).hexdigest() != _VOCABULARY_SHA256:
        raise ClipRTError(
            f"the packaged vocabulary {_VOCABULARY.name} is damaged: its sha256 is not "
            f"{_VOCABULARY_SHA256}. Install clip_rt again."
        )
    with gzip.open(io.BytesIO(compressed), "rt", encoding="utf-8") as lines:
        # The first line is a heading.
        pairs = (line.split() for line in itertools.islice(lines, 1, _NUM_MERGES + 1))
        return [(first, second) for first, second in pairs]


def _byte_alphabet() -> list[str]:
    """Return the visible character that stands for each byte, in the order of their ids.

    The 188 bytes that print in Latin-1 stand for themselves and come first; the others take the
    characters from U+0100 on (GPT-2 `encoder.py`, `bytes_to_unicode`).
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    num_others = 256 - len(visible)
    return [chr(code) for code in (*visible, *range(0x100, 0x100 + num_others))]
