"""What can be rented, how fast it is, and what it costs: facts with their sources.

Peaks of GPUs are those of NVIDIA's data sheets, dense and of FP16 on tensor cores. Prices are list
prices of Amazon EC2, on demand, Linux, us-east-1, a GPU's share of its instance, in US dollars.
Those of G instances stand in public tables of 2026; those of P instances and of processors were not
checked against a price list, and are rough. `clip-rt plan --price` takes yours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clip_rt.planning.work import Precision

GPU_SHARE = 0.34
"""Of the dense FP16 peak that a large batch reaches on a GPU. Computed, not measured by us: the
median of what is published of ViTs, 0.30 to 0.43 (NVIDIA's TensorRT 10.16 of CLIP ViT-L/14 on an
RTX 6000 Ada, 0.34; FasterTransformer's vit_guide.md on T4 and A100, 0.30 to 0.43)."""
GPU_LAYER_S = 0.1e-3
"""Time of each residual block whatever the batch, without CUDA graphs: what is left of
FasterTransformer's batch 1 on an A100 (1.53 ms of 12 blocks, 2.97 ms of 24) beside its batch 32."""
GPU_MEMORY_SHARE = 0.7
"""Of the memory bandwidth that reading weights reaches."""

CPU_FLOP_PER_CORE_S: dict[Precision, float] = {"fp32": 91e9, "int8": 294e9}
"""Measured by `benchmarks/run.py`, suite image at batch 32, through client and Triton on 2 cores of
an AMD EPYC with AVX-512 and VNNI: 22.2 and 71.4 images of ViT-B/32 a second
(2026-11-26_run.json)."""
CPU_FIRST_ITEM: dict[Precision, float] = {"fp32": 0.28, "int8": 0.54}
"""What a batch takes beside its items, as a share of the time of one; measured there too: alone an
image took 57.7 and 21.5 ms, in the batch 45.1 and 14.0."""
CPU_BYTES_PER_S = 29e9
"""At which two cores read memory, measured there too."""
CORES_SHARE = 0.8
"""Of the speed of many cores beside that of two, times their number. Assumed: memory is shared."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU of an instance, or an instance of processors."""

    name: str
    kind: Literal["gpu", "cpu"]
    precision: Precision
    flop_per_s: float
    """That calls of large batches reach."""
    bytes_per_s: float
    """At which weights are read."""
    memory_bytes: float
    usd_per_hour: float
    instance: str
    """What is rented."""
    basis: Literal["computed", "measured"]
    """Where the speed comes from; "measured" is scaled from a machine of the same kind."""


def _gpu(
    name: str, tflops: float, gb_per_s: float, memory_gb: float, usd: float, instance: str
) -> Device:
    return Device(
        name=name,
        kind="gpu",
        precision="fp16",
        flop_per_s=GPU_SHARE * tflops * 1e12,
        bytes_per_s=GPU_MEMORY_SHARE * gb_per_s * 1e9,
        memory_bytes=memory_gb * 1e9,
        usd_per_hour=usd,
        instance=instance,
        basis="computed",
    )


def _cpu(
    name: str, precision: Precision, cores: int, memory_gb: float, usd: float, instance: str
) -> Device:
    return Device(
        name=name,
        kind="cpu",
        precision=precision,
        flop_per_s=CORES_SHARE * cores * CPU_FLOP_PER_CORE_S[precision],
        bytes_per_s=CPU_BYTES_PER_S,
        memory_bytes=memory_gb * 1e9,
        usd_per_hour=usd,
        instance=instance,
        basis="measured",
    )


DEVICES = {
    each.name: each
    for each in (
        _gpu("L4", 121, 300, 24, 0.8048, "g6.xlarge"),
        _gpu("A10G", 70, 600, 24, 1.006, "g5.xlarge"),
        _gpu("L40S", 362, 864, 48, 1.861, "g6e.xlarge"),
        _gpu("A100", 312, 1555, 40, 2.745, "1/8 of p4d.24xlarge"),
        _gpu("H100", 989, 3350, 80, 6.88, "1/8 of p5.48xlarge"),
        _gpu("H200", 989, 4800, 141, 7.91, "1/8 of p5en.48xlarge"),
        _cpu("16 cores", "fp32", 16, 32, 0.8211, "c7a.4xlarge"),
        _cpu("16 cores, INT8", "int8", 16, 32, 0.8211, "c7a.4xlarge"),
    )
}
"""By name. The A10G is Amazon's variant of the A10, of 70 TFLOPS where that has 125."""
