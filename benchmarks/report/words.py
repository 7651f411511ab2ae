"""Figures of a run as short text; the terminal, the page, the plots and the README agree on it."""

from __future__ import annotations

import math

from benchmarks.findings import Interval
from benchmarks.timing import half_width


def number(value: float) -> str:
    """Return three digits that matter: "0.0123", "8.31", "37.1", "1,240"; "none" for NaN."""
    size = abs(value)
    if math.isnan(value):
        return "none"
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.9995 else f"{value:.3g}"


def duration(time_ms: float) -> str:
    """Return a time given in ms with its unit: "8.31 ms", "12.4 s"."""
    return f"{number(time_ms / 1000)} s" if time_ms >= 9_999.5 else f"{number(time_ms)} ms"


def times(ratio: float) -> str:
    """Return a ratio of speeds: "0.95×", "1.41×", "31.5×"."""
    return f"{ratio:.2f}×" if ratio < 9.995 else f"{number(ratio)}×"


def percent(share: float) -> str:
    """Return a share of 1 in whole percent: "94 %"; below 10 % with one digit more."""
    return f"{100 * share:.0f} %" if abs(share) >= 0.0995 else f"{100 * share:.1f} %"


def plus_minus(interval: Interval) -> str:
    """Return the width of an interval: "± 1.2 %"."""
    return f"± {100 * half_width(interval):.1f} %"


def low_to_high(interval: Interval) -> str:
    """Return the ends of an interval: "1.38 to 1.44"."""
    return f"{number(interval.low)} to {number(interval.high)}"


def cosine(value: float) -> str:
    """Return a cosine with the digits in which it differs from 1."""
    return f"{value:.7f}" if value >= 0.9999 else f"{value:.4f}"


def load(call: str, items: int) -> str:
    """Return what each call under load brings: "1 JPEG a call"."""
    plural = {"jpegs": "JPEGs", "pixels": "images"}.get(call, call)
    return f"{items} {plural.removesuffix('s') if items == 1 else plural} a call"


def suite(name: str) -> str:
    """Return the name of a suite for a heading."""
    return {"jpeg": "JPEG", "zero_shot": "Zero-shot"}.get(name) or name.replace(
        "_", " "
    ).capitalize()


def case(of: str, name: str) -> str:
    """Return the name of a case of a suite for a heading: "Zero-shot: 1 of 640x480"."""
    return f"{suite(of)}: {name}"


def label(key: str) -> str:
    """Return a field's name for a reader, its unit behind a comma: "memory, GiB"."""
    name, _, unit = key.rpartition("_")
    units = {"gib": "GiB", "mib": "MiB", "mb": "MB", "mhz": "MHz", "s": "s", "ms": "ms"}
    text = f"{name}, {units[unit]}" if name and unit in units else key
    return text.replace("_", " ")


def listed(words: list[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
