"""Whether INT8 is faster than FP32 on the machine that exports: measured, and said in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from clip_rt import processor
from clip_rt.embedded.runtime_choice import time_by_turns
from clip_rt.processor import Processor
from clip_rt.specs import Tower
from export import int8, parity, probes
from export.pipeline import Towers
from training.dual_encoder import DualEncoder

TEXT_LENGTH_TOKENS = 16
Encoder = Callable[[NDArray[np.generic]], NDArray[np.float32]]


@dataclass(frozen=True)
class Comparison:
    """How many times as fast as in FP32 each tower is in INT8, on one row."""

    image: float
    text: float

    @property
    def is_slower(self) -> bool:
        """Whether a tower is slower in INT8."""
        return min(self.image, self.text) < 1

    def in_words(self, found: Processor) -> str:
        """Say it in a line, and on what kind of processor.

        Args:
            found: The one it was measured on.
        """
        times = f"{_in_words('images', self.image)}, {_in_words('texts', self.text)}"
        if not self.is_slower:
            kind = processor.in_brackets(found.flags, dict(found.caps))
            return f"INT8 is faster than FP32 here{kind}: {times}"
        why = "" if found.has_fast_int8 else f", which {found.lacks('AVX-512', 'VNNI', 'AMX')}"
        return (
            f"INT8 is slower than FP32 on this processor{why}: {times}; it may be faster "
            "where you serve. --precision fp32 is what to serve here."
        )


def _in_words(what: str, speed: float) -> str:
    if speed < 1:
        return f"{what} take {1 / speed:.2f} times as long"
    return f"{what} are {speed:.1f} times as fast"


def compare(fp32: Towers, quantised: Towers, encoder: DualEncoder) -> Comparison:
    """Time both towers in both precisions by turns, FP32 in the faster of its runtimes.

    Args:
        fp32: Files in ONNX.
        quantised: Files of `int8.write_int8`.
        encoder: What they were made from.
    """
    num_threads = torch.get_num_threads()
    speeds: dict[Tower, float] = {}
    batches: dict[Tower, NDArray[np.generic]] = {
        "image": probes.images(encoder.facts.side_px)[:1],
        "text": _short_text(encoder),
    }
    for tower, batch in batches.items():
        before, after = (getattr(towers, tower) for towers in (fp32, quantised))
        encoders = {
            "onnxruntime": parity.onnx_encoder(before),
            "openvino": int8.load_openvino(before, num_threads),
            "int8": int8.load_openvino(after, num_threads),
        }
        speeds[tower] = _speed(encoders, batch)
    return Comparison(**speeds)


def _short_text(encoder: DualEncoder) -> NDArray[np.int32]:
    tokens, _ = probes.tokens_of(encoder)
    length = TEXT_LENGTH_TOKENS if encoder.facts.is_any_length_exact else tokens.shape[1]
    return np.ascontiguousarray(tokens[:1, :length])


def _speed(encoders: Mapping[str, Encoder], batch: NDArray[np.generic]) -> float:
    times_s = time_by_turns({name: partial(encode, batch) for name, encode in encoders.items()})
    int8_s = times_s.pop("int8")
    return min(times_s.values()) / int8_s
