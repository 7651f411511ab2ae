"""Activations that are computed twice instead of kept: gradient checkpointing for one module.

A module and its inputs go in, its output comes out, with the same gradients and side effects.

Source: Chen et al. 2016, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(module: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Call `module` now and again in the backward pass, keeping none of its activations.

    It must draw no random numbers: the second call would draw others.
    """
    if not torch.is_grad_enabled():
        return module(*inputs)
    if torch.compiler.is_compiling():  # Compiled code has no side effects to hold back.
        return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), hold_running_statistics(module)),
    )


@contextmanager
def hold_running_statistics(module: nn.Module) -> Iterator[None]:
    """Let batch normalisation see a batch a second time without counting it twice."""
    norms = _batch_norms(module)
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Without running statistics it would save other tensors than the first time.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Return what a forward pass in training mode changes: statistics of batch normalisation."""
    return [
        tensor
        for norm in _batch_norms(module)
        for tensor in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        if tensor is not None
    ]


def _batch_norms(module: nn.Module) -> list[nn.BatchNorm2d | nn.SyncBatchNorm]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
