"""What is called slower or faster, and what is kept of a run on disk."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from findings_made_up import around, row, run

from benchmarks import record
from benchmarks.compare import compare
from benchmarks.findings import Bar, Interval, Level, Row, StartUp
from benchmarks.timing import median_interval, ratios
from clip_rt.errors import InputError

OLD = around(18.0, 0.02)


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (around(18.0 * 1.20, 0.02), "slower"),
        (around(18.0 * 1.20, 0.20), "same"),  # the intervals meet
        (around(18.0 * 1.045, 0.001), "same"),  # apart, but less than 5 %
        (around(18.0 / 1.20, 0.02), "faster"),
        (around(18.0 * 0.96, 0.001), "same"),
        (around(18.0, 0.0), "same"),
    ],
)
def test_slower_is_apart_and_more_than_5_percent(new: Interval, verdict: str) -> None:
    found = compare(run(row(steadied=OLD)), run(row(steadied=new)))
    (change,) = found.changes
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(new.median / 18.0)
    assert change.agrees is (new.low <= OLD.high and new.high >= OLD.low)
    assert len(found.agreeing) == change.agrees
    assert change.unit == "probes"
    assert len(found.regressions) == (verdict == "slower")
    assert len(found.improvements) == (verdict == "faster")


def measured(rng: np.random.Generator, time_s: float, host: np.ndarray) -> Row:
    samples_s = time_s * host * rng.normal(1.0, 0.02, len(host))
    probe_s = 0.05 * host * rng.normal(1.0, 0.01, len(host))
    return row(
        time_ms=median_interval((1e3 * samples_s).tolist()),
        steadied=median_interval(ratios(samples_s.tolist(), probe_s.tolist())),
    )


def test_a_slower_hour_of_the_host_is_no_regression_and_20_percent_are_seen_in_it() -> None:
    quiet, busy = np.ones(12), np.repeat([1.3, 1.7], 6)
    flagged = {"alike": 0, "planted": 0}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        old = run(measured(rng, 0.9, quiet))
        flagged["alike"] += bool(compare(old, run(measured(rng, 0.9, busy))).regressions)
        flagged["planted"] += bool(compare(old, run(measured(rng, 1.08, busy))).regressions)
    assert flagged == {"alike": 0, "planted": 100}


def test_a_phase_of_the_host_that_the_probe_does_not_feel_is_no_regression() -> None:
    """All became 30 % slower but the probe; one by another 20 %."""
    old = [("open_clip", 18.0, 1.0), ("a", 9.0, 2.0), ("b", 6.0, 3.0)]
    new = [("open_clip", 23.4, 1.0), ("a", 11.7, 2.0), ("b", 9.36, 2.5)]
    before, after = (
        run(*(row(name, steadied=around(t), speed=around(x)) for name, t, x in rows))
        for rows in (old, new)
    )
    baseline, alike, slower = compare(before, after).changes
    assert (alike.unit, alike.verdict, alike.ratio) == ("of the baseline", "same", 1.0)
    assert (slower.unit, slower.verdict) == ("of the baseline", "slower")
    assert slower.ratio == pytest.approx(1.2)
    assert slower.old.median == pytest.approx(1 / 3)
    # Nothing says of the baseline itself that it was the host.
    assert (baseline.unit, baseline.verdict) == ("probes", "slower")
    # Another baseline is another unit.
    (change, _) = compare(run(*before.rows[1:]), run(*after.rows[1:], baseline="c")).changes
    assert change.unit == "probes"


def test_times_are_compared_where_a_run_has_no_probe() -> None:
    found = compare(run(row(steadied=None)), run(row(time_ms=around(1200.0))))
    (change,) = found.changes
    assert (change.unit, change.verdict) == ("ms", "slower")


def test_noise_is_what_keeps_the_intervals_apart() -> None:
    (change,) = compare(run(row(steadied=OLD)), run(row(steadied=around(20.0, 0.03)))).changes
    assert change.noise == pytest.approx(0.05)
    (change,) = compare(run(row(steadied=OLD)), run(row(steadied=around(16.0, 0.03)))).changes
    assert change.noise == pytest.approx(0.05)


def test_rows_are_matched_by_suite_case_and_contender() -> None:
    old = run(row("a"), row("b"), row("a", case="batch 1"))
    new = run(row("a", case="batch 1"), row("c"), row("a"))
    found = compare(old, new)
    assert [(each.contender, each.case) for each in found.changes] == [
        ("a", "batch 1"),
        ("a", "batch 32"),
    ]
    assert found.gone == [("image", "batch 32", "b")]
    assert found.added == [("image", "batch 32", "c")]


def test_equal_runs_need_no_warning() -> None:
    assert compare(run(row()), run(row(), commit="other", date="later")).warnings == []


def test_it_says_why_runs_are_hard_to_compare() -> None:
    old = run(row("onnxruntime"))
    contender = replace(old.contenders[0], versions={"onnxruntime": "1.33.0"})
    new = run(
        row("onnxruntime", items=64, is_noisy=True),
        machine=old.machine | {"cpu": "y"},
        versions=old.versions | {"torch": "2.13"},
        settings=old.settings | {"target": 0.05},
        model="RN50",
        contenders=[contender],
        peaks=replace(old.peaks, how="1 thread"),
        conditions=replace(old.conditions, warnings=["the machine was busy"]),
    )
    assert compare(old, new).warnings == [
        "machine differs: cpu was x, is y",
        "version differs: torch was absent, is 2.13",
        "setting differs: target was 0.03, is 0.05",
        "version differs: onnxruntime of onnxruntime was 1.32.0, is 1.33.0",
        "model differs: was ViT-B/32, is RN50",
        "probe differs: was 2 threads, is 1 thread",
        "the new run: the machine was busy",
        "image, batch 32, onnxruntime: items of a call were 32, are 64",
        "1 of 1 rows are noisy in one of the runs",
    ]


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    startup = StartUp(ready_s=1.0, first_answer_s=0.1, rss_mib=100.0, peak_rss_mib=200.0)
    made = run(row(), row("b", share_of_limit=around(0.9), min_cosine=None))
    made = replace(
        made,
        contenders=[replace(made.contenders[0], startup=startup)],
        levels=[
            Level(
                contender="b",
                call="jpegs",
                items=1,
                answered_per_s=10,
                num_calls=100,
                num_failed=0,
                p50_ms=1.0,
                p95_ms=2.0,
                p99_ms=3.0,
                p999_ms=4.0,
            )
        ],
        bars=[Bar(what="x", value=2.0, limit=1.0, side="at least")],
    )
    path = tmp_path / "run.json"
    record.write(path, made)
    assert record.read_run(path) == made


def test_a_bar_that_is_no_number_stays_unmet(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    bar = Bar(what="x", value=math.nan, limit=1.0, side="at most")
    record.write(path, run(bars=[bar]))
    (found,) = record.read_run(path).bars
    assert math.isnan(found.value)
    assert not found.is_met


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read as the JSON"),
        ("[1, 2]", "has no version"),
        ('{"date": "2026-11-24", "machine": {}}', "has no version"),
        ('{"version": 2}', "version 2; this code reads version 1"),
        ('{"version": 1}', r"not as a run is: date: .*\(14 such in all\)"),
    ],
)
def test_a_file_that_is_no_run_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        record.read_run(path)
    with pytest.raises(InputError, match="cannot be read"):
        record.read_run(tmp_path / "none.json")


def test_a_field_of_another_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    record.write(path, run(row()))
    text = json.loads(path.read_text())
    text["rows"][0]["time_ms"]["median"] = "900"
    path.write_text(json.dumps(text))
    with pytest.raises(InputError, match=r"rows\.0\.time_ms\.median"):
        record.read_run(path)


def test_every_committed_result_of_another_kind_is_refused() -> None:
    for path in record.RESULTS_DIR.glob("*_serving.json"):
        with pytest.raises(InputError, match="no run of"):
            record.read_run(path)


def test_a_commit_has_a_plus_where_files_differ(tmp_path: Path) -> None:
    assert record.commit(tmp_path) == ""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    git("init")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "--no-verify", "-m", "a")
    clean = record.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/new.json").write_text("{}")
    assert record.commit(tmp_path) == clean
    (tmp_path / "a.py").write_text("2\n")
    assert record.commit(tmp_path) == f"{clean}+"
