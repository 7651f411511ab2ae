r"""How fast this is on your machine, where the time goes, how it compares with what else there is.

    python benchmarks/run.py                          # 3 minutes, once everything is made
    python benchmarks/run.py --full                   # all suites, all contenders: an hour or two
    python benchmarks/run.py --suite image,text --contender "triton openvino,open_clip"
    python benchmarks/run.py --compare benchmarks/results/OLD_run.json    # what became slower?
    python benchmarks/run.py --compare OLD.json --against NEW.json        # without a run
    python benchmarks/run.py --repository model_repository --name drawings    # what you serve
    python benchmarks/run.py --judge RUN.json         # the bars and the report of today
    python benchmarks/run.py --list

The first run exports the model into a cache and says how long that takes. Everyone gets the same
weights and items, answers right before anything is timed, and takes turns with the others. The exit
code is 1 when the run is not to be believed, 3 when `--compare` finds something slower.
"""

from __future__ import annotations

import datetime
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
# ruff: noqa: E402 - the next lines decide what can be imported.
# Run as a script, Python looks for modules in this folder first: benchmarks.* would not be found,
# from wherever it is run. Nor shall our own modules hide others of the same name.
if __name__ == "__main__" and sys.path[0] != str(ROOT):
    sys.path[0] = str(ROOT)
    import benchmarks  # noqa: F401 - from here on, a missing package is named in one sentence.

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import contenders
from benchmarks.compare import compare
from benchmarks.contenders.kit import default_folder
from benchmarks.contenders.plant import parse_plant
from benchmarks.findings import Run
from benchmarks.limits import ceilings
from benchmarks.machine import Probe, Watch, describe
from benchmarks.record import RESULTS_DIR, commit, read_run, write_run
from benchmarks.report.page import write_page
from benchmarks.report.plots import render_png
from benchmarks.report.terminal import show, show_comparison
from benchmarks.suites.bars import find_bars
from benchmarks.suites.bench import Bench, Settings
from benchmarks.suites.cases import Pictures
from benchmarks.suites.plan import SUITES
from benchmarks.suites.progress import Progress
from benchmarks.suites.running import QUICK, RunningContenders, Wishes, describe_all
from benchmarks.suites.timed import make_rows
from clip_rt.client import CACHE_VARIABLE
from clip_rt.errors import ClipRTError

QUICK_BUDGET_S, FULL_BUDGET_S = 8.0, 60.0
NUM_FIRST_PROBES = 3
NOT_BELIEVED, REGRESSION = 1, 3
"""Exit codes."""
LAST = "durations"
"""The suite that wants all the memory, when everyone has gone."""
PACKAGES = (
    *("clip-rt", "numpy", "nvidia-pytriton", "onnxruntime", "openvino", "pillow"),
    *("scikit-image", "torch", "tritonclient"),
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
        running = stack.enter_context(RunningContenders(wishes, cache=cache, say=progress.tell))
        progress.say("what this machine can do")
        probe = stack.enter_context(Probe())
        running.start()
        bench = Bench(
            model=running.kit.spec.name,
            weights=wishes.weights,
            spec=running.kit.spec,
            settings=settings,
            contenders=running.contenders,
            baseline=running.baseline,
            probe=probe,
            pictures=Pictures(folder=cache / "pictures"),
            progress=progress,
            reference=running.reference,
            write_items=running.write_items,
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
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        command=shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        commit=commit(),
        machine=describe(),
        versions=_versions(),
        settings={
            "suites": [name for name in SUITES if name in suites],
            "is_full": settings.is_full,
            "target": settings.target,
            "budget_s": settings.budget_s,
            "num_starts": bench.num_starts,
            "plants": {name: asdict(each) for name, each in wishes.plants.items()},
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
        ceilings=ceilings(),
        bars=find_bars(
            model=bench.model,
            baseline=bench.baseline,
            peaks=probe.peaks,
            rows=bench.rows,
            levels=bench.levels,
        ),
        failures=bench.failures + _above_limit(bench),
    )


def _versions() -> dict[str, str]:
    """Return the versions of `PACKAGES`, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


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
    write_run(run, paths[0])
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


def _split(values: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """Return names that are given once each or with commas between them.

    Raises:
        typer.BadParameter: one is not known.
    """
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"no {what} is called {name!r}; there are {', '.join(known)}.")
    return list(dict.fromkeys(names))


def _judged(run: Run) -> Run:
    """Return a run as it is judged today; what was measured stays as it is."""
    bars = find_bars(
        model=run.model, baseline=run.baseline, peaks=run.peaks, rows=run.rows, levels=run.levels
    )
    return replace(run, bars=bars)


def _compare(old: Run, new: Run, console: Console) -> bool:
    """Show what changed and return whether something became slower."""
    comparison = compare(old, new)
    show_comparison(comparison, console)
    return bool(comparison.regressions)


def main(
    suite: Annotated[
        list[str], typer.Option(help="Suites, with commas between them or one at a time.")
    ] = [],  # noqa: B006
    contender: Annotated[list[str], typer.Option(help="Contenders, in the same way.")] = [],  # noqa: B006
    full: Annotated[
        bool, typer.Option("--full/--quick", help="Everything, or what takes minutes.")
    ] = False,
    model: Annotated[str, typer.Option(help="Architecture.")] = "ViT-B/32",
    weights: Annotated[
        str, typer.Option(help="As export.onnx takes them; speed does not depend on them.")
    ] = "random",
    repository: Annotated[
        Path | None, typer.Option(help="A model repository; measures a model that is in it.")
    ] = None,
    name: Annotated[str, typer.Option(help="The model in --repository.")] = "drawings",
    url: Annotated[str, typer.Option(help="host:port of a Triton somewhere.")] = "",
    remote_model: Annotated[str, typer.Option(help="The model of the server at --url.")] = "",
    infinity: Annotated[
        Path | None, typer.Option(help="infinity_emb of its own virtual environment.")
    ] = None,
    target: Annotated[
        float, typer.Option(help="Share to which a median is to be known.", min=0.001, max=1.0)
    ] = 0.03,
    budget_s: Annotated[
        float | None, typer.Option(help="Seconds for the turns of a case.", min=0.1)
    ] = None,
    starts: Annotated[
        int, typer.Option(help="How often everyone is started anew to be timed again.", min=1)
    ] = Settings.num_starts,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS_DIR,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of what is made once; else below ~/.cache.")
    ] = None,
    compare_with: Annotated[
        Path | None, typer.Option("--compare", help="JSON of a run to compare with.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="JSON of the later run, instead of a new one.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="JSON to hold to the bars and to draw anew, without a run.")
    ] = None,
    plant: Annotated[
        list[str], typer.Option(help="slow:NAME:1.2 or wrong:NAME, to see that it is noticed.")
    ] = [],  # noqa: B006
    list_: Annotated[
        bool, typer.Option("--list", help="Only say which suites and contenders there are.")
    ] = False,
) -> None:
    """Measure, show what was found, and write it as JSON, HTML and PNG."""
    console = Console()
    wanted_suites = _split(suite, list(SUITES), "suite")
    wanted = _split(contender, contenders.NAMES, "contender")
    try:
        plants = dict(map(parse_plant, plant))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        _split(list(plants), contenders.NAMES, "contender")
        wishes = Wishes(
            contenders=tuple(wanted or (contenders.NAMES if full else QUICK)),
            model=model,
            weights=weights,
            repository=repository,
            name=name,
            url=url or None,
            remote_model=remote_model or None,
            infinity=str(infinity) if infinity else None,
            plants=plants,
        )
        old = None if compare_with is None else read_run(compare_with)
        if list_:
            list_all(console, wishes)
            return
        if judge is not None:
            report(_judged(read_run(judge)), out, console)
            return
        if against is not None:
            if old is None:
                raise typer.BadParameter("--against needs --compare, the earlier run.")
            raise typer.Exit(REGRESSION if _compare(old, read_run(against), console) else 0)
        run = measure(
            wanted_suites or [name for name in SUITES if full or SUITES[name].is_quick],
            wishes,
            Settings(
                is_full=full,
                target=target,
                budget_s=budget_s or (FULL_BUDGET_S if full else QUICK_BUDGET_S),
                num_starts=starts,
            ),
            cache=cache or default_folder(),
            console=console,
        )
    except ClipRTError as error:  # Something that was given cannot be used.
        raise typer.BadParameter(str(error)) from error
    report(run, out, console)
    is_slower = old is not None and _compare(old, run, console)
    if run.failures:
        raise typer.Exit(NOT_BELIEVED)
    if is_slower:
        raise typer.Exit(REGRESSION)


if __name__ == "__main__":
    typer.run(main)
