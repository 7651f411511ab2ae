"""What each contender's numbers cost: cosines on photographs, right answers on drawings."""

from __future__ import annotations

import numpy as np

from benchmarks.findings import Accuracy
from benchmarks.suites.bench import Bench
from benchmarks.suites.cases import Case
from benchmarks.suites.top1 import SERVED, measure_top1

TOP1_OF = {
    "triton openvino": SERVED,
    "triton onnxruntime": "onnxruntime",
    "triton int8": "openvino int8",
}
"""Whose right answers count for those that are served. Triton takes OpenVINO when it may choose;
the others run the same files with the same settings as the engine called directly."""


def measure_accuracy(bench: Bench, pixels: Case, jpegs: Case) -> None:
    """Hold everyone's embeddings of the same photographs against FP32 torch.

    Full runs also count how often the bundled model is right in each precision.

    Args:
        bench: Gets the figures.
        pixels: Photographs as the model reads them.
        jpegs: The same as files, for those who read files only.
    """
    bench.progress.plan(2 if bench.settings.is_full else 1)
    bench.progress.step("accuracy on photographs")
    cosines: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
    for case in (jpegs, pixels):
        for name in bench.admit(case):
            cosines[name] = bench.cosines(case, name)
    bench.progress.done()
    top1: dict[str, float] = {}
    num_drawings = 0
    if bench.settings.is_full:
        bench.progress.step("accuracy on drawings")
        try:
            top1, num_drawings = measure_top1()
        except Exception as error:  # The cosines are still worth something.
            bench.failures.append(f"accuracy on drawings: {error!r}")
        bench.progress.done()
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
