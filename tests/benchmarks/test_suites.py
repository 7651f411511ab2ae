"""What the suites are made of: cases, admission, load, stages, bars. How fast anything is, no."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from findings_made_up import exactly, peaks
from rich.console import Console

from benchmarks.contenders import AbsentError
from benchmarks.contenders.implementation import LoadResult
from benchmarks.contenders.process import ContenderProcess
from benchmarks.findings import Contender, Level, Row
from benchmarks.suites import bars, cases, load, stages
from benchmarks.suites.bench import Bench, Progress, Settings, Taken, row_cosines
from benchmarks.suites.cases import Case
from benchmarks.suites.running import RunningContenders, Wishes
from benchmarks.suites.timed import find_share, make_rows
from benchmarks.timing import PROBE
from clip_rt.inputs.tokenizer import OpenAITokenizer
from clip_rt.specs import find_spec


def test_texts_have_the_tokens_that_their_case_is_named_for() -> None:
    lengths = {
        case.name: (len(case.items), len(set(case.items)), sorted(cases.count_tokens(case.items)))
        for case in cases.text_cases()
    }
    assert lengths["1 of 8 tokens"] == (1, 1, [8])
    assert lengths["32 of 8 tokens"] == (32, 32, [8] * 32)
    num, num_different, middle = lengths["32 of up to 16 tokens"]
    assert (num, num_different, middle[0], middle[-1]) == (32, 32, 9, 16)
    num, num_different, long = lengths["32 of 17 to 32 tokens"]
    assert (num, num_different, long[0], long[-1]) == (32, 32, 17, 32)
    assert lengths["8 of 77 tokens"] == (8, 8, [77] * 8)


def test_every_label_is_one_token_and_there_are_enough() -> None:
    labels = cases.NOUNS[: cases.NUM_LABELS]
    assert len(set(labels)) == 100
    assert set(cases.count_tokens(cases.short_texts(100))) == {8}
    with pytest.raises(ValueError, match="short texts"):
        cases.short_texts(1000)


def test_a_classifier_takes_classes_from_all_over_the_list() -> None:
    case = cases.classifier_case([f"label {n}" for n in range(1000)], 20)
    assert case.items == [f"label {n}" for n in range(0, 1000, 50)]
    assert (case.name, case.num_items, case.unit) == ("20 classes x 80, cold", 20, "classes")


def test_cosines_of_rows() -> None:
    rows = np.array([[1, 0], [0, 2]], np.float32)
    assert row_cosines(rows, rows).tolist() == [1, 1]
    assert row_cosines(rows, rows[::-1]).tolist() == [0, 0]
    assert np.isnan(row_cosines(rows[:1], rows)).all()
    assert np.isnan(row_cosines(0 * rows, rows)).all()


class Answering:
    """A contender that answers as it is told."""

    def __init__(self, answer: Any, kind: str = "runtime", precision: str = "fp32") -> None:
        self.given = answer
        self.calls = frozenset({"texts"})
        self.facts = Contender(name="x", what="", kind=kind, precision=precision)  # type: ignore[arg-type]

    def load(self, key: str, call: str, items: Any) -> None:
        pass

    def answer(self, key: str) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given

    def run_clients(
        self, key: str, num_clients: int, duration_s: float, *, items_per_call: int
    ) -> LoadResult:
        return LoadResult([0.1] * 10 * num_clients, 0, 1.0)

    def run_arrivals(self, key: str, due_at_s: list[float]) -> LoadResult:
        # It can do 20 each second.
        elapsed_s = max(due_at_s[-1], len(due_at_s) / 20)
        return LoadResult([0.1] * len(due_at_s), 0, elapsed_s)


def make_bench(**contenders: Answering) -> Bench:
    expected = np.eye(3, 8, dtype=np.float32)
    return Bench(
        model="ViT-B/32",
        weights="random",
        spec=find_spec("ViT-B/32"),
        facts=find_spec("ViT-B/32").facts,
        tokenizer=OpenAITokenizer(),
        settings=Settings(is_full=True, target=0.03, budget_s=1.0, level_s=1.0, arrivals_s=50.0),
        contenders=cast(dict[str, ContenderProcess], contenders),
        baseline="open_clip",
        probe=cast(Any, None),
        progress=Progress(Console(quiet=True)),
        reference=lambda case: expected,
        served={},
    )


PEAKS = peaks(220.0, 200.0)
CASE = Case("text", "3", "texts", ["a", "b", "c"], "texts")


def test_only_those_with_right_answers_are_admitted() -> None:
    right = np.eye(3, 8, dtype=np.float32)
    close = right.copy()
    close[1, 2] = 0.05
    bench = make_bench(
        right=Answering(right),
        close=Answering(close),
        int8=Answering(close, precision="int8"),
        wrong=Answering(np.roll(right, 1, axis=0)),
        nan=Answering(right * math.nan),
        short=Answering(right[:2]),
        broken=Answering(RuntimeError("no memory")),
        peer=Answering(close, "peer"),
    )
    admitted = bench.admit(CASE)
    assert list(admitted) == ["right", "int8"]
    assert admitted["right"] == pytest.approx(1)
    assert admitted["int8"] == pytest.approx(0.99875, abs=1e-5)
    assert len(bench.failures) == 5
    for name in ("close", "wrong", "nan", "short", "broken"):
        assert any(name in failure for failure in bench.failures)
    # What is wrong with somebody else's is no fault of the run.
    assert len(bench.notes) == 1
    assert "peer are wrong" in bench.notes[0]
    bench.admit(CASE)
    assert len(bench.failures) == 5  # Asked once, however many measure the case.


def test_contenders_that_are_started_anew_answer_anew() -> None:
    changing = Answering(np.eye(3, 8, dtype=np.float32))
    peer = Answering(np.roll(np.eye(3, 8, dtype=np.float32), 1, axis=0), "peer")
    bench = make_bench(changing=changing, peer=peer)
    assert list(bench.admit(CASE)) == ["changing"]
    changing.given = changing.given[:2]
    assert list(bench.admit(CASE)) == ["changing"]
    bench.taken[CASE.key] = Taken(
        case=CASE, starts=[{"changing": [1.0], PROBE: [0.5]}], min_cosine={"changing": 1.0}
    )
    bench.begin_start(is_last=False)
    assert list(bench.admit(CASE)) == []
    make_rows(bench)
    assert bench.rows == []  # Fast in one start, wrong in the other: it has no speed.
    assert len(bench.failures) == 1
    assert len(bench.notes) == 1  # Said once, though it was wrong in both.


def test_a_row_is_made_of_all_starts() -> None:
    bench = make_bench(**{name: Answering(None) for name in ("open_clip", "openvino")})
    seconds = {
        1: {"open_clip": [2.0, 2.2, 2.1], "openvino": [1.0, 1.1, 1.05], PROBE: [0.5] * 3},
        2: {"open_clip": [2.4, 2.4, 2.4, 2.4], "openvino": [1.2] * 4, PROBE: [0.5] * 4},
        # It did not start again, and nobody can say what the other is against it.
        3: {"openvino": [3.0], PROBE: [0.5]},
    }
    bench.taken[CASE.key] = Taken(
        case=CASE, starts=list(seconds.values()), min_cosine={"open_clip": 1.0, "openvino": 0.9999}
    )
    bench.probe = cast(Any, SimpleNamespace(peaks=PEAKS, flop_while_probe=1e11))
    whole = row("classifier", "1000 classes x 80, from disk", "triton openvino", 1.0)
    bench.rows.append(whole)  # made in the last start
    make_rows(bench)
    peer, ours, last = bench.rows
    assert last is whole
    assert (peer.rounds, ours.rounds) == ([3, 4], [3, 4, 1])
    assert len(ours.samples_ms) == 8
    assert (ours.time_ms.low, ours.time_ms.median, ours.time_ms.high) == (1000.0, 1200.0, 3000.0)
    assert ours.speed is not None
    assert (ours.speed.low, ours.speed.high) == (2.0, 2.0)
    assert ours.steadied is not None
    assert (ours.steadied.low, ours.steadied.high) == (2.0, 6.0)
    assert ours.share_of_limit is not None
    assert ours.min_cosine == 0.9999


def test_who_computes_elsewhere_has_no_share_of_what_this_machine_can() -> None:
    bench = make_bench()
    bench.probe = cast(Any, SimpleNamespace(peaks=PEAKS, flop_while_probe=1e11))
    seconds = [[1.0] * 6], [[0.5] * 6]
    assert find_share(bench, CASE, "openvino", *seconds) is not None
    assert find_share(bench, CASE, "triton openvino", *seconds) is not None
    assert find_share(bench, CASE, "tensorrt", *seconds) is None
    assert find_share(bench, CASE, "triton gpu-a:8001", *seconds) is None


def test_who_does_not_start_again_fails_the_run_and_keeps_what_it_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = Wishes(contender=("onnxruntime", "openvino"))
    running = RunningContenders(wishes, cache=tmp_path, say=lambda _: None)
    num_starts: Counter[str] = Counter()

    def start(name: str) -> Any:
        num_starts[name] += 1
        facts = Contender(name=name, what="", kind="runtime", precision="fp32")
        if name == "openvino" and num_starts[name] > 1:
            raise AbsentError(replace(facts, absent="no memory"))
        return SimpleNamespace(facts=replace(facts, versions={name: "1.0"}), close=lambda: None)

    monkeypatch.setattr(running, "_start", start)
    running.start()
    assert running.start_again() == ["openvino did not start again: no memory"]
    assert list(running.contenders) == ["onnxruntime"]
    told = [(each.name, each.absent, each.versions) for each in running.facts]
    assert told == [
        ("onnxruntime", None, {"onnxruntime": "1.0"}),
        ("openvino", None, {"openvino": "1.0"}),
    ]
    assert running.start_again() == []
    assert num_starts == {"onnxruntime": 3, "openvino": 2}


def test_arrivals_are_a_poisson_process() -> None:
    times_s = load.arrival_times(50.0, 100.0, seed=1)
    gaps_s = np.diff(times_s)
    assert (gaps_s > 0).all()
    assert 0 < times_s[0] < times_s[-1] < 100
    assert len(times_s) == 5000
    assert gaps_s.std() == pytest.approx(gaps_s.mean(), rel=0.1)
    assert len(load.arrival_times(0.001, 1.0, seed=1)) == 1


def level(offered: float, answered: float, num_failed: int = 0) -> Level:
    return Level(
        contender="x",
        call="jpegs",
        items=1,
        offered_per_s=offered,
        answered_per_s=answered,
        num_calls=10,
        num_failed=num_failed,
        p50_ms=1,
        p95_ms=1,
        p99_ms=1,
        p999_ms=1,
    )


def test_the_knee_is_the_highest_rate_that_is_kept_up_with() -> None:
    levels = [level(20, 20), level(10, 9.6), level(30, 20), level(40, 40)]
    marked = load.mark_knee(levels)
    assert [each.offered_per_s for each in marked] == [10, 20, 30, 40]
    # 40 may have been luck: it did not keep up with less.
    assert [each.is_knee for each in marked] == [False, True, False, False]
    assert not any(each.is_knee for each in load.mark_knee([level(10, 10, num_failed=1)]))
    assert not any(each.is_knee for each in load.mark_knee([level(10, 9)]))


def test_the_load_finds_capacity_and_knee_of_those_who_are_served() -> None:
    right = np.eye(3, 8, dtype=np.float32)
    bench = make_bench(
        bare=Answering(right),
        served=Answering(right, "served"),
        infinity=Answering(right),
    )
    load.measure_concurrency(bench, CASE, CASE)
    seen = {(each.contender, each.items, each.num_clients): each for each in bench.levels}
    assert {contender for contender, *_ in seen} == {"served", "infinity"}
    assert len(seen) == 2 * (6 + 2)  # Both sweeps of single items are of the same case here.
    assert seen["served", 1, 8].answered_per_s == 80
    assert seen["served", 1, 8].num_calls == 3 * 80
    bench.levels = [each for each in bench.levels if (each.num_clients, each.items) == (2, 1)]
    load.measure_arrivals(bench, CASE)
    knees = [each for each in bench.levels if each.is_knee]
    assert [each.contender for each in knees] == ["served", "infinity"]
    # The capacity that the closed loop saw, 20 each second, is the one it has.
    assert all(18 <= (each.offered_per_s or 0) <= 22 for each in knees)
    assert not bench.failures


def call_ms(total: float, **spent: float) -> dict[str, float]:
    return {name: value / 1e3 for name, value in {**spent, "total": total}.items()}


def test_stages_of_one_item_add_up_to_its_total() -> None:
    calls = [
        call_ms(10.0, decode=2.0, network=7.5, server_queue=0.5, server_compute=6.0),
        call_ms(12.0, decode=2.0, network=9.5, server_queue=0.5, server_compute=8.0),
        call_ms(99.0, decode=50.0, network=40.0, server_queue=0.5, server_compute=8.0),
        call_ms(1.0, network=1.0),
    ]
    found = stages.summarise(calls, contender="x", what="one", is_single=True)
    assert found.total_ms == pytest.approx(11.0)
    assert found.stages_ms == pytest.approx(
        {"decode": 2.0, "network": 1.0, "server_queue": 0.5, "server_compute": 7.0}
    )
    assert found.missing_ms == pytest.approx(0.5)
    assert found.note == ""


def test_what_is_missing_is_said() -> None:
    lost = stages.summarise([call_ms(10.0, network=5.0)], contender="x", what="one", is_single=True)
    assert lost.missing_ms == pytest.approx(5.0)
    assert "5.00 ms" in lost.note
    beside = stages.summarise(
        [call_ms(10.0, decode=8.0, network=9.0)], contender="x", what="many", is_single=False
    )
    assert beside.missing_ms == pytest.approx(-7.0)
    assert "side by side" in beside.note


def test_operators_add_up_to_the_time_of_the_engine() -> None:
    calls = [{"matrix products": 0.9, "layout": 0.08, "total": 1.0}] * 2
    calls.append({"matrix products": 1.2, "elementwise": 0.03, "total": 1.3})
    found = stages.summarise_inside(calls, contender="openvino", what="x")
    assert found.total_ms == pytest.approx(1100)
    expected = {"matrix products": 1000, "layout": 160 / 3, "elementwise": 10}
    assert found.stages_ms == pytest.approx(expected)
    assert found.missing_ms == pytest.approx(1100 - sum(expected.values()))
    assert found.note == ""
    lost = stages.summarise_inside([{"layout": 0.9, "total": 1.0}], contender="x", what="x")
    assert "100.00 ms are in no operator" in lost.note


def row(suite: str, case: str, contender: str, speed: float, flop: float | None = None) -> Row:
    return Row(
        suite=suite,
        case=case,
        contender=contender,
        call="pixels",
        items=1,
        unit="images",
        time_ms=exactly(1),
        samples_ms=[1],
        per_s=exactly(1),
        speed=exactly(speed),
        flop_per_item=flop,
    )


def test_bars_are_of_what_was_measured() -> None:
    rows = [
        row("image", "batch 1", "triton openvino", 1.5),
        row("image", "batch 1", "triton int8", 2.9),
        row("image", "batch 1", "openvino", 0.1),
        row("image", "batch 32", "triton openvino", 1.06, flop=176e9),  # one each second
    ]
    clients = [
        replace(level(0, rate), contender=name, num_clients=8, offered_per_s=None)
        for name, rate in (("triton openvino", 17.0), ("infinity", 10.0))
    ]
    found = bars.find_bars("ViT-B/32", "open_clip", PEAKS, rows, clients)
    assert [(bar.value, bar.limit, bar.is_met) for bar in found] == [
        (1.5, 1.4, True),
        (1.06, 1.05, True),
        (2.9, 3.0, False),
        (1.7, 1.6, True),
        (pytest.approx(0.88), 0.90, False),
    ]
    assert len({bar.what for bar in found}) == len(found)
    assert not bars.find_bars("ViT-L/14", "open_clip", PEAKS, rows, clients)
    others = bars.find_bars("ViT-B/32", "onnxruntime", PEAKS, rows, [])
    assert [bar.value for bar in others] == [pytest.approx(0.88)]
    assert others[0].what.endswith("at its own shapes")


def test_http_is_held_to_the_client_behind_it_and_to_infinity() -> None:
    rows = [
        replace(row("jpeg", "1 of 640x480", name, 1.0), time_ms=exactly(time_ms))
        for name, time_ms in (("triton int8", 8.0), ("gateway int8", 12.0))
    ]
    answered_per_s = {"triton int8": 100.0, "gateway int8": 91.0, "infinity": 10.0}
    clients = [
        replace(level(0, rate), contender=name, num_clients=16, offered_per_s=None)
        for name, rate in answered_per_s.items()
    ]
    found = bars.find_bars("ViT-B/32", "open_clip", PEAKS, rows, clients)
    of_http = [bar for bar in found if "HTTP" in bar.what]
    assert [(bar.value, bar.limit, bar.is_met) for bar in of_http] == [
        (4.0, 3.0, False),
        (0.91, 0.9, True),
        (9.1, 4.0, True),
    ]


def test_every_bar_is_about_a_case_that_there_is() -> None:
    known = {(case.suite, case.name) for case in cases.text_cases()}
    known.add(
        ("classifier", cases.classifier_case([str(n) for n in range(1000)], cases.NUM_CLASSES).name)
    )
    known |= {("image", f"batch {rows}") for rows in (1, 8, 32, 64)}
    known |= {(case.suite, case.name) for case in cases.jpeg_cases(with_large=False)}
    assert {(suite, case) for suite, case, _, _ in bars.SPEEDS} <= known
