"""A TensorRT engine and a batch of numpy arrays in, embeddings out, on the GPU.

For the parity gate; in production Triton runs the engines.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clip_rt.errors import ExportError
from clip_rt.specs import EMBEDDINGS

_FUSED = re.compile(r"_mha|fmha|gemm_mha|attention", re.IGNORECASE)
"""Names TensorRT gave kernels of a whole attention (NVIDIA/TensorRT issues 3243 and 3620)."""


@dataclass(frozen=True)
class Inspection:
    """What an engine is made of."""

    num_layers: int
    num_fused_attentions: int


class EngineRunner:
    """One engine on the current CUDA device.

    Args:
        path: The engine.
        trt: What `engine.load_runtime` returned.

    Raises:
        ExportError: this TensorRT on this GPU cannot load it.
    """

    def __init__(self, path: Path, trt: Any) -> None:
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ExportError(
                f"{path.name} was built, and TensorRT {trt.__version__} cannot load it on this GPU."
            )
        self._trt = trt
        self._context = self._engine.create_execution_context()
        self._input = self._engine.get_tensor_name(0)
        self._stream = torch.cuda.Stream()
        self._profile: int | None = None

    def __call__(self, batch: NDArray[np.generic]) -> NDArray[np.float32]:
        """Embed a batch of any size; see `parity.Encoder`."""
        _, max_batch_size = self._choose_profile(batch.shape[1:])
        chunks = [
            self._run(np.ascontiguousarray(batch[start : start + max_batch_size]))
            for start in range(0, len(batch), max_batch_size)
        ]
        return np.concatenate(chunks)

    def _choose_profile(self, shape: tuple[int, ...]) -> tuple[int, int]:
        for index in range(self._engine.num_optimization_profiles):
            _, _, largest = self._engine.get_tensor_profile_shape(self._input, index)
            if tuple(largest)[1:] == shape:
                return index, int(largest[0])
        raise ExportError(f"the engine has no profile for items of shape {shape}.")

    def _run(self, chunk: NDArray[np.generic]) -> NDArray[np.float32]:
        with torch.cuda.stream(self._stream):
            found = self.encode(torch.from_numpy(chunk).cuda())
            self._stream.synchronize()
            embeddings: NDArray[np.float32] = found.cpu().numpy()
            return embeddings

    def encode(self, batch: Tensor) -> Tensor:
        """Embed a batch that lies on the device, on the current stream; nobody is waited for.

        Args:
            batch: uint8 (B, S, S, 3) or int32 (B, L), contiguous, B within a profile.

        Returns:
            float32 (B, E).

        Raises:
            ExportError: no profile of the engine fits, or TensorRT could not run it.
        """
        profile, _ = self._choose_profile(tuple(batch.shape[1:]))
        handle = torch.cuda.current_stream().cuda_stream
        # A change of profile cannot be captured into a CUDA graph.
        is_set = profile == self._profile or self._context.set_optimization_profile_async(
            profile, handle
        )
        if not (is_set and self._context.set_input_shape(self._input, tuple(batch.shape))):
            raise ExportError(f"the engine refuses {batch.dtype} {tuple(batch.shape)}.")
        self._profile = profile
        shape = tuple(self._context.get_tensor_shape(EMBEDDINGS))
        found = torch.full(shape, torch.nan, dtype=torch.float32, device=batch.device)
        self._context.set_tensor_address(self._input, batch.data_ptr())
        self._context.set_tensor_address(EMBEDDINGS, found.data_ptr())
        if not self._context.execute_async_v3(handle):
            raise ExportError("TensorRT could not run the engine; its log says why.")
        return found

    def inspect(self) -> Inspection:
        """Count layers and fused attentions."""
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return count_fused(text)


def count_fused(engine_information: str) -> Inspection:
    """Count the layers of an engine's description, and those that are fused attentions."""
    layers = json.loads(engine_information).get("Layers", [])
    names = [each if isinstance(each, str) else str(each.get("Name", "")) for each in layers]
    return Inspection(len(names), sum(bool(_FUSED.search(name)) for name in names))
