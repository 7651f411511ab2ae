"""What a checkpoint's files say of preparing images and texts goes in; what differs here comes out.

Here an image's shorter side is resized to the model's, bicubic, and the middle is cropped; its
colours become numbers by a mean and a deviation; a text is lower-cased and read up to its
end-of-text token. Of each setting that a file states one of three things is done. It is obeyed:
colours, which are folded into the weights. It is neutral: it says what is done here, or reaches no
embedding. Or it is listed under `differs`, and whoever loads the weights refuses them.

Sources: huggingface/transformers 4 and 5, `image_processing_clip.py`, `image_processing_utils.py`,
`tokenization_clip.py` and `processing_utils.py` (5 writes all processors into one file); of before
4.25 `feature_extraction_clip.py`. mlfoundations/open_clip `src/open_clip/transform.py`,
`PreprocessCfg`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clip_rt.specs import CLIP_MEAN, CLIP_STD, END_OF_TEXT

Channels = tuple[float, float, float]

_COLOURS_OR_SIZE = frozenset(
    (
        *("image_mean", "image_std", "size", "crop_size", "resample", "rescale_factor"),
        *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "image_processor_type"),
    )
)
"""A section that has one of these describes an image processor."""
_NEUTRAL = frozenset({"do_convert_rgb", "default_to_square", "_valid_processor_keys"})
"""Images are always converted to RGB; the second acts on a bare `size` only, and is read there."""
_ABOUT_PIXELS = re.compile(
    r"do_|auto_map|.*(size|resampl|interpol|crop|pad|rescale|offset|mean|std|ratio|edge|order)"
)
"""Keys that, unknown as they are, may change what a model sees."""
_DEFAULTS_DIFFER = ("resample", "image_mean", "image_std", "size", "do_center_crop")
"""What a processor of another model must say, because it has other defaults than CLIP's."""
_LEGACY_END = 2
"""`eos_token_id` in configurations of before transformers 4.31: read as the highest id there is."""
_GENERIC_TOKENIZERS = ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class Preprocessing:
    """What one file, or a section of it, says of images."""

    where: str
    mean: Channels = CLIP_MEAN
    """Of values in [0, 1], whatever range the file normalises."""
    std: Channels = CLIP_STD
    side_px: int | None = None
    """Of the square that the model gets; None is silence."""
    differs: tuple[str, ...] = ()
    """Settings that are not followed here, as "name value"."""


def are_equal(these: object, those: object) -> bool:
    """Compare two settings; colours may be rounded."""
    if isinstance(these, tuple) and isinstance(those, tuple) and len(these) == len(those) == 3:
        pairs = zip(these, those, strict=True)
        if all(isinstance(x, float) and isinstance(y, float) for x, y in pairs):
            return all(math.isclose(x, y, abs_tol=1e-4) for x, y in zip(these, those, strict=True))
    return these == those


def of_hugging_face(content: Mapping[str, Any], where: str) -> list[Preprocessing]:
    """Read a preprocessor_config.json or a processor_config.json, nested or not.

    Raises:
        ValueError, TypeError: a value cannot be what its name says.
    """
    sections = {where: content} | {
        f"{where}, {key}": content[key]
        for key in ("image_processor", "feature_extractor")
        if isinstance(content.get(key), dict)
    }
    return [
        _read_section(section, place)
        for place, section in sections.items()
        if not _COLOURS_OR_SIZE.isdisjoint(section)
    ]


def of_open_clip(settings: Mapping[str, Any], where: str) -> Preprocessing:
    """Read the `preprocess_cfg` of an open_clip_config.json.

    open_clip itself replaces `size` by the model's, uses `fill_color` only where `resize_mode` is
    longest, and passes over what it does not know.

    Raises:
        ValueError, TypeError: a value cannot be what its name says.
    """
    done = {"interpolation": "bicubic", "resize_mode": "shortest", "mode": "RGB"}
    differs = [
        _name_it(key, settings[key])
        for key, done_here in done.items()
        if settings.get(key) is not None and str(settings[key]).lower() != done_here.lower()
    ]
    mean, std = (
        _channels(name, _first(settings, name, f"image_{name}"), default)
        for name, default in (("mean", CLIP_MEAN), ("std", CLIP_STD))
    )
    return Preprocessing(where, mean, _positive(std), None, tuple(differs))


def of_tokenizer(settings: Mapping[str, Any], *, context_length: int) -> tuple[str, ...]:
    """Read a tokenizer_config.json; return the settings that are not followed here.

    What pads is neutral: nothing after the end of a text reaches its embedding.
    """
    differs = []
    kind = settings.get("tokenizer_class")
    if kind is not None and "CLIP" not in str(kind) and kind not in _GENERIC_TOKENIZERS:
        differs.append(_name_it("tokenizer_class", kind))
    if settings.get("do_lower_case") is False:
        differs.append(_name_it("do_lower_case", False))
    longest = settings.get("model_max_length")
    if isinstance(longest, (int, float)) and 0 < longest < context_length:
        differs.append(_name_it("model_max_length", longest))
    for key, done_here in (("bos_token", "<|startoftext|>"), ("eos_token", "<|endoftext|>")):
        token = settings.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        if content not in (None, done_here):
            differs.append(_name_it(key, content))
    return tuple(differs)


def of_text_config(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the text section of a config.json; return the settings that are not followed here."""
    end = settings.get("eos_token_id")
    if end in (None, _LEGACY_END, END_OF_TEXT, [END_OF_TEXT]):
        return ()
    return (_name_it("eos_token_id", end),)


def _read_section(section: Mapping[str, Any], where: str) -> Preprocessing:
    said = {key: value for key, value in section.items() if value is not None}
    differs = []
    kind = said.get("image_processor_type", said.get("feature_extractor_type", "CLIP"))
    if not str(kind).startswith("CLIP"):
        silent = [key for key in _DEFAULTS_DIFFER if key not in said]
        if silent:
            differs.append(f"{_name_it('image_processor_type', kind)} without {', '.join(silent)}")
    for key in ("do_resize", "do_center_crop"):
        if not _flag(said, key):
            differs.append(_name_it(key, said[key]))
    resample = said.get("resample", 3)
    is_bicubic = isinstance(resample, str) and resample.lower().rpartition(".")[2] == "bicubic"
    if not (is_bicubic or resample == 3):
        differs.append(_name_it("resample", resample))
    short = _short_side(said)
    side = _square(said.get("crop_size"))
    if "size" in said and short is None:
        differs.append(_name_it("size", said["size"]))
    if "crop_size" in said and side is None:
        differs.append(_name_it("crop_size", said["crop_size"]))
    if short and side and short != side:
        differs.append(_name_it("size", said["size"]) + f" with {_name_it('crop_size', side)}")
    known = _COLOURS_OR_SIZE | _NEUTRAL | {"feature_extractor_type"}
    differs += [
        _name_it(key, value)
        for key, value in said.items()
        if key not in known and _ABOUT_PIXELS.match(key) and value not in (False, [], {}, "")
    ]
    mean, std = _colours(said)
    return Preprocessing(where, mean, std, side or short, tuple(differs))


def _colours(said: Mapping[str, Any]) -> tuple[Channels, Channels]:
    """Return mean and deviation of values in [0, 1].

    A processor computes (x * factor - mean) / std of x in [0, 255].
    """
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if _flag(said, "do_normalize"):
        mean, std = (
            _channels(name, [value] * 3 if isinstance(value, (int, float)) else value, default)
            for name, value, default in (
                ("image_mean", said.get("image_mean"), CLIP_MEAN),
                ("image_std", said.get("image_std"), CLIP_STD),
            )
        )
        std = _positive(std)
    factor = said.get("rescale_factor", 1 / 255) if _flag(said, "do_rescale") else 1.0
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise ValueError(f"rescale_factor {factor!r}")
    scale = 255 * factor
    if math.isclose(scale, 1, rel_tol=1e-6):
        return mean, std
    return _divide(mean, scale), _divide(std, scale)


def _short_side(said: Mapping[str, Any]) -> int | None:
    """Return the length of the resized shorter side; None if something else is resized, or none."""
    size = said.get("size")
    if isinstance(size, dict):
        edges = {key: value for key, value in size.items() if value is not None}
        size = edges["shortest_edge"] if edges.keys() == {"shortest_edge"} else None
    elif said.get("default_to_square"):
        size = None
    if said.get("use_square_size"):
        size = None
    return _pixels(size)


def _square(size: object) -> int | None:
    if isinstance(size, dict) and size.keys() == {"height", "width"}:
        size = [size["height"], size["width"]]
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return _pixels(size)


def _pixels(size: object) -> int | None:
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not math.isfinite(size):
        return None
    return int(size) if size > 0 and size == int(size) else None


def _flag(said: Mapping[str, Any], key: str) -> bool:
    value = said.get(key, True)
    if value not in (True, False):
        raise ValueError(f"{key} {value!r}, which must be true or false")
    return bool(value)


def _channels(name: str, value: Any, default: Channels) -> Channels:
    if value is None:
        return default
    channels = tuple(map(float, value))
    if len(channels) != 3 or not all(map(math.isfinite, channels)):
        raise ValueError(f"{name} {value!r}")
    return channels[0], channels[1], channels[2]


def _positive(std: Channels) -> Channels:
    if min(std) <= 0:
        raise ValueError(f"std {std}")
    return std


def _divide(channels: Channels, scale: float) -> Channels:
    red, green, blue = channels
    return red / scale, green / scale, blue / scale


def _first(settings: Mapping[str, Any], *names: str) -> Any:
    """Return the first value there is; raise ValueError if two differ."""
    said = {name: settings[name] for name in names if settings.get(name) is not None}
    if len(said) > 1 and len({str(value) for value in said.values()}) > 1:
        raise ValueError(f"two values: {said}")
    return next(iter(said.values()), None)


def _name_it(key: str, value: object) -> str:
    return f"{key[:80]} {str(value)[:80]!r}"
