"""Our graphs in each runtime: a batch on the device goes in, embeddings on the device come out.

All work goes to the stream that is current, and nobody waits for it. Torch, TensorRT and the peers
are called alike; `CudaGraph` captures any of them and launches it as one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clip_rt.specs import EMBEDDINGS, EncoderFacts, Tower
from export.engine import (
    BuildOptions,
    Runtime,
    build_engine,
    image_profiles,
    load_runtime,
    text_profiles,
)
from export.engine_runner import EngineRunner
from export.graphs import Graph, PooledBlock
from export.precision import bake_fp16, set_dtype
from training.model import Attention, ResidualAttentionBlock

Encode = Callable[[Tensor], Tensor]
"""uint8 pixels (B, S, S, 3) or int32 tokens (B, L) to float32 (B, E), on the device."""
WARM_UP_CALLS = 3
ENGINE_BATCH, ENGINE_MAX_BATCH = 128, 256
"""What engines are tuned for, and the most they take."""


def bake(graph: Graph, dtype: torch.dtype) -> Graph:
    """Return a copy of a graph whose layers are FP16, as an export has them, or of another type."""
    if dtype == torch.float16:
        return bake_fp16(graph)
    graph = copy.deepcopy(graph).eval()
    for name, layer in graph.layers().items():
        set_dtype(name, layer, dtype)
    return graph


class FusedAttention(Attention):
    """The same attention by torch's one operator for it, which keeps no matrix of logits."""

    def forward(self, x_BLD: Tensor, mask_LL: Tensor | None = None) -> Tensor:  # noqa: D102
        B, L, D = x_BLD.shape
        qkv = functional.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q_BHLK, k_BHLK, v_BHLK = qkv.view(B, L, 3, self.heads, D // self.heads).permute(
            2, 0, 3, 1, 4
        )
        mask_LL = None if mask_LL is None else mask_LL.to(x_BLD.dtype)
        y_BHLK = functional.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask_LL)
        return self.out_proj(y_BHLK.transpose(1, 2).reshape(B, L, D))


def with_fused_attention(graph: Graph) -> Graph:
    """Return a copy of a graph that attends by torch's operator for it."""
    graph = copy.deepcopy(graph)
    for module in graph.modules():
        if type(module) is Attention:
            module.__class__ = FusedAttention
    return graph


def compile_blocks(graph: Graph, backend: str) -> Graph:
    """Return a copy of a graph whose blocks are compiled; those of equal shape share the code."""
    graph = copy.deepcopy(graph)
    for block in graph.modules():
        if isinstance(block, ResidualAttentionBlock | PooledBlock):
            block.compile(backend=backend)
    return graph


class CudaGraph:
    """An encoder for batches of one shape, captured once and replayed."""

    def __init__(self, encode: Encode, example: Tensor) -> None:
        self._input = example.clone()
        for _ in range(WARM_UP_CALLS):
            encode(self._input)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            self._output = encode(self._input)

    def __call__(self, batch: Tensor) -> Tensor:
        """Embed a batch of that shape; the result is overwritten by the next call."""
        self._input.copy_(batch, non_blocking=True)
        self._graph.replay()
        return self._output


class OnnxRuntime:
    """An ONNX file in ONNX Runtime, its inputs and outputs bound to torch's memory.

    Args:
        path: Of `export.onnx_writer`.
        device: On CUDA the work goes to the current stream.
        is_captured: Let ONNX Runtime capture a CUDA graph for each shape.

    Raises:
        Exception: whatever ONNX Runtime raises.
    """

    def __init__(self, path: Path, device: torch.device, *, is_captured: bool = False) -> None:
        import onnxruntime

        self._onnxruntime: Any = onnxruntime
        self._device = device
        self._is_captured = is_captured
        providers: list[Any] = ["CPUExecutionProvider"]
        options = onnxruntime.SessionOptions()
        if device.type == "cuda":
            stream = str(torch.cuda.current_stream().cuda_stream)
            cuda = {"user_compute_stream": stream, "enable_cuda_graph": str(int(is_captured))}
            providers.insert(0, ("CUDAExecutionProvider", cuda))
        else:
            options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        if device.type == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise RuntimeError("ONNX Runtime took the processor: its CUDA provider did not load")
        self._input = self._session.get_inputs()[0].name
        self._width = self._session.get_outputs()[0].shape[-1]
        self._bound: dict[tuple[int, ...], tuple[Any, Any, Tensor, Tensor]] = {}

    def __call__(self, batch: Tensor) -> Tensor:
        """Embed a batch; the result is overwritten by the next call with that shape."""
        shape = tuple(batch.shape)
        if shape not in self._bound:
            self._bound[shape] = self._bind(batch)
        binding, options, given, found = self._bound[shape]
        if given.data_ptr() != batch.data_ptr():
            given.copy_(batch, non_blocking=True)
        self._session.run_with_iobinding(binding, options)
        return found

    def _bind(self, batch: Tensor) -> tuple[Any, Any, Tensor, Tensor]:
        given = batch.clone()
        found = torch.empty(len(batch), self._width, device=self._device)
        where = (self._device.type, self._device.index or 0)
        dtype = np.uint8 if batch.dtype == torch.uint8 else np.int32
        binding = self._session.io_binding()
        binding.bind_input(self._input, *where, dtype, tuple(given.shape), given.data_ptr())
        binding.bind_output(EMBEDDINGS, *where, np.float32, tuple(found.shape), found.data_ptr())
        options = self._onnxruntime.RunOptions()
        if self._device.type == "cuda":
            # The stream is ours, and so is waiting for it.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            if self._is_captured:
                options.add_run_config_entry("gpu_graph_id", str(1 + len(self._bound)))
        return binding, options, given, found


def build_engine_of(
    onnx: Path, facts: EncoderFacts, tower: Tower, runtime: Runtime, folder: Path
) -> EngineRunner:
    """Build a TensorRT engine as `export.trt` does, unless an earlier stage did, and load it.

    Raises:
        ExportError: TensorRT is missing, or refuses the network.
    """
    trt = load_runtime(runtime)
    path = folder / "engines" / f"{onnx.parent.name}-{tower}-{runtime}.engine"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        options = BuildOptions(
            runtime=runtime, opt_batch_size=ENGINE_BATCH, max_batch_size=ENGINE_MAX_BATCH
        )
        profiles = image_profiles if tower == "image" else text_profiles
        build_engine(onnx, path, profiles=profiles(facts, options), options=options, trt=trt)
    return EngineRunner(path, trt)
