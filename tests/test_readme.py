"""The README's Python runs as printed, and prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

from benchmarks.record import read_run
from benchmarks.report.readme import check, results_of

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_prints_what_the_readme_shows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", text, re.DOTALL).groups()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


def test_every_figure_of_the_readme_is_in_a_result() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"## What was measured\n(.*?)\n## ", text, re.DOTALL)[1]
    figures = re.findall(r"\b0\.\d{3,}\b", table)
    results = "".join(path.read_text() for path in (ROOT / "benchmarks/results").glob("*.json"))
    known = {f"{float(number):.3f}" for number in re.findall(r"\d\.\d+(?:e-\d+)?", results)}
    assert len(figures) > 4
    assert not {figure for figure in figures if f"{float(figure):.3f}" not in known}


def test_the_benchmark_tables_are_those_of_their_results():
    readme = ROOT / "README.md"
    paths = results_of(readme)
    assert paths
    for path in paths:
        assert check(readme, read_run(path), path), f"python -m benchmarks.report.readme {path}"
