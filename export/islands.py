"""Which layers must stay FP32: a graph and sample inputs in, the fewest islands found out.

Each layer's drift is measured alone, with every other layer in FP32. Then layers become islands in
the order of their drift, the embedding first because it makes the residual stream FP32 at next to
no cost, until the whole graph is as close to FP32 as asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from clip_rt.errors import CheckpointError
from export.graphs import Graph
from export.precision import Fp16Arithmetic, bake_fp16, set_dtype


@dataclass(frozen=True)
class Proposal:
    """What was found."""

    islands: tuple[str, ...]
    min_cosine: float
    """Of the graph with these islands, to the graph in FP32; -1 where a number is not finite."""
    min_cosine_without: float
    """Of the graph without any island."""
    drift_by_layer: dict[str, float]
    """1 - cosine with this layer alone in FP16, from the largest; infinite where FP16 overflows."""


class _Trial:
    """A graph whose layers change their precision back and forth."""

    def __init__(self, graph: Graph, inputs: Tensor) -> None:
        self.names = list(graph.layers())
        self._graph = bake_fp16(graph, self.names)
        self._layers = self._graph.layers()
        self._weights = {
            name: {key: tensor.clone() for key, tensor in layer.state_dict().items()}
            for name, layer in self._layers.items()
        }
        self._inputs = inputs
        self._is_half = dict.fromkeys(self.names, False)
        self._reference = self._run()

    def cosine(self, islands: set[str]) -> float:
        """Return the smallest cosine to FP32 with all but these layers in FP16."""
        try:
            for name in self.names:
                self._set(name, half=name not in islands)
        except CheckpointError:  # A weight beyond the range.
            return -1.0
        found = self._run()
        cosine_B = torch.nn.functional.cosine_similarity(
            found.double(), self._reference.double(), dim=-1
        )
        return float(cosine_B.min()) if bool(cosine_B.isfinite().all()) else -1.0

    def _set(self, name: str, *, half: bool) -> None:
        if half == self._is_half[name]:
            return
        set_dtype(name, self._layers[name], torch.float16 if half else torch.float32)
        if not half:
            self._layers[name].load_state_dict(self._weights[name])
        self._is_half[name] = half

    @torch.inference_mode()
    def _run(self) -> Tensor:
        with Fp16Arithmetic():
            output: Tensor = self._graph(self._inputs)
            return output


def propose_islands(
    graph: Graph, inputs: Tensor, *, min_cosine: float, progress: bool = True
) -> Proposal:
    """Find few layers to keep in FP32.

    Args:
        graph: float32, in eval mode.
        inputs: Pixels or tokens the graph reads; a handful is enough.
        min_cosine: What the graph in FP16 must reach on every input.
        progress: Show a bar; a trial runs the graph once for each of its layers.

    Returns:
        The proposal. Its cosine may still be below `min_cosine` if FP16 is not enough for what
        this graph does; all layers are then islands.
    """
    trial = _Trial(graph, inputs)
    everything = set(trial.names)
    without = trial.cosine(set())
    drift: dict[str, float] = {}
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    for name in track(
        trial.names, "measuring FP16 drift by layer", console=console, disable=hidden
    ):
        cosine = trial.cosine(everything - {name})
        drift[name] = 1 - cosine if cosine >= 0 else math.inf
    drift = dict(sorted(drift.items(), key=lambda item: -item[1]))
    embedding = trial.names[0]
    order = [embedding, *(name for name in drift if name != embedding)]
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if trial.cosine(set(order[:middle])) >= min_cosine:
            high = middle
        else:
            low = middle + 1
    islands = set(order[:high])
    if len(islands) > 1 and trial.cosine(islands - {embedding}) >= min_cosine:
        islands.discard(embedding)
    return Proposal(
        islands=tuple(name for name in trial.names if name in islands),
        min_cosine=trial.cosine(islands),
        min_cosine_without=without,
        drift_by_layer=drift,
    )


def print_proposal(proposal: Proposal, console: Console, *, rows: int = 8) -> None:
    """Print the layers that drift most, and which become islands."""
    table = Table("layer", "1 - cosine, alone in FP16", "island")
    for name, drift in list(proposal.drift_by_layer.items())[:rows]:
        shown = "overflows" if math.isinf(drift) else f"{drift:.1e}"
        table.add_row(name, shown, "yes" if name in proposal.islands else "")
    table.caption = (
        f"cosine {proposal.min_cosine_without:.6f} without islands, {proposal.min_cosine:.6f} with "
        f"{len(proposal.islands)} of {len(proposal.drift_by_layer)} layers"
    )
    console.print(table)
