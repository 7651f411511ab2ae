"""Does a client feed a model of another library what that library would?

The gate (`export.parity`) holds an exported file against the same model in torch, on the same
pixels and ids. A wrong resize or padding would pass it. Here images and texts go through the
library's own preprocessing, tokenizer and model, and through ours: pixels, ids and embeddings must
be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from clip_rt.errors import ParityError
from clip_rt.inputs.images import preprocess
from clip_rt.inputs.tokenizer import pad
from export.console import stage
from export.parity import Encoder
from export.parity_report import TOLERANCES, Precision, Tolerance
from training.dual_encoder import DualEncoder
from training.encoders.encoder import ExternalEncoder, encode_usable

MAX_LEVELS = 1.0
"""Of 255, between pixels: libraries resize by tables of their own, and round once more or less."""
LEVEL_ROUNDING = 0.01
"""Lost where a pixel is normalised in FP32 and back."""
SIZES_PX = ((640, 480), (333, 501), (225, 1000), (97, 61), (1200, 300), (256, 257), (448, 448))
"""Wide, high, small, odd: width and height."""
TEXTS = (
    "a photo of a cat.",
    "A Photo of TWO Dogs & a bird_house, isn't it?",
    "ein Maßstab für Äpfel und Öl",
    "une crème brûlée, s'il vous plaît !",
    "красная машина",
    "ένα κόκκινο σπίτι",
    "红色的汽车。",
    "赤い自転車と猫",
    "빨간 자전거",
    "سيارة حمراء",
    "מכונית אדומה",
    "लाल गाड़ी",
    "লাল গাড়ি",
    "ஸிவப்பு கார்",
    "รถสีแดง",
    "ఎర్ర కారు",
    "ചുവന്ന കാർ",
    "લાલ ગાડી",
    "ਲਾਲ ਕਾਰ",
    "රතු මෝටර් රථය",
    "ឡានក្រហម",
    "ကားအနီ",
    "xe hơi màu đỏ",
    "წითელი მანქანა",
    "կարմիր մեքենա",
    "ቀይ መኪና",
    "a  rocket 🚀 \t at 12,345.67 °C — “quoted”",
    "a " * 200 + "very long caption",
    "?!",
)
"""In twenty scripts and more, with capitals, marks, blanks and more tokens than a model reads."""


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """How far apart the library's own path and ours are."""

    max_levels: float
    """Of 255, largest difference of a pixel."""
    num_texts: int
    """All of the same ids."""
    min_image_cosine: float
    """Of embeddings, the library's pixels through its model and ours through the exported file."""
    min_text_cosine: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def compare_with_source(
    encoder: DualEncoder, load: Callable[[], tuple[Encoder, Encoder]], precision: Precision
) -> dict[str, Any]:
    """Run `check_source` as a stage of an export, of models of other libraries.

    Args:
        encoder: What is exported.
        load: Loads the image and the text tower that it became.
        precision: Of these.

    Returns:
        What the published report says of it; nothing of our own models.

    Raises:
        ParityError: see `check_source`.
    """
    if not isinstance(encoder, ExternalEncoder):
        return {}
    with stage("compare with its library's own path") as outcome:
        encode_images, encode_texts = load()
        found = check_source(
            encoder,
            encode_images=encode_images,
            encode_texts=encode_texts,
            tolerance=TOLERANCES[precision],
        )
        outcome.append(f"pixels within {found.max_levels:.2f} of 255")
        outcome.append(f"ids of {found.num_texts} texts equal")
        cosine = min(found.min_image_cosine, found.min_text_cosine)
        outcome.append(f"cosine at least {cosine:.6f}")
    return {"source": found.to_json()}


def check_source(
    encoder: ExternalEncoder,
    *,
    encode_images: Encoder,
    encode_texts: Encoder,
    tolerance: Tolerance,
) -> SourceReport:
    """Compare the path of a client with that of the library.

    Args:
        encoder: The model, with its library's own preprocessing.
        encode_images: The exported image tower, uint8 (N, S, S, 3) to float32 (N, E).
        encode_texts: The exported text tower, int32 (N, L) to float32 (N, E).
        tolerance: Of the export's precision.

    Raises:
        ParityError: they differ; says in what.
    """
    facts = encoder.facts
    images = [draw(width, height) for width, height in SIZES_PX]
    ours = preprocess(images, side_px=facts.side_px, resizing=facts.resizing)
    theirs = encoder.source.pixels(images)
    differences = _in_levels(encoder, ours, theirs)
    worst = int(differences.argmax())
    if differences[worst] > MAX_LEVELS + LEVEL_ROUNDING:
        raise ParityError(
            f"an image of {' x '.join(map(str, SIZES_PX[worst]))} px is prepared otherwise than by "
            f"{facts.name}'s own library: a pixel differs by {differences[worst]:.1f} of 255, "
            f"{MAX_LEVELS:g} is allowed. This is a fault of clip_rt: {facts.resizing}.",
            report={"max_levels": float(differences[worst])},
        )
    ids = _check_ids(encoder)
    return SourceReport(
        max_levels=round(float(differences[worst]), 3),
        num_texts=len(ids),
        min_image_cosine=_compare(
            "images", encode_images(ours), _embed(encoder.encode_image, theirs), tolerance
        ),
        min_text_cosine=_compare(
            "texts", encode_texts(ids), _embed(encoder.encode_text, ids.astype(np.int64)), tolerance
        ),
    )


def pixel_differences(
    encoder: ExternalEncoder, images: Sequence[Image.Image]
) -> NDArray[np.float32]:
    """Return how many of 255 levels a pixel of each image differs at most from the library's."""
    facts = encoder.facts
    ours = preprocess(images, side_px=facts.side_px, resizing=facts.resizing)
    return _in_levels(encoder, ours, encoder.source.pixels(images))


def _in_levels(
    encoder: ExternalEncoder, ours: NDArray[np.uint8], theirs: NDArray[np.float32]
) -> NDArray[np.float32]:
    facts = encoder.facts
    mean, std = (np.array(each, np.float32)[:, None, None] for each in (facts.mean, facts.std))
    as_levels = 255 * (theirs * std + mean)
    return np.abs(as_levels - ours.transpose(0, 3, 1, 2)).max(axis=(1, 2, 3))


def _check_ids(encoder: ExternalEncoder) -> NDArray[np.int32]:
    facts = encoder.facts
    ids = encode_usable(encoder, TEXTS)
    padded_NL = pad(
        list(ids.values()), length_tokens=facts.context_length, pad_id=facts.tokenization.pad_id
    )
    for text, padded, theirs in zip(ids, padded_NL, encoder.source.tokens([*ids]), strict=True):
        if not np.array_equal(padded, theirs):
            place = int((padded != theirs).argmax())
            raise ParityError(
                f"the text {text[:40]!r} has other ids than by {facts.name}'s own library: id "
                f"{place} is {padded[place]} here and {theirs[place]} there. Name the tokenizer "
                "of the weights with --tokenizer.",
                report={"text": text, "ours": padded.tolist(), "theirs": theirs.tolist()},
            )
    return padded_NL


@torch.inference_mode()
def _embed(encode: Any, array: NDArray[Any]) -> NDArray[np.float32]:
    return torch.nn.functional.normalize(encode(torch.from_numpy(array)), dim=-1).numpy()


def _compare(
    what: str, found: NDArray[np.float32], expected: NDArray[np.float32], tolerance: Tolerance
) -> float:
    cosines = (found.astype(np.float64) * expected).sum(axis=1)
    cosine = float((cosines / np.linalg.norm(found, axis=1)).min())
    # A pixel off by a level moves an embedding too.
    if cosine < min(tolerance.min_cosine, MIN_COSINE_WITH_OTHER_PIXELS):
        raise ParityError(
            f"{what} through the exported file have a cosine of {cosine:.6f} with the library's "
            f"own path; {tolerance.min_cosine} is needed.",
            report={"cosine": cosine},
        )
    return round(cosine, 7)


MIN_COSINE_WITH_OTHER_PIXELS = 0.9999
"""For FP32, whose tolerance is of equal pixels."""


def draw(width: int, height: int) -> Image.Image:
    """Draw a smooth picture with noise on it, the same at every call."""
    rng = np.random.default_rng(width * 10_000 + height)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((width, height))
    noisy = np.asarray(smooth).astype(np.int16) + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
