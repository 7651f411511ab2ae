"""Is a client's answer that of the model's own library? For every family, through the whole stack.

    python -m benchmarks.studies.families
    python -m benchmarks.studies.families --family 'open_clip PE-Core' --family 'transformers BLIP'

Files, bytes and strings go in, embeddings come out: through a client, the tokenizer that the server
hands out, and a real Triton. Beside it, the library's own preprocessing, tokenizer and model, in
FP32. Weights are random (`studies.small_encoders`). A run that was interrupted goes on with the
families it has not measured at this commit. The exit code is 1 where one is beyond a bar.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from tyro.conf import UseAppendAction

import clip_rt
from benchmarks.record import commit, save
from benchmarks.studies.common import console, show
from benchmarks.studies.scripts import RANGES, draw_texts
from benchmarks.studies.small_encoders import FAMILIES
from clip_rt import served_tokenizer
from clip_rt.inputs.tokenizer import pad
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export import source_parity
from export.onnx import OnnxConfig, export
from training.encoders.encoder import encode_usable
from training.encoders.find import load_encoder

MODULE = "studies.families"
MAX_LEVELS = source_parity.MAX_LEVELS + source_parity.LEVEL_ROUNDING
MAX_DIFFERENCE = 2e-5
NUM_TEXTS = 1000
ROWS = 64
PACKAGES = (
    *("numpy", "onnxruntime", "open_clip_torch", "openvino", "pillow", "timm", "tokenizers"),
    *("torch", "transformers"),
)
FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, kw_only=True)
class FamiliesConfig:
    """Measure, print a table, and write a dated JSON."""

    family: UseAppendAction[tuple[str, ...]] = ()
    """Of `studies.small_encoders`; without it, all."""
    num_texts: int = NUM_TEXTS
    """In twenty scripts, by turns."""
    folder: Path = Path("build/families")
    """Keeps what was measured of each family, for a run that goes on."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How far a client is from the library, for one family."""

    family: str
    resizing: str
    tokenizer: str
    vocab_size: int
    max_levels: float
    """Of 255, largest difference of a pixel."""
    num_texts: int
    """That say something to the model, all measured."""
    num_other_ids: int
    """Texts whose ids are not the library's."""
    max_image_difference: float
    """Of numbers of embeddings of length 1."""
    max_text_difference: float
    seconds: float

    @property
    def is_met(self) -> bool:
        """Whether all bars are."""
        return (
            self.max_levels <= MAX_LEVELS
            and self.num_other_ids == 0
            and max(self.max_image_difference, self.max_text_difference) <= MAX_DIFFERENCE
        )


def measure(family: str, folder: Path, *, num_texts: int = NUM_TEXTS) -> Finding:
    """Make a model of a family, export and serve it, and compare.

    Args:
        family: Of `FAMILIES`.
        folder: Empty; what is made is left in it.
        num_texts: In twenty scripts.
    """
    start_s = time.monotonic()
    model = FAMILIES[family].write(folder / "source")
    export(
        OnnxConfig(model=model, name="family", repository=folder / "models", cache=folder / "made")
    )
    encoder = load_encoder(model, weights="openai")
    facts = encoder.facts
    texts = list(encode_usable(encoder, draw_texts(num_texts)))
    inputs = list(_encode_images(folder))
    images = [Image.open(io.BytesIO(each)).convert("RGB") for each in inputs]
    with _own_cache(folder), clip_rt.Client(repository=folder / "models", timeout_s=300) as client:
        found_images = client.encode_images([_as_some_input(each, folder) for each in inputs])
        found_texts = client.encode_texts(texts, truncate=True)
        # Of what came from the server, and not of what the export has in memory.
        read = client._session.call("load_tokenizer", None, served_tokenizer.load_tokenizer)
    ids = pad(
        [read.encode_text(text, truncate=True) for text in texts],
        length_tokens=facts.context_length,
        pad_id=facts.tokenization.pad_id,
    )
    their_ids = encoder.source.tokens(texts)
    return Finding(
        family=family,
        resizing=f"{facts.resizing.mode}, {facts.resizing.interpolation}",
        tokenizer=facts.tokenization.kind,
        vocab_size=facts.tokenization.vocab_size,
        max_levels=round(float(source_parity.pixel_differences(encoder, images).max()), 4),
        num_texts=len(texts),
        num_other_ids=int((ids != their_ids).any(axis=1).sum()),
        max_image_difference=_difference(
            found_images, encoder.encode_image, encoder.source.pixels(images)
        ),
        max_text_difference=_difference(found_texts, encoder.encode_text, their_ids),
        seconds=round(time.monotonic() - start_s, 1),
    )


def _encode_images(folder: Path) -> Iterator[bytes]:
    for index, (width, height) in enumerate(source_parity.SIZES_PX):
        file = io.BytesIO()
        source_parity.draw(width, height).save(file, format=FORMATS[index % len(FORMATS)])
        yield file.getvalue()


def _as_some_input(content: bytes, folder: Path) -> Any:
    """Return an image as bytes, or as a file, by turns of its size."""
    if len(content) % 2:
        return content
    path = folder / f"{len(content)}.image"
    path.write_bytes(content)
    return path


@contextlib.contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Let the tokenizer come from the server: this user's cache may have it."""
    name, before = "XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME")
    os.environ[name] = str(folder / "cache")
    served_tokenizer._loaded.clear()
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@torch.inference_mode()
def _difference(found: NDArray[np.float32], encode: Any, array: NDArray[Any]) -> float:
    rows = [
        encode(torch.from_numpy(part)) for part in np.split(array, range(ROWS, len(array), ROWS))
    ]
    expected = torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()
    return float(f"{np.abs(found - expected).max():.2e}")


def main(config: FamiliesConfig) -> None:
    """Measure each family, and keep each as it is measured."""
    code, findings, failed = commit(), [], {}
    config.folder.mkdir(parents=True, exist_ok=True)
    for family in config.family or FAMILIES:
        kept = config.folder / f"{family.replace(' ', '_')}_{config.num_texts}_{code}.json"
        if kept.is_file() and not code.endswith("+"):
            findings.append(Finding(**json.loads(kept.read_text("utf-8"))))
            continue
        console.rule(family)
        try:
            with tempfile.TemporaryDirectory() as folder:
                findings.append(measure(family, Path(folder), num_texts=config.num_texts))
        except clip_rt.ClipRTError as error:
            failed[family] = str(error)
            console.print(f"{family}: {error}", markup=False)
            continue
        kept.write_text(json.dumps(asdict(findings[-1])), "utf-8")
    show(
        ("family", "levels", "texts", "other ids", "images", "texts", "met"),
        [
            (
                *(each.family, each.max_levels, each.num_texts, each.num_other_ids),
                *(each.max_image_difference, each.max_text_difference),
                "yes" if each.is_met else "NO",
            )
            for each in findings
        ],
    )
    results = {
        "commit": code,
        "num_scripts": len(RANGES),
        "max_difference": MAX_DIFFERENCE,
        "results": [asdict(each) | {"met": each.is_met} for each in findings],
        "failed": failed,
    }
    save(MODULE, results, packages=PACKAGES)
    if failed or not all(each.is_met for each in findings):
        sys.exit(1)


if __name__ == "__main__":
    with command():
        main(tyro.cli(FamiliesConfig, prog=program(__spec__.name), description=__doc__))
