"""Peak memory of one update of ViT-B/32 in chunks, for small and large batches.

    python -m benchmarks.training_memory

Each batch is trained on in a fresh process, whose highest resident size (VmHWM) is what counts:
weights, gradients, AdamW's state, the activations of one chunk, the embeddings of all. Chunks of
pairs are made when they are asked for, as a data set too large for memory would.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.record import save
from clip_rt.specs import END_OF_TEXT, START_OF_TEXT, VOCAB_SIZE, find_spec
from training.accumulate import cached_backward
from training.data.batches import Batch
from training.loss import contrastive_loss
from training.model import CLIP
from training.optimizer import adamw

MODEL = "ViT-B/32"


class SyntheticChunks(Sequence[Batch]):
    """Chunks of random pairs with tokens of full length, each made anew whenever it is taken."""

    def __init__(self, batch_size: int, chunk_size: int) -> None:
        self.num_chunks, self.chunk_size = batch_size // chunk_size, chunk_size

    def __len__(self) -> int:
        return self.num_chunks

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        return synthetic_batch(self.chunk_size, seed=index)


def synthetic_batch(num_pairs: int, *, seed: int) -> Batch:
    """Draw images and captions that fill the context length."""
    spec = find_spec(MODEL)
    generator = torch.Generator().manual_seed(seed)
    image_BCSS = torch.randn(num_pairs, 3, spec.side_px, spec.side_px, generator=generator)
    tokens_BL = torch.randint(
        1, VOCAB_SIZE - 2, (num_pairs, spec.text.context_length), generator=generator
    )
    tokens_BL[:, 0], tokens_BL[:, -1] = START_OF_TEXT, END_OF_TEXT
    return Batch(image_BCSS, tokens_BL, torch.arange(num_pairs) + seed * num_pairs)


def update_once(batch_size: int, chunk_size: int) -> None:
    """Make one update and print this process's peak in MiB, and how long the update took."""
    torch.manual_seed(0)
    clip = CLIP(find_spec(MODEL)).train()
    optimizer = adamw(clip, peak_lr=1e-3, weight_decay=0.1)
    started_s = time.perf_counter()
    cached_backward(
        clip,
        SyntheticChunks(batch_size, chunk_size),
        lambda image_BE, text_BE, group_B: contrastive_loss(
            image_BE, text_BE, clip.logit_scale.exp(), group_B=group_B
        ),
        autocast=partial(torch.autocast, "cpu", torch.bfloat16),
    )
    optimizer.step()
    elapsed_s = time.perf_counter() - started_s
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(peak_kib / 1024, elapsed_s)  # noqa: T201


def measure(batch_size: int, chunk_size: int) -> dict[str, float]:
    """Run `update_once` in a process of its own."""
    code = f"from benchmarks.training_memory import update_once; update_once({batch_size}, "
    command = [sys.executable, "-c", f"{code}{chunk_size})"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    peak_mib, elapsed_s = map(float, result.stdout.split())
    embeddings_mib = 2 * batch_size * find_spec(MODEL).embedding_dim * 4 / 2**20
    return {
        "batch_size": batch_size,
        "peak_mib": round(peak_mib, 1),
        "embeddings_mib": embeddings_mib,
        "elapsed_s": round(elapsed_s, 1),
    }


def main(
    batch_size: Annotated[list[int], typer.Option(help="Pairs per update; several.")] = [256, 1024],  # noqa: B006
    chunk_size: Annotated[int, typer.Option(help="Pairs in memory at once.")] = 16,
) -> None:
    """Measure, print, and write a dated JSON."""
    rows = []
    for size in batch_size:
        rows.append(measure(size, chunk_size))
        Console().print(rows[-1])
    results = {"model": MODEL, "precision": "bf16 autocast", "chunk_size": chunk_size, "rows": rows}
    Console().print(save("training_memory", results, packages=("torch",)))


if __name__ == "__main__":
    typer.run(main)
