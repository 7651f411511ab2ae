"""Weights from anywhere into `training.model.CLIP`.

A file, a folder in the hub's layout or an identifier of the hub goes in, under OpenAI's,
open_clip's or Hugging Face's names; a float32 model comes out. What does not fit is refused.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from clip_rt.errors import CheckpointError
from clip_rt.specs import CLIP_MEAN, CLIP_STD, MODELS, Activation, ModelSpec, ViTSpec
from training.model import CLIP
from training.weights import hub
from training.weights.adapt import (
    IMAGE_POSITIONS,
    TEXT_POSITIONS,
    read_our_colours,
    resize_image_positions,
    resize_text_positions,
)
from training.weights.claims import Claims, read_claims
from training.weights.naming import is_hugging_faces, is_openais_archive, to_openai_names
from training.weights.tensor_files import read_tensors

_log = logging.getLogger(__name__)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_clip(
    spec: ModelSpec,
    source: str | Path,
    *,
    activation: Activation | None = None,
    side_px: int | None = None,
    context_length: int | None = None,
    option: str = "--activation",
) -> CLIP:
    """Build the model of `spec` with weights from a source.

    Args:
        spec: Architecture the weights must fit exactly.
        source: A file (see `tensor_files.read_tensors`), a folder (see `hub.open_folder`),
            `hf:owner/name[@revision]` (see `hub.fetch`), or `openai` for the weights OpenAI
            published for this architecture. FP16 and BF16 tensors become float32, which loses
            nothing.
        activation: As the weights were trained. None takes the source's word: `hidden_act` of a
            config.json, `quick_gelu` of an open_clip_config.json, also beside a file that is passed
            alone; `activation` in the metadata of our own checkpoints; OpenAI's own files have
            quick_gelu. Where nobody says it, it must be asked for, but of architectures that
            were trained in one way only.
        side_px: Read images of this side: positions are interpolated to it where the weights have
            another. None demands that they have the spec's.
        context_length: Read texts of this length; likewise.
        option: What the caller's user asks for an activation by, for messages.

    Returns:
        The model on the CPU, float32, in eval mode; its `spec` says the activation, side and
        context it has. It has a `logit_bias` if the weights have one (SigLIP).

    Raises:
        CheckpointError: unreadable or unsafe; other names or shapes than the architecture's (the
            message lists them, and names the architecture that does fit); values that are not
            finite; a source that says it was trained otherwise than asked for, or on images or
            texts prepared otherwise than here; or an activation that nobody says. A file that is
            passed alone is taken in spite of another preparation, and a warning names it.
        InputError: the side does not divide into patches, or the context is empty.
    """
    tensors, claims = _read_source(spec, source, asked=activation)
    state_dict = to_openai_names(tensors)
    claims.check_heads(spec)
    spec = replace(
        spec,
        activation=claims.activation_for(spec, activation, source=str(source), option=option),
        side_px=spec.side_px if side_px is None else side_px,
        text=spec.text
        if context_length is None
        else replace(spec.text, context_length=context_length),
    )
    expected = tensor_shapes(spec)
    for name in expected.keys() - state_dict.keys():
        # Counts training steps; OpenAI's FP16 conversions and some tools leave it out.
        if name.endswith("num_batches_tracked"):
            state_dict[name] = torch.tensor(0)
    if "logit_bias" in state_dict:
        expected["logit_bias"] = ()
    resizable = {
        *(IMAGE_POSITIONS if side_px is not None else ()),
        *((TEXT_POSITIONS,) if context_length is not None else ()),
    }
    _check_fit(spec, expected, state_dict, resizable)
    _check_values(state_dict)
    state_dict = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
    }
    _check_preparation(claims, state_dict, source, spec)
    if claims.mean and claims.std and (claims.mean, claims.std) != (CLIP_MEAN, CLIP_STD):
        state_dict = read_our_colours(state_dict, claims.mean, claims.std)
    for name in resizable:
        if name in state_dict and tuple(state_dict[name].shape) != expected[name]:
            resize = resize_text_positions if name == TEXT_POSITIONS else resize_image_positions
            _log.info("%s: %d positions become %d", name, len(state_dict[name]), expected[name][0])
            state_dict[name] = resize(state_dict[name], expected[name][0])
    with torch.device("meta"):
        clip = CLIP(spec)
    return clip.with_weights(state_dict)


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of one file under OpenAI's names.

    Raises:
        CheckpointError: see `tensor_files.read_tensors` and `naming.to_openai_names`.
    """
    return to_openai_names(read_tensors(Path(path)).tensors)


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Identify weights by content.

    Returns:
        sha256, hex, over names, dtypes, shapes and bytes in the order of the names. The step
        counters of batch normalisation are left out: they reach no embedding.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        if name.endswith("num_batches_tracked"):
            continue
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # A view as bytes works for BF16 too, which numpy does not have.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a state dict of `spec`, by name."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in CLIP(spec).state_dict().items()}


def check_exists(source: str | Path) -> None:
    """Refuse a source that is neither there nor a name of something on the hub.

    Raises:
        CheckpointError: it is not.
    """
    name = str(source)
    if not (name == "openai" or name.startswith(hub.PREFIX) or Path(source).exists()):
        raise CheckpointError(
            f"no checkpoint file at {name!r}. Weights are a file, a folder, "
            "hf:owner/name[@revision], or openai."
        )


def _read_source(
    spec: ModelSpec, source: str | Path, *, asked: Activation | None
) -> tuple[dict[str, Tensor], Claims]:
    """Find the files of a source; read their tensors and what is said about them."""
    check_exists(source)
    name = str(source)
    if name == "openai" and not Path(name).exists():
        if spec.name not in hub.OPENAI:
            raise CheckpointError(
                f"OpenAI published no weights for {spec.name}; it did for {', '.join(hub.OPENAI)}."
            )
        name = f"{hub.PREFIX}{hub.OPENAI[spec.name]}"
    if name.startswith(hub.PREFIX):
        found = hub.fetch(name)
    elif Path(source).is_dir():
        found = hub.open_folder(Path(source))
    else:
        tensors, metadata = read_tensors(Path(source))
        own = _claims_of_our_own(metadata, name)
        return tensors, own if own.activation else _claims_beside(Path(source), tensors, asked)
    tensors = {}
    for path in found.files:
        shard = read_tensors(path).tensors
        if twice := sorted(tensors.keys() & shard.keys()):
            raise CheckpointError(f"{str(path)!r} repeats {_listing(twice)} of another shard.")
        tensors |= shard
    claims = read_claims(found.folder, by_open_clip=found.by_open_clip)
    if claims.activation is None and is_openais_archive(tensors):
        claims = _of_openai(found.files[0])
    return tensors, claims


def _claims_of_our_own(metadata: Mapping[str, str], where: str) -> Claims:
    activation = metadata.get("activation")
    if activation not in (None, "quick_gelu", "gelu"):
        raise CheckpointError(
            f"the metadata of {where!r} says activation {activation[:80]!r}; it must be quick_gelu "
            "or gelu."
        )
    return Claims(
        where=f"the metadata of {where!r}", activation=cast("Activation | None", activation)
    )


def _claims_beside(path: Path, tensors: Mapping[str, Tensor], asked: Activation | None) -> Claims:
    """Read what the configuration beside a file says of it, as if its folder were passed."""
    if is_openais_archive(tensors):
        return _of_openai(path)
    by_open_clip = path.name.startswith("open_clip") or not is_hugging_faces(tensors)
    try:
        return read_claims(path.parent, by_open_clip=by_open_clip, for_file=True)
    except CheckpointError as error:
        if asked is None:
            raise
        # Whoever passes the file and its activation has answered for what lies beside it.
        _log.warning("%s is passed over: %s", path.parent, error)
        return Claims()


def _of_openai(path: Path) -> Claims:
    return Claims(where=f"{str(path)!r}, which is OpenAI's,", activation="quick_gelu")


def _check_preparation(
    claims: Claims, state_dict: Mapping[str, Tensor], source: str | Path, spec: ModelSpec
) -> None:
    """Refuse weights that expect other images or texts; of a file that is passed alone, warn."""
    differs = list(claims.differs)
    side_px = _side_of(state_dict, spec)
    if claims.side_px not in (None, side_px):
        differs.append(
            f"the image processor beside {claims.where} makes images of {claims.side_px} px, and "
            f"the weights read {side_px} px"
        )
    if not differs:
        return
    problem = (
        f"the weights {source} expect images resized in another way, or texts read in another way, "
        f"than here: {'; '.join(differs)}."
    )
    if Path(source).is_file():
        _log.warning("%s Embeddings will differ from those of their authors.", problem)
        return
    raise CheckpointError(
        f"{problem} If you accept that, pass the file with the weights itself, and its activation."
    )


def _side_of(state_dict: Mapping[str, Tensor], spec: ModelSpec) -> int:
    """Return the side of the images that the weights have positions for."""
    cell_px = spec.image.patch_px if isinstance(spec.image, ViTSpec) else spec.image.cell_px
    (name,) = (name for name in IMAGE_POSITIONS if name in state_dict)
    return math.isqrt(len(state_dict[name]) - 1) * cell_px


def _check_fit(
    spec: ModelSpec,
    expected: Mapping[str, tuple[int, ...]],
    state_dict: Mapping[str, Tensor],
    resizable: Collection[str] = (),
) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    expected = dict(expected)
    for name in resizable:
        # Any number of positions will do, of the right width.
        if name in expected and found.get(name, ())[1:] == expected[name][1:]:
            expected[name] = found[name]
    if found == expected:
        return
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    raise CheckpointError(
        f"the checkpoint does not fit {spec.name}. Missing: {_listing(missing)}. Unexpected: "
        f"{_listing(unexpected)}. Wrong shape: {_listing(misshapen)}. {_way_out(spec, found)}"
    )


def _way_out(spec: ModelSpec, found: Mapping[str, tuple[int, ...]]) -> str:
    for other in MODELS.values():
        shapes = tensor_shapes(other)
        if {name: s for name, s in found.items() if name in shapes} == shapes:
            return f"It fits {other.name}: pass --model {other.name}."
    shapes = tensor_shapes(spec)
    differing = {name for name in shapes if found.get(name) != shapes[name]}
    if differing <= {*IMAGE_POSITIONS, TEXT_POSITIONS}:
        return (
            "Only positions differ: the weights are for another image side or context length. Ask "
            "for the side you want by load_clip(side_px=..., context_length=...), which "
            "interpolates positions; python -m training.run --init-from does so for its --model."
        )
    if any(name.startswith("visual.trunk.") for name in found):
        return "Its image tower is one of timm's, which is not built here."
    known = ", ".join(MODELS)
    return f"It fits none of the known architectures ({known})."


def _check_values(state_dict: Mapping[str, Tensor]) -> None:
    weights = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    quantised = sorted(name for name, tensor in weights.items() if tensor.dtype not in _FLOATS)
    if quantised:
        raise CheckpointError(
            f"the checkpoint is quantised: {_listing(quantised)} are not of 16, 32 or 64 bits in "
            "floating point. Use the weights it was made from."
        )
    broken = sorted(name for name, tensor in weights.items() if not tensor.isfinite().all())
    if broken:
        raise CheckpointError(
            f"the checkpoint has NaN or infinite values in {_listing(broken)}. Use an earlier one."
        )


def _listing(items: list[str], limit: int = 8) -> str:
    if not items:
        return "none"
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
