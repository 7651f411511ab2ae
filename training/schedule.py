"""The learning rate of each step."""

from __future__ import annotations

import math


def cosine_lr(step: int, *, peak_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Rise linearly to `peak_lr`, then fall to zero along half a cosine (section 2.5)."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
