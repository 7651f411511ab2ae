"""`clip-rt plan`: how many of which machine serve a model at a rate, and at what cost."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from clip_rt.commands.output import OutputOptions
from clip_rt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clip_rt.planning.hardware import Device
    from clip_rt.planning.plan import Load, Option

COLUMNS = (
    "device",
    "instance",
    "precision",
    "basis",
    "num_needed",
    "num_rented",
    "capacity_per_s",
    "rate_per_s",
    "p50_ms",
    "p99_ms",
    "mean_batch",
    "load",
    "usd_per_hour",
    "usd_per_million",
    "reason",
)
TABLE_COLUMNS = ("device", "rent", "p99 ms", "load", "$/hour", "$/million", "why")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is to be served, on what.

    Raises:
        InputError: an option cannot be used.
    """

    model: str = "ViT-L/14"
    """Architecture, such as ViT-B/32."""
    rate: float
    """Items a second at the busiest time."""
    p99_ms: float = 50.0
    """Latency that 99 of 100 may have, from prepared item to embedding."""
    tower: Literal["image", "text"] = "image"
    """Which items."""
    text_length: int = 77
    """Tokens of a text with its padding; exports for processors know shorter ones."""
    max_batch: int = 64
    """Largest batch of the server."""
    spares: int = 1
    """Devices beyond those needed, for one that fails."""
    device: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only these, such as L4; all of the table without it."""
    price: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """DEVICE=USD an hour, in place of the list price; may be repeated."""
    batch_ms: tuple[str, ...] = ()
    """SIZE=MS of batches that you measured on the one --device, such as 1=2.1 8=4.4 64=26."""
    output: Annotated[OutputOptions, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        if self.batch_ms and len(self.device) != 1:
            raise InputError("--batch-ms is of one device; name it with --device.")

    def load(self) -> Load:
        """Return what is to be served.

        Raises:
            InputError: a number is out of its range.
        """
        from clip_rt.planning.plan import Load

        return Load(
            rate_per_s=self.rate,
            p99_s=self.p99_ms / 1e3,
            tower=self.tower,
            text_length=self.text_length,
            max_batch=self.max_batch,
            spares=self.spares,
        )

    def devices(self) -> list[Device]:
        """Return the devices to choose from, with their prices.

        Raises:
            InputError: one is not known, or a price is none.
        """
        from clip_rt.planning.hardware import DEVICES

        prices = dict(_read_pair("--price", each) for each in self.price)
        for name in (*self.device, *prices):
            if name not in DEVICES:
                raise InputError(
                    f"there is no device {name[:40]!r}; there are {', '.join(DEVICES)}."
                )
        return [
            dataclasses.replace(each, usd_per_hour=prices.get(name, each.usd_per_hour))
            for name, each in DEVICES.items()
            if not self.device or name in self.device
        ]

    def read_batches(self) -> list[float] | None:
        """Return the seconds of a batch of 1, 2, ... items, between those measured on a line.

        Raises:
            InputError: they are none, or a batch of 1 is not among them.
        """
        if not self.batch_ms:
            return None
        pairs = sorted(
            (_read_size(size), ms)
            for size, ms in (_read_pair("--batch-ms", each) for each in self.batch_ms)
        )
        sizes, times_ms = zip(*pairs, strict=True)
        if sizes[0] != 1 or len(set(sizes)) < len(sizes):
            raise InputError("--batch-ms needs each size once, and 1 among them: 1=2.1 8=4.4.")
        import numpy as np

        last = min(sizes[-1], self.max_batch)
        return (np.interp(np.arange(1, last + 1), sizes, times_ms) / 1e3).tolist()  # type: ignore[no-any-return]


def plan(config: Annotated[PlanConfig, tyro.conf.arg(name="")]) -> int:
    """Say how many of which machine serve a model at a rate within a latency, and what it costs.

    Speeds of GPUs are computed from data sheets and published shares, those of processors scaled
    from what was measured; docs/sizing.md has the sources. Measure yours and pass --batch-ms.

    Returns:
        The exit code: 0, or 1 where nothing can do it.

    Raises:
        InputError: an option cannot be used.
        OSError: the answer cannot be written.
    """
    # Only here: help needs none of it.
    from clip_rt.planning.plan import DECODE_CORE_S, rank, weigh
    from clip_rt.specs import find_spec

    spec, load, devices, batch_s = (
        find_spec(config.model),
        config.load(),
        config.devices(),
        config.read_batches(),
    )
    if batch_s is not None:
        device = dataclasses.replace(devices[0], basis="measured")
        options = [weigh(spec, load, device, batch_s)]
    else:
        options = rank(spec, load, devices)
    if config.output.is_table:
        config.output.write([_show(each) for each in options], TABLE_COLUMNS)
        possible = [each for each in options if each.num_needed]
        if possible:
            sys.stdout.write(f"\n{_sentence(possible[0], load)}\n")
        if load.tower == "image":
            cores = math.ceil(load.rate_per_s * DECODE_CORE_S)
            sys.stdout.write(
                f"Clients or gateways need about {cores:,} cores beside, to decode and resize "
                "JPEGs of 640x480.\n"
            )
    else:
        numbers = [name for name in COLUMNS if name not in ("device", "instance", "reason")]
        numbers = [name for name in numbers if name not in ("precision", "basis")]
        config.output.write([_row(each) for each in options], COLUMNS, numbers=numbers)
    return 0 if any(each.num_needed for each in options) else 1


def _row(option: Option) -> dict[str, Any]:
    latency, device = option.latency, option.device
    is_possible = latency is not None
    return {
        "device": device.name,
        "instance": device.instance,
        "precision": device.precision,
        "basis": device.basis,
        "num_needed": option.num_needed,
        "num_rented": option.num_rented,
        "capacity_per_s": round(option.capacity_per_s, 1),
        "rate_per_s": round(option.rate_per_s, 1),
        "p50_ms": _ms(latency.p50_s if latency else None),
        "p99_ms": _ms(latency.p99_s if latency else None),
        "mean_batch": latency and round(latency.mean_batch, 2),
        "load": round(option.load, 3) if is_possible else None,
        "usd_per_hour": round(option.usd_per_hour, 4) if is_possible else None,
        "usd_per_million": round(option.usd_per_million, 4) if is_possible else None,
        "reason": option.reason,
    }


def _ms(seconds: float | None) -> float | None:
    """Return what the client sees, in milliseconds."""
    from clip_rt.planning.plan import OVERHEAD_S

    return None if seconds is None else round((seconds + OVERHEAD_S) * 1e3, 2)


def _show(option: Option) -> dict[str, Any]:
    row, latency = _row(option), option.latency
    values: Sequence[object] = (
        f"{option.device.name} ({option.device.instance})",
        f"{option.num_rented}" if latency else "-",
        row["p99_ms"] and f"{row['p99_ms']:.1f}",
        latency and f"{option.load:.0%}",
        latency and f"{option.usd_per_hour:,.2f}",
        latency and f"{option.usd_per_million:,.2f}",
        f"{option.reason} ({option.device.basis})",
    )
    return dict(zip(TABLE_COLUMNS, values, strict=True))


def _sentence(option: Option, load: Load) -> str:
    latency = option.latency
    assert latency is not None  # It is a possible one.
    spare = f" and {load.spares} spare" if load.spares else ""
    return (
        f"Rent {option.num_needed} x {option.device.name}{spare} ({option.device.instance}): "
        f"${option.usd_per_hour:,.2f} an hour, batches of {latency.mean_batch:.1f} on average, "
        f"at {option.load:.0%} of its capacity."
    )


def _read_pair(option: str, text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not name or not 0 < value < math.inf:
        raise InputError(f"{option} is {text[:40]!r}; write NAME=NUMBER, the number above 0.")
    return name, value


def _read_size(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:6]) <= 256:
        raise InputError(f"--batch-ms has a size of {text[:40]!r}; it must be from 1 to 256.")
    return int(text)
