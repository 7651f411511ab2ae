"""TensorRT engines on a GPU, called directly. Written on a machine without one: never run yet.

`run` takes arrays of the host and brings embeddings back, synchronised, so transfers are part of
what is timed around it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders.bare import Bare
from benchmarks.contenders.kit import Kit
from clip_rt.specs import Tower
from export.engine import load_runtime, text_lengths
from export.engine_runner import EngineRunner

TOWERS: tuple[Tower, Tower] = ("image", "text")


def make(kit: Kit) -> Bare:
    """Load both towers as engines; texts are padded to the lengths these have."""
    trt: Any = load_runtime("tensorrt")
    # The file name carries the GPU's compute capability.
    folder = kit.tower("tensorrt", "image").parent
    file = next(path.name for path in sorted(folder.glob("*.plan")))
    image, text = (EngineRunner(kit.tower("tensorrt", each, file), trt) for each in TOWERS)
    lengths = text_lengths(kit.spec)

    def encode_tokens(tokens_NL: NDArray[Any]) -> NDArray[np.float32]:
        length = tokens_NL.shape[1]
        padding = min(each for each in lengths if each >= length) - length
        return text(np.pad(tokens_NL, ((0, 0), (0, padding))).astype(np.int32))

    versions = {"tensorrt": trt.__version__, "gpu": torch.cuda.get_device_name()}
    return Bare(kit, image, encode_tokens, versions)
