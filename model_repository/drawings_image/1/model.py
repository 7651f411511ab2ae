"""Serve the model file beside this one in Triton's python backend.

`model.onnx` is run by OpenVINO or ONNX Runtime, `model.xml` (INT8) by OpenVINO. Which of the two is
the faster for a model in ONNX on this processor is measured at the first load and remembered.

In: one batch of requests, uint8 `pixels` (N, S, S, 3) or int32 `tokens` (N, L); out: float32
`embeddings` (N, D) for each. A bad request gets an error of its own and harms no other.
Export copies this file verbatim to `<model>/1/model.py`, and beside it `python_dlpack.py` as
`dlpack.py` and clip_rt's `processor.py` and `runtime_choice.py`; they import nothing else of this
project.

Read from config.pbtxt: the input and the output, the kind of the instance, and the parameters
`runtime`, `intra_op_threads`, `execution_providers`, `vocab_size` and `context_length`, all of them
optional. The log says which runtime it became, and why.
"""

import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import processor
import runtime_choice
import triton_python_backend_utils as pb_utils
from dlpack import Loan

PROVIDERS_BY_KIND = {"CPU": ["CPUExecutionProvider"], "GPU": ["CUDAExecutionProvider"]}
"""What an instance runs on unless `execution_providers` says otherwise.

TensorRT inside ONNX Runtime builds an engine during the first requests, for minutes, so it runs
only when it is asked for.
"""
RUNTIMES = ("auto", "onnxruntime", "openvino")
"""Values of `runtime`. auto on a processor is the faster of the two, as far as both are there and
take the model."""
TEXT_LENGTH_TOKENS = 16
"""Of the text that runtimes are timed on."""


class RefusedError(Exception):
    """The request itself is wrong; the message goes back to its sender."""


class TritonPythonModel:
    """One instance of one exported tower."""

    def initialize(self, args):
        """Load the graph; raise, and so fail the load, when it cannot run where it was asked to."""
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        (self._input,), (self._output,) = config["input"], config["output"]
        self._dtype = pb_utils.triton_string_to_numpy(self._input["data_type"])
        self._dims = [int(side) for side in self._input["dims"]]
        self._vocab_size = int(parameters.get("vocab_size", 49408))
        self._context_length = int(parameters.get("context_length", 77))
        self._encode = _load(args, parameters)

    def execute(self, requests):
        """Answer every request of a batch, in order, with one run per shape."""
        responses = [None] * len(requests)
        members_by_shape = {}
        for index, request in enumerate(requests):
            try:
                array = self._read(request)
            except RefusedError as error:
                responses[index] = _failure(str(error), pb_utils.TritonError.INVALID_ARG)
            else:
                members_by_shape.setdefault(array.shape[1:], []).append((index, array))
        for members in members_by_shape.values():
            for index, response in self._run(members):
                responses[index] = response
        return responses

    def _read(self, request):
        tensor = pb_utils.get_input_tensor_by_name(request, self._input["name"])
        if tensor is None:
            raise RefusedError(f"input {self._input['name']!r} is missing")
        array = np.from_dlpack(tensor)
        if array.dtype != self._dtype:
            raise RefusedError(
                f"{self._input['name']} is {array.dtype}; the model reads {self._dtype}"
            )
        fits = array.ndim == 1 + len(self._dims) and all(
            side in (-1, found) for side, found in zip(self._dims, array.shape[1:], strict=True)
        )
        if not fits:
            raise RefusedError(
                f"{self._input['name']} has shape {array.shape}; the model reads "
                f"(N, {', '.join(map(str, self._dims))})"
            )
        if np.issubdtype(self._dtype, np.signedinteger):
            self._check_tokens(array)
        return array

    def _check_tokens(self, tokens):
        """Refuse ids outside the table: CUDA would read foreign memory without a word."""
        if not 0 < tokens.shape[1] <= self._context_length:
            raise RefusedError(
                f"tokens are {tokens.shape[1]} long; the model reads 1 to {self._context_length}"
            )
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self._vocab_size):
            raise RefusedError(
                f"token ids span {tokens.min()} to {tokens.max()}; the model knows 0 to "
                f"{self._vocab_size - 1}"
            )

    def _run(self, members):
        """Run arrays of one shape together; when that fails, each alone, to spare the innocent."""
        arrays = [array for _, array in members]
        try:
            embeddings = self._encode(np.concatenate(arrays) if len(arrays) > 1 else arrays[0])
        except Exception as error:  # Whatever went wrong is the answer; the server must live.
            if len(members) == 1:
                return [(members[0][0], _failure(str(error), pb_utils.TritonError.INTERNAL))]
            return [answer for member in members for answer in self._run([member])]
        if len(members) == 1:
            return [(members[0][0], self._answer(embeddings))]
        ends = np.cumsum([len(array) for array in arrays])
        rows = np.split(embeddings, ends[:-1])
        return [(index, self._answer(part)) for (index, _), part in zip(members, rows, strict=True)]

    def _answer(self, embeddings):
        tensor = pb_utils.Tensor.from_dlpack(
            self._output["name"], Loan(np.asarray(embeddings, np.float32))
        )
        return pb_utils.InferenceResponse(output_tensors=[tensor])


def _load(args, parameters):
    """Load the model file into the runtime that `runtime` asks for; return what embeds a batch."""
    folder = os.path.join(args["model_repository"], args["model_version"])
    is_int8 = not os.path.exists(os.path.join(folder, "model.onnx"))
    _check_runtime(is_int8, args, parameters)
    runtime = parameters.get("runtime", "auto")
    on_processor = args["model_instance_kind"] == "CPU" and "execution_providers" not in parameters
    path = os.path.join(folder, "model.xml" if is_int8 else "model.onnx")
    if is_int8 or runtime == "openvino":
        encode, words = _load_openvino(path, args, parameters)
    elif runtime == "auto" and on_processor:
        encode, words = _load_fastest(path, args, parameters)
    else:
        encode, words = _load_onnx(path, args, parameters)
    pb_utils.Logger.log_info(f"{args['model_name']} is run by {words}")
    return encode


def _load_fastest(path, args, parameters):
    """Load into the runtime that is remembered as the faster here, or measure both first."""
    folder, machine = runtime_choice.default_folder(), _name_machine()
    model = _name_model(path, args, parameters)
    choice = runtime_choice.recall(folder, machine, model, args["model_name"])
    has_both = all(map(runtime_choice.installed, runtime_choice.RUNTIMES))
    if choice is None and has_both:
        # One after the other, or the towers and instances of a model would slow each other.
        with runtime_choice.alone(folder) as is_alone:
            choice = runtime_choice.recall(folder, machine, model, args["model_name"])
            if choice is None and is_alone:
                return _measure(path, args, parameters, (folder, machine, model))
    reason = ""
    if choice is not None:
        reason = f"{choice}, measured at an earlier start"
    elif has_both and is_alone is None:
        reason = "not measured: no folder can be written to for a lock"
    elif has_both:
        reason = "not measured: other models still were"
    order = sorted(LOADERS, key=lambda name: choice is not None and name != choice.runtime)
    return _load_first_of(order, path, args, parameters, reason)


def _load_first_of(order, path, args, parameters, reason):
    """Load into the first runtime that takes the model; the last one's refusal is raised."""
    first, second = order
    try:
        encode, words = LOADERS[first](path, args, parameters)
    except Exception as error:
        pb_utils.Logger.log_warn(
            f"{args['model_name']}: not by {runtime_choice.RUNTIMES[first]}, by "
            f"{runtime_choice.RUNTIMES[second]} instead: {error}"
        )
        return LOADERS[second](path, args, parameters)
    return encode, f"{words} ({reason})" if reason else words


def _measure(path, args, parameters, place):
    """Load into both runtimes, time one row, and keep the faster; of one that fails, the other.

    A model that is loaded slowly, or that memory might not hold twice, is OpenVINO's without.
    """
    name, (folder, machine, model) = args["model_name"], place
    first, second = LOADERS
    start_s = time.perf_counter()
    try:
        loaded = {first: LOADERS[first](path, args, parameters)}
    except Exception:
        return _load_first_of([first, second], path, args, parameters, "")
    load_s = time.perf_counter() - start_s
    num_bytes = runtime_choice.model_bytes(Path(path))
    reason = None
    if load_s > runtime_choice.MAX_LOAD_S:
        reason = f"not measured: it took {load_s:.0f} s to load"
    elif not runtime_choice.fits_twice(num_bytes):
        reason = f"not measured: {num_bytes / 2**20:.0f} MiB twice might not fit into memory"
    else:
        batch = _make_row(args, parameters)
        try:
            loaded[second] = LOADERS[second](path, args, parameters)
            choice = runtime_choice.choose(
                runtime_choice.time_by_turns(
                    {each: partial(encode, batch) for each, (encode, _) in loaded.items()}
                )
            )
        except Exception as error:  # The first runs it, as it did before there was a second.
            pb_utils.Logger.log_warn(f"{name}: not measured: {error}")
            reason = "not measured"
        else:
            is_kept = runtime_choice.remember(folder, machine, model, choice, name=name)
            when = "now" if is_kept else "at each start: nothing can be kept"
            encode, words = loaded[choice.runtime]
            return encode, f"{words} ({choice}, measured {when})"
    encode, words = loaded[first]
    return encode, f"{words} ({reason})"


def _make_row(args, parameters):
    """Make one row of zeros, as the model reads them."""
    (config,) = json.loads(args["model_config"])["input"]
    length = min(TEXT_LENGTH_TOKENS, int(parameters.get("context_length", TEXT_LENGTH_TOKENS)))
    dims = [length if int(side) < 0 else int(side) for side in config["dims"]]
    return np.zeros((1, *dims), pb_utils.triton_string_to_numpy(config["data_type"]))


def _name_machine():
    return runtime_choice.digest_machine(dataclasses.asdict(processor.read()))


def _name_model(path, args, parameters):
    (config,) = json.loads(args["model_config"])["input"]
    return runtime_choice.digest_model(Path(path), config["dims"], _num_threads(parameters))


def _check_runtime(is_int8, args, parameters):
    """Raise when what is asked for contradicts itself, the file or the device."""
    runtime, kind = parameters.get("runtime", "auto"), args["model_instance_kind"]
    has_providers = "execution_providers" in parameters
    named = " Its execution_providers are ONNX Runtime's." if has_providers else ""
    fault = None
    if runtime not in RUNTIMES:
        fault = f"has runtime {runtime[:40]!r}; there are {', '.join(RUNTIMES)}."
    elif is_int8 and kind != "CPU":
        fault = (
            f"is configured for {kind}; its INT8 model runs on CPU only. Export it in FP16 for a "
            "GPU."
        )
    elif is_int8 and (runtime == "onnxruntime" or has_providers):
        fault = (
            f"is an INT8 model, which only OpenVINO runs, and has runtime {runtime}.{named} "
            "Leave runtime auto and name no providers, or export it in FP32."
        )
    elif runtime == "openvino" and kind != "CPU":
        fault = (
            f"is configured for {kind} and has runtime openvino, which is for CPU. "
            "Change one: python -m export.repository --runtime auto, or --device cpu."
        )
    elif runtime == "openvino" and has_providers:
        fault = f"has runtime openvino.{named} Remove one of the two."
    if fault:
        raise pb_utils.TritonModelException(f"{args['model_name']} {fault}")


def _load_onnx(path, args, parameters):
    # Or it keeps an identifier in the user's cache folder and sends to its maker what it runs.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    kind, available = args["model_instance_kind"], onnxruntime.get_available_providers()
    wanted = PROVIDERS_BY_KIND[kind]
    if "execution_providers" in parameters:
        wanted = [name.strip() for name in parameters["execution_providers"].split(",")]
    device = {"device_id": int(args["model_instance_device_id"])} if kind == "GPU" else {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _num_threads(parameters)
    options.inter_op_num_threads = 1
    # Between the parts of a run threads spin for a moment, which saves 1 ms of 30 on one image;
    # longer, or between runs, they would take the cores from the client beside them.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        path,
        options,
        providers=[(name, device) for name in wanted if name in available],
    )
    taken = session.get_providers()
    # ONNX Runtime goes on with the processor when a GPU provider cannot start. We do not.
    if not set(wanted) & set(taken):
        raise pb_utils.TritonModelException(
            f"{args['model_name']} is configured for {kind} and wants {' or '.join(wanted)}; "
            f"ONNX Runtime {onnxruntime.__version__} can use {', '.join(available)} here. "
            "Install onnxruntime-gpu with its CUDA libraries, or export for CPU."
        )
    name = session.get_inputs()[0].name
    words = f"ONNX Runtime {onnxruntime.__version__} with {', '.join(taken)}"
    return lambda batch: session.run(None, {name: batch})[0], words


def _load_openvino(path, args, parameters):
    try:
        import openvino
    except ImportError as error:
        raise pb_utils.TritonModelException(
            f"{args['model_name']} is to be run by OpenVINO, and {error}. Install it beside the "
            "server: pip install openvino. Or, unless it is INT8, let ONNX Runtime run it: "
            "python -m export.repository --runtime onnxruntime"
        ) from error
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        # What is not INT8: OpenVINO prefers BF16, which is slower than FP32 without AMX.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": _num_threads(parameters),
        # Threads bound to a core wait for whoever else has it.
        "ENABLE_CPU_PINNING": False,
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    words = f"OpenVINO {openvino.__version__.split('-')[0]}"
    # Not shared outputs: a response is copied when all are made, and each run would overwrite them.
    return lambda batch: request.infer({0: batch}, share_inputs=True)[0], words


LOADERS = {"openvino": _load_openvino, "onnxruntime": _load_onnx}
"""By runtime, in the order in which they are taken where nothing was measured. Each returns what
embeds a batch, and the words of the log."""


def _failure(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _num_threads(parameters):
    return int(parameters.get("intra_op_threads", 0)) or len(os.sched_getaffinity(0))
