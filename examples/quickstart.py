"""Zero-shot classification, end to end: a real Triton names drawings in a style it never saw.

    make quickstart
    make quickstart SERVER=in_process    # without Triton: models run in this process

The bundled model was trained on icons and emoji, none of them drawn by OpenMoji. It chooses among
60 everyday things, and then among all 1,923 names of Unicode's emoji. Writes quickstart.png.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
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
CLASSES = (
    *("apple", "banana", "pear", "lemon", "strawberry", "cherries", "grapes", "watermelon"),
    *("pineapple", "tomato", "carrot", "broccoli", "mushroom", "bread", "cheese", "pizza"),
    *("hamburger", "taco", "popcorn", "cookie"),
    *("bicycle", "motorcycle", "automobile", "bus", "train", "airplane", "helicopter", "rocket"),
    *("sailboat", "tractor", "house", "castle", "tent", "church"),
    *("sun", "cloud", "rainbow", "umbrella", "snowflake", "snowman"),
    *("necktie", "jeans", "dress", "gloves", "glasses", "crown"),
    *("camera", "television", "telephone", "radio", "guitar", "violin", "drum", "key", "pencil"),
    *("scissors", "hammer", "bell", "trophy", "balloon"),
)
"""Things to eat, ride, live in, wear and use."""
EMOJI_BY_CLASS = {"apple": "red apple", "cheese": "cheese wedge"}
"""Classes that Unicode calls something else."""
NUM_SHOWN = 24
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


def describe(name: str, label: str, probability: float) -> str:
    """Write a guess as rich markup, the right one in green."""
    text = f"{escape(label)} {probability:.0%}"
    return f"[bold green]{text}[/]" if label == name else text


def draw_contact_sheet(
    drawings: list[Drawing], guesses: list[list[tuple[str, float]]], *, title: str, footer: str
) -> None:
    """Draw each image with its true name and the best guesses as bars."""
    columns, width, height, margin, band = 4, 330, 116, 10, 34
    rows = -(-len(drawings) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height + 2 * band), "white")
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(14), ImageFont.load_default(11)
    pen.text((margin, 8), title, "black", ImageFont.load_default(17))
    pen.text((margin, band + rows * height + 4), footer, "#495057", bold)
    for position, (drawing, guess) in enumerate(zip(drawings, guesses, strict=True)):
        row, column = divmod(position, columns)
        left, top = column * width + margin, band + row * height + margin
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


def main(*, server: Literal["auto", "embedded", "in_process"] = "auto") -> None:
    """Classify drawings, show some, measure.

    Args:
        server: What runs the model: a Triton of this machine, this process, or the first there is.
    """
    console = Console()
    drawings = read_style(STYLE)
    by_name = {drawing.name: drawing for drawing in drawings}
    everyday = [Drawing(by_name[EMOJI_BY_CLASS.get(each, each)].picture, each) for each in CLASSES]

    with clip_rt.Client(repository=ROOT / "model_repository", server=server) as client:
        started_s = time.monotonic()
        pictures = [drawing.picture for drawing in everyday]
        guesses = client.zero_shot(pictures, CLASSES, templates=TEMPLATES).top(3)
        console.print(
            f"The model is up and has classified {len(everyday)} images into {len(CLASSES)} "
            f"classes after {time.monotonic() - started_s:.1f} s."
        )
        num_right = sum(
            guess[0][0] == drawing.name for drawing, guess in zip(everyday, guesses, strict=True)
        )

        top1, top5, images_per_s = measure_all_names(client, drawings, console)

    positions = [index * len(everyday) // NUM_SHOWN for index in range(NUM_SHOWN)]
    shown, best = [everyday[each] for each in positions], [guesses[each] for each in positions]
    table = Table("true class", "best three guesses", title="Drawings of OpenMoji")
    for drawing, guess in zip(shown, best, strict=True):
        table.add_row(
            drawing.name, ", ".join(describe(drawing.name, *guessed) for guessed in guess)
        )
    console.print(table)

    among_classes = (
        f"OpenMoji, a style the model never saw: {num_right} of {len(everyday)} right among "
        f"{len(CLASSES)} everyday things (chance: 1 of {len(CLASSES)})"
    )
    among_names = (
        f"Among all {len(drawings):,} names of emoji: top-1 {top1:.1%}, top-5 {top5:.1%} "
        f"(chance {1 / len(drawings):.2%})"
    )
    draw_contact_sheet(shown, best, title=among_classes, footer=among_names)
    console.print(f"{among_classes}.\n{among_names}; {images_per_s:.0f} images/s. See {PICTURE}.")


def measure_all_names(
    client: clip_rt.Client, drawings: list[Drawing], console: Console
) -> tuple[float, float, float]:
    """Return top-1 and top-5 accuracy among the names of all drawings, and images per second."""
    names = [drawing.name for drawing in drawings]
    top1 = top5 = 0
    started_s = time.monotonic()
    for start in track(
        range(0, len(drawings), CHUNK), description="all names of emoji", console=console
    ):
        chunk = drawings[start : start + CHUNK]
        scores = client.zero_shot([item.picture for item in chunk], names, templates=TEMPLATES)
        for item, guess in zip(chunk, scores.top(5), strict=True):
            top1 += guess[0][0] == item.name
            top5 += item.name in [label for label, _ in guess]
    count = len(drawings)
    return top1 / count, top5 / count, count / (time.monotonic() - started_s)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
