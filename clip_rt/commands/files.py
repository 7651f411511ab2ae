"""Images of commands, embedded as they come: those that cannot be used keep their place."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_rt.commands.bursts import in_bursts
from clip_rt.commands.output import show
from clip_rt.errors import ModelReplacedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clip_rt.bulk.sources import ImageFile
    from clip_rt.client import Client
    from clip_rt.commands.progress import Progress
    from clip_rt.wire.manifest import Manifest


@dataclass(frozen=True)
class Part:
    """Some images, in order."""

    images: Sequence[tuple[ImageFile, str | None]]
    """Each with the reason why it could not be used, or None."""
    embeddings: NDArray[np.float32]
    """float32 (M, D): of those that could, in order."""


def embed_named(client: Client, manifest: Manifest, names: Sequence[str]) -> Iterator[Part]:
    """Yield what came of the images that names mean, as `find_images` has it; see `embed_files`.

    Whoever writes names to stdin one by one has the answer to each before the next.
    """
    from clip_rt.bulk.sources import STDIN, find_images

    images = find_images(names)
    for burst in in_bursts(images) if STDIN in names else [images]:
        yield from embed_files(client, manifest, burst)


def embed_files(client: Client, manifest: Manifest, images: Iterator[ImageFile]) -> Iterator[Part]:
    """Yield what came of images, in order; memory stays flat.

    Args:
        client: Of the model.
        manifest: That labels were embedded with.
        images: Read as parts are asked for.

    Raises:
        ModelReplacedError: the server has other weights than labels were embedded with.
        ClipRTError: see `Client.stream_images`.
    """
    from clip_rt.inputs import transform

    waiting: deque[tuple[ImageFile, Path | bytes, str]] = deque()

    def read() -> Iterator[Path | bytes]:
        for image in images:
            content: Path | bytes = b""
            error = ""
            try:
                content = image.to_input()
            except OSError as reason:
                error = reason.strerror or str(reason)
            # Of bytes, that they are bytes is all that is asked later.
            waiting.append((image, content if isinstance(content, Path) else b"", error))
            yield content

    num_done = 0
    with closing(client.stream_images(read(), on_error="skip")) as parts:
        for part in parts:
            if num_done == 0 and client.manifest.fingerprint != manifest.fingerprint:
                raise ModelReplacedError(
                    "the server took other weights after the labels were embedded. Start again.",
                    expected=manifest.fingerprint,
                    found=client.manifest.fingerprint,
                )
            good = set(part.indices.tolist())
            failures = iter(part.failures)
            rows: list[tuple[ImageFile, str | None]] = []
            for index in range(num_done, num_done + len(good) + len(part.failures)):
                image, content, error = waiting.popleft()
                if index in good:
                    rows.append((image, None))
                else:
                    prefix = transform.describe(content, index) + " "
                    failure = str(next(failures)).removeprefix(prefix)
                    rows.append((image, error or failure))
            num_done += len(rows)
            yield Part(rows, part.embeddings)


def embed_all(
    client: Client, manifest: Manifest, images: Sequence[ImageFile], progress: Progress
) -> tuple[list[int], NDArray[np.float32]]:
    """Embed all of some images, and say on stderr which cannot be used.

    Args:
        client: Of the model.
        manifest: That labels were embedded with.
        images: N of them.
        progress: Counts them.

    Returns:
        Positions of the M images that could be used, ascending, and their embeddings, float32
        (M, D).

    Raises:
        ClipRTError: see `embed_files`.
    """
    import numpy as np

    kept: list[int] = []
    parts = []
    num_done = 0
    for part in embed_files(client, manifest, iter(images)):
        for index, (image, error) in enumerate(part.images, start=num_done):
            progress.advance(1, error is not None)
            if error is None:
                kept.append(index)
            else:
                sys.stderr.write(f"warning: {show(image.name)} {show(error)}\n")
        num_done += len(part.images)
        parts.append(part.embeddings)
    return kept, np.concatenate(parts) if parts else np.empty((0, manifest.embedding_dim), "f4")
