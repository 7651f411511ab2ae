"""What one version of a tower consists of, in its numbered folder.

config.pbtxt                     how this version is served, to go back to
parity.json                      what the gate measured
model.onnx, model.onnx.data      or model.xml and model.bin, or model.plan,
model-<cc>.plan                  or an engine for each compute capability
model.py, dlpack.py,             what Triton's python backend runs; copies of this package's
processor.py, runtime_choice.py, and of clip_rt's
runtimes.py
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from google.protobuf import text_format

from clip_rt import processor
from clip_rt.embedded import runtime_choice, runtimes
from clip_rt.errors import InputError
from clip_rt.specs import TOKENIZER_FILE
from export.ensembles import PYTHON_DLPACK
from export.storage import external_files
from export.triton_config import Backend, ModelConfig

CONFIG, REPORT = "config.pbtxt", "parity.json"
MODEL_FILE: dict[Backend, tuple[str, ...]] = {
    "python": ("model.onnx", "model.xml"),
    "onnxruntime": ("model.onnx",),
    "tensorrt": ("model.plan",),
}
"""What each backend can run, by its file's name."""
PYTHON_MODEL = Path(__file__).with_name("python_model.py")
PYTHON_TOKENIZER_FILE = Path(__file__).with_name("python_tokenizer_file.py")
PYTHON_FILES = {
    "model.py": PYTHON_MODEL,
    "dlpack.py": PYTHON_DLPACK,
    "processor.py": Path(processor.__file__),
    "runtime_choice.py": Path(runtime_choice.__file__),
    "runtimes.py": Path(runtimes.__file__),
}
"""What the python backend runs, by its name in the version folder; copied there verbatim."""


def name_files(
    file: Path | Mapping[str, Path], backend: Backend, compute_capability: str | None = None
) -> dict[str, Path]:
    """Return what belongs into a version's folder, by its name there; of names, what they are.

    Raises:
        InputError: the weights lie beside `file`, which is not called what it would be there.
    """
    if isinstance(file, Mapping):
        return dict(file)
    first, *others = MODEL_FILE[backend]
    name = next((each for each in others if Path(each).suffix == file.suffix), first)
    if compute_capability is not None:
        name = f"model-{compute_capability}.plan"
    weights: list[Path] = []
    if file.suffix == ".xml":
        weights = [file.with_suffix(".bin")]
    elif name.endswith(".onnx"):
        weights = external_files(file)
    if weights and file.name != name:
        raise InputError(f"{file} keeps its weights beside it, so it must be called {name}.")
    return {name: file} | {each.name: each for each in weights}


def list_weights(folder: Path) -> list[Path]:
    """Return the files in a version's folder that hold its model.

    Raises:
        InputError: there are none, or see `storage.external_files`.
    """
    found = sorted(each for each in folder.glob("model*.plan") if each.is_file())
    if (folder / "model.onnx").is_file():
        found += [folder / "model.onnx", *external_files(folder / "model.onnx")]
    if (folder / "model.xml").is_file():
        found += [folder / "model.xml", folder / "model.bin"]
    lacking = next((each for each in found if not each.is_file()), None)
    if not found or lacking is not None:
        raise InputError(f"{folder} lacks {lacking.name if lacking else 'a model'}.")
    return found


def find_engines(names: Iterable[str]) -> dict[str, str]:
    """Find the engines of single kinds of GPU among files; their names by compute capability."""
    found = {name: re.fullmatch(r"model-(\d+\.\d+)\.plan", name) for name in names}
    return {match[1]: name for name, match in found.items() if match}


def write_version(
    folder: Path,
    version: int,
    config: ModelConfig,
    files: Mapping[str, Path],
    report: Mapping[str, object] | None,
    *,
    programs: Mapping[str, Path] | None = None,
) -> None:
    """Write a model's folder with one version in it.

    Args:
        folder: Of the model.
        version: Its number.
        config: How it is served.
        files: Of the model, by their names there.
        report: What the gate measured.
        programs: What the python backend runs, by its name there; None is what serves a tower.
    """
    inside = folder / str(version)
    inside.mkdir(parents=True)
    text = text_format.MessageToString(config, as_utf8=True)
    # The version has one of its own, to go back to.
    for path in (folder / CONFIG, inside / CONFIG):
        path.write_text(text, "utf-8")
    if report is not None:
        (inside / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    for name, source in files.items():
        shutil.copyfile(source, inside / name)
    if config.backend == "python":
        copy_python_model(inside, programs)


def write_tokenizer_version(
    folder: Path, version: int, config: ModelConfig, content: bytes
) -> None:
    """Write the folder of a model that hands out a tokenizer.json, with one version in it."""
    programs = {"model.py": PYTHON_TOKENIZER_FILE, "dlpack.py": PYTHON_DLPACK}
    write_version(folder, version, config, {}, None, programs=programs)
    (folder / str(version) / TOKENIZER_FILE).write_bytes(content)


def copy_python_model(folder: Path, programs: Mapping[str, Path] | None = None) -> None:
    """Put what the python backend runs into a version's folder."""
    for name, source in (programs or PYTHON_FILES).items():
        shutil.copyfile(source, folder / name)
