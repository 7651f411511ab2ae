"""Dual encoders as open_clip builds them: `open_clip:ViT-B-16-SigLIP2`, or `open_clip:FOLDER`.

Source: open_clip 3.3.0 `factory.py`, `transform.py`, `tokenizer.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
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
    Channels,
    Cleaning,
    EncoderFacts,
    Resizing,
    Tokenization,
)
from training.encoders.encoder import ExternalEncoder
from training.encoders.libraries import import_open_clip
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
    name: str, *, weights: str | Path | None, tokenizer: Path | None = None
) -> ExternalEncoder:
    """Build a model of open_clip.

    Args:
        name: Of one of its configurations, or a folder with an open_clip_config.json.
        weights: A file; None for a folder's own, or else for random ones.
        tokenizer: A tokenizer.json or a folder with one, where the configuration names a tokenizer
            of the hub; None lets open_clip look for it.

    Raises:
        UnknownModelError: open_clip has no such configuration.
        CheckpointError: it is not installed, or the weights or the tokenizer cannot be had.
    """
    open_clip = import_open_clip()
    folder = Path(name)
    identifier = name
    if folder.is_dir():
        identifier = f"{LOCAL}{folder}"
        tokenizer = tokenizer or folder
    elif open_clip.get_model_config(name) is None:
        known = tuple(open_clip.list_models())
        raise UnknownModelError(
            f"open_clip {open_clip.__version__} has no model {name[:80]!r}; "
            "open_clip.list_models() lists those it has.",
            model=name,
            known=known,
        )
    preprocessing = (
        None if folder.is_dir() else _find_preprocessing(open_clip, name, is_random=weights is None)
    )
    with _as_checkpoint_error(f"open_clip cannot build {name}"):
        model = open_clip.create_model(
            identifier,
            pretrained=None if weights is None else str(weights),
            precision="fp32",
            device="cpu",
            load_weights=weights is not None or folder.is_dir(),
            pretrained_text=False,
            force_preprocess_cfg=preprocessing,
            # Its other class for the same weights adds all positions to a text of any length.
            force_custom_text=True,
            weights_only=True,
        )
    model.requires_grad_(False).eval()
    _reparameterise(model)
    _let_texts_be_cut(model)
    text = _text_config(open_clip, name, folder)
    source = _Source(open_clip, model, _tokenizer(open_clip, name, text, tokenizer))
    tokenization, content = _describe_tokenizer(source.tokenizer, model, text)
    resizing, side_px, mean, std = _read_preprocessing(model.visual.preprocess_cfg, name)
    bias = getattr(model, "logit_bias", None)
    with torch.inference_mode():
        embedding_dim = model.encode_image(torch.zeros(1, 3, side_px, side_px)).shape[-1]
    facts = EncoderFacts(
        name=f"{PREFIX}{folder.name if folder.is_dir() else name}",
        side_px=side_px,
        embedding_dim=embedding_dim,
        context_length=text.get("context_length", 77),
        activation="configured",
        mean=mean,
        std=std,
        resizing=resizing,
        tokenization=tokenization,
        score="softmax" if bias is None else "sigmoid",
    )
    return ExternalEncoder(
        facts,
        image_tower=_ImageTower(model),
        text_tower=_TextTower(model),
        logit_scale=float(model.logit_scale.exp()),
        logit_bias=None if bias is None else float(bias),
        tokenizer_file=content,
        source=source,
        versions={name: metadata.version(name) for name in ("open_clip_torch", "timm")},
    )


class _ImageTower(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        # CoCa's returns its tokens too, so its own way in is the model's.
        self.model: Any = model

    def forward(self, image_BCSS: Tensor) -> Tensor:
        return self.model.encode_image(image_BCSS, normalize=False)


class _TextTower(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return self.model.encode_text(tokens_BL, normalize=False)


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


@contextlib.contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    try:
        yield
    # Its own checks are assertions, RuntimeErrors and whatever torch, timm and the hub raise.
    except Exception as error:
        raise CheckpointError(f"{what}: {str(error)[:400] or type(error).__name__}") from error


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


def _text_config(open_clip: Any, name: str, folder: Path) -> dict[str, Any]:
    if folder.is_dir():
        document = json.loads((folder / "open_clip_config.json").read_text("utf-8"))
        return dict(document["model_cfg"]["text_cfg"])
    return dict(open_clip.get_model_config(name)["text_cfg"])


def _tokenizer(open_clip: Any, name: str, text: dict[str, Any], place: Path | None) -> Any:
    """Return open_clip's tokenizer, with the file of its library from where the caller says."""
    if not text.get("hf_tokenizer_name"):
        with _as_checkpoint_error(f"open_clip has no tokenizer for {name}"):
            return open_clip.get_tokenizer(f"{LOCAL}{name}" if Path(name).is_dir() else name)
    settings = dict(text.get("tokenizer_kwargs") or {})
    where = text["hf_tokenizer_name"]
    if place is not None:
        file = find_tokenizer_file(place)
        where = str(file.parent)
        if not (file.parent / "tokenizer_config.json").is_file():
            # A bare file, which transformers reads without a configuration beside it.
            return _from_file(open_clip, file, settings, text.get("context_length", 77))
    with _as_checkpoint_error(
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
    if made.tokenizer.pad_token_id is None:
        made.tokenizer.pad_token = made.tokenizer.convert_ids_to_tokens(pad_id_of(content, 0))
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
