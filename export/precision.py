"""A graph in FP32 in, the same graph with FP16 layers out: the dtypes are in the graph itself.

TensorRT 11 takes its precision from the ONNX file and nowhere else, so it is decided here, in
torch, layer by layer. Always FP32 are mean and standard deviation, every layer normalisation, the
final projection and the L2 normalisation. Every other layer is FP16 unless it is an island, a layer
kept in FP32 because its numbers do not fit.

What an island adds to the residual stream is FP32, and so is the stream from there on: sums take
the wider of two types. The embedding as an island thus makes the whole stream FP32.

Source of what stays FP32: openai/CLIP `clip/model.py` (LayerNorm), and NVIDIA's advice on
transformers in FP16.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from clip_rt.errors import CheckpointError, InputError
from export.graphs import Graph, ImageGraph
from export.storage import FP16_MAX
from training.resnet import AttentionPool2d, Bottleneck, ModifiedResNet


def match_islands(names: Iterable[str], patterns: Collection[str]) -> set[str]:
    """Return the layers whose name matches a shell pattern, such as `*.resblocks.3.mlp`.

    Raises:
        InputError: a pattern matches none; lists what there is.
    """
    names = list(names)
    islands = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise InputError(
                f"no layer is called {pattern[:80]!r}. The layers are {', '.join(names)}."
            )
        islands |= found
    return islands


def bake_fp16(graph: Graph, islands: Collection[str] = ()) -> Graph:
    """Return a copy of a graph whose layers are FP16.

    Args:
        graph: float32, in eval mode.
        islands: Names of the layers, out of `graph.layers()`, that stay FP32.

    Raises:
        CheckpointError: a weight is beyond the FP16 range; names it and its layer.
    """
    graph = copy.deepcopy(graph).eval()
    if isinstance(graph, ImageGraph) and isinstance(graph.visual, ModifiedResNet):
        _fold_batch_norms(graph.visual)
    for name, layer in graph.layers().items():
        set_dtype(name, layer, torch.float32 if name in islands else torch.float16)
    return graph


def set_dtype(name: str, layer: nn.Module, dtype: torch.dtype) -> None:
    """Make a layer compute in `dtype`: cast its weights now, its inputs whenever it is called."""
    # The final projection of a ResNet lies within its last layer.
    projection = layer.c_proj if isinstance(layer, AttentionPool2d) else nn.Identity()
    kept = {key: tensor.clone() for key, tensor in projection.state_dict().items()}
    if dtype == torch.float16:
        for each, tensor in layer.state_dict().items():
            if kept and each.startswith("c_proj."):
                continue
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if not largest <= FP16_MAX:  # Written so that NaN is refused too.
                raise CheckpointError(
                    f"weight {name}.{each} reaches {largest:.4g}, beyond FP16's {FP16_MAX:.0f}. "
                    f"Keep the layer in FP32: --fp32-island '{name}'."
                )
    layer.to(dtype)
    projection.float().load_state_dict(kept)
    for part in (layer, *([projection] if kept else [])):
        if not part._forward_pre_hooks:
            part.register_forward_pre_hook(_cast_inputs)


def _cast_inputs(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(layer.parameters()).dtype
    return tuple(
        each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in inputs
    )


def _fold_batch_norms(tower: ModifiedResNet) -> None:
    """Put each batch normalisation into the convolution before it, in FP32, before any rounding."""
    for number in (1, 2, 3):
        _fold(tower, f"conv{number}", f"bn{number}")
    for block in tower.modules():
        if isinstance(block, Bottleneck):
            for number in (1, 2, 3):
                _fold(block, f"conv{number}", f"bn{number}")
            if block.downsample is not None:
                _fold(block.downsample, "0", "1")


def _fold(parent: nn.Module, conv: str, norm: str) -> None:
    convolution, statistics = parent.get_submodule(conv), parent.get_submodule(norm)
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(statistics, nn.BatchNorm2d)
    setattr(parent, conv, fuse_conv_bn_eval(convolution, statistics))
    setattr(parent, norm, nn.Identity())


class Fp16Arithmetic(TorchDispatchMode):
    """Within it, FP16 operators compute in FP32 and round their result to FP16.

    As tensor cores do, which accumulate in FP32, and many times faster on a processor than its own
    FP16 arithmetic.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        halves: list[Tensor] = []

        def widen(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dtype == torch.float16:
                halves.append(value)
                return value.float()
            return value

        if func.is_view or func in _COPIES:
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(widen, (args, kwargs))
        if not halves:
            return func(*args, **kwargs)
        floats = [each for each in _tensors((args, kwargs)) if each.is_floating_point()]
        is_half = all(each.dtype == torch.float16 or each.ndim == 0 for each in floats)
        result = func(*wide_args, **wide_kwargs)
        return tree_map(_narrow, result) if is_half else result


_COPIES = frozenset(
    (
        torch.ops.aten._to_copy.default,
        torch.ops.aten.clone.default,
        torch.ops.aten.copy_.default,
        torch.ops.aten.cat.default,
        torch.ops.aten.index.Tensor,
        torch.ops.aten.embedding.default,
    )
)
"""Operators that move numbers and do not compute."""


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda value: found.append(value) if isinstance(value, Tensor) else None, tree)
    return found


def _narrow(value: Any) -> Any:
    is_wide = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.half() if is_wide else value
