"""A tokenizer as another library has it in memory, to the tokenizer.json that a client reads.

What the library's own tokenizer does in Rust is taken as it is in memory, with every change the
library makes after it has read the file (transformers 5.23 lets SigLIP 2 lower its texts so); what
it does in Python before that becomes a `Cleaning`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from clip_rt.errors import CheckpointError
from clip_rt.inputs.tokenizer_file import compact
from clip_rt.specs import TOKENIZER_FILE, Cleaning


def read_tokenizer_file(tokenizer: Any) -> tuple[bytes, Cleaning]:
    """Return the tokenizer.json of a tokenizer of transformers, and what it does to texts before.

    Raises:
        CheckpointError: it has none, and is of a kind nobody here knows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return compact(backend.to_str()), "none"
    name = type(tokenizer).__name__
    if name == "SiglipTokenizer":
        return compact(_convert_siglip(tokenizer).to_str()), "no_punctuation"
    raise CheckpointError(
        f"the tokenizer is a {name}, which has no tokenizer.json and does its work in Python. "
        f"Save one beside it as {TOKENIZER_FILE}: transformers.AutoTokenizer.from_pretrained(...)"
        ".save_pretrained(FOLDER), with a version that has a fast one."
    )


def find_tokenizer_file(place: Path) -> Path:
    """Return the tokenizer.json that a path means: the file, or that in a folder.

    Raises:
        CheckpointError: there is none.
    """
    path = place / TOKENIZER_FILE if place.is_dir() else place
    if not path.is_file():
        raise CheckpointError(f"there is no {path}; name a tokenizer.json with --tokenizer.")
    return path


def _convert_siglip(tokenizer: Any) -> Any:
    """Build in Rust what transformers runs in Python: SigLIP's sentencepiece model."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from tokenizers.models import Unigram

    model = tokenizer.sp_model
    pieces = [(model.IdToPiece(each), model.GetScore(each)) for each in range(len(model))]
    made = Tokenizer(Unigram(pieces, unk_id=model.unk_id(), byte_fallback=False))
    rules = model.serialized_model_proto()
    # Rust looks its rules up for letters of less than 6 bytes, marks included, and for single
    # characters; sentencepiece for the longest that there is, and leaves no two spaces in a row.
    made.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Precompiled(_charsmap(rules)),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    made.decoder = decoders.Metaspace()
    end = tokenizer.eos_token
    made.add_special_tokens([AddedToken(end, special=True)])
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return made


def _charsmap(proto: bytes) -> bytes:
    # sentencepiece's own description of its format asks for a newer protobuf than gRPC's.
    description: Any = importlib.import_module("transformers.utils.sentencepiece_model_pb2_new")
    model = description.ModelProto.FromString(proto)
    return bytes(model.normalizer_spec.precompiled_charsmap)


def pad_id_of(content: bytes) -> int | None:
    """Return the padding id that a tokenizer.json names, if it names one."""
    padding = json.loads(content).get("padding") or {}
    pad_id = padding.get("pad_id")
    return None if pad_id is None else int(pad_id)
