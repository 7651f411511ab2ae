"""Serve the model file beside this one in Triton's python backend.

`model.onnx` is run by OpenVINO or ONNX Runtime, `model.xml` (INT8) by OpenVINO. Which of the two is
the faster for a model in ONNX on this processor is measured at the first load and remembered.

In: one batch of requests, uint8 `pixels` (N, S, S, 3) or int32 `tokens` (N, L). Out, for each:
float32 `embeddings` (N, D), or those outputs of a file of hidden states that were asked for. A bad
request gets an error of its own and harms no other.
Export copies this file verbatim to `<model>/1/model.py`, and beside it `python_dlpack.py` as
`dlpack.py` and clip_rt's `processor.py`, `runtime_choice.py` and `runtimes.py`; they import nothing
else of this project.

Read from config.pbtxt: the input and the outputs, the kind of the instance, and the parameters
`runtime`, `intra_op_threads`, `execution_providers`, `vocab_size` and `context_length`, all of them
optional. The log says which runtime it became, and why.
"""

import json
from pathlib import Path

import numpy as np
import runtimes
import triton_python_backend_utils as pb_utils
from dlpack import Loan


class RefusedError(Exception):
    """The request itself is wrong; the message goes back to its sender."""


class TritonPythonModel:
    """One instance of one exported tower."""

    def initialize(self, args):
        """Load the graph; raise, and so fail the load, when it cannot run where it was asked to."""
        config = json.loads(args["model_config"])
        parameters = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        (self._input,) = config["input"]
        self._outputs = [each["name"] for each in config["output"]]
        self._dtype = pb_utils.triton_string_to_numpy(self._input["data_type"])
        self._dims = [int(side) for side in self._input["dims"]]
        self._vocab_size = int(parameters.get("vocab_size", 49408))
        self._context_length = int(parameters.get("context_length", 77))
        self._encode = self._load(args, parameters)

    def _load(self, args, parameters):
        model = runtimes.ModelFile(
            name=args["model_name"],
            folder=Path(args["model_repository"], args["model_version"]),
            kind=args["model_instance_kind"],
            device_id=int(args["model_instance_device_id"]),
            parameters=parameters,
            dims=self._dims,
            dtype=self._dtype,
            log=pb_utils.Logger.log_info,
            warn=pb_utils.Logger.log_warn,
        )
        try:
            return runtimes.load(model)
        except runtimes.RuntimeRefusedError as error:
            raise pb_utils.TritonModelException(str(error)) from error

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
                members_by_shape.setdefault(array.shape[1:], []).append((request, index, array))
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
        arrays = [array for _, _, array in members]
        try:
            outputs = self._encode(np.concatenate(arrays) if len(arrays) > 1 else arrays[0])
        except Exception as error:  # Whatever went wrong is the answer; the server must live.
            if len(members) == 1:
                return [(members[0][1], _failure(str(error), pb_utils.TritonError.INTERNAL))]
            return [answer for member in members for answer in self._run([member])]
        ends = np.cumsum([len(array) for array in arrays])
        parts = zip(*(np.split(output, ends[:-1]) for output in outputs), strict=True)
        return [
            (index, self._answer(request, part))
            for (request, index, _), part in zip(members, parts, strict=True)
        ]

    def _answer(self, request, outputs):
        asked = request.requested_output_names()
        tensors = [
            pb_utils.Tensor.from_dlpack(name, Loan(np.asarray(output, np.float32)))
            for name, output in zip(self._outputs, outputs, strict=True)
            if name in asked
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _failure(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
