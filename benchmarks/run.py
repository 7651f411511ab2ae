r"""How fast this is on your machine, where the time goes, how it compares with what else there is.

    python benchmarks/run.py                          # 3 minutes, once everything is made
    python benchmarks/run.py --full                   # all suites, all contenders: an hour or two
    python benchmarks/run.py --suite image,text --contender "triton openvino,open_clip"
    python benchmarks/run.py --compare benchmarks/results/OLD_run.json    # what became slower?
    python benchmarks/run.py --compare OLD.json --against NEW.json        # without a run
    python benchmarks/run.py --repository model_repository --name drawings    # what you serve
    python benchmarks/run.py --judge RUN.json         # the bars and the report of today
    python benchmarks/run.py --list

The first run exports the model into a cache, which takes minutes. Everyone gets the same weights
and items, answers right before anything is timed, and takes turns with the others. The exit code is
1 when the run is not to be believed, 3 when `--compare` finds something slower.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
# ruff: noqa: E402 - the next lines decide what can be imported.
# Run as a script, Python looks for modules in this folder first: benchmarks.* would not be found,
# from wherever it is run. Nor shall our own modules hide others of the same name.
if __name__ == "__main__" and sys.path[0] != str(ROOT):
    sys.path[0] = str(ROOT)
    import benchmarks  # noqa: F401 - from here on, a missing package is named in one sentence.

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff, UseAppendAction

from benchmarks.compare import compare
from benchmarks.contenders.kit import default_folder
from benchmarks.findings import Run
from benchmarks.machine import Probe, Watch
from benchmarks.record import RESULTS_DIR, describe_result, read_run, write
from benchmarks.report.page import write_page
from benchmarks.report.plots import render_png
from benchmarks.report.terminal import show, show_comparison
from benchmarks.suites.bars import find_bars
from benchmarks.suites.bench import Bench, Progress, Settings
from benchmarks.suites.plan import SUITES
from benchmarks.suites.running import QUICK, RunningContenders, Wishes, describe_all, split_names
from benchmarks.suites.timed import make_rows
from clip_rt.client import CACHE_VARIABLE
from clip_rt.errors import ClipRTError, InputError

QUICK_BUDGET_S, FULL_BUDGET_S = 8.0, 60.0
NUM_FIRST_PROBES = 3
NOT_BELIEVED, UNUSABLE, REGRESSION = 1, 2, 3
"""Exit codes."""
LAST = "durations"
"""The suite that wants all the memory, when everyone has gone."""
PACKAGES = (
    "clip-rt numpy nvidia-pytriton onnxruntime openvino pillow scikit-image torch tritonclient"
).split()


@dataclass(frozen=True, kw_only=True)
class RunConfig(Wishes):
    """Measure, show what was found, and write it as JSON, HTML and PNG."""

    suite: UseAppendAction[tuple[str, ...]] = ()
    """Suites, with commas between them or one at a time."""
    quick: FlagCreatePairsOff[bool] = False
    """What takes minutes, as without --full."""
    target: float = 0.03
    """Share to which a median is to be known."""
    budget_s: float | None = None
    """Seconds for the turns of a case."""
    starts: int = Settings.num_starts
    """How often everyone is started anew to be timed again."""
    out: Path = RESULTS_DIR
    """Folder of the results."""
    cache: Path | None = None
    """Folder of what is made once; else below ~/.cache."""
    compare: Path | None = None
    """JSON of a run to compare with."""
    against: Path | None = None
    """JSON of the later run, instead of a new one."""
    judge: Path | None = None
    """JSON to hold to the bars and to draw anew, without a run."""
    list_: Annotated[FlagCreatePairsOff[bool], tyro.conf.arg(name="list")] = False
    """Only say which suites and contenders there are."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if not 0.001 <= self.target <= 1.0:
            raise InputError(f"--target is {self.target}; it must be from 0.001 to 1.")
        if self.budget_s is not None and self.budget_s < 0.1:
            raise InputError(f"--budget-s is {self.budget_s}; it must be at least 0.1.")
        if self.starts < 1:
            raise InputError(f"--starts is {self.starts}; it must be at least 1.")
        if self.against is not None and self.compare is None:
            raise InputError("--against needs --compare, the earlier run.")

    @property
    def suites(self) -> list[str]:
        """Names of the suites that are measured.

        Raises:
            InputError: one is not known.
        """
        quick = [name for name in SUITES if self.full or SUITES[name].is_quick]
        return split_names(self.suite, list(SUITES), "suite") or quick

    @property
    def settings(self) -> Settings:
        """How much is measured."""
        budget_s = self.budget_s or (FULL_BUDGET_S if self.full else QUICK_BUDGET_S)
        return Settings(
            is_full=self.full, target=self.target, budget_s=budget_s, num_starts=self.starts
        )


def measure(
    suites: Sequence[str], wishes: Wishes, settings: Settings, *, cache: Path, console: Console
) -> Run:
    """Measure the suites with whoever can take part.

    Args:
        suites: Names, in any order.
        wishes: Who takes part, with which model.
        settings: How much is measured.
        cache: Folder for what is made once.
        console: For the progress.

    Returns:
        All that was found; also after Ctrl-C, when `Run.failures` says so.

    Raises:
        InputError: the model or the weights cannot be used.
    """
    # No client shall find what another run has cached.
    os.environ.pop(CACHE_VARIABLE, None)
    start_s = time.perf_counter()
    with ExitStack() as stack:
        watch = stack.enter_context(Watch())
        progress = stack.enter_context(Progress(console))
        running = stack.enter_context(RunningContenders(wishes, cache=cache, say=progress.step))
        progress.say("what this machine can do")
        probe = stack.enter_context(Probe())
        running.start()
        bench = Bench(
            model=running.kit.facts.name,
            weights=wishes.weights,
            spec=running.kit.spec,
            facts=running.kit.facts,
            tokenizer=running.kit.make_tokenizer(),
            settings=settings,
            contenders=running.contenders,
            baseline=running.baseline,
            probe=probe,
            progress=progress,
            reference=running.reference,
            served=running.served,
            # Now, so that there are some whatever happens.
            probe_s=probe.time(NUM_FIRST_PROBES),
        )
        names = [name for name in SUITES if name in suites]
        timed = [name for name in names if SUITES[name].is_timed]
        is_whole = _measure_starts(timed, bench, running, console)
        make_rows(bench)
        others = [name for name in names if name not in timed and name != LAST]
        is_whole = is_whole and _measure_suites(others, bench, console)
        conditions = watch.conditions(bench.probe_s)
        running.close()
        if is_whole and LAST in names:
            _measure_suites([LAST], bench, console)
    conditions.warnings.extend(bench.notes)
    return Run(
        **describe_result(["python", "benchmarks/run.py"], PACKAGES),
        settings={
            "suites": [name for name in SUITES if name in suites],
            "is_full": settings.is_full,
            "target": settings.target,
            "budget_s": settings.budget_s,
            "num_starts": bench.num_starts,
        },
        model=bench.model,
        weights=wishes.weights,
        baseline=bench.baseline,
        took_s=time.perf_counter() - start_s,
        conditions=conditions,
        peaks=probe.peaks,
        contenders=running.facts,
        rows=bench.rows,
        levels=bench.levels,
        stages=bench.stages,
        accuracy=bench.accuracy,
        durations=bench.durations,
        bars=find_bars(bench.model, bench.baseline, probe.peaks, bench.rows, bench.levels),
        failures=bench.failures + _above_limit(bench),
    )


def _measure_starts(
    names: Sequence[str], bench: Bench, running: RunningContenders, console: Console
) -> bool:
    """Time cases in each start of the contenders; return whether the user let them all end."""
    num_starts = bench.settings.num_starts if names else 1
    for start in range(1, num_starts + 1):
        if start > 1:
            try:
                bench.failures += running.start_again()
            except KeyboardInterrupt:
                bench.failures.append(f"cut short by the user in start {start}")
                return False
            except Exception as error:  # What the earlier starts gave is still worth something.
                bench.failures.append(f"start {start}: {error!r}")
                return True
        bench.begin_start(is_last=start == num_starts)
        if not _measure_suites(names, bench, console):
            return False
    return True


def _measure_suites(names: Sequence[str], bench: Bench, console: Console) -> bool:
    """Measure suites and return whether the user let them all end."""
    for name in names:
        try:
            SUITES[name].measure(bench)
        except KeyboardInterrupt:
            bench.failures.append(f"cut short by the user in the suite {name}")
            return False
        except Exception as error:  # The other suites are still worth their time.
            console.print_exception()
            bench.failures.append(f"{name}: {error!r}")
    return True


def _above_limit(bench: Bench) -> list[str]:
    """Say which rows claim more than the machine can do: something is measured wrong."""
    return [
        f"{row.suite}, {row.case}: {row.contender} is at {row.share_of_limit.median:.0%} of the "
        f"limit ({row.limit}), surely above it: its work or its time is measured wrong"
        for row in bench.rows
        if row.share_of_limit is not None and row.share_of_limit.low > 1.0
    ]


def report(run: Run, folder: Path, console: Console) -> None:
    """Show a run, and write it as JSON, HTML and PNG; first the JSON, which holds all there is."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{run.date}_run" + ("" if run.settings["is_full"] else "_quick")
    paths = [folder / f"{stem}.{suffix}" for suffix in ("json", "html", "png")]
    write(paths[0], run)
    show(run, console)
    write_page(run, paths[1])
    # Of a run that timed nothing there is no picture, and that of an earlier one is not of this.
    paths[2].unlink(missing_ok=True)
    render_png(run, paths[2])
    for path in filter(Path.is_file, paths):
        console.print(f"written to {path}", highlight=False, soft_wrap=True)


def list_all(console: Console, wishes: Wishes) -> None:
    """Print which suites and contenders there are, and who could not take part here."""
    table = Table("suite", "what", "in a quick run", title="suites")
    for name, suite in SUITES.items():
        table.add_row(name, suite.what, "yes" if suite.is_quick else "")
    console.print(table)
    table = Table("contender", "what", "in a quick run", "here", title="contenders")
    for facts in describe_all(wishes):
        quick = "yes" if facts.name in QUICK else ""
        table.add_row(facts.name, facts.what, quick, facts.absent or "yes")
    console.print(table)


def _judged(run: Run) -> Run:
    """Return a run as it is judged today; what was measured stays as it is."""
    return replace(run, bars=find_bars(run.model, run.baseline, run.peaks, run.rows, run.levels))


def _compare(old: Run, new: Run, console: Console) -> int:
    """Show what changed and return the exit code: whether something became slower."""
    comparison = compare(old, new)
    show_comparison(comparison, console)
    return REGRESSION if comparison.regressions else 0


def main(config: RunConfig) -> int:
    """Do what was asked for and return the exit code.

    Raises:
        ClipRTError: something that was given cannot be used.
    """
    console, suites = Console(), config.suites
    old = None if config.compare is None else read_run(config.compare)
    if config.list_:
        list_all(console, config)
        return 0
    if config.judge is not None:
        report(_judged(read_run(config.judge)), config.out, console)
        return 0
    if old is not None and config.against is not None:
        return _compare(old, read_run(config.against), console)
    run = measure(
        suites, config, config.settings, cache=config.cache or default_folder(), console=console
    )
    report(run, config.out, console)
    code = 0 if old is None else _compare(old, run, console)
    return NOT_BELIEVED if run.failures else code


def command(arguments: Sequence[str] | None = None) -> int:
    """Do what arguments ask for, of this process unless some are given; return the exit code."""
    try:
        return main(
            tyro.cli(
                RunConfig, prog="python benchmarks/run.py", description=__doc__, args=arguments
            )
        )
    except ClipRTError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        return UNUSABLE


if __name__ == "__main__":
    sys.exit(command())
