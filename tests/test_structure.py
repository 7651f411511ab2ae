"""What ARCHITECTURE.md, README.md and docs/ say about the code, held against the code."""

import ast
import re
import sys
from pathlib import Path

import pytest

import clip_rt
from export.version_folder import PYTHON_FILES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["clip_rt", "training", "export", "benchmarks"]
"""In import order: each may import those before it."""
HEAVY = {"torch", "onnx", "onnxruntime", "tensorrt", "matplotlib"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The top-level names a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    later = set(PACKAGES[PACKAGES.index(package) + 1 :])
    for path in modules(package):
        assert not imported(path) & later, path


def test_the_client_imports_nothing_heavy() -> None:
    for path in modules("clip_rt"):
        # What runs models imports a runtime when it loads one; what draws is an extra of its own.
        if path.name not in ("runtimes.py", "plots.py"):
            assert not imported(path) & HEAVY, path


def test_one_package_speaks_to_triton_and_one_as_triton() -> None:
    speakers = {
        str(path.relative_to(ROOT / "clip_rt"))
        for path in modules("clip_rt")
        if "tritonclient" in imported(path)
    }
    assert speakers == {
        "in_process.py",
        "testing/fake_server.py",
        "testing/faults.py",
        "wire/messages.py",
        "wire/model_config.py",
        "wire/transport.py",
    }


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name
)
def test_every_path_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    names = re.findall(r"`((?:clip_rt|training|export|tests|examples)/[\w./-]+)`", text)
    assert links or names or page.name in ("CHANGELOG.md", "SECURITY.md")
    paths = {*(page.parent / link for link in links), *(ROOT / name for name in names)}
    for path in paths:
        assert path.exists(), f"{page.name} names {path}"


def test_architecture_knows_every_module_of_the_client() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for path in modules("clip_rt"):
        if path.name != "__init__.py":
            assert str(path.relative_to(ROOT)) in text, path


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_bundled_model_runs_what_an_export_would_write(tower: str) -> None:
    folder = ROOT / f"model_repository/drawings_{tower}/1"
    for name, source in PYTHON_FILES.items():
        assert (folder / name).read_bytes() == source.read_bytes()
    assert {path.name for path in folder.glob("*.py")} == set(PYTHON_FILES)


@pytest.mark.parametrize("name", ["processor.py", "embedded/runtime_choice.py"])
def test_what_is_copied_into_a_server_imports_the_standard_library_only(name: str) -> None:
    assert imported(ROOT / "clip_rt" / name) <= sys.stdlib_module_names


def test_what_runs_a_model_beside_a_server_imports_what_is_copied_with_it() -> None:
    known = {"clip_rt", "numpy", "onnxruntime", "openvino", "processor", "runtime_choice"}
    found = imported(ROOT / "clip_rt/embedded/runtimes.py") - sys.stdlib_module_names
    assert found <= known


def test_every_page_names_the_version_of_the_wheel() -> None:
    version = clip_rt.__version__
    assert f"Version {version}." in (ROOT / "README.md").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d$", changes, re.MULTILINE)
    assert released[0] == version
