"""Who takes part in a benchmark: names, how each is made, and why one is absent.

    kit = make_kit("ViT-B/32", "random", default_folder(), find_needs(names, spec))
    with start("openvino int8", kit) as contender:
        contender.load("one", "pixels", pixels)
        contender.time("one", 10)

Nothing is imported of a contender until its own process does it.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import findings
from benchmarks.contenders import process
from benchmarks.contenders.implementation import Order, UnfitError
from benchmarks.contenders.kit import Form, Kit, Need
from benchmarks.contenders.process import ContenderError, ContenderProcess
from clip_rt.specs import ModelSpec, ViTSpec


@dataclass(frozen=True)
class Entry:
    """A contender that could take part."""

    name: str
    what: str
    kind: findings.Kind
    module: str
    """With a function `make(kit, **options)` that returns an Implementation."""
    needs: tuple[Need, ...]
    options: dict[str, Any] = field(default_factory=dict)
    """Of its module's `make`."""
    imports: tuple[str, ...] = ()
    """Packages without which it is absent."""
    precision: findings.Precision = "fp32"

    @property
    def facts(self) -> findings.Contender:
        """What a report says about it."""
        return findings.Contender(
            name=self.name, what=self.what, kind=self.kind, precision=self.precision
        )


class AbsentError(Exception):
    """A contender does not take part; `contender` says so in a report."""

    def __init__(self, contender: findings.Contender) -> None:
        super().__init__(f"{contender.name}: {contender.absent}")
        self.contender = contender


def _runtime(name: str, what: str, form: Form, engine: str, precision: findings.Precision) -> Entry:
    options = {"form": form, "is_openvino": engine == "openvino"}
    what = f"{what}, called directly"
    return Entry(
        name, what, "runtime", f"{__name__}.runtimes", (form,), options, (engine,), precision
    )


def _served(form: Form, what: str, engine: str, precision: findings.Precision = "fp32") -> Entry:
    what = f"clip_rt.Client over the embedded Triton: the whole stack, on {what}"
    imports = ("pytriton", engine)
    name, options = f"triton {form}", {"form": form}
    return Entry(name, what, "served", f"{__name__}.triton", (form,), options, imports, precision)


def _gateway(form: Form, what: str, precision: findings.Precision) -> Entry:
    what = f"clip-rt gateway: OpenAI's embeddings over HTTP on loopback, on {what}"
    imports = ("pytriton", "openvino", "starlette", "uvicorn")
    name, options = f"gateway {form}", {"form": form}
    module = f"{__name__}.gateway"
    return Entry(name, what, "gateway", module, (form,), options, imports, precision)


def _torch_based(name: str, what: str, need: Need) -> Entry:
    what = f"{what}, eager torch in FP32"
    return Entry(name, what, "peer", f"{__name__}.torch_based", (need,), {"package": name}, (name,))


_ENTRIES = (
    _runtime(
        "onnxruntime",
        "ONNX Runtime with clip_rt's preprocessing and tokenizer",
        "onnxruntime",
        "onnxruntime",
        "fp32",
    ),
    _runtime(
        "openvino",
        "OpenVINO on the same ONNX files, told to compute in FP32",
        "onnxruntime",
        "openvino",
        "fp32",
    ),
    _runtime("openvino int8", "OpenVINO on the INT8 model", "int8", "openvino", "int8"),
    _served("onnxruntime", "ONNX Runtime", "onnxruntime"),
    _served("openvino", "OpenVINO in FP32", "openvino"),
    _served("int8", "OpenVINO in INT8", "openvino", "int8"),
    _gateway("openvino", "OpenVINO in FP32", "fp32"),
    _gateway("int8", "OpenVINO in INT8", "int8"),
    _runtime("tensorrt", "TensorRT FP16 engines on this GPU", "tensorrt", "tensorrt", "fp16"),
    _torch_based("open_clip", "open_clip with its own transform and tokenizer", "checkpoint"),
    _torch_based("transformers", "transformers' CLIPModel and CLIPProcessor", "hub"),
    Entry(
        "infinity",
        "infinity's server over HTTP on loopback, torch in FP32; cuts texts to 20 tokens",
        "peer",
        f"{__name__}.infinity",
        ("hub",),
        imports=("httpx", "transformers"),
    ),
)
NAMES = tuple(entry.name for entry in _ENTRIES)
"""All but the remote ones."""
OF_A_REPOSITORY = ("onnxruntime", "openvino", "triton onnxruntime", "triton openvino")
"""Who can run a model that is exported already: its ONNX files are all there is."""
REMOTE = "triton "
"""What the name of a remote Triton begins with, before its URL."""
REFERENCE = Entry(
    "torch",
    "the project's own model in FP32 torch, what answers are held against",
    "runtime",
    f"{__name__}.torch_based",
    ("checkpoint",),
    {"package": "clip_rt"},
)


def is_remote(name: str) -> bool:
    """Return whether a name is "triton URL"."""
    return name.startswith(REMOTE) and ":" in name


def find(name: str) -> Entry:
    """Return the contender of a name, one of `NAMES` or "triton URL".

    Raises:
        KeyError: there is none; names those there are.
    """
    for entry in (*_ENTRIES, REFERENCE):
        if entry.name == name:
            return entry
    if is_remote(name):
        url = name.removeprefix(REMOTE)
        what = f"clip_rt.Client over the Triton at {url}"
        return Entry(name, what, "served", f"{__name__}.triton", (), {"url": url})
    raise KeyError(f"no contender is called {name[:80]!r}; known are {', '.join(NAMES)}.")


def why_absent(name: str, spec: ModelSpec | None, *, infinity: Path | None = None) -> str | None:
    """Return why a contender cannot take part, as far as that is seen without starting it.

    Args:
        name: Of the contender.
        spec: Of the model; None of one of another library.
        infinity: Executable or environment of infinity; see `infinity.find_executable`.
    """
    entry = find(name)
    for package in entry.imports:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if name == "tensorrt" and not _has_gpu():
        return "there is no NVIDIA GPU"
    if spec is None and name not in OF_A_REPOSITORY and not is_remote(name):
        return "a model of another library is there in its exported form only"
    if name in ("transformers", "infinity") and not isinstance(spec and spec.image, ViTSpec):
        return f"transformers has no CLIPModel like {spec and spec.name}"
    if name == "infinity":
        from benchmarks.contenders.infinity import VARIABLE, find_executable

        if find_executable(infinity) is None:
            return f"infinity_emb is not installed, nor named by ${VARIABLE}"
    return None


def find_needs(
    names: Collection[str], spec: ModelSpec, *, infinity: Path | None = None
) -> tuple[Need, ...]:
    """Return what must be made for those contenders that can take part, and the reference."""
    present = [find(name) for name in names if why_absent(name, spec, infinity=infinity) is None]
    needs = [need for entry in (*present, REFERENCE) for need in entry.needs]
    return tuple(dict.fromkeys(needs))


def start(
    name: str,
    kit: Kit,
    *,
    infinity: Path | None = None,
    model: str | None = None,
    start_limit_s: float = process.START_LIMIT_S,
    call_limit_s: float = process.CALL_LIMIT_S,
) -> ContenderProcess:
    """Start a contender in a process of its own, and wait until it has answered once.

    Args:
        name: One of `NAMES`, or "triton URL".
        kit: The forms of the model; `kit.make_kit` of `find_needs`.
        infinity: As for `why_absent`.
        model: Name of the model on a remote Triton, where it has several.
        start_limit_s: Longest wait for it.
        call_limit_s: Longest wait for any of its answers.

    Raises:
        AbsentError: it cannot take part, or did not start; says why.
    """
    entry = find(name)

    def absent(reason: str) -> AbsentError:
        return AbsentError(replace(entry.facts, absent=reason))

    if reason := why_absent(name, kit.spec, infinity=infinity):
        raise absent(reason)
    for need in entry.needs:
        if need in kit.missing:
            raise absent(kit.missing[need])
    options = dict(entry.options)
    if name == "infinity":
        options["executable"] = infinity
    if "url" in options:
        options["model"] = model
    order = Order(module=entry.module, kit=kit, options=options)
    try:
        return ContenderProcess(
            entry.facts, order, start_limit_s=start_limit_s, call_limit_s=call_limit_s
        )
    except (UnfitError, ContenderError) as error:
        raise absent(str(error)) from error


def _has_gpu() -> bool:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, timeout=30.0, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and b"GPU" in found.stdout
