"""Weights on disk: safetensors, published by atomic rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from training.model import CLIP


def save_checkpoint(path: Path, model: CLIP, *, step: int, config: dict[str, Any]) -> None:
    """Write the weights with the step, the architecture and the configuration beside them.

    Args:
        path: Ends in .safetensors. A reader sees the old file or the new one, never a part.
        model: Its state dict is saved under OpenAI's names.
        step: Updates done.
        config: Everything the run was started with; must be JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"architecture": model.spec.name, "step": str(step), "config": json.dumps(config)}
    save_file(weights, partial, metadata=metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
