"""The JSON that lies beside published weights goes in, what it says about them comes out.

Shapes show most of an architecture. What they do not show (activation, heads, colours, anything
this code does not build) would be a quiet loss of accuracy, so it is read and compared.

Sources: huggingface/transformers `src/transformers/models/clip/configuration_clip.py` and
mlfoundations/open_clip `src/open_clip/model.py` (`CLIPVisionCfg`, `CLIPTextCfg`) for the defaults
of what a file leaves out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from clip_rt.errors import CheckpointError
from clip_rt.specs import CONTEXT_LENGTH, MODELS, Activation, ModelSpec
from training.weights import preprocessing
from training.weights.preprocessing import Preprocessing

_log = logging.getLogger(__name__)

HUGGING_FACE_CONFIG = "config.json"
HUGGING_FACE_PREPROCESSOR = "preprocessor_config.json"
HUGGING_FACE_PROCESSOR = "processor_config.json"
"""Where transformers 5 has all processors of a model, images' among them."""
HUGGING_FACE_TOKENIZER = "tokenizer_config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"

TRAINED_BOTH_WAYS = frozenset(MODELS) - {"ViT-g/14", "RN26@64px"}
"""Architectures of which there are weights with either activation.

Source: mlfoundations/open_clip `src/open_clip/model_configs/`, which has each of these twice, plain
and with -quickgelu. The last is of this project.
"""

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
    is_explicit: bool = False
    """Whether the activation is written down, not what silence means to those who wrote the file.
    """
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    side_px: int | None = None
    """Of the images, as they are prepared."""
    differs: tuple[str, ...] = ()
    """What the weights expect and is not done here, each as "file sets name value"."""
    contradiction: str = ""
    """What two files say differently of the activation."""

    def activation_for(
        self, spec: ModelSpec, asked: Activation | None, *, source: str, option: str
    ) -> Activation:
        """Settle the activation: what the source says, else what was asked, else the spec's.

        Args:
            spec: Of the architecture.
            asked: By the caller.
            source: What the caller calls the weights.
            option: What the caller asks by.

        Raises:
            CheckpointError: the source says one and the caller asks for the other; or nobody says
                anything, and there are weights of both kinds.
        """
        if self.contradiction:
            if asked is None:
                raise CheckpointError(
                    f"{self.contradiction}. Remove the file that is wrong, or pass {option}."
                )
            return asked
        if not (self.activation or asked) and spec.name in TRAINED_BOTH_WAYS:
            raise CheckpointError(
                f"nothing says which activation the weights {source} were trained with, and for "
                f"{spec.name} there are both: OpenAI's have quick_gelu, most of open_clip's gelu. "
                "With the wrong one all embeddings are wrong. Pass "
                f"{option} quick_gelu or {option} gelu, or put the config.json or "
                "open_clip_config.json that was published with them beside them."
            )
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


def read_claims(folder: Path, *, by_open_clip: bool, for_file: bool = False) -> Claims:
    """Read the configuration in a folder of the hub's layout.

    Args:
        folder: Holds the weights.
        by_open_clip: Whether open_clip wrote the weights' file; its configuration comes first then.
        for_file: Whether one file of the folder is meant, beside which there may be anything: a
            config.json that is no description of a CLIP is passed over then.

    Raises:
        CheckpointError: unreadable, it describes a network this code does not build, or two files
            contradict each other.
    """
    readers = [(HUGGING_FACE_CONFIG, _read_hugging_face), (OPEN_CLIP_CONFIG, _read_open_clip)]
    found: list[Claims] = []
    for name, reader in readers[::-1] if by_open_clip else readers:
        path = folder / name
        if not path.is_file() or ((found or for_file) and not _describes_clip(path)):
            continue
        try:
            found.append(_read(path, reader))
        except CheckpointError:
            # What the other project's configuration says is not needed, if it can be read or not.
            if not found:
                raise
    if not found:
        return Claims()
    return _without_contradiction(*found) if len(found) == 2 else found[0]


def _read(path: Path, reader: Callable[[Path], Claims]) -> Claims:
    try:
        return reader(path)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{str(path)!r} is not the configuration of a CLIP: {error!r}. Pass the file with the "
            "weights itself, and its activation."
        ) from error


def _describes_clip(path: Path) -> bool:
    """Say whether a config.json is about a model of images and texts at all."""
    if path.name != HUGGING_FACE_CONFIG:
        return True
    try:
        config = read_json(path)
    except CheckpointError as error:
        _log.warning("passed over: %s", error)
        return False
    sections = ("vision_config", "vision_config_dict", "text_config", "text_config_dict")
    return any(isinstance(config.get(name), dict) for name in sections)


def _without_contradiction(first: Claims, second: Claims) -> Claims:
    """Return what the first says, once the second agrees."""
    pairs = ((first.mean, second.mean), (first.std, second.std))
    if any(None not in pair and not preprocessing.are_equal(*pair) for pair in pairs):
        raise CheckpointError(
            f"{first.where} and {second.where} contradict each other: images are normalised by "
            f"mean {first.mean} and deviation {first.std} in the one, by {second.mean} and "
            f"{second.std} in the other. Remove the file that is wrong."
        )
    is_explicit = first.is_explicit and second.is_explicit
    if first.activation == second.activation or not is_explicit:
        return first
    return replace(
        first,
        contradiction=f"{first.where} says the weights were trained with {first.activation}, "
        f"{second.where} that it was {second.activation}",
    )


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
    said = _read_processors(path.parent)
    differs = [f"{path} sets {each}" for each in preprocessing.of_text_config(text)]
    tokenizer = path.with_name(HUGGING_FACE_TOKENIZER)
    if tokenizer.is_file():
        differs += [
            f"{tokenizer} sets {each}"
            for each in preprocessing.of_tokenizer(
                read_json(tokenizer),
                context_length=int(text.get("max_position_embeddings", CONTEXT_LENGTH)),
            )
        ]
    return Claims(
        where=str(path),
        activation=cast(Activation, activations.pop()),
        is_explicit="hidden_act" in text and "hidden_act" in image,
        image_heads=int(image.get("num_attention_heads", 12)),
        text_heads=int(text.get("num_attention_heads", 8)),
        mean=said.mean if said.where else None,
        std=said.std if said.where else None,
        side_px=said.side_px,
        differs=(*_say(said), *differs),
    )


def _read_processors(folder: Path) -> Preprocessing:
    """Read what is said of images, by whatever file; all must say the same.

    Raises:
        CheckpointError: they do not.
    """
    said: list[Preprocessing] = []
    for name in (HUGGING_FACE_PREPROCESSOR, HUGGING_FACE_PROCESSOR):
        path = folder / name
        if path.is_file():
            try:
                said += preprocessing.of_hugging_face(read_json(path), str(path))
            except (AttributeError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{str(path)!r} is no image processor of a CLIP: {error}. Correct it, or pass "
                    "the file with the weights itself, and its activation."
                ) from error
    for other in said[1:]:
        first = said[0]
        for what, here, there in (
            ("mean", first.mean, other.mean),
            ("deviation", first.std, other.std),
            ("side in pixels", first.side_px, other.side_px),
            ("other settings", first.differs, other.differs),
        ):
            if None not in (here, there) and not preprocessing.are_equal(here, there):
                raise CheckpointError(
                    f"{first.where} and {other.where} contradict each other: the images' {what} is "
                    f"{here} in the one and {there} in the other. Remove the file that is wrong."
                )
    sides = [each.side_px for each in said if each.side_px is not None]
    return replace(said[0], side_px=next(iter(sides), None)) if said else Preprocessing("")


def _say(said: Preprocessing) -> tuple[str, ...]:
    return tuple(f"{said.where} sets {each}" for each in said.differs)


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
    settings = content.get("preprocess_cfg") or {}
    said = preprocessing.of_open_clip(settings, str(path))
    has_colours = any("mean" in key or "std" in key for key in settings)
    return Claims(
        where=str(path),
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        is_explicit=True,
        image_heads=width // image.get("head_width", 64),
        text_heads=int(text.get("heads", 8)),
        mean=said.mean if has_colours else None,
        std=said.std if has_colours else None,
        differs=_say(said),
    )
