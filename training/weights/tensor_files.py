"""A file of weights into tensors, without ever running code from that file.

A safetensors file or a plain torch archive goes in, tensors as stored come out. TorchScript
archives, exported programs, pickles with code and pre-2020 torch files are refused, never worked
around.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clip_rt.errors import CheckpointError

MAX_TENSORS = 10_000
"""More than any CLIP has (ViT-bigG/14 in Hugging Face's naming, the longest, has under 1,500)."""


class TensorFile(NamedTuple):
    """What one file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """Of safetensors; empty for torch archives, which have none."""


def read_tensors(path: Path) -> TensorFile:
    """Read a `.safetensors` file, or a `.pt`, `.pth` or `.bin` archive that holds a state dict.

    The state dict may be bare or under the key `state_dict`, as open_clip's training writes it.

    Returns:
        Dense tensors by name on the CPU, as stored.

    Raises:
        CheckpointError: no such file, an unsafe or unknown format, or no state dict in it.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file at {str(path)!r}.")
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        loaded, metadata = _read_safetensors(path)
    else:
        loaded = _read_archive(path)
    nested = loaded.get("state_dict")
    if isinstance(nested, Mapping):
        loaded = dict(nested)
    if not loaded or len(loaded) > MAX_TENSORS:
        raise CheckpointError(
            f"{str(path)!r} has {len(loaded)} entries; a state dict of CLIP has 1 to {MAX_TENSORS}."
        )
    tensors = {}
    for name, value in loaded.items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and _is_dense(value)):
            raise CheckpointError(
                f"{str(path)!r} is not a state dict: entry {str(name)[:80]!r} is a "
                f"{type(value).__name__}, not a dense tensor. Save model.state_dict()."
            )
        tensors[name] = value
    return TensorFile(tensors, metadata)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized


def _read_safetensors(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                return dict.fromkeys(names), {}
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} is not a valid safetensors file: {error}.") from error


def _read_archive(path: Path) -> dict[str, object]:
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
    except (zipfile.BadZipFile, OSError) as error:
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
    if "archive_format" in inner or path.suffix == ".pt2":
        raise CheckpointError(
            f"{str(path)!r} is an exported program (torch.export): it holds a graph, so it was not "
            f"loaded. {_conversion(path, 'torch.export.load({}).state_dict', map_location=False)}"
        )
    if "data.pkl" not in inner or any(member.compress_type for member in members):
        raise CheckpointError(
            f"{str(path)!r} is a zip file that torch.save did not write. Save model.state_dict() "
            "with torch.save or as safetensors."
        )


def _conversion(path: Path, loader: str, *, map_location: bool = True) -> str:
    """Say how to turn a file that can run code into one that cannot."""
    load = loader.format(f"{str(path)!r}" + (", map_location='cpu'" if map_location else ""))
    return (
        'Convert it once, where you trust it: python -c "import torch; from safetensors.torch '
        f"import save_file; weights = {load}; save_file({{name: tensor.contiguous() for name, "
        "tensor in weights.items()}, 'clip.safetensors')\", then pass clip.safetensors."
    )
