"""How well a model names drawings: zero-shot accuracy per style, by the code that serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from clip_rt.prompts import fill, find_templates
from clip_rt.zero_shot import classify, pool
from training.augment import normalise
from training.data import Drawings, cut_tokens
from training.model import CLIP

CHUNK = 128
"""Rows encoded at once; more is not faster on a processor."""


@dataclass(frozen=True)
class Accuracy:
    """Zero-shot accuracy on one style, fractions of 1."""

    top1: float
    top5: float
    num_images: int
    num_classes: int

    @property
    def chance(self) -> float:
        """Top-1 of a guess."""
        return 1 / self.num_classes


@torch.no_grad()
def embed_texts(model: CLIP, texts: Sequence[str]) -> NDArray[np.float32]:
    """Embed texts; float32 (N, E), L2-normalised."""
    rows = []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        tokens_BL = cut_tokens(chunk, context_length=model.spec.text.context_length)
        rows.append(functional.normalize(model.encode_text(tokens_BL).float(), dim=-1))
    return torch.cat(rows).numpy()


@torch.no_grad()
def embed_drawings(model: CLIP, drawings: Drawings) -> NDArray[np.float32]:
    """Embed drawings as they are; float32 (N, E), L2-normalised."""
    rows = []
    for start in range(0, len(drawings), CHUNK):
        rgba = torch.from_numpy(drawings.pixels[start : start + CHUNK]).permute(0, 3, 1, 2)
        image_BCSS = normalise(rgba[:, :3].float() / 255)
        rows.append(functional.normalize(model.encode_image(image_BCSS).float(), dim=-1))
    return torch.cat(rows).numpy()


def class_embeddings(
    model: CLIP, labels: Sequence[str], *, templates: str | Sequence[str] | None = None
) -> NDArray[np.float32]:
    """Embed each label through every template and pool; float32 (C, E)."""
    frames = find_templates(templates)
    texts = [fill(frame, label) for label in labels for frame in frames]
    embeddings = embed_texts(model, texts)
    return pool(embeddings.reshape(len(labels), len(frames), -1))


def zero_shot_accuracy(
    model: CLIP,
    drawings: Drawings,
    labels: Sequence[str],
    *,
    templates: str | Sequence[str] | None = None,
) -> Accuracy:
    """Classify drawings among labels; each drawing's name must be one of them."""
    was_training = model.training
    model.eval()
    classes = class_embeddings(model, labels, templates=templates)
    images = embed_drawings(model, drawings)
    model.train(was_training)
    scale = model.logit_scale.exp().item()
    logits = classify(images, classes, labels, logit_scale=scale).logits
    index_by_label = {label: index for index, label in enumerate(labels)}
    right = np.array([index_by_label[record["name"]] for record in drawings.records])
    own = logits[np.arange(len(right)), right]
    rank = (logits > own[:, None]).sum(axis=1)
    return Accuracy(float((rank < 1).mean()), float((rank < 5).mean()), len(right), len(labels))
