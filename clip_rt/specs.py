"""The one table of numbers about models: architectures, tensor names, preprocessing constants.

Training builds its modules from it, export names its tensors from it, the model repository is
rendered from it and the client checks the server against it. Nothing here does any work but to
refuse values that mean nothing.

Sources: Radford et al. 2021, tables 19 and 20; openai/CLIP `clip/model.py` and `clip/clip.py`; for
ViT-H/14, ViT-g/14 and ViT-bigG/14 mlfoundations/open_clip `src/open_clip/model_configs/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args

from clip_rt.errors import InputError, UnknownModelError

PIXELS = "pixels"
"""Input of `<slug>_image`: uint8 [N, S, S, 3], RGB, not normalised."""
TOKENS = "tokens"
"""Input of `<slug>_text`: int32 [N, L]."""
EMBEDDINGS = "embeddings"
"""Output of both: float32 [N, D], L2-normalised."""
CHUNK_INDEX = "chunk_index"
"""Input of `<slug>_tokenizer_file`: int32 [1], which part of the file, from 0."""
CHUNK = "chunk"
"""Its output: uint8 [n], the bytes of that part; n is `TOKENIZER_CHUNK_BYTES` but for the last."""
TOKENIZER_CHUNK_BYTES = 2**20
"""A message of gRPC holds 4 MiB where nobody says otherwise."""
HiddenLayer = Literal["last", "penultimate", "penultimate_norm"]
"""Which hidden states of a text tower: those behind its last block and its final LayerNorm; those
behind the block before the last, as they are; or these through the final LayerNorm."""
HIDDEN_STATES: dict[HiddenLayer, str] = {
    "last": "last_hidden_state",
    "penultimate": "penultimate_hidden_state",
    "penultimate_norm": "penultimate_norm_hidden_state",
}
"""Outputs of `<slug>_text_hidden` by layer: float32 [N, L, W], L the context length, W a width."""
TEXT_EMBEDS = "text_embeds"
"""Its last output: float32 [N, D], projected at the end of the text, not L2-normalised."""
HIDDEN_OUTPUTS = (*HIDDEN_STATES.values(), TEXT_EMBEDS)
"""All of them, in the order of the file."""
NORM_TOLERANCE = 1e-3
"""How far the length of an embedding may be from 1: FP16 and rounding stay far below."""
MIN_NORM = 1e-6
"""Length of a vector up to which it is no direction."""

CONTEXT_LENGTH = 77
"""Tokens a text tower reads, start and end of text included."""
TEXT_BUCKETS = (16, 32, 77)
"""Lengths a batch of prompts is cut to where an engine has fixed lengths."""
VOCAB_SIZE = 49408
START_OF_TEXT = 49406
END_OF_TEXT = 49407

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each channel in [0, 1], RGB (openai/CLIP `clip/clip.py`, `_transform`)."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of each channel in [0, 1], RGB (same place)."""

MAX_SIDE_PX = 2048
"""Largest square made; more than any dual encoder reads."""

MAX_LOGIT_SCALE = 100.0
"""The learned temperature is clamped so that logits are scaled by at most this (section 2.5)."""

Activation = Literal["quick_gelu", "gelu"]
Tower = Literal["image", "text"]
Channels = tuple[float, float, float]
ResizeMode = Literal["shortest", "squash", "longest"]
Interpolation = Literal["bilinear", "bicubic", "lanczos"]
CropRounding = Literal["even", "down"]


@dataclass(frozen=True, kw_only=True)
class Resizing:
    """How an image of any size becomes the square that a model reads; the defaults are CLIP's."""

    mode: ResizeMode = "shortest"
    """What gets the length asked for: the shortest side, and the centre is cropped; both sides,
    whatever the shape (squash); the longest side, and the rest is filled."""
    resize_px: int | None = None
    """Length asked for, of shortest and squash, where the crop is smaller; None is the crop's."""
    interpolation: Interpolation = "bicubic"
    """Filter of the resize, as Pillow has it: with antialiasing."""
    crop_rounding: CropRounding = "even"
    """Where a crop begins that is half a pixel off the centre: at the even one, as torchvision and
    open_clip have it, or the one before, as transformers has it."""
    fill: tuple[int, int, int] = (0, 0, 0)
    """RGB of what longest fills up."""

    def __post_init__(self) -> None:
        """Refuse what nobody can do.

        Raises:
            InputError: names the field and what it may be.
        """
        for name, values in (
            ("mode", get_args(ResizeMode)),
            ("interpolation", get_args(Interpolation)),
            ("crop_rounding", get_args(CropRounding)),
        ):
            value = getattr(self, name)
            if value not in values:
                raise InputError(
                    f"resizing {name} is {value!r:.80}; it must be {', '.join(values)}."
                )
        if self.resize_px is not None and not (
            type(self.resize_px) is int and 1 <= self.resize_px <= MAX_SIDE_PX
        ):
            raise InputError(
                f"resize_px is {self.resize_px!r:.80}; it must be 1 to {MAX_SIDE_PX}, or None."
            )
        fill = self.fill
        if (
            not isinstance(fill, tuple)
            or [type(x) is int and 0 <= x <= 255 for x in fill] != [True] * 3
        ):
            raise InputError(f"fill is {self.fill!r:.80}; it must be three numbers of 0 to 255.")


CLIP_RESIZING = Resizing()
"""Of OpenAI's models (openai/CLIP `clip/clip.py`, `_transform`)."""

TokenizerKind = Literal["openai", "tokenizer.json"]
TOKENIZER_FILE = "tokenizer.json"
"""Name of such a file, and of the kind of tokenizer that is one."""
Cleaning = Literal["lower", "whitespace", "canonical", "no_punctuation", "none"]
Score = Literal["softmax", "sigmoid"]
MAX_TOKENIZER_BYTES = 128 * 2**20
"""Largest tokenizer.json that is read; XLM-V's, of 901,629 tokens, has about half as many."""


@dataclass(frozen=True, kw_only=True)
class Tokenization:
    """How a text becomes the ids that a model reads; the defaults are CLIP's."""

    kind: TokenizerKind = "openai"
    """openai is in the package; a tokenizer.json, of the library `tokenizers`, comes from the
    server that serves the model."""
    sha256: str = ""
    """Of the tokenizer.json, hex."""
    num_bytes: int = 0
    """Size of the tokenizer.json."""
    vocab_size: int = VOCAB_SIZE
    """Rows of the token embedding; every id is below."""
    cleaning: Cleaning = "lower"
    """What is done to a text before the tokenizer; see `clip_rt.inputs.cleaning`."""
    pad_id: int = 0
    """What follows a text up to the length of its batch."""
    erased_id: int | None = None
    """An id of the tokenizer that becomes 0: CLIPA's separator (open_clip, `strip_sep_token`)."""

    def __post_init__(self) -> None:
        """Refuse what nobody can do.

        Raises:
            InputError: names the field and what it may be.
        """
        for name, values in (("kind", get_args(TokenizerKind)), ("cleaning", get_args(Cleaning))):
            value = getattr(self, name)
            if value not in values:
                raise InputError(
                    f"tokenizer {name} is {value!r:.80}; it must be {', '.join(values)}."
                )
        if not (type(self.vocab_size) is int and 1 <= self.vocab_size < 2**31):
            raise InputError(f"vocab_size is {self.vocab_size!r:.80}; it must be 1 or more.")
        for name in ("pad_id", "erased_id"):
            value = getattr(self, name)
            if value is None and name == "erased_id":
                continue
            if not (type(value) is int and 0 <= value < self.vocab_size):
                raise InputError(f"{name} is {value!r:.80}; it must be 0 to {self.vocab_size - 1}.")
        if self.kind == "openai":
            for each in fields(self):
                if getattr(self, each.name) != each.default:
                    raise InputError(
                        f"{each.name} of OpenAI's tokenizer is {getattr(self, each.name)!r:.80}; "
                        f"it is {each.default!r}."
                    )
            return
        if not (isinstance(self.sha256, str) and re.fullmatch("[0-9a-f]{64}", self.sha256)):
            raise InputError(
                f"sha256 of the tokenizer is {self.sha256!r:.80}; 64 hex digits are one."
            )
        if not (type(self.num_bytes) is int and 1 <= self.num_bytes <= MAX_TOKENIZER_BYTES):
            raise InputError(
                f"the tokenizer has {self.num_bytes!r:.80} bytes; it must be 1 to "
                f"{MAX_TOKENIZER_BYTES:,}."
            )


CLIP_TOKENIZATION = Tokenization()
"""Of OpenAI's models (openai/CLIP `clip/simple_tokenizer.py`)."""


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """What a client must know of a dual encoder to feed it, whichever library it is of."""

    name: str
    """Of the architecture; that of another library begins with its name: open_clip:RN50."""
    side_px: int
    embedding_dim: int
    context_length: int
    activation: str
    """See `Manifest.activation`."""
    mean: Channels = CLIP_MEAN
    std: Channels = CLIP_STD
    resizing: Resizing = CLIP_RESIZING
    tokenization: Tokenization = CLIP_TOKENIZATION
    score: Score = "softmax"
    is_any_length_exact: bool = True
    """Whether a text may be cut after its end to any length and have the same embedding."""


@dataclass(frozen=True, kw_only=True)
class ViTSpec:
    """A vision transformer image tower (Dosovitskiy et al. 2021) as CLIP uses it."""

    patch_px: int
    """Side of a square patch."""
    width: int
    layers: int
    heads: int
    mlp_width: int | None = None
    """Hidden width of the MLPs; None is 4 x `width`."""


@dataclass(frozen=True, kw_only=True)
class ResNetSpec:
    """A ModifiedResNet image tower with attention pooling (section 2.4)."""

    layers: tuple[int, int, int, int]
    """Bottleneck blocks in each of the four stages."""
    width: int
    """Channels after the stem; the last stage has 32 times as many."""
    expansion: ClassVar[int] = 4
    """Channels that leave a block, for each of its 3x3 convolution."""
    cell_px: ClassVar[int] = 32
    """Side of the square of pixels that one cell of the last stage stands for."""

    @property
    def heads(self) -> int:
        """Heads of the attention pooling, 64 channels each."""
        return self.width * 32 // 64


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """A causal text transformer; the embedding is read at the end-of-text token."""

    width: int
    layers: int
    heads: int
    context_length: int = CONTEXT_LENGTH
    vocab_size: int = VOCAB_SIZE


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that fixes the shape of one CLIP architecture."""

    name: str
    side_px: int
    """Side of the square image the model reads."""
    image: ViTSpec | ResNetSpec
    text: TextSpec
    embedding_dim: int
    activation: Activation = "quick_gelu"
    """What the first published weights of the architecture were trained with; others may differ."""

    @property
    def facts(self) -> EncoderFacts:
        """What a client must know of it."""
        return EncoderFacts(
            name=self.name,
            side_px=self.side_px,
            embedding_dim=self.embedding_dim,
            context_length=self.text.context_length,
            activation=self.activation,
        )


def slug(name: str) -> str:
    """Turn a model name into the stem of its Triton model names.

    `ViT-L/14@336px` gives `vit_l_14_336px`. The result is safe as a folder name: lower-case
    letters, digits and single underscores only, at most 64 of them.

    Raises:
        InputError: nothing usable is left, or too much.
    """
    if not isinstance(name, str):
        raise InputError(f"model name is a {type(name).__name__}; it must be a string.")
    stem = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not 0 < len(stem) <= 64:
        raise InputError(
            f"model name {name[:80]!r} gives the stem {stem[:80]!r}; it must have 1 to 64 letters "
            "or digits. Choose another name."
        )
    return stem


def image_model(name: str) -> str:
    """Name of the Triton model that holds the image tower of `name`."""
    return f"{slug(name)}_image"


def text_model(name: str) -> str:
    """Name of the Triton model that holds the text tower of `name`."""
    return f"{slug(name)}_text"


def tokenizer_model(name: str) -> str:
    """Name of the Triton model that hands out the tokenizer.json of `name`."""
    return f"{slug(name)}_tokenizer_file"


def hidden_model(name: str) -> str:
    """Name of the Triton model that answers with the hidden states of texts of `name`."""
    return f"{slug(name)}_text_hidden"


def find_spec(name: str) -> ModelSpec:
    """Look an architecture up by its name.

    Raises:
        UnknownModelError: no such name; the message lists those that exist.
    """
    try:
        return MODELS[name]
    except KeyError:
        known = ", ".join(MODELS)
        raise UnknownModelError(
            f"unknown architecture {name!r}; known are {known}.", model=name, known=tuple(MODELS)
        ) from None


def _vit(
    name: str, side_px: int, patch_px: int, width: int, layers: int, text: TextSpec
) -> ModelSpec:
    image = ViTSpec(patch_px=patch_px, width=width, layers=layers, heads=width // 64)
    return ModelSpec(name=name, side_px=side_px, image=image, text=text, embedding_dim=text.width)


def _open_clip_vit(name: str, image: ViTSpec, text: TextSpec) -> ModelSpec:
    return ModelSpec(
        name=name,
        side_px=224,
        image=image,
        text=text,
        embedding_dim=text.width,
        activation="gelu",
    )


def _resnet(
    name: str,
    side_px: int,
    layers: tuple[int, int, int, int],
    width: int,
    text: TextSpec,
    embedding_dim: int,
) -> ModelSpec:
    image = ResNetSpec(layers=layers, width=width)
    return ModelSpec(
        name=name, side_px=side_px, image=image, text=text, embedding_dim=embedding_dim
    )


def _text(width: int, layers: int = 12) -> TextSpec:
    return TextSpec(width=width, layers=layers, heads=width // 64)


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _resnet("RN50", 224, (3, 4, 6, 3), 64, _text(512), 1024),
        _resnet("RN101", 224, (3, 4, 23, 3), 64, _text(512), 512),
        _resnet("RN50x4", 288, (4, 6, 10, 6), 80, _text(640), 640),
        _resnet("RN50x16", 384, (6, 8, 18, 8), 96, _text(768), 768),
        _resnet("RN50x64", 448, (3, 15, 36, 10), 128, _text(1024), 1024),
        _vit("ViT-B/32", 224, 32, 768, 12, _text(512)),
        _vit("ViT-B/16", 224, 16, 768, 12, _text(512)),
        _vit("ViT-L/14", 224, 14, 1024, 24, _text(768)),
        _vit("ViT-L/14@336px", 336, 14, 1024, 24, _text(768)),
        _open_clip_vit(
            "ViT-H/14", ViTSpec(patch_px=14, width=1280, layers=32, heads=16), _text(1024, 24)
        ),
        _open_clip_vit(
            "ViT-g/14",
            ViTSpec(patch_px=14, width=1408, layers=40, heads=16, mlp_width=6144),
            _text(1024, 24),
        ),
        _open_clip_vit(
            "ViT-bigG/14",
            ViTSpec(patch_px=14, width=1664, layers=48, heads=16, mlp_width=8192),
            _text(1280, 32),
        ),
        # Ours, of the same family: what the bundled model of drawings is trained as.
        _resnet("RN26@64px", 64, (2, 2, 2, 2), 32, _text(192, layers=3), 256),
    )
}
"""Every architecture by its name."""
