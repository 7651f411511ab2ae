"""The command from end to end, on the bundled model: what it writes, and that its alarms go off."""

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import planted_contender
import pytest
from rich.console import Console

from benchmarks import run
from benchmarks.findings import Run
from benchmarks.machine import Probe
from benchmarks.record import read_run
from benchmarks.suites.bench import Bench
from benchmarks.suites.plan import Suite
from benchmarks.suites.running import RunningContenders
from clip_rt.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
BARE = "onnxruntime,openvino"
SERVED = "triton onnxruntime,triton openvino"


class Shared:
    """A probe that outlives the runs which it is lent to: starting one takes 10 seconds."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def __enter__(self) -> Probe:
        return self.probe

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    with Probe(budget_s=1.0) as probe:  # As exact as what is asked of the runs here.
        yield probe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@dataclass
class Result:
    """What came of a command."""

    exit_code: int
    output: str


def invoke(*arguments: str) -> Result:
    output = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        patch.setenv("COLUMNS", "200")
        try:
            exit_code = run.command(arguments)
        except SystemExit as end:
            exit_code = int(end.code or 0)
    return Result(exit_code, output.getvalue())


def measure(probe: Probe, folder: Path, out: str, *arguments: str) -> tuple[Result, Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Probe", lambda: Shared(probe))
        result = invoke(
            *("--repository", str(ROOT / "model_repository"), "--name", "drawings"),
            *("--budget-s", "2", "--out", str(folder / out), "--cache", str(folder / "cache")),
            *arguments,
        )
    assert (folder / out).is_dir(), result.output
    (file,) = (folder / out).glob("*.json")
    return result, read_run(file)


@pytest.fixture(scope="module")
def before(probe: Probe, folder: Path) -> tuple[Result, Run]:
    suites = ("--suite", "zero_shot,stages", "--suite", "accuracy")
    return measure(probe, folder, "before", *suites, "--contender", BARE, "--contender", SERVED)


def test_a_run_is_written_as_json_html_and_png(before: tuple[Result, Run], folder: Path) -> None:
    result, found = before
    assert result.exit_code == 0, result.output
    files = sorted((folder / "before").iterdir())
    assert [file.suffix for file in files] == [".html", ".json", ".png"]
    assert all(file.stem == f"{found.date}_run_quick" for file in files)
    assert all(str(file) in result.output for file in files)


def test_everyone_is_timed_against_the_others(before: tuple[Result, Run], probe: Probe) -> None:
    _, found = before
    assert (found.model, found.baseline) == ("RN26@64px", "onnxruntime")
    assert [each.name for each in found.contenders] == (BARE + "," + SERVED).split(",")
    assert found.peaks == probe.peaks
    assert not found.failures
    assert [row.contender for row in found.rows] == [each.name for each in found.contenders]
    for row in found.rows:
        assert (row.suite, row.case) == ("zero_shot", "1 of 640x480, 100 labels")
        assert row.time_ms.low <= row.time_ms.median <= row.time_ms.high
        assert len(row.rounds) == 2
        assert min(row.rounds) >= 3
        assert sum(row.rounds) == len(row.samples_ms)
        assert row.per_s.median == pytest.approx(1e3 / row.time_ms.median)
        assert row.min_cosine is not None
        assert row.min_cosine > 0.9999
        assert row.steadied is not None
        assert row.speed is not None
        assert row.share_of_limit is not None
        assert 0 < row.share_of_limit.median < 1
        assert row.flop_per_item is not None
        assert 1e8 < row.flop_per_item < 1e9
    assert found.rows[0].speed is not None
    assert found.rows[0].speed.median == 1


def test_contenders_tell_how_they_started(before: tuple[Result, Run]) -> None:
    for contender in before[1].contenders:
        assert contender.absent is None
        assert contender.versions
        assert contender.startup is not None
        assert contender.startup.ready_s > 0.1
        assert contender.startup.peak_rss_mib >= contender.startup.rss_mib > 50


def test_stages_of_one_call_add_up(before: tuple[Result, Run]) -> None:
    *stages, inside = before[1].stages
    assert (inside.contender, inside.what) == ("openvino", "inside the engine: image, batch 8")
    assert inside.missing_ms == pytest.approx(inside.total_ms - sum(inside.stages_ms.values()))
    assert "convolution" in inside.stages_ms
    assert {each.contender for each in stages} == set(SERVED.split(","))
    assert len(stages) == 4
    for each in stages:
        assert each.total_ms > 0
        assert each.missing_ms == pytest.approx(each.total_ms - sum(each.stages_ms.values()))
        if abs(each.missing_ms) > 0.05 * each.total_ms:
            assert each.note
        assert "server_compute" in each.stages_ms
    by_what = {each.what.split(":")[0]: each.stages_ms for each in stages}
    assert list(by_what["zero_shot"])[:2] == ["decode", "resize"]
    assert next(iter(by_what["text"])) == "tokenize"


def test_accuracy_is_of_the_same_photographs(before: tuple[Result, Run]) -> None:
    accuracy = before[1].accuracy
    assert [each.contender for each in accuracy] == (BARE + "," + SERVED).split(",")
    assert all(0.9999 < each.min_cosine <= each.median_cosine < 1.0001 for each in accuracy)


def test_a_wrong_answer_has_no_speed(
    probe: Probe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted_contender.plant_in(monkeypatch, "openvino", is_wrong=True)
    result, found = measure(
        *(probe, folder, "wrong", "--suite", "zero_shot", "--starts", "1"),
        *("--contender", BARE),
    )
    assert result.exit_code == 1
    assert [row.contender for row in found.rows] == ["onnxruntime"]
    (failure,) = found.failures
    assert "openvino" in failure
    assert "wrong" in failure
    assert failure[:60] in " ".join(result.output.split())


def test_what_became_slower_is_found(
    probe: Probe, folder: Path, before: tuple[Result, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted_contender.plant_in(monkeypatch, "onnxruntime", slow_down=4.0)
    (old,) = (folder / "before").glob("*.json")
    result, found = measure(
        *(probe, folder, "slow", "--suite", "zero_shot", "--contender", BARE),
        *("--compare", str(old)),
    )
    assert not found.failures
    assert result.exit_code == 3, result.output
    (new,) = (folder / "slow").glob("*.json")
    again = invoke("--compare", str(old), "--against", str(new))
    assert again.exit_code == 3
    assert "slower" in again.output
    assert invoke("--compare", str(old), "--against", str(old)).exit_code == 0


def test_a_run_that_is_cut_short_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def fail(bench: Bench) -> None:
        raise ZeroDivisionError("of its own")

    def interrupt(bench: Bench) -> None:
        raise KeyboardInterrupt

    ways = {"broken": fail, "good": measured.append, "cut": interrupt, "late": measured.append}
    suites = {name: Suite(what="", measure=way) for name, way in ways.items()}
    monkeypatch.setattr(run, "SUITES", suites)
    bench = cast(Bench, SimpleNamespace(failures=[]))
    run._measure_suites(list(suites), bench, Console(quiet=True))
    assert measured == [bench]
    broken, cut = bench.failures
    assert "broken" in broken
    assert "of its own" in broken
    assert "cut short" in cut


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("nobody"), OSError("full")])
def test_what_the_first_start_gave_is_kept_when_the_second_fails(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_again() -> list[str]:
        raise error

    starts: list[bool] = []
    bench = SimpleNamespace(
        failures=[],
        settings=SimpleNamespace(num_starts=2),
        begin_start=lambda *, is_last: starts.append(is_last),
    )
    running = SimpleNamespace(start_again=start_again)
    monkeypatch.setattr(run, "SUITES", {"good": Suite(what="", measure=lambda bench: None)})
    is_whole = run._measure_starts(
        ["good"], cast(Bench, bench), cast(RunningContenders, running), Console(quiet=True)
    )
    assert is_whole is not isinstance(error, KeyboardInterrupt)
    assert starts == [False]
    (failure,) = bench.failures
    assert "start 2" in failure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "image,speed"], "no suite is called 'speed'"),
        (["--contender", "vllm"], "no contender is called 'vllm'"),
        (["--model", "ViT-Z/99"], "unknown architecture 'ViT-Z/99'"),
        (["--against", "x.json"], "--against needs --compare"),
        (["--compare", "absent.json", "--against", "x.json"], "absent.json cannot be read"),
    ],
)
def test_what_cannot_be_used_is_said(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_it_runs_from_anywhere_and_says_what_there_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/run.py", "--list"],
        cwd=tmp_path,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    for name in (*run.SUITES, "triton openvino", "infinity"):
        assert name in done.stdout


def test_no_engine_is_loaded_beside_those_that_are_measured() -> None:
    code = (
        "import sys, benchmarks.run; "
        "print({'torch', 'openvino', 'onnxruntime', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == "set()"
