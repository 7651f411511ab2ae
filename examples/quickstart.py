"""Zero-shot classification, end to end: a real Triton names drawings by a hand it never saw.

    make quickstart

The bundled model never saw a drawing of OpenMoji, nor, of one name in twenty, any drawing at all.
It chooses among all 1,923 names of Unicode's emoji. Writes quickstart.png.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

import clip_rt

ROOT = Path(__file__).resolve().parents[1]
STYLE = ROOT / "training/sample/styles/openmoji.tar"
PICTURE = Path("quickstart.png")
TEMPLATES = ["{}", "an emoji of {}", "a drawing of {}"]
SHOWN = 24
CHUNK = 64


@dataclass(frozen=True)
class Drawing:
    """A picture file and its true name."""

    picture: bytes
    name: str


def read_style(path: Path) -> list[Drawing]:
    """Read a WebDataset shard of named drawings."""
    drawings = []
    with tarfile.open(path) as tar:
        parts = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
        for name, file in parts.items():
            if file is not None and name.endswith(".webp"):
                record = parts[name.replace(".webp", ".json")]
                assert record is not None  # the two are written together
                drawings.append(Drawing(file.read(), json.load(record)["name"]))
    return drawings


def describe(drawing: Drawing, label: str, probability: float) -> str:
    """Write a guess as rich markup, the right one in green."""
    text = f"{escape(label)} {probability:.0%}"
    return f"[bold green]{text}[/]" if label == drawing.name else text


def draw_contact_sheet(drawings: list[Drawing], guesses: list[list[tuple[str, float]]]) -> None:
    """Draw each image with its true name and the best guesses as bars."""
    columns, width, height, margin = 4, 330, 116, 10
    rows = -(-len(drawings) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(14), ImageFont.load_default(11)
    for position, (drawing, guess) in enumerate(zip(drawings, guesses, strict=True)):
        left, top = position % columns * width + margin, position // columns * height + margin
        with Image.open(io.BytesIO(drawing.picture)) as image:
            sheet.paste(image.resize((88, 88), Image.Resampling.LANCZOS), (left, top))
        left += 98
        pen.text((left, top - 2), _shorten(drawing.name, 30), "black", bold)
        for line, (label, probability) in enumerate(guess[:3]):
            y = top + 22 + 23 * line
            colour = "#2e9e5b" if label == drawing.name else "#b9c2cc"
            pen.rectangle((left, y, left + 210, y + 18), "#f1f3f5")
            pen.rectangle((left, y, left + round(210 * probability), y + 18), colour)
            pen.text(
                (left + 4, y + 2), f"{probability:4.0%}  {_shorten(label, 32)}", "black", plain
            )
    sheet.save(PICTURE)


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def main() -> None:
    """Start the server, classify, show, measure, stop."""
    console = Console()
    drawings = read_style(STYLE)
    labels = [drawing.name for drawing in drawings]
    shown = drawings[:: len(drawings) // SHOWN][:SHOWN]

    with clip_rt.Client(repository=ROOT / "model_repository") as client:
        started_s = time.monotonic()
        pictures = [drawing.picture for drawing in shown]
        guesses = client.zero_shot(pictures, labels, templates=TEMPLATES).top(5)
        console.print(
            f"Triton is up and has named {len(shown)} images among {len(labels):,} labels "
            f"after {time.monotonic() - started_s:.1f} s."
        )

        table = Table("true name", "best five guesses", title="OpenMoji, unseen")
        for drawing, guess in zip(shown, guesses, strict=True):
            table.add_row(drawing.name, ", ".join(describe(drawing, *pair) for pair in guess))
        console.print(table)

        top1 = top5 = 0
        started_s = time.monotonic()
        for start in track(
            range(0, len(drawings), CHUNK), description="the whole style", console=console
        ):
            chunk = drawings[start : start + CHUNK]
            scores = client.zero_shot([item.picture for item in chunk], labels, templates=TEMPLATES)
            for item, guess in zip(chunk, scores.top(5), strict=True):
                top1 += guess[0][0] == item.name
                top5 += item.name in [label for label, _ in guess]
        elapsed_s = time.monotonic() - started_s

    draw_contact_sheet(shown, guesses)
    count = len(drawings)
    console.print(
        f"OpenMoji, a hand the model never saw: top-1 {top1 / count:.1%}, top-5 {top5 / count:.1%} "
        f"of {count:,} images among {count:,} names (chance {1 / count:.2%}); "
        f"{count / elapsed_s:.0f} images/s. See {PICTURE}."
    )


if __name__ == "__main__":
    main()
