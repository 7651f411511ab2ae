"""Weights from a file into `training.model.CLIP`, without ever running code from that file.

A safetensors file or a plain torch archive goes in, float32 tensors under OpenAI's names come out.
TorchScript archives, pickles with code and pre-2020 torch files are refused, never worked around.
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clip_rt.errors import CheckpointError
from clip_rt.specs import MODELS, Activation, ModelSpec
from training.model import CLIP, causal_mask

MAX_TENSORS = 10_000
"""More than any CLIP has (RN50x64, the longest, has under 1,000)."""

IGNORED = frozenset({"attn_mask", "input_resolution", "context_length", "vocab_size"})
"""Facts of the architecture that OpenAI's and open_clip's files store beside the weights."""

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DistributedDataParallel and torch.compile put before every name."""


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint.

    Args:
        path: A `.safetensors` file, or a `.pt`, `.pth` or `.bin` archive that holds a state dict,
            bare or under the key `state_dict` as open_clip's training writes it.

    Returns:
        Tensors by name on the CPU, as stored; prefixes of wrappers and the entries in `IGNORED`
        are removed.

    Raises:
        CheckpointError: no such file, an unsafe or unknown format, or no state dict in it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file at {str(path)!r}.")
    loaded = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    nested = loaded.get("state_dict")
    if isinstance(nested, Mapping):
        loaded = dict(nested)
    if not loaded or len(loaded) > MAX_TENSORS:
        raise CheckpointError(
            f"{str(path)!r} has {len(loaded)} entries; a state dict of CLIP has 1 to {MAX_TENSORS}."
        )
    for name, value in loaded.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided
        if not (isinstance(name, str) and dense):
            raise CheckpointError(
                f"{str(path)!r} is not a state dict: entry {str(name)[:80]!r} is a "
                f"{type(value).__name__}, not a dense tensor. Save model.state_dict()."
            )
    unwrapped = {_unwrap(name): value for name, value in loaded.items()}
    return {name: value for name, value in unwrapped.items() if name not in IGNORED}


def load_clip(spec: ModelSpec, path: str | Path, *, activation: Activation | None = None) -> CLIP:
    """Build the model of `spec` with the weights in a file.

    Args:
        spec: Architecture the weights must fit exactly.
        path: See `load_state_dict`. FP16 and BF16 tensors become float32, which loses nothing.
        activation: Overrides the spec's. A checkpoint has no record of it: OpenAI's weights and
            open_clip's `-quickgelu` models need quick_gelu, open_clip's others need gelu.

    Returns:
        The model on the CPU, float32, in eval mode.

    Raises:
        CheckpointError: unreadable, other names or shapes than the architecture's (the message
            lists them, and names the architecture that does fit), or values that are not finite.
    """
    if activation is not None:
        spec = replace(spec, activation=activation)
    state_dict = load_state_dict(path)
    expected = tensor_shapes(spec)
    for name in expected.keys() - state_dict.keys():
        # Counts training steps; OpenAI's FP16 conversions and some tools leave it out.
        if name.endswith("num_batches_tracked"):
            state_dict[name] = torch.tensor(0)
    _check_fit(spec, expected, state_dict)
    _check_values(state_dict)
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
    }
    # On the meta device nothing is initialised only to be overwritten.
    with torch.device("meta"):
        clip = CLIP(spec)
    clip.load_state_dict(tensors, strict=True, assign=True)
    clip.causal_mask_LL = causal_mask(spec.text.context_length)
    return clip.requires_grad_(False).eval()


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
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a state dict of `spec`, by name."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in CLIP(spec).state_dict().items()}


def _load_safetensors(path: Path) -> dict[str, object]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                return dict.fromkeys(names)
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is not a valid safetensors file: {error}.") from error


def _load_torch(path: Path) -> dict[str, object]:
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{str(path)!r} holds more than tensors, and unpickling that can run code: it was not "
            f"loaded. {_conversion(path, 'torch.load({}, weights_only=False)')}"
        ) from error
    except Exception as error:  # A damaged archive fails in torch in many ways.
        raise CheckpointError(f"{str(path)!r} cannot be read by torch: {error}.") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{str(path)!r} holds a {type(loaded).__name__}, not a state dict. "
            "Save model.state_dict()."
        )
    return dict(loaded)


def _check_archive(path: Path) -> None:
    """Look into the zip directory before torch reads anything."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{str(path)!r} is neither a safetensors file nor a torch archive (torch 1.6 and newer "
            f"write zip files). {_conversion(path, 'torch.load({}, weights_only=False)')}"
        ) from error
    # The first folder is the archive's own name.
    inner = {member.filename.partition("/")[2] for member in members}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise CheckpointError(
            f"{str(path)!r} is a TorchScript archive: it holds code, so it was not loaded (OpenAI "
            f"publishes CLIP in this form). {_conversion(path, 'torch.jit.load({}).state_dict()')}"
        )
    if "data.pkl" not in inner or any(member.compress_type for member in members):
        raise CheckpointError(
            f"{str(path)!r} is a zip file that torch.save did not write. Save model.state_dict() "
            "with torch.save or as safetensors."
        )


def _conversion(path: Path, loader: str) -> str:
    """Say how to turn a file that can run code into one that cannot."""
    load = loader.format(f"{str(path)!r}, map_location='cpu'")
    return (
        'Convert it once, where you trust it: python -c "import torch; from safetensors.torch '
        f"import save_file; weights = {load}; save_file({{name: tensor.contiguous() for name, "
        "tensor in weights.items()}, 'clip.safetensors')\", then pass clip.safetensors."
    )


def _unwrap(name: str) -> str:
    for prefix in _WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def _check_fit(
    spec: ModelSpec, expected: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, Tensor]
) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if found == expected:
        return
    if "logit_bias" in found:
        raise CheckpointError(
            "the checkpoint has a logit_bias: it was trained with the sigmoid loss (SigLIP), which "
            "is not supported yet. Use a model trained with the contrastive loss."
        )
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [
        f"{name} {found[name]} instead of {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    raise CheckpointError(
        f"the checkpoint does not fit {spec.name}. Missing: {_listing(missing)}. Unexpected: "
        f"{_listing(unexpected)}. Wrong shape: {_listing(misshapen)}. {_way_out(found)}"
    )


def _way_out(found: Mapping[str, tuple[int, ...]]) -> str:
    for other in MODELS.values():
        shapes = tensor_shapes(other)
        if {name: s for name, s in found.items() if name in shapes} == shapes:
            return f"It fits {other.name}: pass --model {other.name}."
    if any(name.startswith(("vision_model.", "text_model.")) for name in found):
        return "Its names are those of Hugging Face transformers; OpenAI's names are needed."
    known = ", ".join(MODELS)
    return f"It fits none of the known architectures ({known})."


def _check_values(state_dict: Mapping[str, Tensor]) -> None:
    weights = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    integers = sorted(name for name, tensor in weights.items() if not tensor.is_floating_point())
    if integers:
        raise CheckpointError(
            f"the checkpoint is quantised: {_listing(integers)} are not floating point. Use the "
            "weights it was made from."
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
