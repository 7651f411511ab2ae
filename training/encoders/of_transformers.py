"""Dual encoders as transformers builds them, from a folder in the hub's layout.

Source: transformers 5.23.0 `models/{clip,siglip,metaclip_2,chinese_clip,align,altclip,blip}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from clip_rt.errors import CheckpointError
from clip_rt.inputs import tokenizer_file
from clip_rt.specs import Channels, EncoderFacts, Resizing
from training.dual_encoder import TextHidden
from training.encoders.encoder import ExternalEncoder, describe_configuration
from training.encoders.libraries import as_checkpoint_error, import_transformers
from training.encoders.tokenizer_source import pad_id_of, read_tokenizer_file

PREFIX = "hf:"
FAMILIES = ("clip", "siglip", "metaclip_2", "chinese_clip", "align", "altclip", "blip")
"""Values of `model_type` that are dual encoders with one image and one text tower."""
_UNMASKED = frozenset(("siglip", "clip", "metaclip_2"))
"""Families whose text tower is given no attention mask. SigLIP reads what fills a text up; the
others are causal, so that what comes after the end of a text changes nothing, and the padding may
have the id of that end."""
HIDDEN_FAMILIES = ("clip", "metaclip_2")
"""Families whose text tower is built as CLIP's, so that its hidden states are those of diffusion
models."""
_PROCESSOR_LENGTH = {"align": 64, "siglip": 64}
"""Length to which a family's own processor pads, where the tower could read more."""
_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of filters."""


def load_transformers(folder: Path, *, name: str, random: bool = False) -> ExternalEncoder:
    """Build a model from a folder in the hub's layout; code in the folder is never run.

    Args:
        folder: With config.json, the files of the processor and tokenizer, and safetensors.
        name: That it is known by, such as google/siglip2-base-patch16-224.
        random: Leave the weights as they are initialised.

    Raises:
        CheckpointError: transformers is not installed, cannot read the folder, or has no dual
            encoder of its kind.
    """
    transformers = import_transformers()
    with as_checkpoint_error(f"transformers cannot read {folder}"):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    family = config.model_type
    if family not in FAMILIES:
        raise CheckpointError(
            f"{name} is a {family!r} in the words of its config.json; dual encoders that can be "
            f"exported are {', '.join(FAMILIES)}."
        )
    model_class = (
        transformers.BlipForImageTextRetrieval if family == "blip" else transformers.AutoModel
    )
    with as_checkpoint_error(f"transformers cannot build {name}"):
        if random:
            make = getattr(model_class, "from_config", None) or model_class._from_config
            model = make(config)
        else:
            model, loaded = model_class.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            # It would go on with random ones.
            others = {*loaded["missing_keys"], *(each[0] for each in loaded["mismatched_keys"])}
            if others:
                raise CheckpointError(
                    f"{len(others)} weights are not in its files, or of another shape, among them "
                    f"{', '.join(sorted(others)[:3])}: they are of another model than its "
                    "config.json says. Download it again."
                )
        model = model.float().requires_grad_(False).eval()
        # Its processors on torchvision round the weights of a resize to 16 bits, and differ from
        # its own on Pillow by up to 3 of 255 levels.
        images = transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    content, cleaning = read_tokenizer_file(tokenizer)
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = pad_id_of(content)
    if pad_id is None:
        raise CheckpointError(
            f"the tokenizer of {name} does not say what texts are padded with. Name its pad_token "
            "in tokenizer_config.json."
        )
    if family == "align":
        _pool_whole_maps(model.vision_model)
    context_length = _context_length(config, family, tokenizer)
    towers = _Towers(family, pad_id)
    resizing, side_px, mean, std = _read_preprocessing(images, name)
    with torch.inference_mode():
        embedding_dim = towers.image(model, torch.zeros(1, 3, side_px, side_px)).shape[-1]
    bias = getattr(model, "logit_bias", None)
    facts = EncoderFacts(
        name=f"{PREFIX}{name}",
        side_px=side_px,
        embedding_dim=embedding_dim,
        context_length=context_length,
        activation=describe_configuration(config.to_dict()),
        mean=mean,
        std=std,
        resizing=resizing,
        tokenization=tokenizer_file.describe(
            content,
            vocab_size=config.text_config.vocab_size,
            cleaning=cleaning,
            pad_id=pad_id,
        ),
        score="softmax" if bias is None else "sigmoid",
    )
    return ExternalEncoder(
        facts,
        model=model,
        towers=towers,
        tokenizer_file=content,
        source=_Source(images, tokenizer, context_length),
        versions={"transformers": transformers.__version__},
    )


class _Towers:
    image_modules = ("vision_model", "visual_projection", "vision_proj")
    text_modules = ("text_model", "text_projection", "text_encoder", "text_proj")

    def __init__(self, family: str, pad_id: int) -> None:
        self._family = family
        self._pad_id = pad_id

    def image(self, model: Any, image_BCSS: Tensor) -> Tensor:
        if self._family == "blip":
            hidden_BLD = model.vision_model(pixel_values=image_BCSS).last_hidden_state
            return model.vision_proj(hidden_BLD[:, 0])
        return _pooled(model.get_image_features(pixel_values=image_BCSS))

    def text(self, model: Any, tokens_BL: Tensor) -> Tensor:
        if self._family in _UNMASKED:
            return _pooled(model.get_text_features(input_ids=tokens_BL))
        is_text_BL = (tokens_BL != self._pad_id).long()
        if self._family == "blip":
            hidden_BLD = model.text_encoder(
                input_ids=tokens_BL, attention_mask=is_text_BL
            ).last_hidden_state
            return model.text_proj(hidden_BLD[:, 0])
        return _pooled(model.get_text_features(input_ids=tokens_BL, attention_mask=is_text_BL))

    @property
    def has_text_hidden(self) -> bool:
        return self._family in HIDDEN_FAMILIES

    def text_hidden(self, model: Any, tokens_BL: Tensor) -> TextHidden:
        text = model.text_model
        before: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before.append(args[0] if args else kwargs["hidden_states"])

        # What its last layer reads, which is hidden_states[-2]: asked for by name, transformers
        # collects them in a way that torch does not export.
        hook = text.encoder.layers[-1].register_forward_pre_hook(note, with_kwargs=True)
        try:
            found = text(input_ids=tokens_BL)
        finally:
            hook.remove()
        return TextHidden(
            found.last_hidden_state,
            before[-1],
            text.final_layer_norm(before[-1]),
            model.text_projection(found.pooler_output),
        )


class _Source:
    """The folder's own image processor and tokenizer."""

    def __init__(self, images: Any, tokenizer: Any, context_length: int) -> None:
        self._images = images
        self._tokenizer = tokenizer
        self._context_length = context_length

    def pixels(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        rows = [self._images(images=image, return_tensors="np")["pixel_values"] for image in images]
        return np.concatenate(rows)

    def tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        return np.asarray(
            self._tokenizer(
                list(texts),
                padding="max_length",
                max_length=self._context_length,
                truncation=True,
                return_tensors="np",
            )["input_ids"]
        )


def _pool_whole_maps(vision: Any) -> None:
    """Say of ALIGN's last pooling that it is over the whole map of features.

    It has a window of as many pixels as there are channels, 2560, on a map of 10, which
    OpenVINO 2026.4 crashes of.
    """
    pooler = vision.pooler
    is_average = isinstance(pooler, nn.AvgPool2d)
    vision.pooler = nn.AdaptiveAvgPool2d(1) if is_average else nn.AdaptiveMaxPool2d(1)


def _pooled(found: Any) -> Tensor:
    """Return the embedding: transformers 5 wraps it, 4 does not."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _context_length(config: Any, family: str, tokenizer: Any) -> int:
    text = config.text_config
    limits = [int(text.max_position_embeddings), tokenizer.model_max_length]
    # RoBERTa's positions begin after the padding id.
    if "roberta" in getattr(text, "model_type", "") or family == "altclip":
        limits[0] -= text.pad_token_id + 1
    if family in _PROCESSOR_LENGTH:
        limits.append(_PROCESSOR_LENGTH[family])
    return min(limits)


def _read_preprocessing(processor: Any, name: str) -> tuple[Resizing, int, Channels, Channels]:
    """Write down what an image processor does.

    Raises:
        CheckpointError: it does something else than resize, crop, scale and normalise to a square.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"the image processor of {name} {what}, which is not served.")

    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    if not processor.do_resize or not processor.do_rescale or not processor.do_normalize:
        raise refuse("does not resize, rescale and normalise")
    if abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise refuse(f"scales by {processor.rescale_factor}")
    if getattr(processor, "do_pad", None):
        raise refuse("pads")
    if processor.resample not in _FILTERS:
        raise refuse(f"resizes by the filter {processor.resample}")
    shortest = size.get("shortest_edge")
    if shortest is None and size.get("height") != size.get("width"):
        raise refuse(f"resizes to {size}")
    resize_px = shortest or size["height"]
    side_px = resize_px
    if getattr(processor, "do_center_crop", False):
        if crop.get("height") != crop.get("width"):
            raise refuse(f"crops {crop}")
        side_px = crop["height"]
    elif shortest is not None:
        raise refuse("resizes the shortest side and crops nothing")
    resizing = Resizing(
        mode="squash" if shortest is None else "shortest",
        resize_px=None if resize_px == side_px else resize_px,
        interpolation=_FILTERS[processor.resample],  # type: ignore[arg-type]
        crop_rounding="down",
    )
    mean, std = (
        tuple(float(each) for each in values)
        for values in (processor.image_mean, processor.image_std)
    )
    return resizing, side_px, mean, std  # type: ignore[return-value]
