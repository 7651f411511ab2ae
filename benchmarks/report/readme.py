"""The tables of README and docs that come from results, and the check that they still do.

python -m benchmarks.report.readme benchmarks/results/2026-11-28_run.json    # writes them
python -m benchmarks.report.readme --check                                   # exit code 1 if stale

A block stands between `<!-- benchmarks:NAME -->` and `<!-- /benchmarks:NAME -->`, where NAME is the
name of the result without its date. It links to its result, which is how `--check` finds it. One
of `benchmarks:NAME:short` has a few cases and no picture.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from benchmarks.findings import Row, Run
from benchmarks.record import read_run
from benchmarks.report import answers, words
from clip_rt.errors import InputError
from clip_rt_commands import program
from clip_rt_commands.errors import command

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs/benchmarks.md")
MAX_CASES, MAX_SHORT_CASES = 8, 4


@dataclass(frozen=True, kw_only=True)
class ReadmeConfig:
    """Write the README's block of a result, or check it; --check alone checks all blocks."""

    result: tyro.conf.Positional[Path | None] = None
    """JSON of benchmarks/run.py."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write nothing; exit with 1 where a block is stale."""
    readme: Path | None = None
    """File with the blocks; README.md and docs/benchmarks.md unless named."""


def update(readme: Path, run: Run, result_path: Path) -> bool:
    """Write the block of a result into a README, or a page of docs/.

    Args:
        readme: File with the block's markers.
        run: What the result holds.
        result_path: The result, in the folder of the README or below; its page and picture (.html,
            .png) are linked where they lie beside it.

    Returns:
        Whether the file has changed.

    Raises:
        InputError: The README has no block of that name, or the result is not below it.
    """
    text = readme.read_text(encoding="utf-8")
    new = _replaced(text, readme, run, result_path)
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text


def check(readme: Path, run: Run, result_path: Path) -> bool:
    """Return whether the block of a result says what `update` would write.

    Raises:
        InputError: As `update`.
    """
    text = readme.read_text(encoding="utf-8")
    return _replaced(text, readme, run, result_path) == text


def results_of(readme: Path) -> list[Path]:
    """Return the result that each block of a README links to.

    Raises:
        InputError: A block links to none.
    """
    text = readme.read_text(encoding="utf-8")
    paths = []
    for name, block in re.findall(
        r"<!-- benchmarks:([\w:-]+) -->(.*?)<!-- /benchmarks:\1 -->", text, re.DOTALL
    ):
        link = re.search(r"\]\(([^()\s]+\.json)\)", block)
        if link is None:
            raise InputError(
                f"{readme}: the block benchmarks:{name} links to no result. Write it with "
                "python -m benchmarks.report.readme RESULT.json."
            )
        paths.append((readme.parent / link[1]).resolve())
    return paths


def block(run: Run, links: dict[str, str], *, max_cases: int = MAX_CASES) -> str:
    """Return the markdown of a run: a sentence, a table, where it comes from.

    Args:
        run: What to write about.
        links: Paths from the README to the run's files by "json", "html" and "png"; the last two
            may lack.
        max_cases: Rows of the table at most.
    """
    names = {"FP32": answers.ours(run, "fp32"), "INT8": answers.ours(run, "int8")}
    columns = {head: name for head, name in names.items() if name and name != run.baseline}
    what = {"served": "client, Triton and engine", "runtime": "the engine called directly"}
    kinds = dict.fromkeys(each.kind for each in run.contenders if each.name in columns.values())
    parts = words.listed([what[kind] for kind in kinds if kind in what] or ["nothing of ours"])
    intro = (
        f"{_cell(run.model)} with the same weights, by turns in one run, on "
        f"{_cell(answers.machine(run))}. Ours is {parts}; in bold, how many times as fast as "
        f"{_cell(run.baseline)}, and the 95 % interval of that:"
    )
    lines = [
        intro,
        "",
        "| "
        + " | ".join(["", _cell(run.baseline), *(f"clip_rt {head}" for head in columns)])
        + " |",
        "|---" + "|--:" * (1 + len(columns)) + "|",
    ]
    for case in answers.key_cases(run, max_cases):
        rows = [case.of(run.baseline), *(case.of(name) for name in columns.values())]
        if any(row is not None for row in rows[1:]):
            cells = [_figures(row, is_baseline=not place) for place, row in enumerate(rows)]
            lines.append(f"| {_cell(case.title)} | " + " | ".join(cells) + " |")
    source = [f"[all figures]({links['json']})"]
    if "html" in links:
        source.append(f"[the report]({links['html']})")
    end = f"Time of a call, median over rounds. {run.date}, {_code(run.command)}: "
    lines += ["", f"{end}{words.listed(source)}."]
    if run.failures:
        lines.insert(0, f"**The run failed and is not to be believed: {_cell(run.failures[0])}**\n")
    if "png" in links:
        alt = f"{run.model}: times as fast as {run.baseline}, and under load"
        lines += ["", f"![{_cell(alt)}]({links['png']})"]
    return "\n".join(lines)


def _figures(row: Row | None, *, is_baseline: bool) -> str:
    if row is None:
        return "cannot" if is_baseline else ""
    time = words.duration(row.time_ms.median)
    if is_baseline:
        return f"{time} {words.plus_minus(row.time_ms)}"
    if row.speed is None:
        return time
    return f"{time}, **{words.times(row.speed.median)}** ({words.low_to_high(row.speed)})"


def _cell(text: str) -> str:
    """Escape what would end a cell or begin a tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


def _replaced(text: str, readme: Path, run: Run, result_path: Path) -> str:
    result = result_path.resolve()
    name = re.sub(r"^\d{4}-\d\d-\d\d_", "", result.stem)
    folder = readme.resolve().parent
    root = folder.parent if folder.name == "docs" else folder
    if not result.is_relative_to(root):
        raise InputError(f"{result} is not below {root}, so {readme} cannot link to it.")
    files = {kind: result.with_suffix(f".{kind}") for kind in ("json", "html", "png")}
    links = {kind: os.path.relpath(file, folder) for kind, file in files.items() if file.is_file()}
    is_found = False
    for form, max_cases in ((name, MAX_CASES), (f"{name}:short", MAX_SHORT_CASES)):
        begin, end = f"<!-- benchmarks:{form} -->", f"<!-- /benchmarks:{form} -->"
        if text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end):
            kinds = links if form == name else {k: v for k, v in links.items() if k != "png"}
            before, after = text[: text.index(begin)], text[text.index(end) :]
            text = f"{before}{begin}\n{block(run, kinds, max_cases=max_cases)}\n{after}"
            is_found = True
    if not is_found:
        begin, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
        raise InputError(f"{readme} has no block {begin} ... {end}. Put these two lines into it.")
    return text


def main(config: ReadmeConfig) -> None:
    """Write the blocks of a result, or check them; --check alone checks all blocks.

    Raises:
        InputError: a block is stale or cannot be written.
    """
    if config.result is None and not config.check:
        raise InputError("Name the result to write from, or --check.")
    for page in [config.readme] if config.readme else PAGES:
        for path in [config.result] if config.result else results_of(page):
            run = read_run(path)
            if not config.check:
                changed = "updated" if update(page, run, path) else "already says so"
                Console().print(f"{page}: {changed}", highlight=False, soft_wrap=True)
            elif not check(page, run, path):
                raise InputError(
                    f"{page} does not say what {path} found. "
                    f"Run python -m benchmarks.report.readme {path}."
                )


if __name__ == "__main__":
    with command():
        main(tyro.cli(ReadmeConfig, prog=program(__spec__.name), description=__doc__))
