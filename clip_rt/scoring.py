"""How well images fit the prompts that they were made of: CLIP score, pair by pair.

Source: Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning",
section 3; the factor of 100, and that the mean and not each pair is kept from falling below 0, are
those of torchmetrics 1.9 `functional/multimodal/clip_score.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ClipRTError, InputError, ModelReplacedError, TextError
from clip_rt.inputs.items import check_list, check_on_error

if TYPE_CHECKING:
    from clip_rt.client import Client
    from clip_rt.inputs.images import Images
    from clip_rt.inputs.items import OnError
    from clip_rt.inputs.tokenizer import Texts

FACTOR = 100.0
"""Of the cosine, whatever the model's own temperature."""
PROMPTS_A_PART = 256
"""Embedded in the time of one part of the answers."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ClipScores:
    """CLIP scores of pairs of an image and a prompt."""

    scores: NDArray[np.float64]
    """float64 (N,): 100 times the cosine of each pair, in order; may be below 0."""
    indices: NDArray[np.intp]
    """intp (N,): position of each pair in the caller's batch, ascending."""
    failures: tuple[ClipRTError, ...] = ()
    """An error for each other pair, in order; each carries its `index`."""

    @property
    def mean(self) -> float:
        """Mean of the scores, but no less than 0; NaN of no pair."""
        return max(float(self.scores.mean()), 0.0) if len(self.scores) else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean: sample standard deviation over the root of N; NaN of fewer than two."""
        if len(self.scores) < 2:
            return math.nan
        return float(self.scores.std(ddof=1)) / math.sqrt(len(self.scores))


def clip_score(
    client: Client,
    images: Images,
    prompts: Texts,
    *,
    truncate: bool = False,
    on_error: OnError = "raise",
    timeout_s: float | None = None,
) -> ClipScores:
    """Score how well images fit prompts, as torchmetrics' `clip_score` does with the same weights.

    Any number of pairs: images are read and sent as answers come back. Images are prepared, and
    texts are read, as the served model was trained; no template is put around a prompt.

    Args:
        client: Of the model.
        images: As for `Client.encode_images`; N of them.
        prompts: N strings, one for each image, in order; or one string, for all images.
        truncate: Cut prompts that are too long for the model instead of refusing them.
        on_error: "raise" the first error, or "skip" pairs of which something cannot be used.
        timeout_s: For each part of the answers, not for all; the client's own if None.

    Returns:
        A score for each pair, with their mean and its standard error.

    Raises:
        ImageError, TextTooLongError, TextError: an item cannot be used; carries its index.
        InputError: there are not as many prompts as images.
        ModelReplacedError: the server took other weights meanwhile; score anew.
        ServerError, UnknownModelError, ContractError, ClientClosedError: see
            `Client.encode_images`.
    """
    parts = list(
        stream_scores(
            client, images, prompts, truncate=truncate, on_error=on_error, timeout_s=timeout_s
        )
    )
    empty = ClipScores(scores=np.empty(0), indices=np.empty(0, np.intp))
    return ClipScores(
        scores=np.concatenate([each.scores for each in (empty, *parts)]),
        indices=np.concatenate([each.indices for each in (empty, *parts)]),
        failures=tuple(itertools.chain.from_iterable(each.failures for each in parts)),
    )


def stream_scores(
    client: Client,
    images: Images,
    prompts: Texts,
    *,
    truncate: bool = False,
    on_error: OnError = "raise",
    timeout_s: float | None = None,
) -> Iterator[ClipScores]:
    """Yield scores as `clip_score` returns them, in parts, as they come.

    Raises:
        ClipRTError: see `clip_score`.
    """
    check_on_error(on_error)
    is_one = isinstance(prompts, str)
    texts: list[str] = (
        [prompts]
        if isinstance(prompts, str)
        else list(check_list(prompts, "prompts", "strings", TextError))
    )
    if isinstance(images, (list, tuple)) and not is_one and len(images) != len(texts):
        raise _make_count_error(f"{len(images):,}", len(texts))
    manifest = client.manifest
    # One for all that cannot be used leaves nothing to score.
    rows, bad_texts = _embed_prompts(
        client, texts, truncate, "raise" if is_one else on_error, timeout_s
    )
    num_done = 0
    with closing(client.stream_images(images, on_error=on_error, timeout_s=timeout_s)) as parts:
        for part in parts:
            if num_done == 0 and client.manifest.fingerprint != manifest.fingerprint:
                raise ModelReplacedError(
                    "the server took other weights after the prompts were embedded. Score anew.",
                    expected=manifest.fingerprint,
                    found=client.manifest.fingerprint,
                )
            end = num_done + len(part.indices) + len(part.failures)
            if not is_one and end > len(texts):
                raise _make_count_error(f"{end:,} or more", len(texts))
            text_of = np.zeros_like(part.indices) if is_one else part.indices
            cosines = np.einsum("nd,nd->n", part.embeddings.astype(np.float64), rows[text_of])
            bad = {index_of(error): error for error in part.failures}
            bad |= {index: bad_texts[index] for index in range(num_done, end) if index in bad_texts}
            is_good = np.array([index not in bad for index in part.indices.tolist()], bool)
            yield ClipScores(
                scores=FACTOR * cosines[is_good],
                indices=part.indices[is_good],
                failures=tuple(bad[index] for index in sorted(bad)),
            )
            num_done = end
    if not is_one and num_done != len(texts):
        raise _make_count_error(f"{num_done:,}", len(texts))


def _embed_prompts(
    client: Client,
    texts: Sequence[str],
    truncate: bool,
    on_error: OnError,
    timeout_s: float | None,
) -> tuple[NDArray[np.float32], dict[int, ClipRTError]]:
    """Return a row for each prompt, float32 (T, D), and by position why some have none."""
    # In one call, so that errors have the positions of the caller's.
    part_s = client._timeout_s if timeout_s is None else timeout_s
    num_parts = max(1, math.ceil(len(texts) / PROMPTS_A_PART))
    encoded = client.encode_texts(
        texts, truncate=truncate, on_error="skip", timeout_s=part_s * num_parts
    )
    if on_error == "raise" and encoded.failures:
        raise encoded.failures[0]
    rows = np.zeros((len(texts), encoded.embeddings.shape[1]), np.float32)
    rows[encoded.indices] = encoded.embeddings
    return rows, {index_of(error): error for error in encoded.failures}


def index_of(error: ClipRTError) -> int:
    """Return the position that an error of an item carries."""
    index: int = error.index  # type: ignore[attr-defined]
    return index


def _make_count_error(num_images: str, num_prompts: int) -> InputError:
    return InputError(
        f"there are {num_images} images and {num_prompts:,} prompts; name a prompt for each image, "
        "or one string for all."
    )
