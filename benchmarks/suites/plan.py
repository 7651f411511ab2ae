"""The suites by name, in the order of a run, and what each measures."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from benchmarks.suites import cases
from benchmarks.suites.accuracy import measure_accuracy
from benchmarks.suites.bench import Bench
from benchmarks.suites.cases import Case
from benchmarks.suites.durations import measure_durations
from benchmarks.suites.load import measure_arrivals, measure_concurrency
from benchmarks.suites.stages import measure_inside, measure_stages
from benchmarks.suites.timed import measure_cases, measure_classifier

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


def _image(bench: Bench) -> None:
    measure_cases(bench, cases.image_cases(bench.pictures, bench.spec.side_px))


def _text(bench: Bench) -> None:
    measure_cases(bench, cases.text_cases())


def _jpeg(bench: Bench) -> None:
    measure_cases(bench, cases.jpeg_cases(bench.pictures, with_large=bench.settings.is_full))


def _zero_shot(bench: Bench) -> None:
    measure_cases(bench, cases.zero_shot_cases(bench.pictures))


def _classifier(bench: Bench) -> None:
    try:
        labels = imagenet_names()
    except Exception as error:  # Whatever that package raises; it is not ours.
        bench.notes.append(f"classifier: its labels come with open_clip, which fails: {error!r}")
        return
    measure_classifier(bench, labels)


def _concurrency(bench: Bench) -> None:
    measure_concurrency(bench, _load_images(bench), _load_texts())


def _arrivals(bench: Bench) -> None:
    measure_arrivals(bench, _load_images(bench))


def _startup(bench: Bench) -> None:
    """Measure nothing more: each told how it started when it did."""


def _stages(bench: Bench) -> None:
    _, many = cases.jpeg_cases(bench.pictures, with_large=False)
    one, _ = cases.zero_shot_cases(bench.pictures)
    text, *_ = cases.text_cases()
    measure_stages(bench, [one, text, many] if bench.settings.is_full else [one, text])
    num = NUM_INSIDE_IMAGES if bench.settings.is_full else NUM_INSIDE_IMAGES // 4
    images = cases.image_cases(bench.pictures, bench.spec.side_px)
    measure_inside(bench, next(case for case in images if case.num_items == num))


def _accuracy(bench: Bench) -> None:
    num = NUM_PHOTOGRAPHS if bench.settings.is_full else NUM_PHOTOGRAPHS // 4
    make = partial(Case, suite="accuracy", unit="images")
    pixels = make(
        name=f"{num} photographs, pixels",
        call="pixels",
        items=bench.pictures.pixels(bench.spec.side_px, num),
    )
    jpegs = make(
        name=f"{num} photographs",
        call="jpegs",
        items=bench.pictures.jpegs(cases.SMALL_PX, num),
    )
    measure_accuracy(bench, pixels, jpegs)


def _durations(bench: Bench) -> None:
    for found in measure_durations(
        model=bench.model, weights=bench.weights, say=bench.progress.step
    ):
        if isinstance(found, str):
            bench.notes.append(found)
        else:
            bench.durations.append(found)


def _load_images(bench: Bench) -> Case:
    return Case(
        suite="load",
        name="640x480",
        call="jpegs",
        items=bench.pictures.jpegs(cases.SMALL_PX, NUM_LOAD_IMAGES),
        unit="images",
    )


def _load_texts() -> Case:
    return Case(
        suite="load",
        name="8 tokens",
        call="texts",
        items=cases.short_texts(NUM_LOAD_TEXTS),
        unit="texts",
    )


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
    from benchmarks.contenders.torch_based import import_open_clip

    return list(import_open_clip().IMAGENET_CLASSNAMES)


SUITES: Mapping[str, Suite] = {
    "image": Suite(
        what="preprocessed images in batches", measure=_image, is_quick=True, is_timed=True
    ),
    "text": Suite(
        what="strings of few and many tokens", measure=_text, is_quick=True, is_timed=True
    ),
    "jpeg": Suite(what="JPEG files to embeddings", measure=_jpeg, is_quick=True, is_timed=True),
    "zero_shot": Suite(
        what="JPEG files against known labels",
        measure=_zero_shot,
        is_quick=True,
        is_timed=True,
    ),
    "classifier": Suite(
        what="ImageNet's classes x 80 templates: cold, from disk, from memory",
        measure=_classifier,
        is_timed=True,
    ),
    "concurrency": Suite(
        what="1 to 32 clients of each server that wait for their answers", measure=_concurrency
    ),
    "arrivals": Suite(
        what="images that arrive at 20 to 110 % of each server's capacity", measure=_arrivals
    ),
    "startup": Suite(
        what="time and memory until the first answer", measure=_startup, is_quick=True
    ),
    "stages": Suite(what="where the time of a call goes", measure=_stages, is_quick=True),
    "accuracy": Suite(
        what="cosines on photographs; in full, right answers of the bundled model",
        measure=_accuracy,
        is_quick=True,
    ),
    "durations": Suite(what="exports, an engine, a training step", measure=_durations),
}
