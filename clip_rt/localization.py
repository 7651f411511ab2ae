"""Where in an image something is: windows of several sizes and shapes, each compared with texts.

A dual encoder says how well a whole image fits a text and not where. Here it is asked of many
windows of the image, all in one call, as detectors before learned proposals did it: an image
pyramid under a window of one size (Dalal and Triggs 2005, "Histograms of Oriented Gradients for
Human Detection"), windows of other shapes squeezed to the square that the model reads (Girshick et
al. 2014, R-CNN, appendix A), and greedy non-maximum suppression. What the model says of one window
is noisy, of two that hardly differ too, so each is given the mean of those that overlap it.

How often it is right was measured by `benchmarks.studies.locate`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clip_rt.classification import open_set
from clip_rt.errors import InputError, TextError
from clip_rt.inputs import prompts
from clip_rt.inputs.items import check_list, check_whole_number
from clip_rt.inputs.transform import FILTERS, Square, open_upright

if TYPE_CHECKING:
    from PIL import Image

    from clip_rt.classification.zero_shot import Scores
    from clip_rt.client import Client
    from clip_rt.inputs.decoding import ImageInput

SCALES = (1.0, 0.7, 0.5, 0.35, 0.25)
ASPECT_RATIOS = (1.0,)
STRIDE = 0.25
THRESHOLD = 0.5
MAX_IOU = 0.2
"""Lower than detectors have it, whose boxes fit: windows around one thing overlap little where one
is twice as large as the other."""
OVERLAP_POWER = 6
"""Power of the intersection over union by which windows count in the mean of one: those that
hardly differ. Of what is not there less has a box than by single windows."""
MAX_BOXES = 10
MAX_WINDOWS = 10_000
"""Of one image; each costs as much as an image."""
_ROWS = 256
"""Windows whose overlaps with all others are in memory at a time."""

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels, from the upper left corner."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Something that was found in an image."""

    text: str
    """What was looked for."""
    score: float
    """Probability of the text against the background texts, from 0 to 1, by the mean logits of the
    window and of those that overlap it; of a model whose score is a sigmoid, its probability of the
    text by itself, by the same mean."""
    similarity: float
    """Cosine of the window and the text, from -1 to 1."""
    box: Box
    """Left, top, right, bottom, in pixels of the upright image."""


def locate(
    client: Client,
    image: ImageInput,
    texts: Iterable[str],
    *,
    templates: str | Iterable[str] = (prompts.SLOT,),
    background: Iterable[str] | None = None,
    scales: Iterable[float] = SCALES,
    aspect_ratios: Iterable[float] = ASPECT_RATIOS,
    stride: float = STRIDE,
    threshold: float = THRESHOLD,
    max_iou: float = MAX_IOU,
    max_boxes: int = MAX_BOXES,
    timeout_s: float | None = None,
) -> list[Detection]:
    """Say where in an image what texts describe is to be seen.

    Each text is looked for by itself. Every window costs as much as an image: with the defaults a
    square image has some 850.

    Args:
        client: Of the model.
        image: One image, as `Client.encode_images` takes it.
        texts: What to look for, a list of strings.
        templates: As for `Client.class_embeddings`; without them texts are taken as they are.
        background: Texts for what else an image may show, which compete with each of `texts`;
            without them, `classification.open_set.BACKGROUND`. A model whose score is a sigmoid
            needs none.
        scales: Sides of a square window, as shares of the image's short side, above 0 to 1.
        aspect_ratios: Width by height of windows; those of one scale have the same area.
        stride: From one window to the next, as a share of its side, above 0 to 1.
        threshold: Least score of a box, from 0 to 1.
        max_iou: Most that two boxes of a text overlap, as intersection over union, from 0 to 1.
        max_boxes: Most boxes of each text.
        timeout_s: For all windows; the client's own if None.

    Returns:
        What was found, the highest score first; maybe nothing.

    Raises:
        ImageError: the image cannot be used.
        TextError, TemplateError: a text or a template cannot be used.
        InputError: another argument cannot be used, or there would be more than `MAX_WINDOWS`.
        ServerError, UnknownModelError, ContractError, ClientClosedError: see
            `Client.encode_images`.
    """
    wanted = prompts.check_labels(list(check_list(texts, "texts", "strings", TextError)))
    if not wanted:
        raise InputError("texts is empty; name at least one.")
    sides = _check_shares("scales", scales)
    ratios = _check_shares("aspect_ratios", aspect_ratios, most=math.inf)
    (stride,) = _check_shares("stride", (stride,))
    for name, value in (("threshold", threshold), ("max_iou", max_iou)):
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value!r:.40}; it must be from 0 to 1.")
    max_boxes = check_whole_number(max_boxes, "max_boxes")
    options = client._image_options
    upright = open_upright(
        image, exif=options.exif, max_pixels=options.max_pixels, max_bytes=options.max_bytes
    )
    manifest = client.manifest
    others = _find_background(background, manifest.score == "softmax", wanted)
    windows, boxes = cut_windows(
        upright,
        side_px=manifest.side_px,
        resample=FILTERS[manifest.resizing.interpolation],
        scales=sides,
        aspect_ratios=ratios,
        stride=stride,
    )
    scores = client.zero_shot(windows, (*wanted, *others), templates=templates, timeout_s=timeout_s)
    assert scores.similarities is not None  # They are no probe's.
    margins = smooth(boxes, _find_margins(scores, len(wanted)))
    shares = _sigmoid(margins)
    found: list[Detection] = []
    for column, text in enumerate(wanted):
        for row in suppress(boxes, margins[:, column], max_iou=max_iou)[:max_boxes]:
            if shares[row, column] >= threshold:
                left, top, right, bottom = boxes[row].tolist()
                found.append(
                    Detection(
                        text=text,
                        score=float(shares[row, column]),
                        similarity=float(scores.similarities[row, column]),
                        box=(left, top, right, bottom),
                    )
                )
    return sorted(found, key=lambda each: -each.score)


def cut_windows(
    image: Image.Image,
    *,
    side_px: int,
    resample: Image.Resampling,
    scales: Sequence[float],
    aspect_ratios: Sequence[float],
    stride: float,
) -> tuple[list[Square], NDArray[np.float64]]:
    """Cut an image into windows, each resized to the square that a model reads.

    The image is resized once for each size and shape of a window, so that windows are parts of one
    array and hold no pixels of their own.

    Args:
        image: RGB.
        side_px: Side of the square.
        resample: Filter of the resize.
        scales: See `locate`.
        aspect_ratios: See `locate`.
        stride: See `locate`.

    Returns:
        N squares, uint8 (side_px, side_px, 3), and where in the image they are, float64 (N, 4):
        left, top, right and bottom in pixels.

    Raises:
        InputError: there are more than `MAX_WINDOWS`.
    """
    levels = _find_levels(image.size, side_px, scales, aspect_ratios)
    starts = [tuple(_find_starts(length, side_px, stride) for length in level) for level in levels]
    num_windows = sum(len(lefts) * len(tops) for lefts, tops in starts)
    if num_windows > MAX_WINDOWS:
        raise InputError(
            f"an image of {image.width} x {image.height} px has {num_windows:,} windows; at most "
            f"{MAX_WINDOWS:,} are looked at. Name fewer or larger scales=, fewer aspect_ratios=, "
            "or a larger stride=."
        )
    windows: list[Square] = []
    boxes: list[Box] = []
    for (width, height), (lefts, tops) in zip(levels, starts, strict=True):
        pixels = np.asarray(image.resize((width, height), resample))
        right, down = image.width / width, image.height / height
        for top, left in itertools.product(tops, lefts):
            windows.append(pixels[top : top + side_px, left : left + side_px])
            boxes.append(
                (left * right, top * down, (left + side_px) * right, (top + side_px) * down)
            )
    return windows, np.array(boxes, np.float64)


def find_iou(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the intersection over union of boxes, (N, 4), with others, (M, 4).

    Returns:
        float64 (N, M), from 0 to 1.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas, other_areas = ((each[:, 2:] - each[:, :2]).prod(axis=1) for each in (boxes, others))
    union = areas[:, None] + other_areas[None, :] - shared
    iou: NDArray[np.float64] = shared / np.maximum(union, np.finfo(np.float64).tiny)
    return iou


def suppress(
    boxes: NDArray[np.float64], ranks: NDArray[np.floating[Any]], *, max_iou: float
) -> list[int]:
    """Return the rows of boxes, (N, 4), that overlap no better one by more than `max_iou`.

    Greedy non-maximum suppression by ranks, (N,); the best first, and of equals the first.
    """
    rest = np.argsort(-ranks, kind="stable")
    kept: list[int] = []
    while len(rest):
        best, rest = int(rest[0]), rest[1:]
        kept.append(best)
        rest = rest[find_iou(boxes[[best]], boxes[rest])[0] <= max_iou]
    return kept


def smooth(boxes: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for each box the mean of the values of all that overlap it, weighted by how much.

    Args:
        boxes: (N, 4).
        values: (N, T).

    Returns:
        float64 (N, T).
    """
    means = np.empty_like(values)
    for start in range(0, len(boxes), _ROWS):
        weights = find_iou(boxes[start : start + _ROWS], boxes) ** OVERLAP_POWER
        means[start : start + _ROWS] = weights @ values / weights.sum(axis=1, keepdims=True)
    return means


def _find_levels(
    size: tuple[int, int], side_px: int, scales: Sequence[float], aspect_ratios: Sequence[float]
) -> list[tuple[int, int]]:
    """Return the sizes that an image is resized to, in which windows are squares of `side_px`."""
    width, height = size
    short = min(size)
    found: dict[tuple[int, int], None] = {}
    for scale, ratio in itertools.product(scales, aspect_ratios):
        # A window that would be longer than the image ends with it.
        window_width = min(scale * short * math.sqrt(ratio), width)
        window_height = min(scale * short / math.sqrt(ratio), height)
        level = round(width * side_px / window_width), round(height * side_px / window_height)
        found[max(level[0], side_px), max(level[1], side_px)] = None
    return list(found)


def _find_starts(length: int, side_px: int, stride: float) -> list[int]:
    """Return where windows begin on an axis: at even distances, the last one at its end."""
    room = length - side_px
    num_steps = math.ceil(room / (stride * side_px) - 1e-9)
    return [round(step * room / max(num_steps, 1)) for step in range(num_steps + 1)]


def _find_margins(scores: Scores, num_texts: int) -> NDArray[np.float64]:
    """Return how far each text is ahead of the background, in logits, (N, T).

    Its sigmoid is the softmax's probability of the text beside the background alone. Near 1 that is
    the same float for many windows, and the margin still tells them apart.
    """
    logits = scores.logits.astype(np.float64)
    if scores.score == "sigmoid":
        return logits[:, :num_texts]
    background = np.logaddexp.reduce(logits[:, num_texts:], axis=1, keepdims=True)
    margins: NDArray[np.float64] = logits[:, :num_texts] - background
    return margins


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    # Of minus the magnitude: exp cannot overflow.
    small = np.exp(-np.abs(logits))
    share: NDArray[np.float64] = np.where(logits < 0, small, 1.0) / (1 + small)
    return share


def _find_background(
    background: Iterable[str] | None, is_softmax: bool, texts: Sequence[str]
) -> tuple[str, ...]:
    """Return the texts that compete with those that are looked for.

    Raises:
        InputError: there are none, and the model needs some.
    """
    if background is None:
        return open_set.background_of("softmax" if is_softmax else "sigmoid", texts)
    checked = prompts.check_labels(background)
    asked = {text.strip().casefold() for text in texts}
    others = tuple(each for each in checked if each.strip().casefold() not in asked)
    if is_softmax and not others:
        raise InputError(
            "background holds nothing but texts that are looked for; name at least one other, or "
            "leave background= out."
        )
    return others if is_softmax else ()


def _check_shares(name: str, given: Iterable[float], *, most: float = 1.0) -> tuple[float, ...]:
    """Return numbers above 0, at most `most`.

    Raises:
        InputError: one is none, or there is none.
    """
    try:
        numbers = tuple(float(each) for each in given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {given!r:.40}; numbers are needed.") from error
    span = "above 0" if math.isinf(most) else f"above 0, at most {most:g}"
    if not numbers:
        raise InputError(f"{name} is empty; name at least one number {span}.")
    for number in numbers:
        if not 0 < number <= most or math.isinf(number):
            raise InputError(f"{name} has {number!r:.40}; it must be {span}.")
    return numbers
