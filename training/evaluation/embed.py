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
from clip_rt.errors import CheckpointError, InputError
from clip_rt.inputs.decoding import DEFAULT_LIMITS, ImageInput, Limits
from clip_rt.inputs.images import Images, iterate
from clip_rt.inputs.prompts import check_labels, fill, find_templates
from clip_rt.inputs.transform import prepare
from clip_rt.requests import batches as batching
from clip_rt.specs import Activation, EncoderFacts, find_spec
from training.data.augment import normalise
from training.data.drawing_batches import Drawings
from training.dual_encoder import DualEncoder
from training.encoders.encoder import ExternalEncoder
from training.encoders.find import OWN_WEIGHTS, RANDOM_WEIGHTS, is_external, load_encoder
from training.weights.load import check_exists, load_clip

CHUNK = 128
"""Rows encoded at once; more is not faster on a processor."""

DECODING_THREADS = min(8, os.cpu_count() or 1)
"""Pillow decodes and resizes without holding Python's lock."""


def open_model(
    checkpoint: str | Path | None,
    *,
    model: str | None = None,
    activation: Activation | None = None,
    tokenizer: Path | None = None,
) -> DualEncoder:
    """Load a checkpoint, as the architecture it names where none is given.

    Args:
        checkpoint: What `training.weights.load.load_clip` reads; of a model of another library what
            `training.encoders.find.load_encoder` reads, random, or None for its own weights.
        model: Key of `clip_rt.specs.MODELS`, or a model of another library; None takes the name
            `training.run` wrote beside the weights.
        activation: As the weights were trained; needed where nothing beside them says it.
        tokenizer: A tokenizer.json, or a folder with one, for models of open_clip.

    Raises:
        InputError: an option means nothing for this model.
        CheckpointError: missing or unreadable, or it names no architecture.
        UnknownModelError: no such architecture.
    """
    if model is not None and is_external(model):
        return open_external(model, checkpoint, activation=activation, tokenizer=tokenizer)
    if checkpoint is None:
        raise InputError("pass --checkpoint: only models of other libraries have their own.")
    if tokenizer is not None:
        raise InputError("--tokenizer is for models of open_clip; leave it out.")
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
    if is_external(name):
        raise CheckpointError(
            f"{str(checkpoint)!r} is a fine-tuned {name}. Pass --model with the name or folder "
            "that it was trained from."
        )
    return load_clip(find_spec(name), checkpoint, activation=activation)


def open_external(
    model: str,
    weights: str | Path | None,
    *,
    activation: Activation | None,
    tokenizer: Path | None,
) -> ExternalEncoder:
    """Load a model of another library; see `open_model`.

    Raises:
        InputError, CheckpointError, UnknownModelError: see `open_model`.
    """
    if activation is not None:
        raise InputError(
            f"{model} has the activation of its configuration; leave --activation out. open_clip "
            "has configurations of both, such as ViT-B-32-quickgelu."
        )
    named = OWN_WEIGHTS if weights is None else str(weights)
    return load_encoder(
        model, weights=None if named == RANDOM_WEIGHTS else named, tokenizer=tokenizer
    )


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
    model: DualEncoder, images: Images, *, limits: Limits = DEFAULT_LIMITS
) -> NDArray[np.float32]:
    """Embed images of any kind that `clip_rt.Client` takes, in memory for a few at a time.

    Returns:
        float32 (N, E), L2-normalised, in the order of the images. N = 0 gives (0, E).

    Raises:
        ImageError: an image cannot be used; carries its index.
    """
    facts = model.facts

    def square(item: tuple[int, ImageInput]) -> NDArray[np.uint8]:
        return prepare(
            item[1],
            side_px=facts.side_px,
            resizing=facts.resizing,
            index=item[0],
            max_pixels=limits.max_pixels,
            max_bytes=limits.max_bytes,
        )

    rows = []
    source = enumerate(iterate(images))
    with evaluating(model), ThreadPoolExecutor(DECODING_THREADS) as threads:
        while chunk := list(itertools.islice(source, CHUNK)):
            pixels_NSSC = np.stack(list(threads.map(square, chunk)))
            image_BCSS = pixels_to_input(pixels_NSSC, facts).to(device_of(model))
            rows.append(_unit(model.encode_image(image_BCSS)))
    return batching.join(rows, dim=facts.embedding_dim)


def pixels_to_input(pixels_NSSC: NDArray[np.uint8], facts: EncoderFacts) -> Tensor:
    """Turn uint8 (N, S, S, 3) into the float32 (N, 3, S, S) an image tower takes."""
    image_NCSS = torch.from_numpy(pixels_NSSC).permute(0, 3, 1, 2).float() / 255
    return normalise(image_NCSS, facts.mean, facts.std)


def on_white(rgba_NSSC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Flatten RGBA pictures onto white; uint8 (N, S, S, 3)."""
    alpha = rgba_NSSC[..., 3:].astype(np.uint16)
    rgb = (rgba_NSSC[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return rgb.astype(np.uint8)


def embed_drawings(model: DualEncoder, drawings: Drawings) -> NDArray[np.float32]:
    """Embed drawings on white; float32 (N, E), L2-normalised."""
    return embed_images(model, on_white(drawings.pixels))


def embed_texts(
    model: DualEncoder, texts: Sequence[str], *, truncate: bool = False, progress: bool = False
) -> NDArray[np.float32]:
    """Embed texts as they are, equal ones once, short ones in short batches.

    Returns:
        float32 (N, E), L2-normalised, in the order of the texts. N = 0 gives (0, E).

    Raises:
        TextTooLongError: a text has too many tokens and `truncate` is off; carries its index.
        TextError: a text cannot be used; carries its index.
    """
    facts = model.facts
    ids = [
        model.text_tokenizer.encode_text(text, index=index, truncate=truncate)
        for index, text in enumerate(texts)
    ]
    plan = batching.plan_texts(
        ids,
        max_rows=CHUNK,
        buckets=() if facts.is_any_length_exact else (facts.context_length,),
        pad_id=facts.tokenization.pad_id,
    )
    bar = tqdm(plan.batches, desc="embedding texts", unit="batch", disable=not progress)
    with evaluating(model):
        rows = [
            _unit(model.encode_text(torch.from_numpy(batch).to(device_of(model)))) for batch in bar
        ]
    return batching.join(rows, dim=facts.embedding_dim)[plan.row_by_text]


def class_embeddings(
    model: DualEncoder,
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


def logit_scale(model: DualEncoder) -> float:
    """Return the factor of the cosine, the learned inverse temperature."""
    return float(model.logit_scale.detach().exp())


def device_of(model: nn.Module) -> torch.device:
    """Say where the weights of a model are."""
    return next(model.parameters()).device


def _unit(embeddings: Tensor) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
    return unit
