"""Images and texts in, embeddings of a torch model out, prepared by the code that serves.

Nothing here needs a server: `clip_rt` resizes, tokenises and lays out the batches, torch computes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from clip_rt.classification.zero_shot import pool
from clip_rt.errors import CheckpointError
from clip_rt.inputs.decoding import DEFAULT_LIMITS, ImageInput, Limits
from clip_rt.inputs.images import Images, iterate
from clip_rt.inputs.prompts import check_labels, fill, find_templates
from clip_rt.inputs.tokenizer import encode
from clip_rt.inputs.transform import prepare
from clip_rt.requests import batches as batching
from clip_rt.specs import Activation, find_spec
from training.data.augment import normalise
from training.data.drawing_batches import Drawings
from training.model import CLIP
from training.weights.load import check_exists, load_clip

CHUNK = 128
"""Rows encoded at once; more is not faster on a processor."""

DECODING_THREADS = min(8, os.cpu_count() or 1)
"""Pillow decodes and resizes without holding Python's lock."""


def open_model(
    checkpoint: str | Path, *, model: str | None = None, activation: Activation | None = None
) -> CLIP:
    """Load a checkpoint, as the architecture it names where none is given.

    Args:
        checkpoint: What `training.weights.load.load_clip` reads.
        model: Key of `clip_rt.specs.MODELS`; None takes the name `training.run` wrote beside the
            weights.
        activation: As the weights were trained; needed where nothing beside them says it.

    Raises:
        CheckpointError: missing or unreadable, or it names no architecture.
        UnknownModelError: no such architecture.
    """
    check_exists(checkpoint)
    facts: dict[str, str] = {}
    path = Path(checkpoint)
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{str(checkpoint)!r} cannot be read: {error}.") from error
    name = model or facts.get("architecture")
    if name is None:
        raise CheckpointError(
            f"{str(checkpoint)!r} does not say which architecture it is. Pass --model."
        )
    return load_clip(find_spec(name), checkpoint, activation=activation)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode without gradients, and each back into its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def embed_images(
    model: CLIP, images: Images, *, limits: Limits = DEFAULT_LIMITS
) -> NDArray[np.float32]:
    """Embed images of any kind that `clip_rt.Client` takes, in memory for a few at a time.

    Returns:
        float32 (N, E), L2-normalised, in the order of the images. N = 0 gives (0, E).

    Raises:
        ImageError: an image cannot be used; carries its index.
    """
    side_px = model.spec.side_px

    def square(item: tuple[int, ImageInput]) -> NDArray[np.uint8]:
        return prepare(
            item[1],
            side_px=side_px,
            index=item[0],
            max_pixels=limits.max_pixels,
            max_bytes=limits.max_bytes,
        )

    rows = []
    source = enumerate(iterate(images))
    with evaluating(model), ThreadPoolExecutor(DECODING_THREADS) as threads:
        while chunk := list(itertools.islice(source, CHUNK)):
            pixels_NSSC = np.stack(list(threads.map(square, chunk)))
            image_BCSS = pixels_to_input(pixels_NSSC).to(device_of(model))
            rows.append(_unit(model.encode_image(image_BCSS)))
    return batching.join(rows, dim=model.spec.embedding_dim)


def pixels_to_input(pixels_NSSC: NDArray[np.uint8]) -> Tensor:
    """Turn uint8 (N, S, S, 3) into the float32 (N, 3, S, S) an image tower takes."""
    return normalise(torch.from_numpy(pixels_NSSC).permute(0, 3, 1, 2).float() / 255)


def on_white(rgba_NSSC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Flatten RGBA pictures onto white; uint8 (N, S, S, 3)."""
    alpha = rgba_NSSC[..., 3:].astype(np.uint16)
    rgb = (rgba_NSSC[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return rgb.astype(np.uint8)


def embed_drawings(model: CLIP, drawings: Drawings) -> NDArray[np.float32]:
    """Embed drawings on white; float32 (N, E), L2-normalised."""
    return embed_images(model, on_white(drawings.pixels))


def embed_texts(
    model: CLIP, texts: Sequence[str], *, truncate: bool = False, progress: bool = False
) -> NDArray[np.float32]:
    """Embed texts as they are, equal ones once, short ones in short batches.

    Returns:
        float32 (N, E), L2-normalised, in the order of the texts. N = 0 gives (0, E).

    Raises:
        TextTooLongError: a text has too many tokens and `truncate` is off; carries its index.
        TextError: a text cannot be used; carries its index.
    """
    ids = encode(texts, context_length=model.spec.text.context_length, truncate=truncate)
    plan = batching.plan_texts(ids, max_rows=CHUNK)
    bar = tqdm(plan.batches, desc="embedding texts", unit="batch", disable=not progress)
    with evaluating(model):
        rows = [
            _unit(model.encode_text(torch.from_numpy(batch).to(device_of(model)))) for batch in bar
        ]
    return batching.join(rows, dim=model.spec.embedding_dim)[plan.row_by_text]


def class_embeddings(
    model: CLIP,
    labels: Sequence[str],
    *,
    templates: str | Sequence[str] | None = None,
    progress: bool = False,
) -> NDArray[np.float32]:
    """Embed each label through every template and pool; float32 (C, E), L2-normalised.

    Raises:
        TemplateError, TextError: see `clip_rt.Client.class_embeddings`.
    """
    labels, frames = check_labels(labels), find_templates(templates)
    texts = [fill(frame, label, index=i) for i, label in enumerate(labels) for frame in frames]
    embeddings = embed_texts(model, texts, progress=progress)
    return pool(embeddings.reshape(len(labels), len(frames), -1))


def logit_scale(model: CLIP) -> float:
    """Return the factor of the cosine, the learned inverse temperature."""
    return float(model.logit_scale.detach().exp())


def device_of(model: nn.Module) -> torch.device:
    """Say where the weights of a model are."""
    return next(model.parameters()).device


def _unit(embeddings: Tensor) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
    return unit
