"""open_clip, as its README says to use it."""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.contenders import torch_based
from benchmarks.contenders.implementation import TEMPLATES, installed, zero_shot_prompts
from benchmarks.contenders.kit import Kit
from benchmarks.findings import CallKind
from clip_rt.inputs.prompts import find_templates
from clip_rt.specs import ModelSpec


class OpenClip:
    """A model of open_clip with its own transform and tokenizer, eager, FP32."""

    calls: frozenset[CallKind] = frozenset(
        {"pixels", "tokens", "jpegs", "texts", "classifier", "zero_shot"}
    )

    def __init__(self, kit: Kit) -> None:
        torch_based.set_up()
        self._open_clip: Any = importlib.import_module("open_clip")
        name = architecture(kit.spec)
        if name not in self._open_clip.list_models():
            self._open_clip.add_model_config(kit.open_clip_config)
            name = kit.open_clip_config.stem
        self._model, _, self._transform = self._open_clip.create_model_and_transforms(
            name, pretrained=str(kit.checkpoint)
        )
        self._model.eval()
        self._tokenize = self._open_clip.get_tokenizer(name)
        self._context_length = kit.spec.text.context_length
        self.versions = installed("open_clip_torch", "torch")

    @torch.inference_mode()
    def prepare(self, call: CallKind, items: Any) -> Any:
        """Normalise pixels, pad tokens to the length it demands, embed the labels of zero-shot."""
        if call == "pixels":
            return torch_based.normalise(items)
        if call == "tokens":
            padding = self._context_length - items.shape[1]
            return torch.from_numpy(np.pad(items, ((0, 0), (0, padding))).astype(np.int64))
        if call == "zero_shot":
            jpegs, labels = items
            tokens = self._tokenize(zero_shot_prompts(labels))
            return jpegs, self._model.encode_text(tokens, normalize=True)
        return items

    @torch.inference_mode()
    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Embed as its README does."""
        if call == "pixels":
            rows = self._model.encode_image(prepared, normalize=True)
        elif call == "tokens":
            rows = self._model.encode_text(prepared, normalize=True)
        elif call == "jpegs":
            rows = self._encode_jpegs(prepared)
        elif call == "texts":
            rows = self._model.encode_text(self._tokenize(prepared), normalize=True)
        elif call == "classifier":
            templates = [_filler(template) for template in find_templates(TEMPLATES)]
            rows = self._open_clip.build_zero_shot_classifier(
                self._model, self._tokenize, prepared, templates
            ).T
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
        images = [self._transform(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs]
        rows: torch.Tensor = self._model.encode_image(torch.stack(images), normalize=True)
        return rows


def architecture(spec: ModelSpec) -> str:
    """Return what open_clip calls an architecture."""
    suffix = "-quickgelu" if spec.activation == "quick_gelu" else ""
    return spec.name.replace("/", "-").replace("@", "-").removesuffix("px") + suffix


def _filler(template: str) -> Any:
    return lambda label: template.replace("{}", label)


def make(kit: Kit) -> OpenClip:
    """Load it."""
    return OpenClip(kit)
