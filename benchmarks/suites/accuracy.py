"""What each contender's numbers cost: cosines on photographs, right answers on drawings.

The drawings are of a style that the bundled model has not learned from. INT8 is made of the FP32
file, calibrated on other drawings and on the names of their classes, as whoever has a model and
knows what it is for would; a third of them are of the same style, in black lines.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks.contenders.runtimes import load_onnxruntime
from benchmarks.findings import Accuracy
from benchmarks.suites.bench import Bench
from benchmarks.suites.cases import Case
from benchmarks.top1 import top1
from clip_rt.specs import find_spec, image_model, text_model

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = ROOT / "model_repository"
NAME, ARCHITECTURE = "drawings", "RN26@64px"
DRAWINGS = ROOT / "training/sample/styles/openmoji.tar"
CALIBRATION = tuple(
    ROOT / "training/sample" / file
    for file in ("train/sample.tar", "styles/openmoji-black.tar", "styles/iconoir.tar")
)
NUM_CALIBRATION = 100
"""Drawings of each."""
TIMEOUT_S = 600.0
SERVED = "triton"
"""Through the client and the embedded Triton, with the engine that it takes by itself."""
TOP1_OF = {
    "triton openvino": SERVED,
    "triton onnxruntime": "onnxruntime",
    "triton int8": "openvino int8",
    "gateway openvino": SERVED,
    "gateway int8": "openvino int8",
}
"""Whose right answers count for those that are served. Triton takes OpenVINO when it may choose;
the others run the same files with the same settings as the engine called directly."""


def measure_accuracy(bench: Bench, pixels: Case | None, jpegs: Case) -> None:
    """Hold everyone's embeddings of the same photographs against FP32 torch.

    Full runs also count how often the bundled model is right in each precision.

    Args:
        bench: Gets the figures.
        pixels: Photographs as the model reads them, if anybody takes those.
        jpegs: The same as files, for those who read files only.
    """
    bench.progress.step("accuracy on photographs")
    cosines: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
    for case in filter(None, (jpegs, pixels)):
        for name in bench.admit(case):
            cosines[name] = bench.cosines(case, name)
    top1: dict[str, float] = {}
    num_drawings = 0
    if bench.settings.is_full:
        bench.progress.step("accuracy on drawings")
        try:
            top1, num_drawings = measure_top1()
        except Exception as error:  # The cosines are still worth something.
            bench.failures.append(f"accuracy on drawings: {error!r}")
    for name in bench.contenders:
        source = TOP1_OF.get(name, name)
        if name in cosines:
            bench.accuracy.append(
                Accuracy(
                    contender=name,
                    precision=bench.contenders[name].facts.precision,
                    top1=top1.get(source),
                    num_images=num_drawings if source in top1 else len(cosines[name]),
                    min_cosine=float(cosines[name].min()),
                    median_cosine=float(np.median(cosines[name])),
                )
            )


def measure_top1(num_drawings: int = 4096) -> tuple[dict[str, float], int]:
    """Measure in a process of its own, which is where torch and the engines stay.

    Args:
        num_drawings: How many, chosen at random; all where there are fewer.

    Returns:
        The share of right answers by contender, and how many drawings there were.

    Raises:
        TimeoutError: it took too long.
        ImportError: OpenVINO, NNCF, ONNX Runtime or torch is not installed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, num_drawings).result(timeout=TIMEOUT_S)


def _measure(num_drawings: int) -> tuple[dict[str, float], int]:
    from export import int8
    from export.samples import calibration_batches, load_samples, read_choices

    spec, num_threads = find_spec(ARCHITECTURE), len(os.sched_getaffinity(0))
    samples = load_samples(DRAWINGS, spec.facts, num_images=num_drawings)
    image_file, text_file = (
        REPOSITORY / name / "1/model.onnx" for name in (image_model(NAME), text_model(NAME))
    )
    found = {}
    for contender, load in (
        ("onnxruntime", partial(load_onnxruntime, is_default=True)),
        ("openvino", int8.load_openvino),
    ):
        towers = [load(file, num_threads=num_threads) for file in (image_file, text_file)]
        found[contender] = top1(towers[0], towers[1], samples)
    calibration = [
        load_samples(each, spec.facts, num_images=NUM_CALIBRATION) for each in CALIBRATION
    ]
    drawn: list[list[NDArray[np.generic]]] = [
        [*batches] for batches in calibration_batches(calibration)
    ]
    with tempfile.TemporaryDirectory() as folder:
        encoders = []
        for file, batches in zip((image_file, text_file), drawn, strict=True):
            path = Path(folder, f"{file.parents[1].name}.xml")
            int8.write_int8(file, batches, path)
            encoders.append(int8.load_openvino(path, num_threads))
        found["openvino int8"] = top1(encoders[0], encoders[1], samples)
    _, texts, _ = read_choices(DRAWINGS, num_images=num_drawings)
    with clip_rt.Client(repository=REPOSITORY, model=NAME, timeout_s=TIMEOUT_S) as client:
        image_NE = client.encode_images(list(samples.pixels_NSSC))
        text_ME = client.encode_texts(texts, truncate=True)
    found[SERVED] = float(((image_NE @ text_ME.T).argmax(axis=1) == samples.right_N).mean())
    return found, len(samples.right_N)
