"""Stage 5: preprocessing on the device against the processor's: which is the bottleneck?

The processor's is `clip_rt.preprocess`, which is exact. On the device a JPEG is decoded by
torchvision or nvImageCodec and resized by torch's antialiased bicubic filter; how far its pixels
are from the exact ones is measured too.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

import clip_rt
from benchmarks.gpu.bench import Bench, noting, spread
from benchmarks.timing import time_each

SIDE_PX = 224
MAX_THREADS = 16
JPEG_QUALITY = 90
BUDGET_S = 3.0


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """Yield what was found so far."""
    jpegs = [make_jpeg(bench.scale.jpeg_px, index) for index in range(bench.scale.jpegs)]
    cores = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {
        "jpegs": len(jpegs),
        "jpeg_px": list(bench.scale.jpeg_px),
        "mean_jpeg_bytes": sum(map(len, jpegs)) // len(jpegs),
        "cores": cores,
        "images_per_s": {},
        "mean_level_difference": {},
    }
    exact = clip_rt.preprocess(jpegs, side_px=SIDE_PX)
    ways: dict[str, Callable[[], object]] = {
        f"processor, {threads} thread{'s' * (threads > 1)}": partial(
            clip_rt.preprocess, jpegs, side_px=SIDE_PX, num_threads=threads
        )
        for threads in sorted({1, min(cores, MAX_THREADS)})
    }
    on_device: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "torchvision": partial(_torchvision, bench, jpegs),
        "nvImageCodec": partial(_nvimgcodec, bench, jpegs),
        "resize only": partial(_resize_only, bench, jpegs),
    }
    for name, prepare in on_device.items():
        with noting(result, name):
            call = prepare()
            squares = call()
            difference = np.abs(squares.cpu().numpy().astype(np.int16) - exact.astype(np.int16))
            result["mean_level_difference"][name] = round(float(difference.mean()), 4)
            ways[name] = partial(_finished, bench, call)
    turns = bench.turns({name: time_each(way) for name, way in ways.items()}, budget_s=BUDGET_S)
    for name, each in turns.items():
        result["images_per_s"][name] = spread(each, len(jpegs), is_rate=True)
    yield result


def make_jpeg(size: tuple[int, int], index: int) -> bytes:
    """Encode a smooth picture with some noise; the same one for the same arguments."""
    rng = np.random.default_rng(index)
    small = rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), np.int16)
    pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    return file.getvalue()


def to_square(image_CHW: Tensor) -> Tensor:
    """Resize the shorter side and crop the centre, uint8 (3, H, W) to (S, S, 3)."""
    height, width = image_CHW.shape[1:]
    factor = SIDE_PX / min(height, width)
    size = [SIDE_PX if side == min(height, width) else int(side * factor)
            for side in (height, width)]  # fmt: skip
    resized = functional.interpolate(
        image_CHW[None].float(), size=size, mode="bicubic", antialias=True, align_corners=False
    )[0]
    top, left = (round((side - SIDE_PX) / 2) for side in size)
    square = resized[:, top : top + SIDE_PX, left : left + SIDE_PX]
    return square.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def _finished(bench: Bench, call: Callable[[], Tensor]) -> None:
    call()
    bench.synchronise()


def _torchvision(bench: Bench, jpegs: list[bytes]) -> Callable[[], Tensor]:
    torchvision_io: Any = importlib.import_module("torchvision.io")
    rgb = torchvision_io.ImageReadMode.RGB
    files = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]

    def call() -> Tensor:
        images = torchvision_io.decode_jpeg(files, mode=rgb, device=bench.device)
        return torch.stack([to_square(image) for image in images])

    return call


def _nvimgcodec(bench: Bench, jpegs: list[bytes]) -> Callable[[], Tensor]:
    codec: Any = importlib.import_module("nvidia.nvimgcodec")
    decoder = codec.Decoder()

    def call() -> Tensor:
        images = [torch.utils.dlpack.from_dlpack(image) for image in decoder.decode(jpegs)]
        return torch.stack([to_square(image.permute(2, 0, 1)) for image in images])

    return call


def _resize_only(bench: Bench, jpegs: list[bytes]) -> Callable[[], Tensor]:
    arrays = [np.array(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs]
    images = [torch.from_numpy(each).to(bench.device).permute(2, 0, 1) for each in arrays]
    return lambda: torch.stack([to_square(image) for image in images])
