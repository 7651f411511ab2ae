"""The inputs parity is measured on: images and tokens that reach the corners of both towers.

The same arrays at every call, so that two reports of one model can be compared.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_rt.inputs.tokenizer import pad, tokenize
from clip_rt.specs import CLIP_TOKENIZATION, END_OF_TEXT, START_OF_TEXT
from training.dual_encoder import DualEncoder
from training.encoders.encoder import encode_usable

PROMPTS = (
    "a photo of a cat.",
    "a photo of a dog.",
    "a diagram",
    "an icon of a red umbrella",
    "satellite view of a harbour at night",
    "two people riding bicycles through heavy rain past a row of parked cars",
    "a low resolution, black and white photo of the hard to see insides of a grand piano",
    "the word “naïve” written in neon, 東京 ☔ 2024",
    "a " * 40 + "very long caption",
    "?",
)


def images(side_px: int, *, num_noise: int = 5, num_smooth: int = 5) -> NDArray[np.uint8]:
    """Return smooth gradients and noise, with one black, one white, and a checkerboard between.

    Returns:
        uint8 (num_noise + num_smooth + 3, S, S, 3).
    """
    rng = np.random.default_rng(0)
    flat = [np.full((side_px, side_px, 3), level, np.uint8) for level in (0, 255)]
    board = (np.indices((side_px, side_px)).sum(axis=0) % 2 * 255).astype(np.uint8)
    noise = rng.integers(0, 256, (num_noise, side_px, side_px, 3), np.uint8)
    smooth = [
        Image.fromarray(grid).resize((side_px, side_px), Image.Resampling.BICUBIC)
        for grid in rng.integers(0, 256, (num_smooth, 4, 4, 3), np.uint8)
    ]
    return np.stack([*map(np.asarray, smooth), *flat, np.dstack([board] * 3), *noise])


def tokens(context_length: int) -> NDArray[np.int32]:
    """Return real prompts, then rows whose end of text stands at each edge a cut can have.

    Returns:
        int32 (N, context_length); each row has an end of text.
    """
    prompts = tokenize(PROMPTS, context_length=context_length, truncate=True)
    rng = np.random.default_rng(0)
    ends = sorted({1, 2, 15, 16, 31, 32, context_length - 1} & set(range(1, context_length)))
    edges = rng.integers(1, START_OF_TEXT, (2 * len(ends), context_length)).astype(np.int32)
    edges[:, 0] = START_OF_TEXT
    for row, end in enumerate(ends):
        # Padded as OpenAI pads, and as Hugging Face does: only the first end of text counts.
        for padding, index in ((0, row), (END_OF_TEXT, len(ends) + row)):
            edges[index, end] = END_OF_TEXT
            edges[index, end + 1 :] = padding
    return np.concatenate([prompts, edges])


def tokens_of(encoder: DualEncoder) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """Return texts as an encoder reads them, and how many tokens each has before its padding.

    Returns:
        int32 (N, context length) and intp (N,). Of CLIP's own tokenizer they are `tokens`.
    """
    facts = encoder.facts
    if facts.tokenization == CLIP_TOKENIZATION:
        found = tokens(facts.context_length)
        return found, np.argmax(found == END_OF_TEXT, axis=1) + 1
    ids = list(encode_usable(encoder, PROMPTS).values())
    padded = pad(ids, length_tokens=facts.context_length, pad_id=facts.tokenization.pad_id)
    return padded, np.array([len(each) for each in ids])
