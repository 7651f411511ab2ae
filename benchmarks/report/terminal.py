"""A run, and a comparison of two, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks.compare import Change, Comparison
from benchmarks.findings import Bar, Level, Row, Run
from benchmarks.report import answers, words
from benchmarks.report.answers import CaseRows
from benchmarks.timing import half_width

_TEXTS = (
    *("suite", "case", "contender", "why it is absent", "what"),
    *("stages, ms", "precision", "note"),
)
"""Columns of text; all others are figures, set to the right."""


def show(run: Run, console: Console) -> None:
    """Print all that a run found; why it is not to be believed comes last, in red."""
    for sentence in answers.headline(run):
        console.print(Text(sentence, style="bold"))
    console.print(Text(f"{answers.machine(run)}; {run.date}; {run.command}", style="dim"))
    for table in (
        *(_suite_table(run, suite) for suite in answers.suites(run)),
        _load_table(run),
        _stage_table(run),
        _accuracy_table(run),
        _startup_table(run),
        _duration_table(run),
        _peak_table(run),
        _absent_table(run),
        bar_table(run.bars),
    ):
        _print(table, console)
    _print_remarks(run, console)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print what became slower or faster in the later of two runs, and what makes it doubtful."""
    looks = {"slower": "bold red", "faster": "green", "same": "dim"}
    columns = ("suite", "case", "contender", "time, new / old", "old", "new", "within noise", "")
    table = _table("Against the older run", columns)
    for change in sorted(comparison.changes, key=lambda each: list(looks).index(each.verdict)):
        table.add_row(
            *map(escape, (change.suite, change.case, change.contender)),
            words.times(change.ratio),
            _in_unit(change, change.old.median),
            _in_unit(change, change.new.median),
            f"± {100 * change.noise:.1f} %",
            change.verdict if change.verdict != "same" else "same within noise",
            style=looks[change.verdict],
        )
    _print(table, console)
    for what, keys in (("Only in the older run", comparison.gone), ("New", comparison.added)):
        if keys:
            text = f"{what}: {'; '.join(', '.join(key) for key in keys)}."
            console.print(Text(text, style="dim"))
    for warning in comparison.warnings:
        console.print(Text(f"Careful: {warning}", style="yellow"))
    slower, faster = len(comparison.regressions), len(comparison.improvements)
    same = len(comparison.changes) - slower - faster
    text = f"{slower} slower, {faster} faster, {same} the same within noise; "
    text += f"the intervals of {len(comparison.agreeing)} of {len(comparison.changes)} meet."
    console.print(Text(text, style="bold red" if slower else "bold"))


def bar_table(bars: Sequence[Bar]) -> Table:
    """Return the table of figures and what they are held to."""
    met, missed = Text("met", style="green"), Text("missed", style="bold red")
    rows = [
        (
            bar.what,
            words.number(bar.value),
            f"{bar.side} {words.number(bar.limit)}",
            met if bar.is_met else missed,
        )
        for bar in bars
    ]
    return _table("Bars", ("what", "figure", "bar", ""), rows)


def _suite_table(run: Run, suite: str) -> Table:
    cases = answers.cases(run, suite)
    unit = cases[0].rows[0].unit
    heads = ["contender", "a call", "± %", f"{unit}/s", f"times\n{run.baseline}"]
    heads += ["of the\nlimit", "cosine", "top-1\n%"]
    cells = {id(row): _row_cells(run, case, row) for case in cases for row in case.rows}
    # Columns that this suite has nothing for would only take room.
    used = [place for place in range(len(heads)) if any(own[place] for own in cells.values())]
    table = _table(words.suite(suite), [heads[place] for place in used])
    for case in cases:
        table.add_section()
        # In two lines, or the longest name decides how wide the column of contenders is.
        table.add_row(Text(case.name.replace(", ", ",\n"), style="bold blue"))
        for row in case.rows:
            table.add_row(*(cells[id(row)][place] for place in used))
    return table


def _row_cells(run: Run, case: CaseRows, row: Row) -> list[Text]:
    facts = answers.contender(run, row.contender)
    look = "bold" if facts is not None and facts.kind == "served" else ""
    top1 = answers.top1(run, row.contender)
    share = row.share_of_limit
    cells = [
        row.contender,
        words.duration(row.time_ms.median),
        f"{100 * half_width(row.time_ms):.1f}" + ("~" if row.is_noisy else " "),
        words.number(row.per_s.median),
        words.times(row.speed.median) if row.speed else "",
        words.percent(share.median) if share else "",
        words.cosine(row.min_cosine) if row.min_cosine is not None else "",
        f"{100 * top1:.1f}" if top1 is not None else "",
    ]
    texts = [Text(cell, style=look) for cell in cells]
    if row.is_noisy:
        texts[2].stylize("yellow")
    if row is case.rows[0]:
        texts[3].stylize("green")
    return texts


def _load_table(run: Run) -> Table:
    columns = ["contender", "clients or\ncalls/s", "answered\na second"]
    columns += ["p50\nms", "p95\nms", "p99\nms", "p99.9\nms", "failed"]
    table = _table("Under load", columns)
    closed = [level for level in run.levels if level.num_clients is not None]
    arrivals = [level for level in run.levels if level.num_clients is None]
    for how, levels in (("closed loop", closed), ("Poisson arrivals", arrivals)):
        for what, of_call in answers.by_call(levels):
            table.add_section()
            table.add_row(Text(f"{what}\n{how}", style="bold blue"))
            for _, of_contender in answers.by_contender(of_call):
                for level in of_contender:
                    table.add_row(*_level_cells(level), style="bold" if level.is_knee else "")
    return table


def _level_cells(level: Level) -> list[str | Text]:
    load = f"{level.num_clients}" if level.num_clients else words.number(level.offered_per_s or 0)
    return [
        escape(level.contender),
        load + (" knee" if level.is_knee else ""),
        words.number(level.answered_per_s),
        *map(words.number, (level.p50_ms, level.p95_ms, level.p99_ms, level.p999_ms)),
        Text(str(level.num_failed), style="red" if level.num_failed else ""),
    ]


def _stage_table(run: Run) -> Table:
    rows = []
    for each in run.stages:
        stages = ", ".join(f"{name} {words.number(ms)}" for name, ms in each.stages_ms.items())
        missing = f"{100 * each.missing_ms / each.total_ms:.1f} %"
        notes = "\n".join(filter(None, (stages, each.note)))
        rows.append((each.contender, each.what, words.number(each.total_ms), missing, notes))
    columns = ("contender", "what", "all, ms", "missing", "stages, ms")
    return _table("Where the time goes", columns, rows)


def _accuracy_table(run: Run) -> Table:
    columns = ("contender", "precision", "top-1", "pictures", "worst cosine", "median cosine")
    rows = [
        (
            each.contender,
            each.precision,
            f"{100 * each.top1:.1f} %" if each.top1 is not None else "",
            f"{each.num_images:,}",
            words.cosine(each.min_cosine),
            words.cosine(each.median_cosine),
        )
        for each in run.accuracy
    ]
    return _table("Accuracy", columns, rows)


def _startup_table(run: Run) -> Table:
    rows = []
    for each in run.contenders:
        if up := each.startup:
            times = map(_seconds, (up.ready_s, up.first_answer_s))
            rows.append((each.name, *times, *map(_mib, (up.rss_mib, up.peak_rss_mib))))
    return _table("From nothing", ("contender", "ready", "first answer", "memory", "at most"), rows)


def _duration_table(run: Run) -> Table:
    rows = [
        (each.what, _seconds(each.seconds), _mib(each.peak_rss_mib), each.note)
        for each in run.durations
    ]
    return _table("Done now and then", ("what", "time", "most memory", "note"), rows)


def _peak_table(run: Run) -> Table:
    peaks = (
        ("FP32 matrix products, best shape", "GFLOP/s", run.peaks.gemm_fp32_gflop_per_s),
        ("those of ViT-B/32", "GFLOP/s", run.peaks.gemm_fp32_model_gflop_per_s),
        ("INT8 matrix products", "GOP/s", run.peaks.gemm_int8_gop_per_s),
        ("reading memory", "GB/s", run.peaks.read_gb_per_s),
    )
    rows = [
        (what, f"{words.number(found.median)} {unit}", words.low_to_high(found))
        for what, unit, found in peaks
        if found
    ]
    return _table("What this machine can do", ("what", "measured", "95 % interval"), rows)


def _absent_table(run: Run) -> Table:
    rows = [(each.name, each.absent) for each in run.contenders if each.absent]
    return _table("Not measured", ("contender", "why it is absent"), rows)


def _print_remarks(run: Run, console: Console) -> None:
    for level, look in (("warn", "yellow"), ("bad", "bold red")):
        for remark in answers.remarks(run):
            if remark.level == level:
                console.print(Text(remark.text, style=look))


def _table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str | Text]] = ()) -> Table:
    """Return a table of text as it is, which nobody reads as markup."""
    table = Table(
        title=f"\n{escape(title)}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for column in columns:
        is_text = column in _TEXTS
        is_cut = is_text and column != "contender"
        table.add_column(escape(column), justify="left" if is_text else "right", no_wrap=not is_cut)
    for row in rows:
        table.add_row(*(escape(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def _print(table: Table, console: Console) -> None:
    """Print a table unless it is empty; closer together where there is no room."""
    if not table.row_count:
        return
    unbounded = console.options.update(max_width=1000)
    if console.measure(table, options=unbounded).maximum > console.width:
        table.padding = 0
    console.print(table)


def _seconds(value: float) -> str:
    return f"{words.number(value)} s"


def _mib(value: float | None) -> str:
    return "" if value is None else f"{words.number(value)} MiB"


def _in_unit(change: Change, value: float) -> str:
    return words.duration(value) if change.unit == "ms" else f"{words.number(value)} {change.unit}"
