"""Those that are made of torch, eager, in FP32: open_clip, transformers and our own model.

The first two are used as their READMEs and model cards say; the answers of all contenders are held
against those of the last. Each is imported only where it is made.
"""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.contenders.implementation import (
    TEMPLATES,
    Implementation,
    count_cores,
    installed,
    normalise,
    prompts_of,
    zero_shot_prompts,
)
from benchmarks.contenders.kit import Kit
from benchmarks.contenders.runtimes import Bare
from benchmarks.findings import CallKind
from clip_rt.inputs.prompts import find_templates
from clip_rt.specs import ModelSpec
from training.encoders.libraries import import_open_clip, import_transformers

CLASSES_PER_BATCH = 10
"""Of the classifier, for which transformers has no function; so many as open_clip takes."""


class TorchBased(Implementation):
    """What open_clip and transformers have in common; rows are of length 1, on the processor."""

    _model: Any

    @torch.inference_mode()
    def prepare(self, call: CallKind, items: Any) -> Any:
        """Normalise pixels, embed the labels of zero-shot."""
        if call == "pixels":
            return torch.from_numpy(normalise(items))
        if call == "zero_shot":
            jpegs, labels = items
            return jpegs, self._encode_texts(zero_shot_prompts(labels))
        return items

    @torch.inference_mode()
    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Embed as the package's own examples do."""
        if call == "zero_shot":
            jpegs, class_CE = prepared
            scale = self._model.logit_scale.exp()
            rows = (scale * self._encode_jpegs(jpegs) @ class_CE.T).softmax(dim=-1)
        else:
            encode: dict[CallKind, Callable[[Any], torch.Tensor]] = {
                "pixels": self._encode_pixels,
                "jpegs": self._encode_jpegs,
                "texts": self._encode_texts,
                "classifier": self._encode_classes,
            }
            rows = encode[call](prepared)
        return _to_numpy(rows)

    @abstractmethod
    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed normalised pixels, (N, 3, S, S), (N, D)."""

    @abstractmethod
    def _encode_jpegs(self, jpegs: list[bytes]) -> torch.Tensor:
        """Embed encoded photographs, (N, D)."""

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Embed texts, (N, D)."""

    @abstractmethod
    def _encode_classes(self, labels: list[str]) -> torch.Tensor:
        """Embed labels by the mean of their prompts, (N, D)."""


class OpenClip(TorchBased):
    """A model of open_clip with its own transform and tokenizer."""

    def __init__(self, kit: Kit) -> None:
        self._open_clip = import_open_clip()
        name = architecture(kit.architecture)
        if name not in self._open_clip.list_models():
            self._open_clip.add_model_config(kit.open_clip_config)
            name = kit.open_clip_config.stem
        self._model, _, self._transform = self._open_clip.create_model_and_transforms(
            name, pretrained=str(kit.checkpoint)
        )
        self._model.eval()
        self._tokenize = self._open_clip.get_tokenizer(name)
        self.versions = installed("open_clip_torch", "torch")

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._model.encode_image(pixels, normalize=True)

    def _encode_jpegs(self, jpegs: list[bytes]) -> torch.Tensor:
        images = [self._transform(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs]
        return self._encode_pixels(torch.stack(images))

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        return self._model.encode_text(self._tokenize(texts), normalize=True)

    def _encode_classes(self, labels: list[str]) -> torch.Tensor:
        templates = [_filler(template) for template in find_templates(TEMPLATES)]
        build = self._open_clip.build_zero_shot_classifier
        return build(self._model, self._tokenize, labels, templates).T


class Transformers(TorchBased):
    """A CLIPModel and its CLIPProcessor, padded to the longest text of a call."""

    def __init__(self, kit: Kit) -> None:
        transformers = import_transformers()
        self._model = transformers.CLIPModel.from_pretrained(kit.hub).eval()
        self._process = transformers.CLIPProcessor.from_pretrained(kit.hub)
        self.versions = installed("transformers", "torch")

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return _features(self._model.get_image_features(pixel_values=pixels))

    def _encode_jpegs(self, jpegs: list[bytes]) -> torch.Tensor:
        images = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]
        inputs = self._process(images=images, return_tensors="pt")
        return _features(self._model.get_image_features(**inputs))

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        inputs = self._process(text=texts, padding=True, return_tensors="pt")
        return _features(self._model.get_text_features(**inputs))

    def _encode_classes(self, labels: list[str]) -> torch.Tensor:
        starts = range(0, len(labels), CLASSES_PER_BATCH)
        batches = [labels[start : start + CLASSES_PER_BATCH] for start in starts]
        means = [
            self._encode_texts(prompts_of(batch)).unflatten(0, (len(batch), -1)).mean(dim=1)
            for batch in batches
        ]
        return _unit(torch.cat(means))


def architecture(spec: ModelSpec) -> str:
    """Return what open_clip calls an architecture."""
    suffix = "-quickgelu" if spec.activation == "quick_gelu" else ""
    return spec.name.replace("/", "-").replace("@", "-").removesuffix("px") + suffix


def make(kit: Kit, *, package: str) -> Implementation:
    """Load open_clip, transformers, or our own model of the checkpoint of the kit."""
    torch.set_num_threads(count_cores())
    if package == "open_clip":
        return OpenClip(kit)
    return Transformers(kit) if package == "transformers" else _our_own(kit)


def _our_own(kit: Kit) -> Bare:
    from training.weights.load import load_clip

    clip = load_clip(kit.architecture, kit.checkpoint)

    @torch.inference_mode()
    def encode_pixels(pixels_NSSC: NDArray[Any]) -> NDArray[np.float32]:
        image_BCSS = torch.from_numpy(normalise(pixels_NSSC))
        return _to_numpy(_unit(clip.encode_image(image_BCSS)))

    @torch.inference_mode()
    def encode_tokens(tokens_NL: NDArray[Any]) -> NDArray[np.float32]:
        return _to_numpy(_unit(clip.encode_text(torch.from_numpy(tokens_NL).long())))

    return Bare(kit, encode_pixels, encode_tokens, installed("torch"))


def _features(found: Any) -> torch.Tensor:
    # Version 5 wraps them.
    return _unit(found if isinstance(found, torch.Tensor) else found.pooler_output)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


def _to_numpy(rows: torch.Tensor) -> NDArray[np.float32]:
    return rows.float().cpu().numpy()


def _filler(template: str) -> Any:
    return lambda label: template.replace("{}", label)
