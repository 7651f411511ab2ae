"""Dual encoders as open_clip builds them: `open_clip:ViT-B-16-SigLIP2`, or `open_clip:FOLDER`.

Source: open_clip 3.3.0 `factory.py`, `transform.py`, `tokenizer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from clip_rt.errors import CheckpointError, UnknownModelError
from clip_rt.inputs import tokenizer_file
from clip_rt.specs import (
    CLIP_TOKENIZATION,
    TOKENIZER_FILE,
    Channels,
    Cleaning,
    EncoderFacts,
    Resizing,
    Tokenization,
)
from training.dual_encoder import TextHidden
from training.encoders.encoder import ExternalEncoder, describe_configuration
from training.encoders.libraries import as_checkpoint_error, import_open_clip
from training.encoders.tokenizer_source import find_tokenizer_file, pad_id_of, read_tokenizer_file

PREFIX = "open_clip:"
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
LOCAL = "local-dir:"
"""What open_clip writes before a folder in the hub's layout."""
_CLEANING: dict[str, Cleaning] = {
    "lower": "lower",
    "whitespace": "whitespace",
    "canonicalize": "canonical",
}


def load_open_clip(
    name: str,
    *,
    folder: Path | None = None,
    has_weights: bool = False,
    file: Path | None = None,
    tokenizer: Path | None = None,
) -> ExternalEncoder:
    """Build a model of open_clip; with neither `has_weights` nor `file` its weights are random.

    Args:
        name: Of one of its configurations; or the folder itself.
        folder: With an open_clip_config.json, in which the tokenizer's files are looked for too.
        has_weights: Load those in the folder.
        file: Weights of a named configuration.
        tokenizer: A tokenizer.json or a folder with one, where the configuration names a tokenizer
            of the hub; None lets open_clip look for it.

    Raises:
        UnknownModelError: open_clip has no such configuration.
        CheckpointError: the weights or the tokenizer cannot be had, or are of another model.
    """
    open_clip = import_open_clip()
    is_named = not Path(name).is_dir()
    configuration = _find_configuration(open_clip, name, folder)
    preprocessing = None
    if folder is None:
        preprocessing = _find_preprocessing(open_clip, name, is_random=file is None)
    with as_checkpoint_error(f"open_clip cannot build {name}"):
        model = open_clip.create_model(
            name if folder is None else f"{LOCAL}{folder}",
            pretrained=None if file is None else str(file),
            precision="fp32",
            device="cpu",
            load_weights=has_weights or file is not None,
            pretrained_text=False,
            force_preprocess_cfg=preprocessing,
            # Its other class for the same weights adds all positions to a text of any length.
            force_custom_text=True,
            weights_only=True,
        )
    model.requires_grad_(False).eval()
    _reparameterise(model)
    _let_texts_be_cut(model)
    text = configuration["text_cfg"]
    source = _Source(open_clip, model, _tokenizer(open_clip, name, text, folder, tokenizer))
    tokenization, content = _describe_tokenizer(source.tokenizer, model, text)
    resizing, side_px, mean, std = _read_preprocessing(model.visual.preprocess_cfg, name)
    bias = getattr(model, "logit_bias", None)
    with torch.inference_mode():
        embedding_dim = model.encode_image(torch.zeros(1, 3, side_px, side_px)).shape[-1]
    facts = EncoderFacts(
        name=f"{PREFIX}{name if is_named else Path(name).name}",
        side_px=side_px,
        embedding_dim=embedding_dim,
        context_length=text.get("context_length", 77),
        activation=describe_configuration(configuration),
        mean=mean,
        std=std,
        resizing=resizing,
        tokenization=tokenization,
        score="softmax" if bias is None else "sigmoid",
    )
    return ExternalEncoder(
        facts,
        model=model,
        towers=_Towers(),
        tokenizer_file=content,
        source=source,
        versions={name: metadata.version(name) for name in ("open_clip_torch", "timm")},
    )


def list_tags(name: str) -> dict[str, str]:
    """Return where the weights lie that open_clip knows of a configuration, by its tags for them.

    Raises:
        UnknownModelError: it has no such configuration.
    """
    open_clip = import_open_clip()
    _find_configuration(open_clip, name, None)
    known = open_clip.pretrained
    found = {
        tag: known.get_pretrained_cfg(name, tag).get("hf_hub", "").strip("/")
        for tag in known.list_pretrained_tags_by_model(name)
    }
    return {tag: f"hf:{place}" for tag, place in found.items() if place}


class _Towers:
    image_modules = ("visual",)
    text_modules = ("text",)

    def image(self, model: Any, image_BCSS: Tensor) -> Tensor:
        # CoCa's tower returns its tokens too, so its own way in is the model's.
        return model.encode_image(image_BCSS, normalize=False)

    def text(self, model: Any, tokens_BL: Tensor) -> Tensor:
        return model.encode_text(tokens_BL, normalize=False)

    has_text_hidden = False

    def text_hidden(self, model: Any, tokens_BL: Tensor) -> TextHidden:
        raise NotImplementedError


class _Source:
    """open_clip's own transform and tokenizer."""

    def __init__(self, open_clip: Any, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        settings = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
        self._transform = open_clip.transform.image_transform_v2(settings, is_train=False)

    def pixels(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        return np.stack([self._transform(image).numpy() for image in images])

    def tokens(self, texts: Sequence[str]) -> NDArray[np.int64]:
        return np.asarray(self.tokenizer(list(texts)))


def _find_preprocessing(open_clip: Any, name: str, *, is_random: bool) -> dict[str, Any]:
    """Return how images are prepared for the weights that open_clip knows of a configuration.

    The configuration itself does not say it, and a file of weights does not either: without this
    SigLIP's would be fed as CLIP's.

    Raises:
        CheckpointError: it knows several that differ, and the weights may be of any.
    """
    known = open_clip.pretrained
    found: dict[str, list[str]] = {}
    for tag in known.list_pretrained_tags_by_model(name):
        said = known.get_pretrained_cfg(name, tag)
        kept = {key: said[key] for key in _PREPROCESSING if said.get(key) is not None}
        found.setdefault(json.dumps(kept), []).append(tag)
    if len(found) > 1 and not is_random:
        ways = "; ".join(f"{', '.join(tags)}: {way}" for way, tags in found.items())
        raise CheckpointError(
            f"open_clip prepares images for weights of {name} in {len(found)} ways, and a file "
            f"does not say which is its own ({ways[:600]}). Put it into a folder with its "
            "open_clip_config.json, and pass --model open_clip:FOLDER."
        )
    return dict(json.loads(next(iter(found), "{}")))


def _reparameterise(model: nn.Module) -> None:
    """Fold branches that exist for training only into one convolution each, as MobileCLIP needs."""
    for module in model.modules():
        if hasattr(module, "reparameterize") or hasattr(module, "fuse"):
            from timm.utils.model import reparameterize_model

            reparameterize_model(model, inplace=True)
            return


def _let_texts_be_cut(model: nn.Module) -> None:
    """Cut the causal mask of a text tower to the length of the texts, as it cuts the positions."""
    transformer = getattr(getattr(model, "text", None), "transformer", None)
    if isinstance(transformer, nn.Module):
        transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)


def _cut_mask(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = kwargs.get("attn_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        length = args[0].shape[1]
        kwargs = kwargs | {"attn_mask": mask[:length, :length]}
    return args, kwargs


def _find_configuration(open_clip: Any, name: str, folder: Path | None) -> dict[str, Any]:
    """Return open_clip's description of the architecture.

    Raises:
        UnknownModelError: it has none of that name.
        CheckpointError: the folder has none, or that of another model.
    """
    named: Any = None
    if not Path(name).is_dir():
        named = open_clip.get_model_config(name)
        if named is None:
            raise UnknownModelError(
                f"open_clip {open_clip.__version__} has no model {name[:80]!r}; "
                "open_clip.list_models() lists those it has.",
                model=name,
                known=tuple(open_clip.list_models()),
            )
    if folder is None:
        return dict(named)
    file = folder / "open_clip_config.json"
    try:
        found = json.loads(file.read_text("utf-8"))["model_cfg"]
        found["text_cfg"], found["vision_cfg"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not what open_clip writes: {error!r:.200}.") from error
    if named is not None and _towers_of(found) != _towers_of(named):
        raise CheckpointError(
            f"the weights come with the configuration of another model than {name}. Leave the name "
            f"to them: --model {PREFIX}FOLDER, with a copy of their folder."
        )
    return dict(found)


def _towers_of(configuration: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the shape of both towers; where a tokenizer is found is not of it."""
    text = {
        key: value
        for key, value in configuration["text_cfg"].items()
        if not key.startswith("hf_tokenizer")
    }
    return {"vision": configuration["vision_cfg"], "text": text}


def _tokenizer(
    open_clip: Any, name: str, text: dict[str, Any], folder: Path | None, place: Path | None
) -> Any:
    """Return open_clip's tokenizer, with the file of its library from where the caller says."""
    if place is None and folder is not None and (folder / TOKENIZER_FILE).is_file():
        place = folder
    if not text.get("hf_tokenizer_name"):
        with as_checkpoint_error(f"open_clip has no tokenizer for {name}"):
            return open_clip.get_tokenizer(name if folder is None else f"{LOCAL}{folder}")
    settings = dict(text.get("tokenizer_kwargs") or {})
    where = text["hf_tokenizer_name"]
    if place is not None:
        file = find_tokenizer_file(place)
        where = str(file.parent)
        if not (file.parent / "tokenizer_config.json").is_file():
            # A bare file, which transformers reads without a configuration beside it.
            return _from_file(open_clip, file, settings, text.get("context_length", 77))
    with as_checkpoint_error(
        f"the tokenizer {where} of {name} cannot be had; name its tokenizer.json with --tokenizer"
    ):
        return open_clip.tokenizer.HFTokenizer(
            where, context_length=text.get("context_length", 77), **settings
        )


def _from_file(open_clip: Any, file: Path, settings: dict[str, Any], context_length: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = object.__new__(open_clip.tokenizer.HFTokenizer)
    made.tokenizer_mode = settings.get("tokenizer_mode") or ""
    made.context_length = context_length
    made.clean_fn = open_clip.tokenizer.get_clean_fn(settings.get("clean", "whitespace"))
    made.strip_sep_token = settings.get("strip_sep_token", False)
    content = file.read_bytes()
    made.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    pad_id = pad_id_of(content)
    if pad_id is None:
        raise CheckpointError(
            f"{file} does not say what texts are padded with. Put its tokenizer_config.json beside "
            "it, and name the folder."
        )
    made.tokenizer.pad_token = made.tokenizer.convert_ids_to_tokens(pad_id)
    return made


def _describe_tokenizer(
    tokenizer: Any, model: nn.Module, text: dict[str, Any]
) -> tuple[Tokenization, bytes | None]:
    if type(tokenizer).__name__ == "SimpleTokenizer":
        if tokenizer.clean_fn.__name__ != "_clean_lower" or tokenizer.reduction_fn is not None:
            raise CheckpointError(
                "open_clip's tokenizer is told to clean or shorten texts otherwise."
            )
        return CLIP_TOKENIZATION, None
    if tokenizer.tokenizer_mode:
        raise CheckpointError(
            f"open_clip's tokenizer mode {tokenizer.tokenizer_mode!r} is not known here."
        )
    content, before = read_tokenizer_file(tokenizer.tokenizer)
    if before != "none":
        raise CheckpointError(
            f"the tokenizer is a {type(tokenizer.tokenizer).__name__}, which is none of Rust. Save "
            "the tokenizer.json of one that is."
        )
    settings = text.get("tokenizer_kwargs") or {}
    inner = tokenizer.tokenizer
    return (
        tokenizer_file.describe(
            content,
            vocab_size=_vocab_size(model),
            cleaning=_CLEANING[settings.get("clean", "whitespace")],
            pad_id=inner.pad_token_id,
            erased_id=inner.sep_token_id if tokenizer.strip_sep_token else None,
        ),
        content,
    )


def _vocab_size(model: nn.Module) -> int:
    """Return the rows of the token embedding: the largest there is in the text tower."""
    text = getattr(model, "text", model)
    return max(
        module.num_embeddings for module in text.modules() if isinstance(module, nn.Embedding)
    )


def _read_preprocessing(
    said: dict[str, Any], name: str
) -> tuple[Resizing, int, Channels, Channels]:
    size = said["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise CheckpointError(f"{name} reads {height} x {width} px; only squares are served.")
    fill = int(said.get("fill_color", 0))
    resizing = Resizing(
        mode=said.get("resize_mode", "shortest"),
        interpolation=said.get("interpolation", "bicubic"),
        fill=(fill, fill, fill),
    )
    mean, std = (tuple(float(each) for each in said[key]) for key in ("mean", "std"))
    return resizing, height, mean, std  # type: ignore[return-value]
