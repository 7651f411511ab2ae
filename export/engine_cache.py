"""TensorRT engines for the GPU of this machine: built once, kept, and served from a link.

    python -m export.engine_cache --source models/clip.safetensors --cache /engines \
        --serve /served/models -- --model ViT-L/14 --weights models/clip.safetensors --name shop

What stands after `--` are options of export.trt, which builds the engines, compares them with torch
and publishes them; this adds --repository. An engine fits one TensorRT and one kind of GPU, so the
repository is kept under a key of these, of the SHA-256 of the sources and of the options: machines
of several kinds may share the folder. Where it is there already, nothing is built.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from clip_rt.errors import ExportError, InputError
from clip_rt_commands import program
from clip_rt_commands.errors import command
from export.store import sha256_of

BUILD = (sys.executable, "-m", "export.trt")
FACTS = "engines.json"
"""What the key of a repository was made of, beside it."""
_KEY_DIGITS = 32


@dataclass(frozen=True, kw_only=True)
class EngineCacheConfig:
    """Where engines are made of what, kept, and served."""

    source: tuple[Path, ...]
    """Files that the engines are made of: weights, or ONNX files."""
    cache: Path
    """Folder of all that were built; machines may share it."""
    serve: Path
    """Link that is made to the repository for this machine, for Triton."""

    def __post_init__(self) -> None:
        if missing := [str(each) for each in self.source if not each.is_file()]:
            raise InputError(f"there is no file {missing[0]}; --source names files.")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What an engine depends on beside its sources."""

    tensorrt: str
    """Version."""
    compute_capability: str
    """Such as 8.9."""
    gpu: str
    """Name, with the slice of it where MIG makes some."""


def find_machine() -> Machine:
    """Return what this machine has.

    Raises:
        ExportError: it lacks a GPU, or TensorRT.
    """
    # Here, because the key is of use where neither is.
    import torch

    try:
        tensorrt = importlib.import_module("tensorrt")
    except ImportError as error:
        raise ExportError(
            f"TensorRT cannot be imported: {error}. Run this in NVIDIA's container, "
            "nvcr.io/nvidia/tensorrt."
        ) from error
    if not torch.cuda.is_available():
        raise ExportError("this machine has no GPU that torch can use. Give the container one.")
    major, minor = torch.cuda.get_device_capability()
    return Machine(
        tensorrt=str(tensorrt.__version__),
        compute_capability=f"{major}.{minor}",
        gpu=torch.cuda.get_device_name(),
    )


def describe(
    sources: Mapping[str, str], machine: Machine, options: Sequence[str]
) -> dict[str, object]:
    """Return all that engines depend on.

    Args:
        sources: SHA-256 of each file, by its name; where it lies does not matter.
        machine: Which they are for.
        options: Of export.trt.
    """
    return {"sources": dict(sources), "options": list(options), **asdict(machine)}


def make_key(facts: Mapping[str, object]) -> str:
    """Return the name of a folder for engines: hex digits that change with any of the facts."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]


def prepare(
    config: EngineCacheConfig,
    machine: Machine,
    options: Sequence[str],
    *,
    build: Sequence[str] = BUILD,
) -> tuple[Path, bool]:
    """Make sure of the engines for a machine, and of the link that Triton is to serve.

    Returns:
        Their repository, and whether they were built now.

    Raises:
        ExportError: the build failed; nothing of it is kept, and the link is as it was.
    """
    if "--repository" in options:
        raise InputError("where engines are published is chosen here; name no repository after --.")
    sources = {each.name: sha256_of(each) for each in config.source}
    if len(sources) < len(config.source):
        raise InputError("two --source have one name; name files that are called differently.")
    facts = describe(sources, machine, options)
    folder = config.cache.resolve() / make_key(facts)
    is_new = not folder.is_dir()
    if is_new:
        _build(folder, facts, [*build, *options])
    _link(config.serve, folder / "models")
    return folder / "models", is_new


def _build(folder: Path, facts: Mapping[str, object], line: Sequence[str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        done = subprocess.run([*line, "--repository", str(staging / "models")], check=False)
        if done.returncode or not (staging / "models").is_dir():
            raise ExportError(
                f"no engines were built: {' '.join(line[:3])} ended with exit status "
                f"{done.returncode}. What it printed says why."
            )
        (staging / FACTS).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
        staging.chmod(0o755)
        try:
            os.rename(staging, folder)
        except OSError:
            # Another machine of this kind was faster; its engines are as good.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists() and not link.is_symlink():
        raise InputError(f"--serve {link} is there, and no link. Name another path, or remove it.")
    staged = link.with_name(f".{link.name}-{os.getpid()}")
    staged.unlink(missing_ok=True)
    staged.symlink_to(target)
    os.replace(staged, link)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    with command():
        config = tyro.cli(
            EngineCacheConfig,
            prog=program("export.engine_cache"),
            description=__doc__,
            args=given[:end],
        )
        repository, is_new = prepare(config, find_machine(), given[end + 1 :])
        what = "built" if is_new else "there already"
        sys.stdout.write(f"the engines are {what}: {config.serve} leads to {repository}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
