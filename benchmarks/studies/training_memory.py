"""Peak memory of one update of ViT-B/32 in chunks, for small and large batches.

    python -m benchmarks.studies.training_memory

Each batch is trained on in a fresh process, whose highest resident size (VmHWM) is what counts:
weights, gradients, AdamW's state, the activations of one chunk, the embeddings of all. Chunks of
pairs are made when they are asked for, as a data set too large for memory would.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import tyro
from tyro.conf import UseAppendAction

from benchmarks.record import save
from benchmarks.resources import peak_mib
from benchmarks.studies.common import PRECISIONS, console, make_batch, make_step
from clip_rt.specs import find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from training.data.batches import Batch
from training.model import CLIP

MODEL = "ViT-B/32"
BATCH_SIZES = (256, 1024)


@dataclass(frozen=True, kw_only=True)
class TrainingMemoryConfig:
    """Measure, print, and write a dated JSON."""

    batch_size: UseAppendAction[tuple[int, ...]] = ()
    """Pairs per update; several. Without it, 256 and 1024."""
    chunk_size: int = 16
    """Pairs in memory at once."""


class SyntheticChunks(Sequence[Batch]):
    """Chunks of random pairs with tokens of full length, each made anew whenever it is taken."""

    def __init__(self, batch_size: int, chunk_size: int) -> None:
        self.num_chunks, self.chunk_size = batch_size // chunk_size, chunk_size

    def __len__(self) -> int:
        return self.num_chunks

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        spec = find_spec(MODEL)
        return make_batch(spec, self.chunk_size, spec.text.context_length, seed=index)


def update_once(batch_size: int, chunk_size: int) -> tuple[float, float]:
    """Make one update; return this process's peak in MiB, and the seconds of the update."""
    torch.manual_seed(0)
    clip = CLIP(find_spec(MODEL)).train()
    step = make_step(clip, SyntheticChunks(batch_size, chunk_size), PRECISIONS["bf16"])
    start_s = time.perf_counter()
    step()
    elapsed_s = time.perf_counter() - start_s
    return peak_mib(os.getpid()), elapsed_s


def measure(batch_size: int, chunk_size: int) -> dict[str, float]:
    """Run `update_once` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        mib, elapsed_s = pool.submit(update_once, batch_size, chunk_size).result()
    return {
        "batch_size": batch_size,
        "peak_mib": round(mib, 1),
        "embeddings_mib": 2 * batch_size * find_spec(MODEL).embedding_dim * 4 / 2**20,
        "elapsed_s": round(elapsed_s, 1),
    }


def main(config: TrainingMemoryConfig) -> None:
    """Measure each batch size."""
    rows = []
    for size in config.batch_size or BATCH_SIZES:
        rows.append(measure(size, config.chunk_size))
        console.print(rows[-1])
    results = {"model": MODEL, "precision": "bf16 autocast", "chunk_size": config.chunk_size}
    save("studies.training_memory", results | {"rows": rows}, packages=("torch",))


if __name__ == "__main__":
    with command():
        main(tyro.cli(TrainingMemoryConfig, prog=program(__spec__.name), description=__doc__))
