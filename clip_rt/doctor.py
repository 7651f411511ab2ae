"""Is everything there, and does it answer what it should? `python -m clip_rt doctor`.

Looks at this machine and at one or more servers, an embedded one where none is named, and prints a
line for each finding: ok, warn or fail, what was found, and the way out. Ends with 0 when nothing
fails, with 1 otherwise, by its deadline: fit for a readiness probe.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clip_rt import processor
from clip_rt._version import __version__
from clip_rt.deadline import Deadline
from clip_rt.embedded import runtime_choice
from clip_rt.embedded.memory import find_model_bytes
from clip_rt.errors import (
    ClipRTError,
    ServerError,
    ServerStartError,
    ServerTimeoutError,
    ServerUnavailableError,
)
from clip_rt.specs import image_model, text_model
from clip_rt.wire import canary

if TYPE_CHECKING:
    from clip_rt.client import Client
    from clip_rt.embedded.runtime_choice import Choice
    from clip_rt.processor import Processor
    from clip_rt.session import ServerKind
    from clip_rt.wire.transport import Transport

PYTHONS = ((3, 10), (3, 13))
"""First and last Python that this version is tested with."""
PACKAGES = ("numpy", "pillow", "tokenizers", "ftfy", "tritonclient", "grpcio")
SAFE_TRITON = (2, 71)
"""Of container 26.07, where the newest known vulnerability is fixed (CVE-2026-16497)."""
SECURITY_PAGE = "https://www.nvidia.com/en-us/security/"
SHARED_MEMORY_BYTES = 64 * 1024**2
"""Docker gives a container this much, and a server of several models needs more."""
EMBEDDED, IN_PROCESS = "embedded", "in process"
"""Names of what runs a repository here."""
NUM_CALLS = 5
"""Calls whose median is the latency."""

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    status: Status
    detail: str
    way_out: str = ""
    server: str = ""
    """Address of the server it is about; empty for this machine."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What was measured, for machines; names carry their units."""


def report(
    urls: Sequence[str],
    *,
    repository: Path | None,
    model: str | None,
    timeout_s: float,
    as_json: bool,
    server: ServerKind = "auto",
) -> int:
    """Examine, print each finding when it is made, or all as one JSON object.

    Returns:
        The exit code: 1 if anything fails, else 0.
    """
    findings = []
    write = sys.stdout.write
    for finding in examine(
        urls,
        repository=repository,
        model=model,
        server=server,
        deadline=Deadline.after(timeout_s),
    ):
        findings.append(finding)
        if not as_json:
            write(f"{_line(finding)}\n")
            sys.stdout.flush()
    is_well = all(finding.status != "fail" for finding in findings)
    if as_json:
        document = {"ok": is_well, "findings": [asdict(finding) for finding in findings]}
        write(json.dumps(document, indent=2) + "\n")
    return 0 if is_well else 1


def examine(
    urls: Sequence[str] = (),
    *,
    repository: Path | None = None,
    model: str | None = None,
    server: ServerKind = "auto",
    deadline: Deadline,
) -> Iterator[Finding]:
    """Examine this machine and the servers a client with these arguments would use.

    Args:
        urls: Addresses of running servers; no server is started when there is one.
        repository: Folder of models for an embedded server.
        model: Served name; the only one if None.
        server: What runs a repository, as for a client.
        deadline: For all of it.

    Yields:
        Findings as they are made. What depends on something that failed is left out.
    """
    yield _check_python()
    packages = _check_packages()
    yield packages
    if packages.status == "fail":
        return
    yield check_processor(processor.read())
    yield from _check_cache_folder()
    from clip_rt.session import choose_source, is_in_process

    try:
        source = choose_source(urls or None, repository, may_be_remote=server == "auto")
    except ClipRTError as error:
        check = "models" if isinstance(error, ServerStartError) else "server"
        yield Finding(check, "fail", str(error))
        return
    if isinstance(source, Path) and is_in_process(server):
        yield _check_runtimes()
        yield from _examine_server(source, model, deadline, name=IN_PROCESS)
        return
    if isinstance(source, Path):
        yield _check_shared_memory()
        parts = _check_parts()
        yield parts
        if parts.status == "ok":
            yield from _examine_server(source, model, deadline, name=EMBEDDED)
        return
    for index, url in enumerate(source):
        # One that hangs leaves time for the others.
        share_s = _remaining_s(deadline) / (len(source) - index)
        yield from _examine_server(url, model, Deadline.after(share_s), name=url)


def _line(finding: Finding) -> str:
    name = f"{finding.server} {finding.check}".strip()
    return f"{finding.status:<5} {name}: {finding.detail} {finding.way_out}".rstrip()


def _check_python() -> Finding:
    found = f"{platform.python_version()} on {sys.platform} {platform.machine()}"
    first, last = PYTHONS
    if not first <= sys.version_info[:2] <= last:
        wanted = " to ".join(".".join(map(str, version)) for version in PYTHONS)
        return Finding("python", "warn", found, f"clip_rt is tested with Python {wanted}.")
    return Finding("python", "ok", found)


def _check_packages() -> Finding:
    found, missing = [f"clip_rt {__version__}"], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding("packages", "fail", f"missing: {', '.join(missing)}.", "pip install clip-rt")
    return Finding("packages", "ok", ", ".join(found))


def check_processor(found: Processor) -> Finding:
    """Name the instruction sets that matter, what of them may be used, and what follows."""
    sets = ", ".join(processor.name_sets(found.flags)) or "no instruction set that we know"
    used = processor.name_sets(found.usable_flags)
    detail = f"{found.name} has {sets}"
    if found.caps:
        detail += f"; {', '.join(f'{name}={value[:40]}' for name, value in found.caps)}"
        detail += f" leaves {', '.join(used) or 'none'}"
    detail += f"; INT8 is {'fast' if found.has_fast_int8 else 'no faster than FP32'}"
    detail += f", BF16 training {'fast' if found.has_fast_bf16 else 'slow'}"
    numbers = {flag: float(flag in found.usable_flags) for flag in found.flags}
    numbers["int8_is_fast"] = float(found.has_fast_int8)
    numbers["bf16_is_fast"] = float(found.has_fast_bf16)
    if found.usable_flags != frozenset(found.flags):
        names = " and ".join(name for name, _ in found.caps)
        way_out = f"Unset {names} to use all of it."
        return Finding("processor", "warn", f"{detail}.", way_out, numbers=numbers)
    return Finding("processor", "ok", detail, numbers=numbers)


def check_precision(
    precision: str,
    found: Processor,
    measured: Mapping[str, Choice],
    *,
    name: str,
    is_here: bool,
) -> Finding:
    """Say whether the served precision is the fastest on this machine's processor.

    Args:
        precision: Of the manifest.
        found: This machine's.
        measured: By tower, what the embedded server measured of this model here.
        name: Of the server.
        is_here: Whether the server computes on this machine.
    """
    fastest = "int8" if found.has_fast_int8 else "fp32"
    detail = f"{precision} is served; by its processor this machine is fastest in {fastest}"
    if measured:
        times = "; ".join(f"{tower}: {choice}" for tower, choice in measured.items())
        detail += f"; measured, {times}"
    if not is_here:
        detail += "; that is about this machine, the server may be another"
    way_out = ""
    if precision == "int8" and fastest != "int8":
        lacking = found.lacks("AVX-512", "VNNI", "AMX")
        detail += f"; INT8 is slower than FP32 on a processor that {lacking}."
        way_out = "For machines like this: python -m export.onnx --precision fp32."
    elif precision == "fp16":
        detail += "; a processor computes FP16 in FP32 with roundings between."
        way_out = "For processors: python -m export.onnx --precision fp32, or int8."
    status: Status = "warn" if way_out and is_here else "ok"
    numbers = {
        f"{tower}_{runtime}_ms": ms
        for tower, choice in measured.items()
        for runtime, ms in choice.times_ms.items()
    }
    return Finding("precision", status, detail, way_out, name, numbers)


def _check_cache_folder() -> Iterator[Finding]:
    from clip_rt.client import CACHE_VARIABLE

    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        return
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        detail = f"{folder} cannot be written: {error.strerror}."
        way_out = f"Each process embeds its classes anew; change ${CACHE_VARIABLE}."
        yield Finding("cache folder", "warn", detail, way_out)
    else:
        yield Finding("cache folder", "ok", f"{folder} can be written")


def _check_shared_memory() -> Finding:
    try:
        free_bytes = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        detail = f"/dev/shm: {error.strerror}."
        return Finding("shared memory", "fail", detail, "Mount a tmpfs there.")
    detail = f"{free_bytes / 1024**2:.0f} MiB are free in /dev/shm"
    numbers = {"free_bytes": float(free_bytes)}
    if free_bytes < SHARED_MEMORY_BYTES:
        way_out = "Large batches may fail: docker run --shm-size=1g."
        return Finding("shared memory", "warn", f"{detail}.", way_out, numbers=numbers)
    return Finding("shared memory", "ok", detail, numbers=numbers)


def _check_parts() -> Finding:
    from clip_rt.embedded.installation import find_home

    try:
        find_home()
    except ServerStartError as error:
        return Finding("parts", "fail", str(error))
    version = importlib.metadata.version("nvidia-pytriton")
    return Finding("parts", "ok", f"nvidia-pytriton {version} and all else the server needs")


def _check_runtimes() -> Finding:
    found = [
        f"{shown} {importlib.metadata.version(name)}"
        for name, shown in runtime_choice.RUNTIMES.items()
        if runtime_choice.installed(name)
    ]
    if found:
        return Finding("parts", "ok", f"models run in this process, by {' or '.join(found)}")
    way_out = "pip install 'clip-rt[in-process]'"
    return Finding("parts", "fail", "neither OpenVINO nor ONNX Runtime is installed.", way_out)


def _examine_server(
    source: str | Path, model: str | None, deadline: Deadline, *, name: str
) -> Iterator[Finding]:
    """Examine the server at an address, or what runs a repository here, as far as it goes."""
    from clip_rt.wire.channel import is_loopback, parse_url

    is_here = isinstance(source, Path)
    check = "server"
    try:
        with contextlib.ExitStack() as stack:
            transport = _open_transport(source, deadline, stack, name=name)
            if name != IN_PROCESS:
                yield _check_version(transport, name, deadline)
            if isinstance(source, str):
                is_here = is_loopback(parse_url(source)[0])
                yield _check_encryption(source)
            check = "models"
            if transport.is_ready(timeout_s=_remaining_s(deadline)):
                yield Finding(check, "ok", "all are ready", server=name)
            else:
                way_out = "Wait, or read the server's log."
                yield Finding(check, "fail", "not all are ready.", way_out, name)
            check = "contract"
            client = stack.enter_context(_make_client(source, model, deadline, name=name))
            manifest = client.manifest
            detail = f"{manifest.model} is {manifest.architecture} in {manifest.precision}, "
            detail += f"weights {manifest.fingerprint[:12]}, {manifest.embedding_dim} dimensions"
            yield Finding(check, "ok", detail, server=name)
            check = "execution"
            names = image_model(manifest.model), text_model(manifest.model)
            towers = transport.describe(names, deadline)
            detail = "; ".join(f"{tower.name} by {tower.runs_on}" for tower in towers)
            yield Finding(check, "ok", detail, server=name)
            check = "precision"
            if all(" on CPU" in tower.runs_on for tower in towers):
                here = processor.read()
                times = _recall_times(here, names) if is_here else {}
                yield check_precision(manifest.precision, here, times, name=name, is_here=is_here)
            check = "canary"
            yield _check_canary(client, name, deadline)
            check = "latency"
            yield _check_latency(client, name, deadline)
            check = "memory"
            yield _check_memory(transport, names, name, deadline, is_here=is_here)
    except ClipRTError as error:
        is_unreached = isinstance(error, (ServerUnavailableError, ServerTimeoutError))
        way_out = "Is it running, and is this its gRPC port?" if is_unreached else ""
        yield Finding(check, "fail", " ".join(str(error).split()), way_out, name)


def _recall_times(here: Processor, names: Sequence[str]) -> dict[str, Choice]:
    """Return what the embedded server measured of these models on this machine."""
    machine = runtime_choice.digest_machine(asdict(here))
    known = runtime_choice.recall_all(runtime_choice.default_folder(), machine)
    return {name: known[name] for name in names if name in known}


def _open_transport(
    source: str | Path, deadline: Deadline, stack: contextlib.ExitStack, *, name: str
) -> Transport:
    """Open a connection to a server, starting it if it is to be our own."""
    from clip_rt.wire.transport import Transport

    if isinstance(source, str):
        transport = Transport(source)
    elif name == IN_PROCESS:
        from clip_rt.in_process import InProcessTransport

        transport = InProcessTransport(source)
    else:
        from clip_rt.embedded.server import acquire_server

        server = acquire_server(source, start_timeout_s=_remaining_s(deadline))
        stack.callback(server.stop)
        transport = Transport(server.url, headers=server.headers, may_cancel=False)
    return stack.enter_context(contextlib.closing(transport))


def _make_client(source: str | Path, model: str | None, deadline: Deadline, *, name: str) -> Client:
    from clip_rt.client import Client

    url, repository = (source, None) if isinstance(source, str) else (None, source)
    time_s = _remaining_s(deadline)
    return Client(
        url,
        repository=repository,
        model=model,
        server="in_process" if name == IN_PROCESS else "auto",
        timeout_s=time_s,
        start_timeout_s=time_s,
    )


def _remaining_s(deadline: Deadline) -> float:
    """Return the time left, and a moment in which to say that there is none."""
    return max(deadline.remaining_s(), 0.001)


def _check_version(transport: Transport, name: str, deadline: Deadline) -> Finding:
    from clip_rt.wire.channel import is_loopback, parse_url

    facts = transport.read_server(timeout_s=_remaining_s(deadline))
    version = re.match(r"(\d+)\.(\d+)", facts.version)
    detail = f"version {facts.version[:40]}"
    if version is None or tuple(map(int, version.groups())) >= SAFE_TRITON:
        return Finding("server", "ok", detail, server=name)
    detail += ", which has known vulnerabilities"
    minimum = ".".join(map(str, SAFE_TRITON))
    way_out = f"Run container 26.07 or newer (Triton {minimum}): {SECURITY_PAGE}"
    if is_loopback(parse_url(transport.url)[0]):
        way_out = f"It is for development on this machine. {way_out}"
        return Finding("server", "warn", f"{detail}.", way_out, name)
    return Finding("server", "fail", f"{detail} and listens beyond loopback.", way_out, name)


def _check_encryption(url: str) -> Finding:
    from clip_rt.wire.channel import is_loopback, parse_url

    target, is_secure = parse_url(url)
    if is_secure or is_loopback(target):
        return Finding("encryption", "ok", "TLS" if is_secure else "none, on loopback", server=url)
    way_out = "Use grpcs://, or a network nobody else is in."
    return Finding("encryption", "warn", "none: images and texts can be read.", way_out, url)


def _check_canary(client: Client, name: str, deadline: Deadline) -> Finding:
    expected = client.manifest.canary
    (image,) = client.encode_images(canary.draw_image(), timeout_s=_remaining_s(deadline))
    (text,) = client.encode_texts(canary.TEXT, truncate=True, timeout_s=_remaining_s(deadline))
    if expected is None:
        way_out = "Export it again, or python -m export.canary for one in ONNX."
        detail = "the model carries none, so its answers were compared with nothing."
        return Finding("canary", "warn", detail, way_out, name)
    cosines, min_cosine = canary.compare(expected, image=image, text=text)
    numbers = {f"{tower}_cosine": cosine for tower, cosine in cosines.items()}
    detail = " and ".join(f"{cosine:.6f} ({tower})" for tower, cosine in cosines.items())
    detail = f"cosine {detail} with the reference; at least {min_cosine:g} is due"
    if min(cosines.values()) >= min_cosine:
        return Finding("canary", "ok", detail, server=name, numbers=numbers)
    way_out = "Embeddings of this server are wrong: export the model again with this clip_rt."
    return Finding("canary", "fail", f"{detail}.", way_out, name, numbers)


def _check_latency(client: Client, name: str, deadline: Deadline) -> Finding:
    image = canary.draw_image()
    calls: dict[str, Callable[[], object]] = {
        "image": lambda: client.encode_images(image, timeout_s=_remaining_s(deadline)),
        "text": lambda: client.encode_texts(
            canary.TEXT, truncate=True, timeout_s=_remaining_s(deadline)
        ),
    }
    numbers = {}
    for what, call in calls.items():
        durations_s = []
        for _ in range(NUM_CALLS):
            start_s = time.perf_counter()
            call()
            durations_s.append(time.perf_counter() - start_s)
        numbers[f"{what}_ms"] = 1000 * statistics.median(durations_s)
    detail = ", ".join(f"one {what} {numbers[f'{what}_ms']:.1f} ms" for what in calls)
    detail += f" (median of {NUM_CALLS})"
    return Finding("latency", "ok", detail, server=name, numbers=numbers)


def _check_memory(
    transport: Transport, names: Sequence[str], name: str, deadline: Deadline, *, is_here: bool
) -> Finding:
    """Say what each tower holds, by the server or, of one on this machine, by its processes."""
    found: dict[str, int] = {}
    with contextlib.suppress(ServerError):  # Statistics may be restricted.
        counted = transport.read_statistics(names, deadline)
        found = {each: statistics.memory_bytes for each, statistics in counted.items()}
    if is_here and not any(found.values()):
        found = find_model_bytes(names)
    numbers = {f"{each}_bytes": float(num_bytes) for each, num_bytes in found.items() if num_bytes}
    if not numbers:
        return Finding("memory", "ok", "the server does not say what its models hold", server=name)
    detail = ", ".join(f"{each} {found[each] / 2**20:.0f} MiB" for each in names if found.get(each))
    return Finding("memory", "ok", detail, server=name, numbers=numbers)
