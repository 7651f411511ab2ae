"""What is not installed is named in one sentence, and help needs none of it."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip_rt_commands import extras

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = ("benchmarks", "export", "training")
LIGHT = {"ftfy", "google", "grpc", "numpy", "PIL", "tokenizers", "tritonclient", "tyro"}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "google": "tritonclient",
    "grpc": "tritonclient",
    "huggingface_hub": "huggingface-hub",
    "markupsafe": "jinja2",
    "onnx_ir": "onnx-ir",
    "openvino": "openvino",
    "resvg_py": "resvg-py",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "open_clip": "open-clip-torch",
}
"""Where a module's distribution has another name."""
OPTIONAL = {
    "export": {"modelopt", "nncf", "openvino", "tensorrt", "tensorrt_rtx"},
    "benchmarks": {
        *("sentencepiece", "tensorrt", "tensorrt_rtx"),
        # Engines that benchmarks.studies.vector_stores compares, where they are.
        *("duckdb", "faiss", "lancedb", "pyarrow", "sqlite_vec", "usearch"),
    },
    # Models of other libraries, which export.onnx takes.
    "training": {"timm", "transformers"},
}
"""Modules that an option needs, which says so itself, by the package that imports them."""
RUN_ELSEWHERE = tuple(
    f"export/python_{each}.py" for each in ("dlpack", "front", "model", "tokenizer_file")
)
"""Files that Triton's Python backend runs."""


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def third_party(package: str) -> dict[str, str]:
    """Modules of others that a package imports, each with a file that does."""
    found: dict[str, str] = {}
    for path in sorted((extras.ROOT / package).rglob("*.py")):
        name = str(path.relative_to(extras.ROOT))
        if name not in RUN_ELSEWHERE:
            found |= {module: name for module in imports_of(path)}
    known = {*sys.stdlib_module_names, *extras.OURS}
    return {module: name for module, name in found.items() if module not in known}


def declared(*names: str) -> set[str]:
    """Distributions that the client and some extras bring, spelled as in an index."""
    project = tomllib.loads((extras.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for name in filter(None, names):
        wanted += project["optional-dependencies"][name]
    return {re.match(r"[\w.-]+", each)[0].lower().replace("_", "-") for each in wanted}


@pytest.mark.parametrize("package", PACKAGES)
def test_an_extra_declares_whatever_its_commands_import(package):
    wanted = extras.EXTRAS[package].split(",")
    brought = declared(*wanted)
    missing = {
        module: file
        for module, file in third_party(package).items()
        if module not in OPTIONAL.get(package, set())
        and DISTRIBUTIONS.get(module, module).lower() not in brought
    }
    assert not missing, f"pyproject.toml: add these to {wanted}"


def test_help_does_without_every_module_that_is_not_light():
    imported = set().union(*map(third_party, PACKAGES))
    assert imported - LIGHT - {"triton_python_backend_utils", "dlpack"} <= extras.SLOW_MODULES


@pytest.mark.parametrize("names", sorted(set(extras.EXTRAS.values())))
def test_every_extra_that_a_sentence_names_exists(names):
    assert declared(*names.split(","))


@pytest.mark.parametrize(
    ("orig_argv", "argv", "name"),
    [
        (["python", "-m", "export.onnx", "-m"], ["-m", "-m"], "export.onnx"),
        (["python", "-u", "-m", "training.run"], ["-m"], "training.run"),
        (
            ["python", "benchmarks/run.py"],
            [str(extras.ROOT / "benchmarks/run.py")],
            "benchmarks.run",
        ),
        (["python", "-m", "pytest"], ["-m"], None),
        (["python", "-c", "import export"], ["-c"], None),
        (["python", "shop.py"], ["/srv/shop.py"], None),
        (["python", "tests/x.py"], [str(extras.ROOT / "tests/x.py")], None),
    ],
)
def test_a_command_is_told_from_a_program_that_imports_us(orig_argv, argv, name):
    assert extras.find_command(orig_argv, argv) == name


@pytest.fixture
def without(tmp_path):
    """Run Python where some modules cannot be found."""

    def run(modules: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "sitecustomize.py").write_text(
            "import sys\n"
            "class Gone:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.partition('.')[0] in {modules.split()!r}:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Gone())\n"
        )
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=extras.ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.mark.parametrize(
    ("gone", "command", "extra"),
    [
        ("onnx", ("-m", "export.onnx", "--model", "RN26@64px"), "export"),
        ("webdataset", ("-m", "export.compare", "a", "b"), "server,export"),
        ("rich", ("-m", "export.repository"), "export"),
        ("tyro", ("-m", "training.run", "--help"), "train"),
        ("tyro", ("benchmarks/run.py", "--list"), "server,export,int8,bench"),
        # Met while the command runs.
        ("skimage", ("-m", "benchmarks.studies.decoding"), "server,export,int8,train,bench"),
    ],
)
def test_what_is_missing_is_one_sentence(without, gone, command, extra):
    done = without(gone, *command)
    name = "benchmarks.run" if command[0] != "-m" else command[1]
    assert done.returncode == 1
    assert done.stderr == "error: " + extras.sentence(name, gone) + "\n"
    assert f"pip install 'clip-rt[{extra}]'" in done.stderr
    assert f"-e '.[{extra}]'" in done.stderr


def test_a_module_of_ours_that_is_missing_keeps_its_traceback(without):
    done = without("export", "-m", "benchmarks.studies.decoding")
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "export.bundle", "pack", "--help"),
        ("-m", "export.trt", "-h"),
        ("-m", "training.few_shot", "--help"),
        ("benchmarks/run.py", "--help"),
    ],
)
def test_help_needs_nothing_that_is_slow(without, command):
    done = without(" ".join(extras.SLOW_MODULES), *command)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert not done.stderr


def test_importing_a_package_changes_nothing_in_a_program_of_others(without):
    code = (
        "import sys; hook, finders = sys.excepthook, list(sys.meta_path)\n"
        "import benchmarks, export, training\n"
        "assert sys.excepthook is hook and sys.meta_path[:len(finders)] == finders"
    )
    done = without("nothing", "-c", code, "--help")
    assert done.returncode == 0, done.stderr
