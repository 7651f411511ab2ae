"""How often the bundled model names a drawing right, in each precision and through each engine.

The drawings are of a hand that it has not learned from. INT8 is made of the FP32 file, calibrated
on other drawings and on the names of their classes, as whoever has a model and knows what it is
for would; a third of them are by the same hand, in black lines.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
    import clip_rt
    from benchmarks.int8 import onnxruntime_encoder, top1
    from clip_rt.specs import find_spec, image_model, text_model
    from export import int8
    from export.samples import calibration_batches, load_samples, read_choices

    spec, num_threads = find_spec(ARCHITECTURE), len(os.sched_getaffinity(0))
    samples = load_samples(DRAWINGS, spec, num_images=num_drawings)
    image_file, text_file = (
        REPOSITORY / name / "1/model.onnx" for name in (image_model(NAME), text_model(NAME))
    )
    found = {}
    for contender, load in (
        ("onnxruntime", onnxruntime_encoder),
        ("openvino", int8.load_openvino),
    ):
        found[contender] = top1(
            load(image_file, num_threads), load(text_file, num_threads), samples
        )
    calibration = [load_samples(each, spec, num_images=NUM_CALIBRATION) for each in CALIBRATION]
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
