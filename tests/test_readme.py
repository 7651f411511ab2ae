"""The Python of README and docs/ runs as printed and prints what they say; their commands exist.

The commands themselves run in `make extras`, each where only what its page installs is installed.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import clip_rt
from benchmarks.record import read_run
from benchmarks.report.readme import PAGES, check, results_of
from clip_rt import errors
from clip_rt.moderation.policy import Calibration, Label, Policy
from clip_rt.requests.retries import RetryBudget, RetryPolicy
from clip_rt.specs import MODELS
from clip_rt.testing import FakeServer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def load_pages():
    """What `make extras` reads README and docs/ by."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / ".ci/pages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


STEP = load_pages()
DOCUMENTS = STEP.documents()
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "model_repository/README.md"]
SNIPPET = re.compile(
    r"^```python\n(?!# \w+\.py\n)(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)
"""Python that is no file of the reader's, and what it prints, where that is shown."""
WITH_SNIPPETS = [page for page in DOCUMENTS if SNIPPET.search(page.read_text("utf-8"))]


def python_commands() -> list[str]:
    """Commands of ours in all documents, in blocks and within sentences."""
    found: list[str] = []
    for page in (*DOCUMENTS, *OTHERS):
        inline = re.findall(r"(?<!`)`((?:python|torchrun) [^`]+)`(?!`)", page.read_text("utf-8"))
        found += [*STEP.commands(page), *(" ".join(each.split()) for each in inline)]
    pieces = [piece.strip() for each in found for piece in each.split("&&")]
    return [each for each in dict.fromkeys(pieces) if re.match(r"(python|torchrun) ", each)]


@functools.cache
def help_of(command: tuple[str, ...]) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", python_commands())
def test_every_command_of_the_documents_has_the_options_it_is_shown_with(command):
    words = shlex.split(command)
    if "-c" in words:
        compile(words[words.index("-c") + 1], command, "exec")
        return
    if "-m" in words:
        start = words.index("-m")
        program, rest = words[start : start + 2], words[start + 2 :]
    else:
        program, rest = words[1:2], words[2:]
    if rest and program[1:] in (["clip_rt"], ["export.bundle"]):
        program, rest = [*program, rest[0]], rest[1:]
    if program == ["-m", "pytest"]:
        return
    text = help_of(tuple(program))
    if program[0] == "-m":
        assert f"usage: python -m {' '.join(program[1:])} " in " ".join(text.lower().split())
    options = [word.partition("=")[0] for word in rest if word.startswith("--")]
    assert [each for each in options if not re.search(rf"{each}(?![\w-])", text)] == []


def test_all_pages_of_the_documentation_are_read():
    assert set(DOCUMENTS) == {ROOT / "README.md", *DOCS.glob("*.md")}


def test_what_the_step_leaves_out_or_makes_smaller_is_on_a_page():
    commands = [command for page in DOCUMENTS for command in STEP.commands(page)]
    for start in STEP.NOT_RUN:
        assert any(STEP.why_not(each) == STEP.NOT_RUN[start] for each in commands), start
    assert [full for full, _ in STEP.SMALLER if not any(full in each for each in commands)] == []
    assert [each for each in STEP.BEFORE if not any(each in other for other in commands)] == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_every_command_of_a_page_has_an_environment(page):
    for command in STEP.commands(page):
        assert command.startswith((*STEP.SHELL, "from ", "import ")), command
    num_run = sum(
        STEP.why_not(each) is None and STEP.INSTALL.match(each) is None
        for each in STEP.commands(page)
    )
    assert sum(len(each.lines) for each in STEP.readme(page)) == num_run


def test_the_docs_list_the_architectures_there_are():
    text = " ".join((DOCS / "your-weights.md").read_text("utf-8").split())
    listed = re.search(r"`--model` is the architecture: (.*?)\. ", text)[1]
    assert re.split(r", | or ", listed) == list(MODELS)


def fitted_policy() -> Policy:
    """A policy of the bundled model; its numbers are made up."""
    text = (ROOT / "model_repository/drawings_image/config.pbtxt").read_text("utf-8")
    fingerprint = re.search(r'key: "fingerprint"\s+value \{\s+string_value: "\\"(\w+)', text)[1]
    calibration = Calibration(slope=30.0, intercept=-12.0)
    label = Label(name="pizza", review_threshold=0.5, calibration=calibration)
    return Policy(name="food", labels=(label,), model="drawings", fingerprint=fingerprint)


@pytest.fixture
def run_page(tmp_path, monkeypatch, capsys):
    """Run the snippets of a page one after another, as one session, and check what they print.

    Servers that a page names are in place; where it names none, the embedded one runs.
    """
    (tmp_path / "tests").mkdir()
    picture = (ROOT / "examples/images/rocket.png").read_bytes()
    (tmp_path / "tests/cat.jpg").write_bytes(picture)
    (tmp_path / "photo.png").write_bytes(picture)
    (tmp_path / "photos").mkdir()
    for name in ("bicycle.png", "pizza.png", "rocket.png"):
        (tmp_path / "photos" / name).write_bytes((ROOT / "examples/images" / name).read_bytes())
    (tmp_path / "policy.json").write_text(fitted_policy().to_json(), "utf-8")
    monkeypatch.chdir(tmp_path)

    def run(page: Path) -> dict[str, object]:
        kept = []
        names = {
            "kept": kept,
            "token": "t",
            "labels": ["cat", "dog"],
            "paths": ["photo.png", "nowhere.png"],
            "millions_of_paths": ["photo.png"] * 3,
            "index": type("Index", (), {"add": staticmethod(lambda *row: kept.append(row))}),
        }
        with FakeServer(model="shop-v3") as a, FakeServer(model="shop-v3") as b:
            for code, output in SNIPPET.findall(page.read_text("utf-8")):
                code = code.replace("triton-a:8001", a.url).replace("triton-b:8001", b.url)
                code = code.replace("/var/cache/clip_rt", str(tmp_path / "cache"))
                exec(compile(code, page.name, "exec"), names)
                printed = capsys.readouterr().out
                if output:
                    assert printed == output
            if isinstance(client := names.get("client"), clip_rt.Client):
                client.close()
        return names

    return run


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.name)
def test_the_snippets_of_a_page_run_as_printed(page, run_page):
    names = run_page(page)
    if page.name == "serving.md":
        assert [error.index for error in names["scores"].failures] == [1]
        assert sum(len(rows) for _, rows in names["kept"]) == 3


@pytest.mark.parametrize(
    ("page", "after"),
    [("evaluation.md", "## The bundled model\n"), ("moderation.md", "On drawings in styles that")],
)
def test_every_figure_of_the_bundled_model_is_in_a_result(page: str, after: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    figures = re.findall(r"\b0\.\d{3,}\b", text.partition(after)[2])
    results = "".join(path.read_text() for path in (ROOT / "benchmarks/results").glob("*.json"))
    known = {f"{float(number):.3f}" for number in re.findall(r"\d\.\d+(?:e-\d+)?", results)}
    assert len(figures) > 4
    assert not {figure for figure in figures if f"{float(figure):.3f}" not in known}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_benchmark_tables_are_those_of_their_results(page):
    paths = results_of(page)
    assert paths
    for path in paths:
        assert check(page, read_run(path), path), f"python -m benchmarks.report.readme {path}"


UNITS = {"": 1, "s": 1, "%": 0.01, "MiB": 2**20, "GiB": 2**30, "megapixels": 1e6}
DEFAULT = re.compile(r"^\| [^|]+ \| ([\d.]+) ?(\S*) \| `(clip_rt\.[\w.]+)` \|$", re.MULTILINE)
"""A row of a table of defaults: what, a number with its unit, a name in the code."""


def value_of(name: str) -> float:
    """The value of a constant, an attribute or an argument's default, by its dotted name."""
    found = clip_rt
    for each in name.split(".")[1:]:
        if inspect.ismodule(found) and not hasattr(found, each):
            found = importlib.import_module(f"{found.__name__}.{each}")
        elif isinstance(found, type) and not hasattr(found, each):
            found = inspect.signature(found).parameters[each].default
        else:
            found = getattr(found, each)
    return found


@pytest.mark.parametrize("page", ["reliability.md", "performance.md"])
def test_the_defaults_of_a_page_are_those_of_the_code(page):
    text = (DOCS / page).read_text("utf-8")
    rows = DEFAULT.findall(text)
    assert len(rows) == text.count("| `clip_rt.")
    for number, unit, name in rows:
        assert float(number) * UNITS[unit] == pytest.approx(value_of(name)), name


def test_every_default_of_retries_is_listed():
    text = (DOCS / "reliability.md").read_text("utf-8")
    for kind in (RetryBudget, RetryPolicy):
        for name in inspect.signature(kind).parameters:
            assert f"`clip_rt.requests.retries.{kind.__name__}.{name}`" in text


def test_every_error_has_its_section():
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    part = re.search(r"^## Errors\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]
    titles_and_bodies = re.split(r"^### (\w+)\n", part, flags=re.MULTILINE)[1:]
    sections = dict(zip(titles_and_bodies[::2], titles_and_bodies[1::2], strict=True))
    classes = {name: each for name, each in vars(errors).items() if inspect.isclass(each)}
    tree = {name: each for name, each in classes.items() if issubclass(each, errors.ClipRTError)}
    assert list(sections) == list(tree)
    for name, body in sections.items():
        if name not in ("ClipRTError", "ServerError"):
            assert "**Means**: " in body, name
            assert "**Do**: " in body, name
        if "__init__" in vars(tree[name]):
            own, inherited = (
                set(inspect.signature(each.__init__).parameters)
                for each in (tree[name], tree[name].__base__)
            )
            for attribute in own - inherited - {"message", "url", "may_be_one_item"}:
                assert f"`{attribute}`" in body, f"{name} carries {attribute}"


def test_the_reference_has_every_public_name():
    text = (DOCS / "reference.md").read_text("utf-8")
    shown = re.findall(r"^::: ([\w.]+)", text, re.MULTILINE)
    names = {name.rpartition(".")[2] for name in shown}
    left_out = {"MODELS", "telemetry", "testing", "__version__"}
    assert set(clip_rt.__all__) - names - left_out == set()
    for name in shown:
        assert value_of(name) is not None
