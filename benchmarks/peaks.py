"""What this machine can do at most, measured in a process of its own; see `machine.Probe`.

    python -m benchmarks.peaks NUM_THREADS BUDGET_S [DIVISOR]

reads requests, one JSON a line, and answers each with one: "peaks" first, then "time" as often as
rounds are made. It ends when nobody can ask any more. The libraries that multiply matrices are
tried against each other, because none is the fastest on every processor, and a limit that was
measured with a slow one would be passed. Matrices are as ViT-B/32 has them at 32 images, and one
larger, whose product is also the probe of every round. A divisor makes them, and the memory that is
read, so many times smaller: for a test of the program, whose figures are then none of the machine.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks import findings
from benchmarks.findings import Interval
from benchmarks.timing import Way, inverse, median_interval, ratios, take_turns, time_each
from clip_rt.specs import MODELS, ViTSpec


class Shape(NamedTuple):
    """Of a product of matrices, (m, k) times (k, n)."""

    m: int
    k: int
    n: int

    @property
    def flop(self) -> int:
        """Operations, a multiplication and an addition each for 2."""
        return 2 * self.m * self.k * self.n

    def smaller(self, divisor: int) -> Shape:
        """Return one with so many times fewer rows, and as many times fewer operations."""
        return self._replace(m=self.m // divisor)


def _vit_shapes(model: str, num_images: int) -> tuple[Shape, ...]:
    spec = MODELS[model]
    assert isinstance(spec.image, ViTSpec)
    width = spec.image.width
    rows = num_images * ((spec.side_px // spec.image.patch_px) ** 2 + 1)
    pairs = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    return tuple(Shape(rows, k, n) for k, n in pairs)


PROBE_SHAPE = Shape(2048, 2048, 2048)
MODEL_SHAPES = _vit_shapes("ViT-B/32", 32)
"""Of the four products that each layer has."""
TRIAL_SHAPE = Shape(512, 512, 512)
MAX_INT8_SLOWNESS = 4.0
"""Of an INT8 product, in times of NumPy's in float32. A slower one is a plain loop, no peak: torch
has that where the processor has no VNNI, and every shape of it would take minutes."""
TRIAL_CALLS = 5
READ_BYTES = 768 * 2**20
"""More than any cache holds."""
CHOICE_SHARE = 0.4
"""Of the budget, for finding the fastest libraries."""
TURN_S = 0.05
MAX_ROUNDS = 15

Array = NDArray[Any]
Call = Callable[[], object]


def _numpy(a: Array, b: Array, num_threads: int) -> Call:
    return functools.partial(np.matmul, a, b, out=np.empty((len(a), b.shape[1]), np.float32))


def _torch(a: Array, b: Array, num_threads: int) -> Call:
    import torch

    torch.set_num_threads(num_threads)
    out = torch.empty(len(a), b.shape[1])
    return functools.partial(torch.mm, torch.from_numpy(a), torch.from_numpy(b), out=out)


def _openvino(a: Array, b: Array, num_threads: int) -> Call:
    from openvino import opset13

    left = opset13.parameter(a.shape, np.float32)
    product = opset13.matmul(left, opset13.constant(b), False, False)
    return _openvino_call(product, left, a, num_threads)


def _openvino_call(product: Any, left: Any, a: Array, num_threads: int) -> Call:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": num_threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(openvino.Model([product], [left]), "CPU", options)
    request = model.create_infer_request()
    request.set_input_tensor(openvino.Tensor(a))
    return request.infer


def _onnxruntime(a: Array, b: Array, num_threads: int) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, a.shape)],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, (len(a), b.shape[1]))],
        [numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return functools.partial(session.run, None, {"a": a})


LIBRARIES: dict[str, Callable[[Array, Array, int], Call]] = {
    "numpy": _numpy,
    "torch": _torch,
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}
"""Each makes a call that multiplies two float32 matrices; the second is a constant, as weights."""


def _products(library: str, shapes: Sequence[Shape], num_threads: int) -> dict[Shape, Call]:
    """Return the product of each shape by one library.

    Raises:
        ImportError: it is not installed.
    """
    rng = np.random.default_rng(0)
    return {
        shape: LIBRARIES[library](
            rng.random((shape.m, shape.k), np.float32),
            rng.random((shape.k, shape.n), np.float32),
            num_threads,
        )
        for shape in shapes
    }


def _torch_int8(shape: Shape, num_threads: int) -> Call:
    import torch

    torch.set_num_threads(num_threads)
    a = torch.randint(-127, 128, (shape.m, shape.k), dtype=torch.int8)
    b = torch.randint(-127, 128, (shape.k, shape.n), dtype=torch.int8)
    return functools.partial(torch._int_mm, a, b)


def _openvino_int8(shape: Shape, num_threads: int) -> Call:
    """As a quantised model has it: float32 comes in, is rounded to INT8, and goes out."""
    from openvino import opset13

    rng = np.random.default_rng(0)
    left = opset13.parameter((shape.m, shape.k), np.float32)
    low, high = np.float32(-1), np.float32(127 / 128)
    rounded = opset13.fake_quantize(left, low, high, low, high, 256)
    weight = opset13.constant(rng.integers(-127, 128, (shape.n, shape.k), np.int8))
    scale = opset13.constant(np.full((shape.n, 1), 1 / 127, np.float32))
    right = opset13.multiply(opset13.convert(weight, np.float32), scale)
    product = opset13.matmul(rounded, right, False, True)
    a = rng.uniform(-1, 1, (shape.m, shape.k)).astype(np.float32)
    return _openvino_call(product, left, a, num_threads)


INT8_LIBRARIES: dict[str, Callable[[Shape, int], Call]] = {
    "torch": _torch_int8,
    "openvino": _openvino_int8,
}
"""Each makes a call that multiplies INT8 matrices and adds the products up in INT32."""


def _int8_products(shapes: Sequence[Shape], num_threads: int) -> dict[tuple[str, Shape], Call]:
    """Return the INT8 products of the shapes by each library that has fast ones."""
    float32_s = _fastest_s(_products("numpy", [TRIAL_SHAPE], num_threads)[TRIAL_SHAPE])
    calls: dict[tuple[str, Shape], Call] = {}
    for library, make in INT8_LIBRARIES.items():
        try:
            trial = make(TRIAL_SHAPE, num_threads)
            if _fastest_s(trial) > MAX_INT8_SLOWNESS * float32_s:
                continue
            calls |= {(library, shape): make(shape, num_threads) for shape in shapes}
        except (ImportError, AttributeError, RuntimeError):  # torch's is not everywhere
            continue
    return calls


def _fastest_s(call: Call) -> float:
    """Return the seconds of the fastest of a few calls."""
    return min(time_each(call)(TRIAL_CALLS))


def _reader(num_bytes: int, num_threads: int) -> Call:
    """Return a call that reads so much with all cores; a maximum waits for memory only."""
    part = np.ones(num_bytes // 8 // num_threads, np.int64)
    parts = [part, *(part.copy() for _ in range(num_threads - 1))]
    pool = ThreadPoolExecutor(num_threads)
    return lambda: list(pool.map(np.max, parts))


class Peaks:
    """The measurements, and the product that stays as the probe."""

    def __init__(self, num_threads: int, budget_s: float, divisor: int = 1) -> None:
        self._num_threads = num_threads
        self._budget_s = budget_s
        self._probe_shape = PROBE_SHAPE.smaller(divisor)
        self._model_shapes = tuple(shape.smaller(divisor) for shape in MODEL_SHAPES)
        self._read_bytes = READ_BYTES // divisor
        self._probe: Way | None = None

    def measure(self) -> dict[str, Any]:
        """Choose the fastest library, then measure it, INT8 and memory by turns.

        The products of the model have a library of their own where another is faster at these.
        """
        by_library = {}
        shapes = (self._probe_shape, *self._model_shapes)
        for library in LIBRARIES:
            try:
                by_library[library] = _products(library, shapes, self._num_threads)
            except ImportError:
                continue
        choice_ways = {}
        for library, calls in by_library.items():
            choice_ways[f"probe {library}"] = time_each(calls[self._probe_shape])
            model_calls = [calls[each] for each in self._model_shapes]
            choice_ways[f"model {library}"] = time_each(_all_of(model_calls))
        choice = take_turns(
            choice_ways,
            budget_s=CHOICE_SHARE * self._budget_s,
            min_rounds=3,
            min_turn_s=TURN_S,
            max_rounds=MAX_ROUNDS,
        )

        def median_s(library: str, *parts: str) -> float:
            return sum(choice[f"{part} {library}"].interval_s.median for part in parts)

        library = min(by_library, key=lambda name: median_s(name, "probe", "model"))
        model_library = min(by_library, key=lambda name: median_s(name, "model"))
        products = {(library, shape): call for shape, call in by_library[library].items()}
        products |= {
            (model_library, each): by_library[model_library][each] for each in self._model_shapes
        }
        by_library.clear()
        int8_products = _int8_products(shapes, self._num_threads)
        self._probe = time_each(products[library, self._probe_shape])
        ways = {_name("fp32", *key): time_each(call) for key, call in products.items()}
        ways |= {_name("int8", *key): time_each(call) for key, call in int8_products.items()}
        ways["read"] = time_each(_reader(self._read_bytes, self._num_threads))
        turns = take_turns(
            ways,
            budget_s=(1 - CHOICE_SHARE) * self._budget_s,
            min_turn_s=TURN_S,
            max_rounds=MAX_ROUNDS,
        )

        probe_s = turns[_name("fp32", library, self._probe_shape)].samples_s

        def speed(precision: str, library: str, shape: Shape) -> float:
            """In rates of the probe in the same rounds, so that a slow moment decides nothing."""
            samples_s = turns[_name(precision, library, shape)].samples_s
            times = median_interval(ratios(probe_s, samples_s)).median
            return times * shape.flop / self._probe_shape.flop

        def rate(precision: str, library: str, shape: Shape) -> Interval:
            time_s = turns[_name(precision, library, shape)].interval_s
            return inverse(time_s, shape.flop / 1e9)

        model_s = {
            each: turns[_name("fp32", model_library, each)].samples_s for each in self._model_shapes
        }
        best = max(products, key=lambda key: speed("fp32", *key))
        best_int8 = max(int8_products, key=lambda key: speed("int8", *key), default=None)
        peaks = findings.Peaks(
            gemm_fp32_gflop_per_s=rate("fp32", *best),
            gemm_fp32_model_gflop_per_s=model_rate(model_s),
            gemm_int8_gop_per_s=rate("int8", *best_int8) if best_int8 else None,
            read_gb_per_s=inverse(turns["read"].interval_s, self._read_bytes / 1e9),
            how=f"{self._num_threads} threads; the fastest here: FP32 by {_with_version(best[0])}, "
            f"those of ViT-B/32 by {_with_version(model_library)}, INT8 by "
            f"{_with_version(best_int8[0]) if best_int8 else 'none'}",
        )
        flop_while_probe = self._probe_shape.flop * speed("fp32", *best)
        return {"peaks": asdict(peaks), "flop_while_probe": flop_while_probe}

    def time(self, num_calls: int) -> list[float]:
        """Return the seconds of each of so many probes, once one more has woken the threads.

        Others have had the processor meanwhile; the limit is what it can do at its best.
        """
        assert self._probe is not None, "peaks come first"
        self._probe(1)
        return self._probe(num_calls)


def model_rate(samples_s: Mapping[Shape, Sequence[float]]) -> Interval:
    """Return the GFLOP/s of the model's products one after another, each weighing as its work does.

    Args:
        samples_s: Of each product, its times in the same rounds.
    """
    rounds_s = [sum(times_s) for times_s in zip(*samples_s.values(), strict=True)]
    gflop = sum(shape.flop for shape in samples_s) / 1e9
    return inverse(median_interval(rounds_s), gflop)


def _name(precision: str, library: str, shape: Shape) -> str:
    return f"{precision} {library} {shape}"


def _with_version(library: str) -> str:
    version: str = sys.modules[library].__version__
    return f"{library} {version.partition('-')[0]}"


def _all_of(calls: Iterable[Call]) -> Call:
    calls = list(calls)
    return lambda: [call() for call in calls]


def main() -> None:
    """Answer requests from standard input until it ends."""
    # Libraries may print; what goes to the other side is only what is written here.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    num_threads, budget_s, *divisor = sys.argv[1:]
    peaks = Peaks(int(num_threads), float(budget_s), *map(int, divisor))
    for line in sys.stdin:
        request = json.loads(line)
        answer: object
        answer = peaks.measure() if request == "peaks" else peaks.time(int(request))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
