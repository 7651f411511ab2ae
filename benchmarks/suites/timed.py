"""Calls of fixed items, timed by turns: the suites image, text, jpeg, zero_shot and classifier.

In each start of the contenders all cases are timed; what a start does to their speed is then part
of the intervals of the rows, which are made at the end.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import clip_rt
from benchmarks import contenders
from benchmarks.contenders.implementation import TEMPLATES, prompts_of
from benchmarks.contenders.process import ContenderError
from benchmarks.findings import Duration, Row
from benchmarks.limits import share_of_limit
from benchmarks.machine import cache_bytes
from benchmarks.suites.bench import Bench, Taken, row_cosines
from benchmarks.suites.cases import NUM_CLASSES, Case, classifier_case, count_tokens
from benchmarks.timing import (
    MIN_SAMPLES,
    PROBE,
    Way,
    half_width,
    inverse,
    is_narrow,
    median_interval,
    ratios,
    scaled,
    take_turns,
)
from clip_rt.planning.work import flop_per_image, flop_per_text, weight_bytes
from clip_rt.specs import ModelSpec, Tower

NUM_MEMORY_CALLS = 51
NUM_DISK_CALLS = 9
WHOLE = ("triton openvino", "triton int8")
"""Those that make the classifier of all classes, once."""
TIMEOUT_S = 3600.0
UNPRUNED = ("open_clip", "transformers", "infinity")
"""They compute all positions in the last block; everyone else runs our graphs."""
PADDING: Mapping[str, Callable[[Sequence[int], int], list[int]]] = {
    "open_clip": lambda lengths, context: [context] * len(lengths),
    **dict.fromkeys(
        ("transformers", "infinity"), lambda lengths, context: [max(lengths)] * len(lengths)
    ),
}
"""What the lengths of texts become; the others' count as they are, the least that is needed."""


def measure_cases(bench: Bench, cases: Iterable[Case]) -> None:
    """Time each case with everyone who answers it right."""
    wanted = [case for case in cases if bench.settings.is_full or case.is_quick]
    for case in wanted:
        bench.progress.step(case.key)
        try:
            measure_case(bench, case)
        except ContenderError as error:  # The other cases are still worth their time.
            bench.failures.append(f"{case.key}: {error}")


def measure_case(bench: Bench, case: Case) -> None:
    """Time one case in this start of the contenders, and keep it for `make_rows`.

    Raises:
        ContenderError: a contender raised; says which.
    """
    cosines = bench.admit(case)
    if not cosines:
        return

    def tell(num_rounds: int, widest: float) -> None:
        bench.progress.say(f"{case.key}: round {num_rounds}, ±{widest:.1%}")

    ways: dict[str, Way] = {name: _way(bench, case, name) for name in cosines}
    turns = take_turns(
        ways | {PROBE: bench.probe.time},
        target=bench.settings.target,
        budget_s=bench.settings.budget_s / bench.settings.num_starts,
        min_rounds=math.ceil(MIN_SAMPLES / bench.settings.num_starts),
        on_round=tell,
    )
    bench.probe_s += turns[PROBE].samples_s
    taken = bench.taken.setdefault(case.key, Taken(case=case))
    taken.starts.append({name: each.samples_s for name, each in turns.items()})
    for name, cosine in cosines.items():
        taken.min_cosine[name] = min(cosine, taken.min_cosine.get(name, 1.0))


def make_rows(bench: Bench) -> None:
    """Make a row for each contender of each case, of the rounds of all starts.

    They go before those that are there: the whole classifier, which was made in the last start.
    """
    bench.rows[:0] = [
        _row(bench, taken, name)
        for key, taken in bench.taken.items()
        for name in taken.min_cosine
        if (key, name) not in bench.refused
    ]


def _way(bench: Bench, case: Case, name: str) -> Way:
    def take(num_calls: int) -> list[float]:
        try:
            return bench.contenders[name].time(case.key, num_calls)
        except Exception as error:
            raise ContenderError(f"{name} raised {error!r}") from error

    return take


def _row(bench: Bench, taken: Taken, name: str) -> Row:
    case = taken.case
    starts = [start for start in taken.starts if name in start]
    samples_s = [start[name] for start in starts]
    probe_s = [start[PROBE] for start in starts]
    with_base = [start for start in starts if bench.baseline in start]
    speeds = [ratios(start[bench.baseline], start[name]) for start in with_base]
    time_s = median_interval(*samples_s)
    return Row(
        suite=case.suite,
        case=case.name,
        contender=name,
        call=case.call,
        items=case.num_items,
        unit=case.unit,
        time_ms=scaled(time_s, 1e3),
        samples_ms=[1e3 * each_s for start_s in samples_s for each_s in start_s],
        rounds=[len(start_s) for start_s in samples_s],
        per_s=inverse(time_s, case.num_items),
        speed=median_interval(*speeds) if speeds else None,
        steadied=median_interval(*map(ratios, samples_s, probe_s)),
        min_cosine=taken.min_cosine[name],
        is_noisy=not is_narrow(*samples_s, target=bench.settings.target),
        **(find_share(bench, case, name, samples_s, probe_s) or {}),
    )


def measure_classifier(bench: Bench, labels: Sequence[str]) -> None:
    """Make classifiers cold; and once all of it, then from the cache on disk and in memory.

    Args:
        bench: Full runs only make all of it, in the last start.
        labels: ImageNet's classes.
    """
    case = classifier_case(labels, min(NUM_CLASSES, len(labels)))
    bench.progress.step(case.key)
    measure_case(bench, case)
    if not (bench.settings.is_full and bench.is_last_start):
        return
    names = [name for name in WHOLE if name in bench.served and name in bench.admit(case)]
    for name in names:
        bench.progress.step(f"classifier: all {len(labels)} classes, {name}")
        _measure_whole(bench, name, labels, case)


def _measure_whole(bench: Bench, name: str, labels: Sequence[str], known: Case) -> None:
    """Make the whole classifier with an empty cache on disk, then ask for it again.

    The part of it that all have made is compared with what this contender answered there.
    """
    position = {label: row for row, label in enumerate(labels)}
    chosen = [position[label] for label in known.items]

    def check(found_CE: NDArray[np.float32], what: str) -> None:
        worst = float(row_cosines(found_CE[chosen], expected).min())
        if not worst >= 0.9999:
            raise ContenderError(f"{name}, {what}: other class embeddings, cosine {worst:.5f}")

    expected = bench.contenders[name].answer(known.key)
    repository, model = bench.served[name]
    with tempfile.TemporaryDirectory() as folder:
        ask = partial(_ask, Path(folder), repository, model, labels)
        cold_s, found_CE = ask(1)
        check(found_CE, "cold")
        disk_s, found_CE = [], np.empty(0, np.float32)
        for _ in range(NUM_DISK_CALLS):
            each_s, found_CE = ask(1)
            disk_s += each_s
        check(found_CE, "from disk")
        both_s, found_CE = ask(1 + NUM_MEMORY_CALLS)
        check(found_CE, "from memory")
    what = f"classifier of {len(labels)} classes x 80, cold, {name}"
    bench.durations.append(Duration(what=what, seconds=cold_s[0], note="once, cache empty"))
    for where, times_s in (("from disk", disk_s), ("from memory", both_s[1:])):
        time_s = median_interval(times_s)
        bench.rows.append(
            Row(
                suite="classifier",
                case=f"{len(labels)} classes x 80, {where}",
                contender=name,
                call="classifier",
                items=len(labels),
                unit="classes",
                time_ms=scaled(time_s, 1e3),
                samples_ms=[1e3 * each for each in times_s],
                per_s=inverse(time_s, len(labels)),
                is_noisy=half_width(time_s) > bench.settings.target,
            )
        )


def _ask(
    folder: Path, repository: Path, model: str, labels: Sequence[str], num_calls: int
) -> tuple[list[float], NDArray[np.float32]]:
    """Ask a new client, whose memory is empty, and return the seconds of each call."""
    times_s = []
    with clip_rt.Client(
        repository=repository, model=model, cache_dir=folder, timeout_s=TIMEOUT_S
    ) as client:
        _ = client.manifest
        for _ in range(num_calls):
            start_s = time.perf_counter()
            class_CE = client.class_embeddings(labels, templates=TEMPLATES)
            times_s.append(time.perf_counter() - start_s)
    return times_s, class_CE


def find_share(
    bench: Bench,
    case: Case,
    name: str,
    samples_s: Sequence[Sequence[float]],
    probe_s: Sequence[Sequence[float]],
) -> dict[str, Any] | None:
    """Hold the times of a contender against what this machine could do.

    Args:
        bench: Knows the machine and the model.
        case: What was called.
        name: Who was called.
        samples_s: For each start, seconds of a call, one for each round.
        probe_s: Seconds of the probe in the same rounds.

    Returns:
        Those fields of a row; None for those who do not compute here.
    """
    # On another machine, or another processor of this one, than the one whose peaks are known.
    if contenders.is_remote(name) or name == "tensorrt" or bench.spec is None:
        return None
    flop_per_item, tower = _work(bench, bench.spec, case, name)
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
    return {"flop_per_item": flop_per_item, "share_of_limit": share, "limit": limit}


def _work(bench: Bench, spec: ModelSpec, case: Case, name: str) -> tuple[float, Tower]:
    """Return the operations of one item, and which tower does them."""
    is_pruned = name not in UNPRUNED
    if case.unit == "images":
        return flop_per_image(spec, is_pruned=is_pruned), "image"
    # The prompts of a class are as many for each, so their mean is the mean of the classes.
    texts = prompts_of(case.items) if case.call == "classifier" else case.items
    lengths = count_tokens(texts)
    if name in PADDING:
        lengths = PADDING[name](lengths, spec.text.context_length)
    flop = statistics.fmean(flop_per_text(spec, length, is_pruned=is_pruned) for length in lengths)
    return flop * len(texts) / case.num_items, "text"
