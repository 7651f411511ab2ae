"""Which precision a run computes in when it is told none: BF16 where the device multiplies it fast.

Without its own instructions a processor computes BF16 by way of FP32: of the bundled model's recipe
a step then takes about ten times as long as in FP32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from clip_rt import processor
from clip_rt.processor import Processor
from training import parallel
from training.checkpoint import read_last_facts
from training.config import Precision, TrainConfig


@dataclass(frozen=True)
class Settled:
    """The precision of a run."""

    precision: Precision
    """Never auto."""
    reason: str
    """Why, for the log."""
    warning: str = ""
    """Why another would be faster; empty where none would."""


def settle(config: TrainConfig, world: parallel.World) -> tuple[TrainConfig, Settled]:
    """Replace the precision auto by the one to compute in; call it on all processes alike.

    A run that goes on keeps what it was begun with.

    Returns:
        The configuration, and why it has this precision.
    """
    earlier = None
    if world.is_first and config.precision == "auto" and config.resume:
        facts = read_last_facts(config.out_dir / "snapshots")
        earlier = facts["config"].get("precision") if facts else None
    has_all = parallel.mean_over_ranks(torch.tensor(float(has_fast_bf16(world.device)))).item() == 1
    found = choose(
        config.precision,
        has_fast_bf16=has_all,
        device=describe(world.device),
        earlier=parallel.broadcast(earlier),
    )
    return replace(config, precision=found.precision), found


def choose(
    asked: Precision, *, has_fast_bf16: bool, device: str, earlier: Precision | None = None
) -> Settled:
    """Choose the precision of a run.

    Args:
        asked: What the configuration says.
        has_fast_bf16: Whether every device multiplies BF16 as such.
        device: What computes, in words.
        earlier: What the run that is to go on was begun with.
    """
    fast = f"{device} multiplies BF16 as such" if has_fast_bf16 else f"{device} has no fast BF16"
    if asked == "auto":
        if earlier is not None:
            return Settled(earlier, "the run was begun with it")
        return Settled("bf16" if has_fast_bf16 else "fp32", fast)
    warning = ""
    if asked == "bf16" and not has_fast_bf16:
        warning = f"bf16 is slow here: {fast}. --precision fp32 is faster, and auto takes it."
    return Settled(asked, "it was asked for", warning)


def has_fast_bf16(device: torch.device, found: Processor | None = None) -> bool:
    """Tell whether a device multiplies BF16 by instructions of its own.

    Args:
        device: Where the run computes.
        found: The processor, where that is the device; this one if None.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch's own answer covers processors too that have AVX-512 and no BF16, where it is no faster.
    if not (found or processor.read()).has_fast_bf16 or not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def describe(device: torch.device) -> str:
    """Name a device in words, with what decides how fast it is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor.read().label
