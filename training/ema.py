"""A slowly moving average of a model's weights, often better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
        device = next(iter(self.average.values())).device
        step = torch.as_tensor(step, device=device).double()
        weight = 1 - ((1 + step) / (10 + step)).clamp(max=self._decay)
        if is_due is not None:
            weight = weight * is_due
        for name, average in self.average.items():
            average.lerp_(self._live[name], weight.to(average.dtype))

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
