"""FP32 torch, our own model: what the answers of all contenders are held against."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders.bare import Bare
from benchmarks.contenders.implementation import count_cores, installed
from benchmarks.contenders.kit import Kit
from benchmarks.contenders.torch_based import normalise, normalised, to_numpy
from training.weights.load import load_clip


def make(kit: Kit) -> Bare:
    """Load the checkpoint of a kit."""
    torch.set_num_threads(count_cores())
    clip = load_clip(kit.spec, kit.checkpoint)

    @torch.inference_mode()
    def encode_pixels(pixels_NSSC: NDArray[Any]) -> NDArray[np.float32]:
        return to_numpy(normalised(clip.encode_image(normalise(pixels_NSSC))))

    @torch.inference_mode()
    def encode_tokens(tokens_NL: NDArray[Any]) -> NDArray[np.float32]:
        return to_numpy(normalised(clip.encode_text(torch.from_numpy(tokens_NL).long())))

    return Bare(kit, encode_pixels, encode_tokens, installed("torch"))
