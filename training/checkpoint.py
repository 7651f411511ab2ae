"""Weights and whole runs on disk: safetensors, published by atomic rename.

`save_checkpoint` writes what export and evaluation read. `save_snapshot` writes all that a run
needs to go on as if it had never stopped; no random state is among it, because every random number
of a run is a function of its seed and the step.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip_rt.errors import CheckpointError
from clip_rt.specs import EncoderFacts

_SNAPSHOT = re.compile(r"step_(\d{8})\.safetensors")
_FACTS = "clip_rt.run"


@dataclass(frozen=True)
class Snapshot:
    """A run at rest."""

    step: int
    tensors: dict[str, Tensor]
    """By name; the parts of a run are told apart by prefixes."""
    facts: dict[str, Any]
    """What is no tensor; JSON."""


def save_checkpoint(
    path: Path,
    weights: Mapping[str, Tensor],
    facts: EncoderFacts,
    *,
    step: int,
    config: Mapping[str, Any],
) -> None:
    """Write weights with the step, the architecture and the configuration beside them.

    Args:
        path: Ends in .safetensors. A reader sees the old file or the new one, never a part.
        weights: What `DualEncoder.to_file` gives.
        facts: Name and activation are noted, so that nobody loads it as something else.
        step: Updates done.
        config: Everything the run was started with; JSON.

    Raises:
        CheckpointError: it cannot be written; what was there before is still there.
    """
    metadata = {
        "architecture": facts.name,
        "activation": facts.activation,
        "preparation": json.dumps(describe_preparation(facts)),
        "step": str(step),
        "config": json.dumps(config),
    }
    _write(path, weights, metadata)


def describe_preparation(facts: EncoderFacts) -> dict[str, Any]:
    """Return how images and texts are prepared for a model, as JSON holds it."""
    names = ("side_px", "mean", "std", "resizing", "context_length", "tokenization")
    said = asdict(facts)
    found: dict[str, Any] = json.loads(json.dumps({name: said[name] for name in names}))
    return found


def save_snapshot(folder: Path, snapshot: Snapshot, *, keep_last: int) -> Path:
    """Write a snapshot beside the older ones, then remove all but the last ones.

    Raises:
        CheckpointError: it cannot be written; the older ones are still there.
    """
    path = folder / f"step_{snapshot.step:08d}.safetensors"
    _write(path, snapshot.tensors, {_FACTS: json.dumps(snapshot.facts)})
    for _, older in _list_snapshots(folder)[:-keep_last]:
        older.unlink()
    return path


def load_last_snapshot(folder: Path) -> Snapshot | None:
    """Read the newest snapshot that can be read; None when there is none at all.

    A damaged one, which a lost disk can leave, is passed over for the one before it.

    Raises:
        CheckpointError: there are snapshots, and none can be read.
    """
    return _read_last(folder, with_tensors=True)


def read_last_facts(folder: Path) -> dict[str, Any] | None:
    """Read what is no tensor of the snapshot that `load_last_snapshot` would most likely load.

    Raises:
        CheckpointError: there are snapshots, and none can be read.
    """
    snapshot = _read_last(folder, with_tensors=False)
    return snapshot.facts if snapshot else None


def _read_last(folder: Path, *, with_tensors: bool) -> Snapshot | None:
    problems = []
    for step, path in reversed(_list_snapshots(folder)):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                facts = json.loads((file.metadata() or {})[_FACTS])
                names = file.keys() if with_tensors else []
                tensors = {name: file.get_tensor(name) for name in names}
            return Snapshot(step, tensors, facts)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            problems.append(f"{path.name}: {error}")
    if problems:
        raise CheckpointError(
            f"none of the {len(problems)} snapshots in {str(folder)!r} can be read "
            f"({problems[0]}). Start anew in another --out-dir."
        )
    return None


def pack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a prefix before every name."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def unpack(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `pack` put under a prefix."""
    start = f"{prefix}/"
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}


def _list_snapshots(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((_SNAPSHOT.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{str(path)!r} cannot be written: {error}. What was saved before is intact; make room "
            "and run it again, python -m training.run --resume."
        ) from error


def flatten_optimizer(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name each tensor of an optimiser's state by its parameter and its role in one string."""
    return {f"{name}:{role}": t for name, roles in state.items() for role, t in roles.items()}


def unflatten_optimizer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo `flatten_optimizer`."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, role = key.rpartition(":")
        state.setdefault(name, {})[role] = tensor
    return state


def remove_partials(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for partial in folder.rglob(".*.partial"):
        partial.unlink(missing_ok=True)
