"""The tokenizer of a served model: in the package, in this user's cache, or from the server.

A tokenizer.json has up to 60 MB, too much for a manifest, so a server hands it out as a third
Triton model, `<slug>_tokenizer_file`: the index of a part goes in, its bytes come out. It is
fetched once and kept for all processes of the user, under the sha256 that the manifest says, which
is checked whenever it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clip_rt import fork, telemetry
from clip_rt.deadline import Deadline
from clip_rt.embedded.runtime_choice import default_folder
from clip_rt.errors import ContractError, InferenceError, ServerTimeoutError
from clip_rt.inputs.tokenizer import OpenAITokenizer, TextTokenizer
from clip_rt.inputs.tokenizer_file import FileTokenizer
from clip_rt.requests.connection import Model
from clip_rt.specs import TOKENIZER_CHUNK_BYTES, Tokenization, tokenizer_model

FOLDER = "tokenizers"
"""Below the user's cache of clip_rt."""
MAX_LOADED = 8
"""Tokenizers kept in memory; one of 256,000 tokens takes about 100 MB."""

PARALLEL_CHUNKS = 4
"""Parts that are asked for at a time: of a distant server one after another is mostly waiting."""

_lock = threading.Lock()
_loaded: dict[tuple[Tokenization, int], FileTokenizer] = {}
_chunks: dict[str, list[bytes]] = {}
"""Parts that have come so far of files that are not whole, by the sha256 they are to have."""


def load_tokenizer(model: Model, deadline: Deadline) -> TextTokenizer:
    """Return what makes ids of texts for a model; the first time it may ask the server.

    Raises:
        ContractError: the server's file is not the one its manifest names, or none.
        ServerError: it does not answer in time.
    """
    manifest = model.manifest
    tokenization, context_length = manifest.tokenization, manifest.context_length
    if tokenization.kind == "openai":
        return OpenAITokenizer(context_length)
    key = tokenization, context_length
    found = _loaded.get(key)
    if found is not None:
        return found
    # One thread loads it, the others want the same.
    if not _lock.acquire(timeout=max(deadline.remaining_s(), 0.0)):
        raise ServerTimeoutError(
            f"another thread is still loading a tokenizer after {deadline.timeout_s:g} s. Allow "
            "more with timeout_s=.",
            timeout_s=deadline.timeout_s,
        )
    try:
        found = _loaded.get(key)
        if found is None:
            with telemetry.stage("load_tokenizer"):
                content = _find(tokenization) or _fetch(model, tokenization, deadline)
                found = FileTokenizer(content, tokenization, context_length=context_length)
            while len(_loaded) >= MAX_LOADED:
                del _loaded[next(iter(_loaded))]
            _loaded[key] = found
    finally:
        _lock.release()
    return found


def _find(tokenization: Tokenization) -> bytes | None:
    """Return the file from the user's cache; None where it is not there whole."""
    folder = default_folder(FOLDER)
    if folder is None:
        return None
    with contextlib.suppress(OSError):
        content = _path(folder, tokenization).read_bytes()
        if hashlib.sha256(content).hexdigest() == tokenization.sha256:
            return content
    return None


def _fetch(model: Model, tokenization: Tokenization, deadline: Deadline) -> bytes:
    name = tokenizer_model(model.manifest.model)
    num_chunks = -(-tokenization.num_bytes // TOKENIZER_CHUNK_BYTES)
    # What came before a deadline need not come again.
    chunks = _chunks.setdefault(tokenization.sha256, [])

    def read(index: int) -> bytes:
        return model.connection.read_chunk(model, name, index, deadline)

    threads = ThreadPoolExecutor(PARALLEL_CHUNKS, thread_name_prefix="clip_rt_tokenizer")
    try:
        chunks.extend(threads.map(read, range(len(chunks), num_chunks)))
    except InferenceError as error:
        raise ContractError(
            f"{model.connection.urls} serves {model.manifest.model!r} and not the tokenizer its "
            f"manifest names ({error!s:.200}). Put the folder {name} of the exported model into "
            "its repository too.",
            expected=name,
            found=None,
        ) from error
    finally:
        # Those under way end by the deadline; Ctrl-C does not wait for them.
        threads.shutdown(wait=False, cancel_futures=True)
    content = b"".join(_chunks.pop(tokenization.sha256))
    if hashlib.sha256(content).hexdigest() != tokenization.sha256:
        model.connection.verify_with_retries(model, deadline)
        raise ContractError(
            f"{name} at {model.connection.urls} handed out {len(content):,} bytes that are not the "
            f"tokenizer its manifest names, of {tokenization.num_bytes:,} bytes and the sha256 "
            f"{tokenization.sha256}. Export the model again.",
            expected=tokenization.sha256,
            found=hashlib.sha256(content).hexdigest(),
        )
    _keep(tokenization, content)
    return content


def _keep(tokenization: Tokenization, content: bytes) -> None:
    """Put the file into the user's cache; if that fails, the next process fetches it again."""
    folder = default_folder(FOLDER)
    if folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(prefix=".fetched-", dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(beside, _path(folder, tokenization))
        except BaseException:
            os.unlink(beside)
            raise


def _path(folder: Path, tokenization: Tokenization) -> Path:
    # Checked to be hex digits where the manifest is read.
    return folder / f"{tokenization.sha256}.json"


def _renew_lock_in_child() -> None:
    global _lock
    _lock = threading.Lock()


fork.in_child(_renew_lock_in_child)
