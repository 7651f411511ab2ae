"""Texts to ids by a tokenizer.json of the library `tokenizers`: Gemma's, XLM-V's, mT5's, BERT's.

The file says how text is split and which tokens begin and end it; the manifest of the model says
how text is cleaned before, how long it may be and what it is padded with (`specs.Tokenization`).
Special tokens that somebody writes in a text are plain text, as everywhere in clip_rt.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from typing import TYPE_CHECKING, Any

from clip_rt.errors import ContractError, InputError, TextError
from clip_rt.inputs.cleaning import clean
from clip_rt.inputs.tokenizer import (
    CLEANING_VERSION,
    check_text,
    make_empty_error,
    make_length_error,
)
from clip_rt.inputs.tokenizer_limits import check_content, check_tokenizer
from clip_rt.specs import Cleaning, Tokenization

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class FileTokenizer:
    """The tokenizer of one model, read from the bytes of a tokenizer.json. Thread-safe.

    Args:
        content: Of the file.
        tokenization: What the model's manifest says.
        context_length: Ids that the model reads at most, those of start and end included.

    Raises:
        ContractError: the bytes are not those of the manifest, or no tokenizer.
    """

    def __init__(self, content: bytes, tokenization: Tokenization, *, context_length: int) -> None:
        found = hashlib.sha256(content).hexdigest()
        if found != tokenization.sha256:
            raise ContractError(
                f"the tokenizer.json has the sha256 {found}; the manifest of the model says "
                f"{tokenization.sha256}. Export the model again.",
                expected=tokenization.sha256,
                found=found,
            )
        self._tokenization = tokenization
        self._context_length = context_length
        self._tokenizer = parse(content)
        self._tokenizer.no_padding()
        self._num_added = self._tokenizer.num_special_tokens_to_add(False)
        if self._num_added >= context_length:
            raise ContractError(
                f"the tokenizer.json adds {self._num_added} ids to a text, and the model reads "
                f"{context_length}: nothing is left for the text. Export the model again.",
                expected=context_length,
                found=self._num_added,
            )
        # What is beyond it is counted, for the error.
        self._tokenizer.enable_truncation(context_length)
        # As it is set by the library of the source, `<eos>` in a text would be the control token.
        self._tokenizer.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Rust's own state is without it.
        self._tokenizer.encode_special_tokens = True

    def encode_text(
        self,
        text: str,
        *,
        index: int | None = None,
        truncate: bool = False,
        may_be_empty: bool = False,
    ) -> list[int]:
        """Return the ids of a text, those of start and end included, without padding.

        Args:
            text: One text.
            index: Its position in the caller's batch, for the error.
            truncate: Cut a text that is too long and keep its end, instead of refusing.
            may_be_empty: Take a text that says nothing, instead of refusing.

        Raises:
            TextTooLongError: it needs more ids and `truncate` is off.
            TextError: it is no usable string.
        """
        check_text(text, index)
        cleaned = clean(text, self._tokenization.cleaning)
        if not (cleaned.strip() or may_be_empty):
            raise make_empty_error(text, index)
        try:
            encoding = self._tokenizer.encode(cleaned)
        except BaseException as error:
            _raise_unless_of_rust(error)
            name = "text" if index is None else f"text {index}"
            raise TextError(
                f"{name} cannot be split into tokens by the model's tokenizer: {error!s:.200}. "
                "Leave it out.",
                index=index,
            ) from error
        ids: list[int] = encoding.ids
        if encoding.overflowing and not truncate:
            beyond = sum(len(each.ids) - self._num_added for each in encoding.overflowing)
            raise make_length_error(text, index, len(ids) + beyond, self._context_length)
        if len(ids) <= self._num_added and not may_be_empty:
            raise make_empty_error(text, index)
        if len(ids) > self._context_length:
            raise ContractError(
                f"the tokenizer.json makes {len(ids)} ids of a text that was cut, and the model "
                f"reads {self._context_length}. Export the model again.",
                expected=self._context_length,
                found=len(ids),
            )
        return self._check_ids(ids, text, index)

    def fingerprint(self) -> str:
        """Return a sha256 (hex) that changes whenever the ids of a text may change."""
        import ftfy
        import tokenizers

        parts = (
            repr(self._tokenization),
            CLEANING_VERSION,
            ftfy.__version__,
            tokenizers.__version__,
            unicodedata.unidata_version,
        )
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()

    def _check_ids(self, ids: list[int], text: str, index: int | None) -> list[int]:
        if max(ids) >= self._tokenization.vocab_size:
            raise TextError(
                f"{'text' if index is None else f'text {index}'} is {text[:60]!r} and has the id "
                f"{max(ids)}; the model knows 0 to {self._tokenization.vocab_size - 1}. Export the "
                "model again.",
                index=index,
            )
        erased_id = self._tokenization.erased_id
        return ids if erased_id is None else [0 if each == erased_id else each for each in ids]


def parse(content: bytes) -> Tokenizer:
    """Read a tokenizer.json, whoever wrote it.

    Raises:
        ContractError: it is not one that the installed `tokenizers` can read, or is beyond the
            limits of `tokenizer_limits`.
    """
    from tokenizers import Tokenizer

    check_content(content)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except BaseException as error:
        _raise_unless_of_rust(error)
        raise ContractError(
            f"the tokenizer.json cannot be read by tokenizers {_version()}: {error!s:.200}. Is it "
            "whole? Install a newer tokenizers, or export the model again.",
            expected="a tokenizer.json",
            found=content[:40],
        ) from error
    check_tokenizer(tokenizer)
    return tokenizer


def describe(
    content: bytes,
    *,
    vocab_size: int,
    cleaning: Cleaning,
    pad_id: int,
    erased_id: int | None = None,
) -> Tokenization:
    """Write down a tokenizer.json for a manifest.

    Raises:
        InputError: a field cannot be used.
        ContractError: the file cannot be read.
    """
    parse(content)
    return Tokenization(
        kind="tokenizer.json",
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        vocab_size=vocab_size,
        cleaning=cleaning,
        pad_id=pad_id,
        erased_id=erased_id,
    )


def compact(content: str) -> bytes:
    """Return a tokenizer.json without the blanks between its parts, a fifth smaller."""
    try:
        return json.dumps(json.loads(content), ensure_ascii=False, separators=(",", ":")).encode()
    except ValueError as error:
        raise InputError(f"the tokenizer.json is not JSON: {error}.") from error


def _raise_unless_of_rust(error: BaseException) -> None:
    """Raise again what has nothing to do with the tokenizer.

    A panic of Rust, as where a regular expression gives up, is a BaseException of its own.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)):
        raise error


def _version() -> str:
    import tokenizers

    return str(tokenizers.__version__)
