"""TensorRT engines on a GPU, called directly. Written on a machine without one: never run yet.

`run` takes arrays of the host and brings embeddings back, synchronised, so transfers are part of
what is timed around it; `time_on_device` begins with the batch on the GPU and is timed by CUDA
events, which see the kernels only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders.bare import Bare
from benchmarks.contenders.kit import Kit
from benchmarks.findings import CallKind
from clip_rt.specs import EMBEDDINGS
from export.engine import load_runtime, text_lengths
from export.engine_runner import EngineRunner


class TimedRunner(EngineRunner):
    """An engine that is timed on the GPU as well."""

    def time_on_device(self, batch: NDArray[np.generic], num_calls: int) -> list[float]:
        """Return the seconds of each of some runs of a batch that is on the GPU already.

        Args:
            batch: One that the engine takes at once.
            num_calls: How many runs.
        """
        profile, max_batch_size = self._choose_profile(batch.shape[1:])
        if len(batch) > max_batch_size:
            raise ValueError(f"{len(batch)} rows are more than the engine's {max_batch_size}.")
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(num_calls)
        ]
        with torch.cuda.stream(self._stream):
            handle = self._stream.cuda_stream
            given = torch.from_numpy(np.ascontiguousarray(batch)).cuda()
            self._context.set_optimization_profile_async(profile, handle)
            self._context.set_input_shape(self._input, tuple(given.shape))
            shape = tuple(self._context.get_tensor_shape(EMBEDDINGS))
            found = torch.empty(shape, dtype=torch.float32, device="cuda")
            self._context.set_tensor_address(self._input, given.data_ptr())
            self._context.set_tensor_address(EMBEDDINGS, found.data_ptr())
            for begin, end in events:
                begin.record(self._stream)
                self._context.execute_async_v3(handle)
                end.record(self._stream)
            self._stream.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]


class TensorRT(Bare):
    """Both towers as engines; texts are padded to the lengths these have."""

    def __init__(self, kit: Kit) -> None:
        trt: Any = load_runtime("tensorrt")
        self._image = TimedRunner(kit.tower("tensorrt", "image", _engine(kit)), trt)
        self._text = TimedRunner(kit.tower("tensorrt", "text", _engine(kit)), trt)
        self._lengths = text_lengths(kit.spec)
        versions = {"tensorrt": trt.__version__, "gpu": torch.cuda.get_device_name()}
        super().__init__(kit, self._image, self._encode_padded, versions)

    def time_on_device(self, call: CallKind, prepared: Any, num_calls: int) -> list[float]:
        """Time "pixels" or "tokens" by CUDA events, without transfers."""
        if call == "pixels":
            return self._image.time_on_device(prepared, num_calls)
        if call == "tokens":
            return self._text.time_on_device(self._pad(prepared), num_calls)
        raise ValueError(f"{call} is not all on the GPU.")

    def _encode_padded(self, tokens_NL: NDArray[Any]) -> NDArray[np.float32]:
        return self._text(self._pad(tokens_NL))

    def _pad(self, tokens_NL: NDArray[Any]) -> NDArray[np.int32]:
        length = tokens_NL.shape[1]
        padding = min(each for each in self._lengths if each >= length) - length
        return np.pad(tokens_NL, ((0, 0), (0, padding))).astype(np.int32)


def _engine(kit: Kit) -> str:
    """Return the file name of the engine, which carries the GPU's compute capability."""
    folder = kit.tower("tensorrt", "image").parent
    return next(path.name for path in sorted(folder.glob("*.plan")))


def make(kit: Kit) -> TensorRT:
    """Load both engines."""
    return TensorRT(kit)
