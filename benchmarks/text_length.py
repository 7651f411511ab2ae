"""What cutting texts at their length saves, and that it changes nothing: 256 ImageNet prompts.

    python -m benchmarks.text_length

CLIP reads 77 tokens whatever a text holds. Its text tower is causal and read at the end of text, so
what follows cannot reach the embedding: cutting it off is exact. The FP32 text tower of an
architecture with random weights runs in ONNX Runtime, in batches by turns, at each length.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.record import save
from benchmarks.training_step import import_open_clip
from clip_rt.inputs.tokenizer import encode as encode_texts
from clip_rt.inputs.tokenizer import pad
from clip_rt.requests.batches import MAX_ROWS, plan_texts
from clip_rt.specs import TEXT_BUCKETS, find_spec
from export.graphs import TextGraph
from export.onnx_writer import write_onnx
from export.parity import Encoder, onnx_encoder
from export.road import random_clip

NUM_PROMPTS, LONGEST_TOKENS = 256, 11
AS_SENT = "as the client sends them"
"""Sorted, each request at the length of its longest text."""

Requests = list[NDArray[np.int32]]


def imagenet_prompts() -> list[list[int]]:
    """Return the ids of the first prompts of ImageNet's classes that are not longer than most.

    Classes are named as OpenAI names them; start and end of text count.
    """
    names = import_open_clip().IMAGENET_CLASSNAMES
    token_ids = encode_texts([f"a photo of a {name}." for name in names])
    return [ids for ids in token_ids if len(ids) <= LONGEST_TOKENS][:NUM_PROMPTS]


def requests_of(token_ids: list[list[int]], length_tokens: int) -> Requests:
    """Pad all texts to one length, in requests of the client's size."""
    tokens_NL = pad(token_ids, length_tokens=length_tokens)
    return [tokens_NL[start : start + MAX_ROWS] for start in range(0, len(tokens_NL), MAX_ROWS)]


def run(encode: Encoder, requests: Requests) -> NDArray[np.float32]:
    """Embed all texts."""
    return np.concatenate([encode(tokens_BL) for tokens_BL in requests])


def main(
    model: Annotated[str, typer.Option(help="Architecture.")] = "ViT-B/32",
    num_rounds: Annotated[int, typer.Option(help="Timed rounds of each length.")] = 11,
    num_threads: Annotated[int, typer.Option(help="Of ONNX Runtime.")] = 2,
) -> None:
    """Measure, print a table, and write a dated JSON."""
    torch.set_num_threads(num_threads)
    clip = random_clip(find_spec(model))
    token_ids = imagenet_prompts()
    whole = str(clip.spec.text.context_length)
    forms = {
        str(length): requests_of(token_ids, length) for length in (LONGEST_TOKENS, *TEXT_BUCKETS)
    }
    plan = plan_texts(token_ids, max_rows=MAX_ROWS)
    forms[AS_SENT] = list(plan.batches)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.onnx"
        write_onnx(TextGraph(clip), clip.spec, file)
        encode = onnx_encoder(file)
        found = {name: run(encode, requests) for name, requests in forms.items()}
        found[AS_SENT] = found[AS_SENT][plan.row_by_text]
        times_s: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(num_rounds):
            for name, requests in forms.items():
                start_s = time.perf_counter()
                run(encode, requests)
                times_s[name].append(time.perf_counter() - start_s)
    table, results = Table("tokens", "ms", f"speed to {whole}", "largest difference"), {}
    for name, times in times_s.items():
        ratios = [a / b for a, b in zip(times_s[whole], times, strict=True)]
        difference = float(np.abs(found[name] - found[whole]).max())
        results[name] = {
            "median_ms": round(1e3 * statistics.median(times), 2),
            "speed": round(statistics.median(ratios), 3),
            "max_difference": difference,
        }
        row = results[name]
        table.add_row(name, f"{row['median_ms']:.1f}", f"{row['speed']:.2f}", f"{difference:.1e}")
    Console().print(table)
    document = {
        "model": model,
        "num_prompts": len(token_ids),
        "num_threads": num_threads,
        "results": results,
    }
    path = save("text_length", document, packages=("onnxruntime", "open_clip_torch", "torch"))
    Console().print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
