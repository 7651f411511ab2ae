"""What cutting texts at their length saves, and that it changes nothing: 256 ImageNet prompts.

    python -m benchmarks.studies.text_length

CLIP reads 77 tokens whatever a text holds. Its text tower is causal and read at the end of text, so
what follows cannot reach the embedding: cutting it off is exact. The FP32 text tower of an
architecture with random weights runs in ONNX Runtime, in batches by turns, at each length.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.record import save
from benchmarks.studies.common import show, write_towers
from benchmarks.timing import speeds, take_rounds, time_each
from clip_rt.inputs import tokenizer
from clip_rt.requests.batches import MAX_ROWS, plan_texts
from clip_rt.specs import TEXT_BUCKETS, find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.parity import onnx_encoder
from export.pipeline import random_clip
from training.encoders.libraries import import_open_clip

NUM_PROMPTS, LONGEST_TOKENS = 256, 11
AS_SENT = "as the client sends them"
"""Sorted, each request at the length of its longest text."""


@dataclass(frozen=True, kw_only=True)
class TextLengthConfig:
    """Measure, print a table, and write a dated JSON."""

    model: str = "ViT-B/32"
    """Architecture."""
    num_rounds: int = 11
    """Timed rounds of each length."""
    num_threads: int = 2
    """Of ONNX Runtime."""


def imagenet_prompts() -> list[list[int]]:
    """Return the ids of the first prompts of ImageNet's classes that are not longer than most.

    Classes are named as OpenAI names them; start and end of text count.
    """
    names = import_open_clip().IMAGENET_CLASSNAMES
    token_ids = tokenizer.encode([f"a photo of a {name}." for name in names])
    return [ids for ids in token_ids if len(ids) <= LONGEST_TOKENS][:NUM_PROMPTS]


def requests_of(token_ids: list[list[int]], length_tokens: int) -> list[NDArray[np.int32]]:
    """Pad all texts to one length, in requests of the client's size."""
    tokens_NL = tokenizer.pad(token_ids, length_tokens=length_tokens)
    return [tokens_NL[start : start + MAX_ROWS] for start in range(0, len(tokens_NL), MAX_ROWS)]


def main(config: TextLengthConfig) -> None:
    """Compare what each length gives, then time it."""
    torch.set_num_threads(config.num_threads)
    clip = random_clip(find_spec(config.model))
    token_ids = imagenet_prompts()
    whole = str(clip.spec.text.context_length)
    forms = {
        str(length): requests_of(token_ids, length) for length in (LONGEST_TOKENS, *TEXT_BUCKETS)
    }
    plan = plan_texts(token_ids, max_rows=MAX_ROWS)
    forms[AS_SENT] = list(plan.batches)
    with tempfile.TemporaryDirectory() as folder:
        encode = onnx_encoder(write_towers(clip, Path(folder), ["text"])["text"])

        def embed(requests: list[NDArray[np.int32]]) -> NDArray[np.float32]:
            return np.concatenate([encode(tokens_BL) for tokens_BL in requests])

        found = {name: embed(requests) for name, requests in forms.items()}
        found[AS_SENT] = found[AS_SENT][plan.row_by_text]
        ways = {name: time_each(partial(embed, requests)) for name, requests in forms.items()}
        times_s = take_rounds(ways, config.num_rounds, is_warm=True)
    results = {
        name: {
            "median_ms": round(1e3 * time_s.median, 2),
            "speed": round(speed.median, 3),
            "max_difference": float(np.abs(found[name] - found[whole]).max()),
        }
        for name, (time_s, speed) in speeds(times_s, whole).items()
    }
    show(
        ("tokens", "ms", f"speed to {whole}", "largest difference"),
        [
            (name, f"{row['median_ms']:.1f}", f"{row['speed']:.2f}", f"{row['max_difference']:.1e}")
            for name, row in results.items()
        ],
    )
    settings = {"model": config.model, "num_prompts": len(token_ids)}
    settings["num_threads"] = config.num_threads
    packages = ("onnxruntime", "open_clip_torch", "torch")
    save("studies.text_length", settings | {"results": results}, packages=packages)


if __name__ == "__main__":
    with command():
        main(tyro.cli(TextLengthConfig, prog=program(__spec__.name), description=__doc__))
