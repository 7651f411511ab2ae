"""How well `clip-rt search` finds drawings by name, in styles that the bundled model never saw.

    python -m benchmarks.studies.search_quality

Each held-out style is written to files, indexed and searched as a user's folder would be. A search
for a name is right where a drawing of that name is among the first hits. What `-word` does is
measured on names that share a word: `moon -face` should find the moons that have no face.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image

import clip_rt
from benchmarks.record import save
from benchmarks.studies.common import ROOT, show
from benchmarks.studies.drawings import pictures
from benchmarks.studies.emoji import load_style, names
from clip_rt.search import Index
from clip_rt_commands import program
from clip_rt_commands.errors import command

STYLES = ("openmoji", "openmoji-black", "flat-color-icons", "iconoir")
TEMPLATES = ("{}", "an emoji of {}", "a drawing of {}", "a photo of a {}.")
RANKS = (1, 5, 10)
MINUS_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MIN_WITH, MIN_WITHOUT = 3, 3
"""Names with both words, and with the first alone, of a search with a minus."""


@dataclass(frozen=True, kw_only=True)
class SearchQualityConfig:
    """Measure, print tables, and write a dated JSON."""

    repository: Path = ROOT / "model_repository"
    """Model repository to serve."""


def write_files(style: str, folder: Path) -> list[str]:
    """Write the drawings of a style as files, and return their names, in the order of the files."""
    drawings = load_style(style)
    for number, picture in enumerate(pictures(drawings)):
        Image.fromarray(picture).save(folder / f"{number:05d}.png")
    return names(drawings)


def find_by_name(
    client: clip_rt.Client, index: Index, drawn: Sequence[str], template: str
) -> dict[str, float]:
    """Search for each name, and return recall by rank and the number of names."""
    asked = sorted(set(drawn))
    vectors = client.encode_texts([template.replace("{}", name) for name in asked], truncate=True)
    ranks = []
    for name, vector in zip(asked, vectors, strict=True):
        hits = index.find(vector, client.manifest, top=max(RANKS))
        # The same drawing may stand for several names.
        found = [{drawn[int(Path(path).stem)] for path in (hit.path, *hit.copies)} for hit in hits]
        ranks.append(next((rank for rank, each in enumerate(found, 1) if name in each), np.inf))
    recall = {f"recall_at_{rank}": float((np.array(ranks) <= rank).mean()) for rank in RANKS}
    return recall | {"names": len(asked), "images": len(drawn)}


def measure_minus(client: clip_rt.Client, drawn: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return by weight how well `word -other` finds names with the one and without the other."""
    words = [set(re.findall(r"[a-z]+", name.lower())) for name in drawn]
    num_by_word = Counter(word for each in words for word in each if len(word) > 2)
    pairs = []
    for word, num in sorted(num_by_word.items()):
        if num < MIN_WITH + MIN_WITHOUT or num > len(drawn) // 20:
            continue
        has_word = np.array([word in each for each in words])
        beside = Counter(
            other for each in words if word in each for other in each - {word} if len(other) > 2
        )
        for other, num_both in sorted(beside.items()):
            if MIN_WITH <= num_both <= num - MIN_WITHOUT:
                has_other = np.array([other in each for each in words])
                pairs.append((word, other, has_word & ~has_other, has_word & has_other))
    texts = sorted({each for word, other, _, _ in pairs for each in (word, other)})
    rows = client.encode_texts(texts)
    vector_by_text = dict(zip(texts, rows, strict=True))
    drawings = client.encode_images(pictures(load_style("openmoji")))
    return {
        str(weight): _precision(pairs, vector_by_text, drawings, weight) for weight in MINUS_WEIGHTS
    }


def _precision(
    pairs: Sequence[tuple[str, str, NDArray[np.bool_], NDArray[np.bool_]]],
    vector_by_text: dict[str, NDArray[np.float32]],
    drawings: NDArray[np.float32],
    weight: float,
) -> dict[str, float]:
    wanted_shares, unwanted_shares = [], []
    for word, other, wanted, unwanted in pairs:
        vector = vector_by_text[word] - weight * vector_by_text[other]
        first = np.argsort(-(drawings @ vector))[: int(wanted.sum())]
        wanted_shares.append(float(wanted[first].mean()))
        unwanted_shares.append(float(unwanted[first].mean()))
    return {
        "wanted_among_first": float(np.mean(wanted_shares)),
        "unwanted_among_first": float(np.mean(unwanted_shares)),
        "searches": len(pairs),
    }


def main(config: SearchQualityConfig) -> None:
    """Measure all styles with all templates, and searches with a minus."""
    results: dict[str, Any] = {}
    with clip_rt.Client(repository=config.repository, model="drawings", timeout_s=300.0) as client:
        for style in STYLES:
            with tempfile.TemporaryDirectory(prefix="clip_rt-search-") as folder:
                files = Path(folder, "drawings")
                files.mkdir()
                drawn = write_files(style, files)
                with Index.open(Path(folder, "index"), create=True) as index:
                    index.update(client, [files])
                    for template in TEMPLATES:
                        results[f"{style}, {template}"] = find_by_name(
                            client, index, drawn, template
                        )
        minus = measure_minus(client, names(load_style("openmoji")))
    show(
        ("style, search", *(f"recall@{rank}" for rank in RANKS), "names", "images"),
        [
            (
                what,
                *(f"{row[f'recall_at_{rank}']:.3f}" for rank in RANKS),
                row["names"],
                row["images"],
            )
            for what, row in results.items()
        ],
        title="search by name",
    )
    show(
        ("weight of the minus", "wanted", "unwanted", "searches"),
        [
            (
                weight,
                f"{row['wanted_among_first']:.3f}",
                f"{row['unwanted_among_first']:.3f}",
                row["searches"],
            )
            for weight, row in minus.items()
        ],
        title="among the first, of as many as are wanted",
    )
    packages = ("numpy", "onnxruntime", "openvino", "pillow", "nvidia-pytriton")
    save("studies.search_quality", {"by_name": results, "minus": minus}, packages=packages)


if __name__ == "__main__":
    with command():
        main(tyro.cli(SearchQualityConfig, prog=program(__spec__.name), description=__doc__))
