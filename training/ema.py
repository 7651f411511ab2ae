"""A slowly moving average of a model's weights, often better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class WeightAverage:
    """Exponential moving average of all parameters and of batch normalisation's statistics.

    Args:
        model: Whose weights to follow, sharded or not; they must not be replaced, only changed.
        decay: Share of the average that is kept at each update, below 1.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self._decay = decay
        self._live = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
        self.average = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self, step: int | Tensor, is_due: Tensor | None = None) -> None:
        """Move towards the weights; faster at first, when they are still mostly noise.

        Args:
            step: Updates of the weights before this one, a number or int64 ().
            is_due: bool (); where false, the average stays as it is.
        """
        reference = next(iter(self.average.values()))
        step = torch.as_tensor(step, device=reference.device).double()
        weight = 1 - ((1 + step) / (10 + step)).clamp(max=self._decay)
        weight = weight.to(reference.dtype)
        if is_due is not None:
            weight = weight * is_due
        averages = [_own_part(average) for average in self.average.values()]
        live = [_own_part(self._live[name]) for name in self.average]
        torch._foreach_lerp_(averages, live, [weight] * len(live))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the average into the model for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.average.items():
            live = self._live[name]
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)


def _own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
