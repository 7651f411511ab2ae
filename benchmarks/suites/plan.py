"""The suites by name, in the order of a run, and what each measures."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from benchmarks import photos
from benchmarks.contenders.implementation import prompts_of
from benchmarks.suites import cases
from benchmarks.suites.accuracy import measure_accuracy
from benchmarks.suites.bench import Bench
from benchmarks.suites.cases import Case
from benchmarks.suites.durations import measure_durations
from benchmarks.suites.load import measure_arrivals, measure_concurrency
from benchmarks.suites.stages import measure_inside, measure_stages
from benchmarks.suites.timed import measure_cases, measure_classifier
from clip_rt.errors import TextTooLongError

NUM_PHOTOGRAPHS = 64
"""That accuracy is measured on; fewer in a quick run."""
NUM_LOAD_IMAGES, NUM_LOAD_TEXTS = 64, 96
"""Different ones, which clients send again and again."""
NUM_INSIDE_IMAGES = 32
"""In the batch that is taken apart inside the engine; fewer in a quick run, which times no such."""
NAMES_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Something to measure."""

    what: str
    """One line for a reader."""
    measure: Callable[[Bench], None]
    is_quick: bool = False
    """Whether a quick run has it."""
    is_timed: bool = False
    """Whether it times cases by turns, in each start of the contenders."""


SUITES: dict[str, Suite] = {}
"""By name, in the order of a run."""
Measure = Callable[[Bench], None]


def suite(
    what: str, *, is_quick: bool = False, is_timed: bool = False
) -> Callable[[Measure], Measure]:
    """Make a suite of a function, which gives it its name."""

    def add(measure: Measure) -> Measure:
        name = measure.__name__.strip("_")
        SUITES[name] = Suite(what=what, measure=measure, is_quick=is_quick, is_timed=is_timed)
        return measure

    return add


@suite("preprocessed images in batches", is_quick=True, is_timed=True)
def _image(bench: Bench) -> None:
    if _are_squares_read(bench):
        measure_cases(bench, cases.image_cases(bench.facts.side_px))


@suite("strings of few and many tokens", is_quick=True, is_timed=True)
def _text(bench: Bench) -> None:
    measure_cases(bench, [case for case in cases.text_cases() if _is_read(bench, case)])


@suite("JPEG files to embeddings", is_quick=True, is_timed=True)
def _jpeg(bench: Bench) -> None:
    measure_cases(bench, cases.jpeg_cases(with_large=bench.settings.is_full))


@suite("JPEG files against known labels", is_quick=True, is_timed=True)
def _zero_shot(bench: Bench) -> None:
    measure_cases(bench, cases.zero_shot_cases())


@suite("ImageNet's classes x 80 templates: cold, from disk, from memory", is_timed=True)
def _classifier(bench: Bench) -> None:
    try:
        labels = imagenet_names()
    except Exception as error:  # Whatever that package raises; it is not ours.
        bench.notes.append(f"classifier: its labels come with open_clip, which fails: {error!r}")
        return
    if _is_read(bench, cases.classifier_case(labels, len(labels))):
        measure_classifier(bench, labels)


@suite("1 to 32 clients of each server that wait for their answers")
def _concurrency(bench: Bench) -> None:
    texts = Case("load", "8 tokens", "texts", cases.short_texts(NUM_LOAD_TEXTS), "texts")
    measure_concurrency(bench, _load_images(), texts)


@suite("images that arrive at 20 to 110 % of each server's capacity")
def _arrivals(bench: Bench) -> None:
    measure_arrivals(bench, _load_images())


@suite("time and memory until the first answer", is_quick=True)
def _startup(bench: Bench) -> None:
    """Measure nothing more: each told how it started when it did."""


@suite("where the time of a call goes", is_quick=True)
def _stages(bench: Bench) -> None:
    _, many = cases.jpeg_cases(with_large=False)
    one, _ = cases.zero_shot_cases()
    text, *_ = cases.text_cases()
    measure_stages(bench, [one, text, many] if bench.settings.is_full else [one, text])
    num = NUM_INSIDE_IMAGES if bench.settings.is_full else NUM_INSIDE_IMAGES // 4
    if _are_squares_read(bench):
        images = cases.image_cases(bench.facts.side_px)
        measure_inside(bench, next(case for case in images if case.num_items == num))


@suite("cosines on photographs; in full, right answers of the bundled model", is_quick=True)
def _accuracy(bench: Bench) -> None:
    num = NUM_PHOTOGRAPHS if bench.settings.is_full else NUM_PHOTOGRAPHS // 4
    name = f"{num} photographs"
    pixels = cases.photo_pixels(bench.facts.side_px, num)
    jpegs = photos.jpegs(photos.SMALL_PX, num)
    measure_accuracy(
        bench,
        Case("accuracy", f"{name}, pixels", "pixels", pixels, "images")
        if _are_squares_read(bench)
        else None,
        Case("accuracy", name, "jpegs", jpegs, "images"),
    )


@suite("exports, an engine, a training step")
def _durations(bench: Bench) -> None:
    if bench.spec is None:
        bench.notes.append(f"durations: {bench.model} is exported already, by another library")
        return
    for found in measure_durations(
        model=bench.model, weights=bench.weights, say=bench.progress.step
    ):
        if isinstance(found, str):
            bench.notes.append(found)
        else:
            bench.durations.append(found)


def _are_squares_read(bench: Bench) -> bool:
    """Tell whether the model's client takes an image of the side it reads as it is; or note it."""
    facts = bench.facts
    if facts.resizing.resize_px in (None, facts.side_px):
        return True
    _note(bench, f"pixels: {bench.model} crops what it has made larger, squares among it")
    return False


def _is_read(bench: Bench, case: Case) -> bool:
    """Tell whether the model reads the texts of a case to their end; or note that it does not."""
    try:
        for text in prompts_of(case.items) if case.call == "classifier" else case.items:
            bench.tokenizer.encode_text(text)
    except TextTooLongError as error:
        _note(bench, f"{case.key}: {bench.model} reads {error.context_length} tokens of a text")
        return False
    return True


def _note(bench: Bench, remark: str) -> None:
    if remark not in bench.notes:
        bench.notes.append(remark)


def _load_images() -> Case:
    files = photos.jpegs(photos.SMALL_PX, NUM_LOAD_IMAGES)
    return Case("load", "640x480", "jpegs", files, "images")


def imagenet_names() -> list[str]:
    """Return ImageNet's 1,000 classes as OpenAI names them, asked in a process of its own.

    Raises:
        ImportError: open_clip, whose names they are, is not installed.
        TimeoutError: it took too long.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_imagenet_names).result(timeout=NAMES_TIMEOUT_S)


def _imagenet_names() -> list[str]:
    # Here, because it brings torch.
    from training.encoders.libraries import import_open_clip

    return list(import_open_clip().IMAGENET_CLASSNAMES)
