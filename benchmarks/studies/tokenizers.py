"""How long a tokenizer of 256,000 tokens takes: to come from the server, to load, to read labels.

    python -m benchmarks.studies.tokenizers

The tokenizer is made here as Gemma's is, SigLIP 2's, with as many tokens and nearly as many merges,
in a smaller file. A real server hands it out. Each round is two new processes: the first finds an
empty cache, the second what the first kept. Both import clip_rt, connect, ask for the tokenizer,
and read labels.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import clip_rt
from benchmarks.record import save
from benchmarks.studies import made_tokenizers
from benchmarks.studies.common import ROOT, console, show, write_towers
from benchmarks.studies.scripts import draw_texts, named_words
from clip_rt.inputs import tokenizer_file
from clip_rt.specs import TextSpec, find_spec
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.pipeline import fingerprint_of, make_manifest, random_clip
from export.repository import publish

MODULE = "studies.tokenizers"
NUM_LABELS = 1000
MAX_LOAD_S = 1.5
MAX_LABELS_S = 0.05
CONTEXT_LENGTH = 64
UNTIMED = "imports of tokenizers by clip_rt"


@dataclass(frozen=True, kw_only=True)
class TokenizersConfig:
    """Measure, print a table, and write a dated JSON."""

    rounds: int = 5
    """Of two processes each."""


def draw_labels() -> dict[str, list[str]]:
    """Return labels in their prompts: English ones, and some in twenty scripts."""
    rng = np.random.default_rng(3)
    english = [" ".join(rng.choice(named_words(), 2)) for _ in range(NUM_LABELS)]
    many = [" ".join(text.split()[:2])[:24] or "x" for text in draw_texts(NUM_LABELS, seed=3)]
    return {
        "English labels": [f"a photo of a {label}." for label in english],
        "labels in 20 scripts": [f"a photo of a {label}." for label in many],
    }


def write_repository(folder: Path) -> dict[str, Any]:
    """Publish a small model with the tokenizer; return what the tokenizer is."""
    content = tokenizer_file.compact(made_tokenizers.gemma())
    spec = find_spec("RN26@64px")
    vocab_size = made_tokenizers.GEMMA_TOKENS
    text = TextSpec(
        width=64, layers=1, heads=1, context_length=CONTEXT_LENGTH, vocab_size=vocab_size
    )
    clip = random_clip(replace(spec, text=text))
    files = write_towers(clip, folder / "towers")
    described = tokenizer_file.describe(
        content, vocab_size=vocab_size, cleaning="canonical", pad_id=0
    )
    manifest = replace(
        make_manifest(clip, "gemma", precision="fp32", weights_fingerprint=fingerprint_of(clip)),
        tokenization=described,
    )
    image, text_file = files["image"], files["text"]
    publish(folder / "models", manifest, image=image, text=text_file, tokenizer_file=content)
    model = json.loads(content)["model"]
    return {
        "num_tokens": len(model["vocab"]),
        "num_merges": len(model["merges"]),
        "megabytes": round(len(content) / 1e6, 1),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def run_process(url: str, labels: Path, cache: Path) -> dict[str, Any]:
    """Ask in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.studies.tokenizer_process", url, str(labels)],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return dict(json.loads(done.stdout))


def summarise(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each step, in milliseconds."""
    return {
        name: round(1e3 * float(np.median([each[name] for each in rounds])), 1)
        for name in rounds[0]
        if name != UNTIMED
    }


def main(config: TokenizersConfig) -> None:
    """Measure in new processes, beside a server of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with console.status("make a tokenizer and a model"):
            tokenizer = write_repository(folder)
        labels = folder / "labels.json"
        labels.write_text(json.dumps(draw_labels()), "utf-8")
        rounds: dict[str, list[dict[str, Any]]] = {"first process": [], "later process": []}
        server = clip_rt.EmbeddedServer(folder / "models")
        url = server.start()
        try:
            for turn in range(config.rounds):
                for each in rounds.values():
                    each.append(run_process(url, labels, folder / f"cache_{turn}"))
        finally:
            server.stop()
    medians = {name: summarise(each) for name, each in rounds.items()}
    names = list(medians["first process"])
    show(
        ("milliseconds", *medians),
        [(name, *(each[name] for each in medians.values())) for name in names],
        f"{tokenizer['num_tokens']:,} tokens, {tokenizer['megabytes']} MB",
    )
    all_rounds = [each for name in rounds for each in rounds[name]]
    bars = {
        "loaded in 1.5 s": medians["later process"]["tokenizer"] <= 1e3 * MAX_LOAD_S,
        "1,000 English labels in 50 ms": medians["later process"]["English labels, again"]
        <= 1e3 * MAX_LABELS_S,
        "not loaded at import": not any(each[UNTIMED] for each in all_rounds),
    }
    for what, is_met in bars.items():
        console.print(f"{what}: {'yes' if is_met else 'NO'}", highlight=False)
    packages = ("ftfy", "tokenizers")
    results = {"tokenizer": tokenizer, "medians_ms": medians, "rounds_s": rounds, "bars": bars}
    save(MODULE, results, packages=packages)


if __name__ == "__main__":
    with command():
        main(tyro.cli(TokenizersConfig, prog=program(__spec__.name), description=__doc__))
