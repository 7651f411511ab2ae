"""Engines that are called directly, driven as a user without a server would.

Each engine is imported only where it is loaded. TensorRT's was written on a machine without a GPU:
never run yet. Its transfers are part of what is timed around it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks.contenders.implementation import (
    Implementation,
    count_cores,
    installed,
    prompts_of,
    zero_shot_prompts,
)
from benchmarks.contenders.kit import MAX_BATCH_SIZE, Form, Kit
from benchmarks.findings import CallKind
from clip_rt.classification import zero_shot
from clip_rt.inputs.tokenizer import pad
from clip_rt.telemetry import TOTAL

if TYPE_CHECKING:
    import openvino

Encode: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
"""uint8 (N, S, S, 3) or int32 (N, L) in, float32 (N, D) of length 1 out."""
OPERATORS = {
    "matrix products": ("FullyConnected", "MatMul"),
    "convolution": ("Convolution",),
    "attention": ("ScaledDotProductAttention", "Subgraph", "Softmax"),
    "normalisation": ("MVN",),
    "layout": ("Transpose", "Reorder", "Reshape"),
}
"""By kind, the operators that OpenVINO names after it has fused them. A Subgraph is what it
compiles itself: in these models, attention."""
ELEMENTWISE = "elementwise"
"""All other operators."""
KINDS = (*OPERATORS, ELEMENTWISE)
KIND_OF = {operator: kind for kind, operators in OPERATORS.items() for operator in operators}
PROFILE_LIMIT_S = 300.0


class Bare(Implementation):
    """The towers in an engine that is called directly.

    Args:
        kit: Whose model it is.
        encode_pixels: The image tower.
        encode_tokens: The text tower.
        versions: Of what runs them.
    """

    def __init__(
        self, kit: Kit, encode_pixels: Encode, encode_tokens: Encode, versions: dict[str, str]
    ) -> None:
        self._kit = kit
        self._facts, self._tokenizer = kit.facts, kit.make_tokenizer()
        self._encode_pixels = encode_pixels
        self._encode_tokens = encode_tokens
        self.versions = versions

    def prepare(self, call: CallKind, items: Any) -> Any:
        """Embed the labels of "zero_shot"; for all others there is nothing to prepare."""
        if call == "zero_shot":
            jpegs, labels = items
            return jpegs, labels, self._encode_texts(zero_shot_prompts(labels))
        return np.ascontiguousarray(items) if call == "pixels" else items

    def run(self, call: CallKind, prepared: Any) -> NDArray[np.float32]:
        """Embed; batches of at most what the server would make of them."""
        if call == "pixels":
            return self._in_batches(self._encode_pixels, prepared)
        if call == "jpegs":
            return self._encode_jpegs(prepared)
        if call == "texts":
            return self._encode_texts(prepared)
        if call == "classifier":
            rows = self._encode_texts(prompts_of(prepared))
            return zero_shot.pool(rows.reshape(len(prepared), -1, rows.shape[1]))
        jpegs, labels, class_CE = prepared
        return zero_shot.classify(
            image_embeddings=self._encode_jpegs(jpegs),
            class_embeddings=class_CE,
            labels=labels,
            logit_scale=self._kit.logit_scale,
            logit_bias=self._kit.logit_bias,
            score=self._facts.score,
        ).probabilities

    def _encode_jpegs(self, jpegs: list[bytes]) -> NDArray[np.float32]:
        facts = self._facts
        pixels = clip_rt.preprocess(
            jpegs, side_px=facts.side_px, resizing=facts.resizing, num_threads=count_cores()
        )
        return self._in_batches(self._encode_pixels, pixels)

    def _encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        facts = self._facts

        def encode(ids: list[list[int]]) -> NDArray[np.float32]:
            # Where nothing after the end of a text reaches its embedding, nothing is computed.
            length = max(map(len, ids)) if facts.is_any_length_exact else facts.context_length
            pad_id = facts.tokenization.pad_id
            return self._encode_tokens(pad(ids, length_tokens=length, pad_id=pad_id))

        return self._in_batches(encode, [self._tokenizer.encode_text(text) for text in texts])

    @staticmethod
    def _in_batches(encode: Callable[[Any], NDArray[np.float32]], rows: Any) -> NDArray[np.float32]:
        starts = range(0, len(rows), MAX_BATCH_SIZE)
        # A copy: some engines write the next answer into the same memory.
        parts = [encode(rows[start : start + MAX_BATCH_SIZE]).copy() for start in starts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class OpenVINO(Bare):
    """The towers in OpenVINO.

    Args:
        kit: Whose model it is.
        files: Of the image tower and of the text tower.
    """

    def __init__(self, kit: Kit, files: tuple[Path, Path]) -> None:
        self._image_file, text_file = files
        image, text = load_openvino(self._image_file), load_openvino(text_file)
        super().__init__(kit, image, text, installed("openvino"))

    def profile(self, call: CallKind, prepared: Any, num_calls: int) -> list[dict[str, float]]:
        """Return for each of some runs the seconds by kind of operator, and `total`.

        In a process of its own that ends with it: a second copy of the tower is not among the
        memory that this contender needs.

        Raises:
            ValueError: the call is another than "pixels".
        """
        if call != "pixels":
            raise ValueError(f"only the image tower is taken apart, with pixels; this is {call}.")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.submit(_profile, self._image_file, prepared, num_calls)
            return found.result(timeout=PROFILE_LIMIT_S)


def make(kit: Kit, *, form: Form, is_openvino: bool = False) -> Implementation:
    """Load both towers of a form in ONNX Runtime, OpenVINO or TensorRT."""
    if form == "tensorrt":
        return _make_tensorrt(kit)
    name = "model.xml" if form == "int8" else "model.onnx"
    files = kit.tower(form, "image", name), kit.tower(form, "text", name)
    if is_openvino:
        return OpenVINO(kit, files)
    image, text = map(load_onnxruntime, files)
    return Bare(kit, image, text, installed("onnxruntime"))


def load_onnxruntime(
    file: Path, *, is_default: bool = False, num_threads: int | None = None
) -> Encode:
    """Load a tower, ONNX, with the options of export/python_model.py.

    Args:
        file: Which.
        is_default: Its threads spin while they wait as ONNX Runtime has it by default, for long.
        num_threads: Without it, one for each core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or count_cores()
    options.inter_op_num_threads = 1
    if not is_default:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: session.run(None, {name: batch})[0]


def load_openvino(file: Path) -> Encode:
    """Load a tower, ONNX or OpenVINO's own, with the settings of export/python_model.py."""
    request = _compile(file, is_counting=False)
    return lambda batch: request.infer({0: batch}, share_inputs=True)[0]


def _make_tensorrt(kit: Kit) -> Bare:
    """Load both towers as engines; texts are padded to the lengths these have."""
    import torch

    from export.engine import load_runtime, text_lengths
    from export.engine_runner import EngineRunner

    trt: Any = load_runtime("tensorrt")
    # The file name carries the GPU's compute capability.
    file = min(kit.tower("tensorrt", "image").parent.glob("*.plan")).name
    image, text = (
        EngineRunner(kit.tower("tensorrt", "image", file), trt),
        EngineRunner(kit.tower("tensorrt", "text", file), trt),
    )
    lengths = text_lengths(kit.architecture.facts)

    def encode_tokens(tokens_NL: NDArray[Any]) -> NDArray[np.float32]:
        length = tokens_NL.shape[1]
        padding = min(each for each in lengths if each >= length) - length
        return text(np.pad(tokens_NL, ((0, 0), (0, padding))).astype(np.int32))

    versions = {"tensorrt": trt.__version__, "gpu": torch.cuda.get_device_name()}
    return Bare(kit, image, encode_tokens, versions)


def _profile(file: Path, batch: NDArray[Any], num_calls: int) -> list[dict[str, float]]:
    """Count in each of some runs after the first, which sets things up."""
    request = _compile(file, is_counting=True)
    request.infer({0: batch}, share_inputs=True)
    before_s = _spent_s(request, num_runs=1)
    calls = []
    for num_runs in range(2, num_calls + 2):
        start_s = time.perf_counter()
        request.infer({0: batch}, share_inputs=True, share_outputs=True)
        total_s = time.perf_counter() - start_s
        spent_s = _spent_s(request, num_runs)
        # What a model has none of is left out.
        kinds = {kind: spent_s[kind] - before_s[kind] for kind in KINDS if spent_s[kind] > 0}
        calls.append({**kinds, TOTAL: total_s})
        before_s = spent_s
    return calls


def _spent_s(request: openvino.InferRequest, num_runs: int) -> Counter[str]:
    """Return the seconds of all runs so far by kind; OpenVINO's counters are the means of these."""
    spent_s: Counter[str] = Counter()
    for operator in request.profiling_info:
        kind = KIND_OF.get(operator.node_type, ELEMENTWISE)
        spent_s[kind] += num_runs * operator.real_time.total_seconds()
    return spent_s


def _compile(file: Path, *, is_counting: bool) -> openvino.InferRequest:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": count_cores(),
        "ENABLE_CPU_PINNING": False,
        "PERF_COUNT": is_counting,
    }
    return openvino.Core().compile_model(str(file), "CPU", settings).create_infer_request()
