"""The same weights in every form that a contender reads, made once and kept.

What needs torch is made in processes of its own (`forms`, and the project's own commands), so that
it is never in the one that asks.

    KIT/checkpoint.safetensors      open_clip reads it, and so does the reference
    KIT/open_clip/                  a configuration, for architectures that open_clip does not know
    KIT/hub/                        in the layout of the hub: transformers, infinity
    KIT/repositories/FORM/          a model repository for each way to serve, of one model each
    KIT/photos/                     what INT8 is calibrated on
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Literal, cast, get_args

from clip_rt.embedded import runtime_choice
from clip_rt.errors import InputError
from clip_rt.inputs.prompts import fill, find_templates
from clip_rt.inputs.tokenizer import OpenAITokenizer, TextTokenizer
from clip_rt.inputs.tokenizer_file import FileTokenizer
from clip_rt.specs import (
    EncoderFacts,
    ModelSpec,
    Tower,
    find_spec,
    image_model,
    slug,
    text_model,
)
from clip_rt.wire.manifest import Manifest

ROOT = Path(__file__).parents[2]
Form = Literal["onnxruntime", "openvino", "int8", "tensorrt"]
"""What a model repository of the kit runs."""
Need = Literal["checkpoint", "hub", "onnxruntime", "openvino", "int8", "tensorrt"]
BASES: dict[Need, tuple[Need, ...]] = {
    "hub": ("checkpoint",),
    "openvino": ("onnxruntime",),
}
"""What is needed to make something."""
RANDOM = "random"
SERVED = "clip"
"""Name of the model in every repository."""
MAX_BATCH_SIZE = 64
NUM_PHOTOS = 160
SUBJECTS = (
    "an astronaut in front of a flag|a cat|cup of coffee|rocket on its launch pad|Golden Retriever|"
    "great white shark|the old town hall of a small city|12 red apples|snow|jazz|kitchen|violin|"
    "a child's drawing of two owls & a house|passenger car, coach, carriage|café at night|"
    "running shoes, size 42|steel arch bridge over a wide river|a man who repairs a bicycle|"
    "satellite image of a forest|yellow taxi cab"
).split("|")
"""Of captions, in prompts of all sorts: INT8 needs to see words and lengths of every kind."""
PACKAGES = ("nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "torch", "transformers")
SOURCES = (
    "clip_rt/specs.py clip_rt/wire/manifest.py clip_rt/inputs/tokenizer.py "
    "clip_rt/inputs/transform.py export training/model.py training/resnet.py training/weights "
    "benchmarks/photos.py benchmarks/contenders/forms.py benchmarks/contenders/kit.py"
).split()
"""Files and folders whose code decides what is in a kit."""
LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Kit:
    """Where the forms of a model are."""

    folder: Path
    spec: ModelSpec | None
    """None of a model of another library, of which there is the exported form only."""
    name: str = SERVED
    """Of the model in its repositories."""
    version: int = 1
    """That is served."""
    logit_scale: float = 1 / 0.07
    """Factor of the cosine; that of weights nobody trained."""
    logit_bias: float = 0.0
    manifest: Manifest | None = None
    """Of a model that is exported already."""
    tokenizer_file: bytes | None = None
    """Its tokenizer.json, where that is not OpenAI's."""
    missing: dict[Need, str] = field(default_factory=dict)
    """Why something that was asked for could not be made."""

    @property
    def architecture(self) -> ModelSpec:
        """What the model is made of, for those who build it themselves.

        Raises:
            InputError: it is another library's.
        """
        if self.spec is None:
            raise InputError(f"{self.facts.name} is none of clip_rt's own architectures.")
        return self.spec

    @property
    def facts(self) -> EncoderFacts:
        """How the model is fed."""
        if self.manifest is None:
            return self.architecture.facts
        manifest = self.manifest
        return EncoderFacts(
            name=manifest.architecture,
            side_px=manifest.side_px,
            embedding_dim=manifest.embedding_dim,
            context_length=manifest.context_length,
            activation=manifest.activation,
            mean=manifest.mean,
            std=manifest.std,
            resizing=manifest.resizing,
            tokenization=manifest.tokenization,
            score=manifest.score,
            is_any_length_exact=not manifest.text_buckets,
        )

    def make_tokenizer(self) -> TextTokenizer:
        """Return what makes ids of the model's texts."""
        facts = self.facts
        if self.tokenizer_file is None:
            return OpenAITokenizer(facts.context_length)
        return FileTokenizer(
            self.tokenizer_file, facts.tokenization, context_length=facts.context_length
        )

    @property
    def checkpoint(self) -> Path:
        """Weights under open_clip's names, which are OpenAI's."""
        return self.folder / "checkpoint.safetensors"

    @property
    def open_clip_config(self) -> Path:
        """open_clip's description of the architecture."""
        return self.folder / "open_clip" / "clip_rt_benchmark.json"

    @property
    def hub(self) -> Path:
        """Folder in the layout of the hub."""
        return self.folder / "hub"

    def repository(self, form: Form) -> Path:
        """Return the model repository of a way to serve."""
        return self.folder / "repositories" / form

    def tower(self, form: Form, tower: Tower, file: str = "model.onnx") -> Path:
        """Return a file of the version of a tower that is served."""
        name = image_model(self.name) if tower == "image" else text_model(self.name)
        return self.repository(form) / name / str(self.version) / file


def default_folder() -> Path:
    """Return where kits are kept.

    Raises:
        InputError: there is no home folder.
    """
    folder = runtime_choice.default_folder("benchmarks")
    if folder is None:
        raise InputError("there is no home folder to keep models in; name one with --cache.")
    return folder


def make_kit(
    model: str,
    weights: str,
    folder: Path,
    needs: Collection[Need],
    *,
    say: Callable[[str], None] = print,
) -> Kit:
    """Make what is needed and not there yet.

    Args:
        model: Architecture, a key of `clip_rt.specs.MODELS`.
        weights: "random", or what `export.onnx` takes.
        folder: Of all kits; this one gets a folder below it.
        needs: What the chosen contenders read.
        say: Told what is made.

    Returns:
        The kit. What could not be made is in `missing`, and everything else is there.

    Raises:
        InputError: the weights are a file or folder that is not there.
        UnknownModelError: there is no such architecture.
    """
    spec = find_spec(model)
    key = _key(model, weights)
    # One folder for the same weights, renewed when code or packages change, so that none pile up.
    place = hashlib.sha256(f"{model}\0{weights}".encode()).hexdigest()[:12]
    folder = folder.expanduser().absolute() / f"{slug(model)}-{place}"
    folder.mkdir(parents=True, exist_ok=True)
    kit = Kit(folder=folder, spec=spec)
    with _alone(folder):
        for need in _in_order(needs):
            if _is_made(folder, need, key):
                continue
            done = folder / f".{need}.done"
            done.unlink(missing_ok=True)
            if lacking := next((b for b in BASES.get(need, ()) if b in kit.missing), None):
                kit.missing[need] = f"it is made from {lacking}: {kit.missing[lacking]}"
                continue
            say(f"{model}: making {need}")
            try:
                _make(kit, need, model, weights)
                done.write_text(key, "utf-8")
            except FailedError as error:
                kit.missing[need] = str(error)
        return _read_facts(kit, key)


def _make(kit: Kit, need: Need, model: str, weights: str) -> None:
    """Make one thing, from nothing.

    Raises:
        FailedError: a command failed.
    """
    common = ["--model", model, "--weights", weights]
    if need in ("checkpoint", "hub"):
        run_module(["benchmarks.contenders.forms", need, "--folder", str(kit.folder), *common])
        return
    repository = kit.repository(cast(Form, need))
    shutil.rmtree(repository, ignore_errors=True)
    published = ["--repository", str(repository), "--name", kit.name]
    if need == "openvino":
        copy_models(kit.repository("onnxruntime"), repository)
        run_module(["export.repository", *published, "--runtime", "openvino"])
        return
    common += [*published, "--max-batch-size", str(MAX_BATCH_SIZE)]
    common += ["--cache", str(kit.folder.parent / "store")]
    if need == "onnxruntime":
        # Named, because left to itself the server takes OpenVINO.
        run_module(["export.onnx", *common, "--runtime", "onnxruntime"])
    elif need == "int8":
        table = str(_write_photos(kit.folder / "photos"))
        common += ["--precision", "int8", "--calibration", table]
        # The command insists; what INT8 costs such weights is measured elsewhere.
        common += [] if weights == RANDOM else ["--samples", table]
        run_module(["export.onnx", *common])
    else:
        run_module(["export.trt", *common])


def _read_facts(kit: Kit, key: str) -> Kit:
    """Return the kit with its temperature, after making sure that all of it has the same weights.

    Args:
        kit: What is there.
        key: Of what is up to date.

    Raises:
        InputError: it has not.
    """
    # Only here: every contender's process imports this module, and is measured.
    from export.triton_config import read_manifest

    manifests = {
        form: read_manifest(kit.repository(form) / image_model(kit.name))
        for form in get_args(Form)
        if _is_made(kit.folder, form, key)
    }
    fingerprints = {form: manifest.fingerprint for form, manifest in manifests.items()}
    facts = kit.folder / "checkpoint.json"
    if _is_made(kit.folder, "checkpoint", key):
        fingerprints["checkpoint"] = json.loads(facts.read_text("utf-8"))["fingerprint"]
    if len(set(fingerprints.values())) > 1:
        raise InputError(f"{kit.folder} mixes weights: {fingerprints}. Remove the folder.")
    for manifest in manifests.values():
        return replace(kit, logit_scale=manifest.logit_scale, logit_bias=manifest.logit_bias)
    return kit


def _is_made(folder: Path, need: Need, key: str) -> bool:
    done = folder / f".{need}.done"
    return done.exists() and done.read_text("utf-8") == key


class FailedError(Exception):
    """A command failed; the message is its last lines."""


def run_module(arguments: list[str]) -> None:
    """Run a module of this project.

    Raises:
        FailedError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
        raise FailedError(f"{arguments[0]} failed: " + "\n".join(lines[-LAST_LINES:]))


def _write_photos(folder: Path) -> Path:
    """Write pictures with captions, what INT8 is calibrated on; return their table."""
    from benchmarks import photos  # Only here: it loads scikit-image.

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table, templates = folder / "photos.csv", ("{}", "{}.", *find_templates("openai_imagenet"))
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "caption"))
        for index in range(NUM_PHOTOS):
            image = f"{index:03}.jpg"
            # Not the same ones as are measured, which begin at 0.
            (folder / image).write_bytes(photos.jpeg(photos.SMALL_PX, 10_000 + index))
            template = templates[index % len(templates)]
            rows.writerow((image, fill(template, SUBJECTS[index % len(SUBJECTS)])))
    return table


def copy_models(source: Path, target: Path) -> None:
    """Copy a repository or a model of one.

    Weights are linked, since nothing writes into them; across file systems all is copied.
    """

    def copy(path: str, to: str) -> None:
        if Path(path).name.startswith("model.onnx"):
            with suppress(OSError):
                os.link(path, to)
                return
        shutil.copy2(path, to)

    shutil.copytree(source, target, copy_function=copy)


def _in_order(needs: Collection[Need]) -> list[Need]:
    """Return the needs and what they are made from, each after that."""
    ordered: dict[Need, None] = {}
    for need in get_args(Need):
        if need in needs:
            ordered.update(dict.fromkeys((*BASES.get(need, ()), need)))
    return list(ordered)


def _key(model: str, weights: str) -> str:
    """Return a hash of all that decides what is in a kit."""
    digest = hashlib.sha256(f"{model}\0{weights}\0".encode())
    path = Path(weights)
    if weights != RANDOM and path.exists():
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            facts = file.stat()
            digest.update(f"{file.absolute()} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    elif path.suffix:
        raise InputError(f"there are no weights at {weights[:200]!r}.")
    for package in PACKAGES:
        try:
            digest.update(f"{package} {metadata.version(package)}\n".encode())
        except metadata.PackageNotFoundError:
            continue
    for source in SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other run works on this kit."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
