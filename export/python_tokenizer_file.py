"""Hand out the tokenizer.json beside this file in parts, in Triton's python backend.

In: `chunk_index` int32 [1], from 0; out: `chunk` uint8 [n], 1 MiB of the file or what is left.
Export copies this file verbatim to `<slug>_tokenizer_file/<version>/model.py`, and dlpack.py beside
it.
"""

import os

import numpy as np
import triton_python_backend_utils as pb_utils
from dlpack import Loan

CHUNK_BYTES = 2**20
FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizer.json")


class TritonPythonModel:
    """The file of one model."""

    def initialize(self, args):
        """Open the file; raise, and so fail the load, when there is none."""
        self._content = np.memmap(FILE, np.uint8, mode="r")

    def execute(self, requests):
        """Answer every request with the part it asks for."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        asked = pb_utils.get_input_tensor_by_name(request, "chunk_index")
        index = int(np.from_dlpack(asked)[0])
        num_chunks = -(-len(self._content) // CHUNK_BYTES)
        if not 0 <= index < num_chunks:
            error = pb_utils.TritonError(
                f"chunk_index is {index}; the file has the parts 0 to {num_chunks - 1}",
                pb_utils.TritonError.INVALID_ARG,
            )
            return pb_utils.InferenceResponse(error=error)
        start = index * CHUNK_BYTES
        chunk = Loan(self._content[start : start + CHUNK_BYTES])
        return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("chunk", chunk)])
