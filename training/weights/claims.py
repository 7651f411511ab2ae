"""The JSON that lies beside published weights goes in, what it says about them comes out.

Shapes show most of an architecture. What they do not show (activation, heads, colours, anything
this code does not build) would be a quiet loss of accuracy, so it is read and compared.

Sources: huggingface/transformers `src/transformers/models/clip/configuration_clip.py` and
mlfoundations/open_clip `src/open_clip/model.py` (`CLIPVisionCfg`, `CLIPTextCfg`) for the defaults
of what a file leaves out.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from clip_rt.errors import CheckpointError
from clip_rt.specs import Activation, ModelSpec

HUGGING_FACE_CONFIG = "config.json"
HUGGING_FACE_PREPROCESSOR = "preprocessor_config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"

MAX_JSON_BYTES = 16 * 2**20
"""The index of the largest CLIP has under 1 MiB."""

_SHOWN_BY_SHAPES = frozenset(
    {"image_size", "patch_size", "layers", "width", "mlp_ratio", "context_length", "vocab_size"}
)
_WITHOUT_EFFECT = frozenset(
    {"patch_dropout", "output_tokens", "pad_id", "eos_id", "attn_pooler_queries"}
    | {
        "attn_pooler_heads",
        "timm_model_pretrained",
        "timm_pool",
        "timm_proj",
        "hf_model_pretrained",
    }
    | {"hf_tokenizer_name", "hf_proj_type", "hf_pooler_type"}
)
"""Of open_clip's settings: they act in training only, or in towers that are refused anyway."""
_HEADS = frozenset({"head_width", "heads"})
_AS_BUILT = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",)} | {
    "proj_type": ("linear",),
    "block_type": ("default",),
}
"""Of open_clip's settings: the values that describe what `training.model` builds."""


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What a source says about its weights; None is silence."""

    where: str = ""
    """The file that says it."""
    activation: Activation | None = None
    image_heads: int | None = None
    text_heads: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def activation_for(self, spec: ModelSpec, asked: Activation | None) -> Activation:
        """Settle the activation: what the source says, else what was asked, else the spec's.

        Raises:
            CheckpointError: the source says one and the caller asks for the other.
        """
        if asked and self.activation and asked != self.activation:
            raise CheckpointError(
                f"{self.where} says the weights were trained with {self.activation}, but {asked} "
                f"was asked for: the embeddings would be wrong. Ask for {self.activation}, or for "
                "none."
            )
        return self.activation or asked or spec.activation

    def check_heads(self, spec: ModelSpec) -> None:
        """Compare the number of attention heads, which no shape shows.

        Raises:
            CheckpointError: the source has another number than `spec`.
        """
        for tower, found, expected in (
            ("image", self.image_heads, spec.image.heads),
            ("text", self.text_heads, spec.text.heads),
        ):
            if found is not None and found != expected:
                raise CheckpointError(
                    f"{self.where} says the {tower} tower has {found} attention heads; {spec.name} "
                    f"has {expected}. Name the architecture the weights were trained as."
                )


def read_claims(folder: Path, *, by_open_clip: bool) -> Claims:
    """Read the configuration in a folder of the hub's layout.

    Args:
        folder: Holds the weights.
        by_open_clip: Whether open_clip wrote the weights' file; its configuration comes first then.

    Raises:
        CheckpointError: unreadable, or it describes a network this code does not build.
    """
    readers = [(HUGGING_FACE_CONFIG, _read_hugging_face), (OPEN_CLIP_CONFIG, _read_open_clip)]
    for name, reader in readers[::-1] if by_open_clip else readers:
        path = folder / name
        if path.is_file():
            try:
                return reader(path)
            except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
                raise CheckpointError(
                    f"{str(path)!r} is not the configuration of a CLIP: {error!r}. Pass the file "
                    "with the weights itself, and its activation."
                ) from error
    return Claims()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: unreadable, too large, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{str(path)!r} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, not an object.")
    return content


def _read_hugging_face(path: Path) -> Claims:
    config = read_json(path)
    if (model_type := config.get("model_type", "clip")) != "clip":
        raise CheckpointError(
            f"{str(path)!r} describes a model of type {str(model_type)[:80]!r}; only clip is read."
        )
    # Older files repeat a section under another name, and that one counts.
    text, image = (
        config.get(f"{tower}_config_dict") or config.get(f"{tower}_config") or {}
        for tower in ("text", "vision")
    )
    epsilons = {section.get("layer_norm_eps", 1e-5) for section in (text, image)}
    if epsilons != {1e-5}:
        raise CheckpointError(f"{str(path)!r} has layer_norm_eps {sorted(epsilons)}, not 1e-05.")
    activations = {section.get("hidden_act", "quick_gelu") for section in (text, image)}
    if activations not in ({"quick_gelu"}, {"gelu"}):
        raise CheckpointError(
            f"{str(path)!r} says hidden_act {sorted(activations)}; both towers must have "
            "quick_gelu, or both gelu."
        )
    mean = std = None
    preprocessor = path.with_name(HUGGING_FACE_PREPROCESSOR)
    if preprocessor.is_file():
        settings = read_json(preprocessor)
        mean, std = _colours(settings.get("image_mean"), settings.get("image_std"))
        if settings.get("resample", 3) != 3:
            raise _other_preprocessing(preprocessor, "resample", settings["resample"])
    return Claims(
        where=str(path),
        activation=cast(Activation, activations.pop()),
        image_heads=int(image.get("num_attention_heads", 12)),
        text_heads=int(text.get("num_attention_heads", 8)),
        mean=mean,
        std=std,
    )


def _read_open_clip(path: Path) -> Claims:
    content = read_json(path)
    config = content.get("model_cfg", content)
    image, text = config["vision_cfg"], config["text_cfg"]
    for section in (image, text):
        for key, value in section.items():
            if key in _SHOWN_BY_SHAPES | _WITHOUT_EFFECT | _HEADS or not value:
                continue
            if value not in _AS_BUILT.get(key, ()):
                raise CheckpointError(
                    f"{str(path)!r} sets {key[:80]!r} to {str(value)[:80]!r}: a network that is "
                    "not built here."
                )
    is_resnet = isinstance(image["layers"], list)
    width = image["width"] * 32 if is_resnet else image["width"]
    preprocessing = content.get("preprocess_cfg") or {}
    for key, expected in (("interpolation", "bicubic"), ("resize_mode", "shortest")):
        if preprocessing.get(key, expected) != expected:
            raise _other_preprocessing(path, key, preprocessing[key])
    mean, std = _colours(preprocessing.get("mean"), preprocessing.get("std"))
    return Claims(
        where=str(path),
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        image_heads=width // image.get("head_width", 64),
        text_heads=int(text.get("heads", 8)),
        mean=mean,
        std=std,
    )


def _colours(
    mean: Any, std: Any
) -> tuple[tuple[float, float, float] | None, tuple[float, float, float] | None]:
    if mean is None or std is None:
        return None, None
    (m0, m1, m2), (s0, s1, s2) = map(float, mean), map(float, std)
    if not all(map(math.isfinite, (m0, m1, m2, s0, s1, s2))) or min(s0, s1, s2) <= 0:
        raise ValueError(f"mean {mean} and std {std}")
    return (m0, m1, m2), (s0, s1, s2)


def _other_preprocessing(path: Path, key: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} sets {key} to {str(value)[:80]!r}: the weights expect images resized in "
        "another way than CLIP's. If you accept that, pass the file with the weights itself, and "
        "its activation."
    )
