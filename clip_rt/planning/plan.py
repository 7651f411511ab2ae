"""The choice: how many of which machine serve a rate within a latency, at what cost, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clip_rt.errors import InputError
from clip_rt.planning.hardware import CPU_FIRST_ITEM, GPU_LAYER_S, Device
from clip_rt.planning.queueing import Latency, capacity_per_s, estimate
from clip_rt.planning.work import flop_per_image, flop_per_text, weight_bytes
from clip_rt.specs import ModelSpec, Tower

OVERHEAD_S = 2e-3
"""Client, gRPC and Triton for a prepared item within one datacentre; on loopback below 1 ms."""
DECODE_CORE_S = 6e-3
"""Of a core, to decode and resize a JPEG of 640x480; at clients or gateways, not at the server."""
MEMORY_FACTOR = 3.0
"""Weights, workspace and a runtime, as a multiple of the weights of both towers."""
MIN_LOAD, MAX_LOAD = 0.05, 0.9
"""Of the capacity. Above it a plan has no room for any error of its own; where the latency holds
only below it, the device is the wrong one."""
HOURS_PER_MILLION = 1e6 / 3600


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is to be served.

    Raises:
        InputError: a number is out of its range.
    """

    rate_per_s: float
    """Items a second, at the busiest time."""
    p99_s: float
    """Of the latency that 99 of 100 items may have, from prepared item to embedding."""
    tower: Tower = "image"
    text_length: int = 77
    """Tokens of a text with its padding."""
    max_batch: int = 64
    spares: int = 1
    """Devices beyond those needed, for one that fails and for rollouts."""

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate_per_s), ("p99", self.p99_s)):
            if not 0 < value < math.inf:
                raise InputError(f"{name} is {value:g}; it must be above 0 and finite.")
        for name, number, least in (
            ("max batch", self.max_batch, 1),
            ("spares", self.spares, 0),
            ("text length", self.text_length, 1),
        ):
            if number < least:
                raise InputError(f"{name} is {number}; it must be {least} or more.")
        if self.max_batch > 256:
            raise InputError(f"max batch is {self.max_batch}; it must be 256 or less.")


@dataclass(frozen=True, kw_only=True)
class Option:
    """A device, and how many of it the load needs."""

    device: Device
    batch_s: tuple[float, ...]
    """Seconds of a batch of 1, 2, ... items."""
    capacity_per_s: float
    """Of one device, whatever the latency."""
    rate_per_s: float
    """Of one device within the wanted latency."""
    num_needed: int
    """0 where no number of it reaches the latency."""
    num_rented: int
    """With spares."""
    latency: Latency | None
    """With those needed."""
    load: float
    """Of those needed, as a share of their capacity."""
    usd_per_hour: float
    usd_per_million: float
    """Items, at the wanted rate all the time."""
    reason: str
    """Why so many, or why it cannot be."""


def batch_seconds(spec: ModelSpec, load: Load, device: Device) -> tuple[float, ...]:
    """Return the seconds of a batch of 1, 2, ... items on a device.

    What is there to be done whatever the size, and the longer of reading the weights and computing.
    """
    if load.tower == "image":
        flop = flop_per_image(spec, is_pruned=True)
    else:
        flop = flop_per_text(spec, load.text_length, is_pruned=True)
    read_s = weight_bytes(spec, load.tower, device.precision) / device.bytes_per_s
    item_s = flop / device.flop_per_s
    if device.kind == "gpu":
        fixed_s = GPU_LAYER_S * num_layers(spec, load.tower)
    else:
        fixed_s = CPU_FIRST_ITEM[device.precision] * item_s
    sizes = range(1, load.max_batch + 1)
    return tuple(fixed_s + max(read_s, size * item_s) for size in sizes)


def num_layers(spec: ModelSpec, tower: Tower) -> int:
    """Return how many residual blocks a tower has."""
    layers = spec.text.layers if tower == "text" else spec.image.layers
    return layers if isinstance(layers, int) else sum(layers)


def weigh(
    spec: ModelSpec, load: Load, device: Device, batch_s: Sequence[float] | None = None
) -> Option:
    """Return what a load needs of a device.

    Args:
        spec: Of the model.
        load: What is to be served.
        device: To be rented.
        batch_s: Seconds of a batch of 1, 2, ... items where they were measured.
    """
    times = tuple(batch_s) if batch_s is not None else batch_seconds(spec, load, device)
    most_per_s = capacity_per_s(times)
    room_s = load.p99_s - OVERHEAD_S
    needed_bytes = MEMORY_FACTOR * sum(
        weight_bytes(spec, tower, device.precision) for tower in ("image", "text")
    )

    def cannot(reason: str) -> Option:
        return Option(
            device=device,
            batch_s=times,
            capacity_per_s=most_per_s,
            rate_per_s=0.0,
            num_needed=0,
            num_rented=0,
            latency=None,
            load=0.0,
            usd_per_hour=math.inf,
            usd_per_million=math.inf,
            reason=reason,
        )

    if needed_bytes > device.memory_bytes:
        return cannot(
            f"needs about {needed_bytes / 1e9:.1f} GB of memory, it has "
            f"{device.memory_bytes / 1e9:.0f}"
        )
    # Where the load is light, an item waits for one batch and is in the next.
    if times[0] >= room_s:
        return cannot(
            f"one item alone takes {(times[0] + OVERHEAD_S) * 1e3:.1f} ms of the allowed "
            f"{load.p99_s * 1e3:g}"
        )
    rate = _highest_rate(times, room_s, most_per_s)
    if rate == 0:
        lightest_s = estimate(MIN_LOAD * most_per_s, times).p99_s + OVERHEAD_S
        return cannot(
            f"at {MIN_LOAD:.0%} of its capacity the p99 is {lightest_s * 1e3:.1f} ms of the "
            f"allowed {load.p99_s * 1e3:g}"
        )
    num = math.ceil(load.rate_per_s / rate - 1e-9)
    latency = estimate(load.rate_per_s / num, times)
    rented = num + load.spares
    per_hour = rented * device.usd_per_hour
    limited_by = "the latency" if rate < 0.98 * MAX_LOAD * most_per_s else "its throughput"
    return Option(
        device=device,
        batch_s=times,
        capacity_per_s=most_per_s,
        rate_per_s=rate,
        num_needed=num,
        num_rented=rented,
        latency=latency,
        load=load.rate_per_s / num / most_per_s,
        usd_per_hour=per_hour,
        usd_per_million=per_hour / load.rate_per_s * HOURS_PER_MILLION,
        reason=f"{rate:,.0f} a second each, limited by {limited_by}",
    )


def rank(spec: ModelSpec, load: Load, devices: Iterable[Device]) -> list[Option]:
    """Return what a load needs of each device, the cheapest first and those that cannot last."""
    options = [weigh(spec, load, device) for device in devices]
    return sorted(options, key=lambda each: (each.usd_per_hour, each.device.name))


def _highest_rate(batch_s: Sequence[float], room_s: float, capacity: float) -> float:
    """Return the highest rate whose p99 is within `room_s`, to 1 %; 0 if there is none."""
    low, high = MIN_LOAD * capacity, MAX_LOAD * capacity
    if estimate(high, batch_s).p99_s <= room_s:
        return high
    if estimate(low, batch_s).p99_s > room_s:
        return 0.0
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        if estimate(middle, batch_s).p99_s <= room_s:
            low = middle
        else:
            high = middle
    return low
