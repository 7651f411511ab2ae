"""transformers' CLIPModel, as the hub's model cards say to use it."""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.contenders import torch_based
from benchmarks.contenders.implementation import installed, prompts_of, zero_shot_prompts
from benchmarks.contenders.kit import Kit
from benchmarks.findings import CallKind

CLASSES_PER_BATCH = 10
"""Of the classifier, for which it has no function of its own; so many as open_clip takes."""


class Transformers:
    """A CLIPModel and its CLIPProcessor, eager, FP32, padded to the longest text of a call."""

    calls: frozenset[CallKind] = frozenset(
        {"pixels", "tokens", "jpegs", "texts", "classifier", "zero_shot"}
    )

    def __init__(self, kit: Kit) -> None:
        torch_based.set_up()
        transformers: Any = importlib.import_module("transformers")
        self._model = transformers.CLIPModel.from_pretrained(kit.hub).eval()
        self._process = transformers.CLIPProcessor.from_pretrained(kit.hub)
        self.versions = installed("transformers", "torch")

    @torch.inference_mode()
    def prepare(self, call: CallKind, items: Any) -> Any:
        """Normalise pixels, embed the labels of zero-shot."""
        if call == "pixels":
            return torch_based.normalise(items)
        if call == "tokens":
            return torch.from_numpy(items.astype(np.int64))
        if call == "zero_shot":
            jpegs, labels = items
            return jpegs, self._encode_texts(zero_shot_prompts(labels))
        return items

    @torch.inference_mode()
    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Embed by `get_image_features` and `get_text_features`."""
        if call == "pixels":
            rows = _features(self._model.get_image_features(pixel_values=prepared))
        elif call == "tokens":
            rows = _features(self._model.get_text_features(input_ids=prepared))
        elif call == "jpegs":
            rows = self._encode_jpegs(prepared)
        elif call == "texts":
            rows = self._encode_texts(prepared)
        elif call == "classifier":
            starts = range(0, len(prepared), CLASSES_PER_BATCH)
            batches = [prepared[start : start + CLASSES_PER_BATCH] for start in starts]
            rows = torch.cat([self._encode_classes(batch) for batch in batches])
        else:
            jpegs, class_CE = prepared
            scale = self._model.logit_scale.exp()
            rows = (scale * self._encode_jpegs(jpegs) @ class_CE.T).softmax(dim=-1)
        return torch_based.to_numpy(rows)

    def pids(self) -> list[int]:
        """Return none: it is all in this process."""
        return []

    def close(self) -> None:
        """Do nothing."""

    def _encode_jpegs(self, jpegs: list[bytes]) -> torch.Tensor:
        images = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]
        inputs = self._process(images=images, return_tensors="pt")
        return _features(self._model.get_image_features(**inputs))

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        inputs = self._process(text=texts, padding=True, return_tensors="pt")
        return _features(self._model.get_text_features(**inputs))

    def _encode_classes(self, labels: list[str]) -> torch.Tensor:
        rows = self._encode_texts(prompts_of(labels))
        return torch_based.normalised(rows.reshape(len(labels), -1, rows.shape[1]).mean(dim=1))


def _features(found: Any) -> torch.Tensor:
    # Version 5 wraps them.
    rows: torch.Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
    return torch_based.normalised(rows)


def make(kit: Kit) -> Transformers:
    """Load it."""
    return Transformers(kit)
