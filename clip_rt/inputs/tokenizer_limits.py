"""What a tokenizer.json may ask of this process: it may be anybody's, and Rust aborts or spins.

`tokenizers` believes a file. A normalizer may make gigabytes of a caption, and a regular expression
of Oniguruma may go back and forth for minutes; neither can be interrupted, and out of memory Rust
ends the process. So both are looked at before the first text.
"""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any

from clip_rt.errors import ContractError
from clip_rt.specs import MAX_TOKENIZER_BYTES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_PARTS = 2**23
"""Lists, objects and commas of a file, each of which takes memory; XLM-V's has 2.7 million."""
MAX_ADDED_TOKENS = 2**14
"""Looked for in every text at once; Gemma 3 has 6,415."""
MAX_GROWTH = 256
"""Of a text by normalizers, in characters; sentencepiece's own rules make at most 18 of one."""
MAX_PREPENDED_CHARS = 64
MAX_WORD_CHARS = 1000
"""Of a word that WordPiece looks up in every split; BERT has 100."""
MAX_PATTERN_CHARS = 4096
MAX_OPEN_REPEATS = 1
"""Of an alternative of a regular expression, with something behind that may fail, as `\\s+(?!\\S)`;
those of GPT-2, CLIP, GPT-4 and Qwen have no more. The time grows as the length of a text to the
power of one more: of 10,000 characters 0.3 s, where two would take minutes."""
MAX_CLOSED_REPEAT = 8
"""What a repetition may reach that is not counted, as `\\p{N}{1,3}`."""
MAX_WAYS = 64
"""In which all that may be there or not, or one of several, can be tried of an alternative."""
MAX_STEPS = 32
"""Normalizers, or pre-tokenizers, one after another."""
MAX_UTF8_BYTES = 4
"""Of a character."""
# Ours are written without; they would hide a name from the search for it.
_ESCAPE = rb"\u00"
_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"')
_ATOM = re.compile(r"\\(?:[pPxuo]\{[^}]*\}|.)", re.DOTALL)
_REPEAT = re.compile(r"[*+]|\{(\d*)(,?)(\d*)\}")
_GROUP = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|<\w+>|[imsu-]+[:)])?)?")


def check_content(content: bytes) -> None:
    """Look at a file before Rust does.

    Raises:
        ContractError: it is too large, or would have Rust end the process.
    """
    if len(content) > MAX_TOKENIZER_BYTES:
        raise _refuse("bytes", len(content), MAX_TOKENIZER_BYTES)
    num_parts = sum(map(content.count, (b"[", b"{", b",")))
    if num_parts > MAX_PARTS:
        raise _refuse("lists, objects and commas", num_parts, MAX_PARTS)
    num_added = content.count(b'"single_word"')
    if num_added > MAX_ADDED_TOKENS:
        raise _refuse("added tokens", num_added, MAX_ADDED_TOKENS)
    # Looked for as bytes first, which takes a tenth of the time in a file that has none.
    if b"precompiled_charsmap" in content:
        for match in _CHARSMAP.finditer(content):
            _read_charsmap(match[1])
    place = content.find(_ESCAPE)
    while place >= 0:
        first = place
        while first > 0 and content[first - 1 : first] == b"\\":
            first -= 1
        digits = content[place + len(_ESCAPE) : place + len(_ESCAPE) + 2]
        # After an odd number of them the backslash is itself escaped, and the rest are letters.
        if (place - first) % 2 == 0 and digits[:1] in (b"2", b"3", b"4", b"5", b"6", b"7"):
            raise ContractError(
                f"the tokenizer.json hides a letter of ASCII as \\u00{digits.decode('latin-1')}, "
                "which none that is exported does. Export the model again.",
                expected="plain letters",
                found=digits,
            )
        place = content.find(_ESCAPE, place + 1)


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Look at what was read, before the first text.

    Raises:
        ContractError: a text may take minutes or gigabytes, or have other ids each time.
    """
    growth = 1
    normalizers, splitters = _parts(tokenizer.normalizer), _parts(tokenizer.pre_tokenizer)
    for part in normalizers:
        if part["type"] == "Replace":
            # Where a pattern may match nothing, what it is replaced by stands beside each letter.
            is_pattern = "Regex" in part.get("pattern", {})
            growth *= max(1, len(part["content"]) + int(is_pattern))
        elif part["type"] == "Precompiled":
            growth *= max(1, _read_charsmap(part["precompiled_charsmap"].encode()))
        elif part["type"] == "Prepend" and len(part["prepend"]) > MAX_PREPENDED_CHARS:
            raise _refuse("characters before each text", len(part["prepend"]), MAX_PREPENDED_CHARS)
        elif part["type"] == "ByteLevel":
            growth *= MAX_UTF8_BYTES
        _check_pattern(part)
    growth *= MAX_UTF8_BYTES ** sum(part["type"] == "ByteLevel" for part in splitters)
    if growth > MAX_GROWTH:
        raise _refuse("characters made of one", growth, MAX_GROWTH)
    for part in splitters:
        _check_pattern(part)
    model = tokenizer.model
    word_chars = getattr(model, "max_input_chars_per_word", 0)
    if word_chars > MAX_WORD_CHARS:
        raise _refuse("characters of a word that is looked up", word_chars, MAX_WORD_CHARS)
    if dropout := getattr(model, "dropout", None):
        raise _refuse("dropout, which gives a text other ids each time,", dropout, 0)


def _parts(component: Any) -> list[dict[str, Any]]:
    """Return a normalizer or pre-tokenizer, or those it is a sequence of, as the file has them."""
    found: list[dict[str, Any]] = []
    waiting = [] if component is None else [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop()
        inner = part.get("normalizers") or part.get("pretokenizers")
        if inner:
            waiting += inner
        else:
            found.append(part)
    if len(found) > MAX_STEPS:
        raise _refuse("steps before its tokens", len(found), MAX_STEPS)
    return found


def _read_charsmap(encoded: bytes) -> int:
    """Return how many characters sentencepiece's rules make of one at most.

    A trie behind its length in 4 bytes, then strings that end in a zero (sentencepiece,
    `src/normalizer.cc`, `DecodePrecompiledCharsMap`). Rust asks for the memory the length says.
    """
    try:
        content = base64.b64decode(encoded, validate=True)
        num_bytes = int.from_bytes(content[:4], "little")
        if len(content) < 4 or num_bytes > len(content) - 4:
            raise ValueError(f"it says that its trie has {num_bytes:,} bytes")
        strings = content[4 + num_bytes :].decode("utf-8").split("\0")
    except ValueError as error:
        raise ContractError(
            f"the rules of the tokenizer.json for characters cannot be read: {error!s:.200}. "
            "Export the model again.",
            expected="a precompiled_charsmap",
            found=encoded[:40],
        ) from error
    return max(map(len, strings))


def _check_pattern(part: dict[str, Any]) -> None:
    pattern = (part.get("pattern") or {}).get("Regex")
    if pattern is None:
        return
    try:
        repeats = count_open_repeats(pattern)
    except ValueError as error:
        raise ContractError(
            f"the tokenizer.json has the regular expression {pattern!r:.80}, and {error}: a text "
            "might take minutes. Export the model with a tokenizer that has none such.",
            expected="repetitions of single characters",
            found=pattern,
        ) from error
    if repeats > MAX_OPEN_REPEATS:
        raise _refuse(f"repetitions in a row in {pattern!r:.80}", repeats, MAX_OPEN_REPEATS)


def count_open_repeats(pattern: str) -> int:
    """Return how many repetitions that may be tried anew an alternative has at most.

    Those have no close end, and something follows that may fail; what comes last stays.

    Args:
        pattern: Of Oniguruma, in Ruby's syntax.

    Raises:
        ValueError: it has what may take exponential time, or what this cannot read.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise ValueError(f"it has more than {MAX_PATTERN_CHARS} characters")
    place, depth, count, worst, before = 0, 0, 0, 0, ""
    is_last_open, ways, num_choices = False, 1, 1
    while place < len(pattern):
        character = pattern[place]
        repeat = _REPEAT.match(pattern, place)
        if not (repeat or character in "|)"):
            count, is_last_open = count + is_last_open, False
        if character == "\\":
            match = _ATOM.match(pattern, place)
            if match is None or match[0][1] in "123456789kgK":
                raise ValueError("it refers to its own groups, or ends in a backslash")
            place, before = match.end(), "atom"
        elif character == "[":
            place, before = _end_of_class(pattern, place), "atom"
        elif character == "(":
            match = _GROUP.match(pattern, place)
            assert match is not None
            if match[0] == "(?":
                raise ValueError("it has a kind of group that is not known here")
            depth += not match[0].endswith(")")
            place, before = match.end(), ""
        elif character == ")":
            depth, place, before = depth - 1, place + 1, "group"
        elif repeat:
            if before != "atom":
                raise ValueError(f"it repeats a {before or 'group'}")
            is_open = repeat[1] is None or (repeat[2] and not repeat[3])
            most = 0 if is_open else int(repeat[3] or repeat[1] or 0)
            is_last_open = bool(is_open or most > MAX_CLOSED_REPEAT)
            ways *= 1 if is_last_open or not repeat[2] else most + 1
            place = repeat.end()
            # As few as will do, or never back.
            if pattern[place : place + 1] == "?" or (
                repeat[1] is None and pattern[place : place + 1] == "+"
            ):
                place += 1
            before = "repetition"
        else:
            if character == "|" and depth == 0:
                worst, count, is_last_open, ways, num_choices = max(worst, count), 0, False, 1, 1
            num_choices += character == "|"
            ways *= 1 + (character == "?")
            place += 1
            before = before if character == "?" else "atom"
        if ways * num_choices > MAX_WAYS:
            raise ValueError(f"it has an alternative with more than {MAX_WAYS} ways to try")
    return max(worst, count)


def _end_of_class(pattern: str, start: int) -> int:
    """Return the place behind a class of characters, in which there may be others."""
    place, depth = start, 0
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            place += 1
        elif character == "[":
            depth += 1
            # A bracket that comes first is one of the characters.
            place += len(re.match(r"\^?\]?", pattern[place + 1 :])[0])  # type: ignore[index]
        elif character == "]":
            depth -= 1
            if depth == 0:
                return place + 1
        place += 1
    raise ValueError("it has a class of characters without an end")


def _refuse(what: str, found: float, limit: int) -> ContractError:
    return ContractError(
        f"the tokenizer.json has {found:,} {what}; at most {limit:,} are read. Export the model "
        "with another tokenizer.",
        expected=limit,
        found=found,
    )
