"""For each extra, alone and as the pages combine them: a fresh environment, and what it promises.

    make extras                                             # all
    python .ci/extras.py export                             # environments by their extras
    python .ci/extras.py export --without webdataset        # has to fail: this step notices
    python .ci/extras.py --readme                           # commands of README and docs/ only
    python .ci/extras.py --wheels                           # what wheels install only

The commands of README and docs/ run as printed, in order, each in an environment of the `pip
install` above it on its page and in a copy of the checkout; see `pages`. In another copy, at the
same time, run commands that no page shows. A third is built into wheels, and what they install runs
in a folder outside of any checkout. For systems that are not at hand, what they would install is
looked up. uv makes an environment in seconds; without it pip does.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]

from pages import BEFORE, FILE, Environment, documents, environments, readme  # noqa: E402 - by the line above

from clip_rt_commands.extras import extras_of  # noqa: E402

FIXTURES = """
import itertools, pathlib, tarfile
from PIL import Image
rows = []
for label, colour in (("shoe", "red"), ("hat", "blue")):
    for folder, number in itertools.product(("photos", "val"), range(12)):
        path = pathlib.Path(folder, label, f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (72, 64), colour)
        image.paste((9 * number, 200, 20 * number), (number, number, 40, 40))
        image.save(path)
        if folder == "photos":
            rows.append(f"{path},{label}")
table = "\\n".join(["image,label", *rows]) + "\\n"
for name in ("photos.csv", "products.csv"):
    pathlib.Path(name).write_text(table)
Image.new("RGB", (64, 64), "red").save("photo.jpg")
pathlib.Path("tests").mkdir(exist_ok=True)
Image.new("RGB", (64, 64), "red").save("tests/cat.jpg")
pathlib.Path("shards").mkdir()
for number in range(100):
    with tarfile.open(f"shards/{number:03d}.tar", "w") as tar:
        for index in range(2):
            tar.add(f"photos/shoe/{index}.png", f"{number}_{index}.png")
            text = pathlib.Path("caption.txt")
            text.write_text("a red shoe")
            tar.add(text, f"{number}_{index}.txt")
"""
"""The user's own files that pages speak of, small."""

WEIGHTS = """
import pathlib, torch
from clip_rt.specs import find_spec
from training.checkpoint import save_checkpoint
from training.model import CLIP
torch.manual_seed(0)
model = CLIP(find_spec("RN26@64px"))
file = pathlib.Path("clip.safetensors")
save_checkpoint(file, model.state_dict(), model.facts, step=0, config={})
"""


FAKE_CALL = """python -c "
import clip_rt.testing
with clip_rt.testing.FakeServer(model='m') as server, clip_rt.Client(server.url) as client:
    print(client.encode_texts('a').shape)
" """
COUNTED_CALL = """python -c "
import clip_rt.testing, opentelemetry.trace, prometheus_client
clip_rt.telemetry.enable_prometheus()
with clip_rt.testing.FakeServer(model='m') as server, clip_rt.Client(server.url) as client:
    client.encode_texts('a')
print(prometheus_client.generate_latest().decode())
" | grep clip_rt"""
EXPORT = "python -m export.onnx --model RN26@64px --weights random --name tiny --cache cache"
EXPORT_ON_SAMPLES = f"{EXPORT} --samples photos photos.csv shards/000.tar"
TRAIN = (
    "python -m training.run --model RN26@64px --data 'shards/{000..003}.tar' --batch-size 4 "
    "--total-steps 1 --out-dir runs/a --tensorboard"
)
INTERPOLATE = (
    "python -m training.interpolate --zero-shot clip.safetensors "
    "--fine-tuned runs/a/checkpoint.safetensors --out mixed.safetensors"
)
REHEARSE = "python -m benchmarks.gpu --rehearse --stage device --stage parity --out rehearsal"
EMPTY_HANDED = '! python {0} 2> said && grep -F ".[{1}]" said'
"""Where nothing is installed but the client."""

MORE = (
    Environment(
        "",
        [
            "python -m clip_rt doctor --help && python -m clip_rt serve --help",
            "clip-rt --help && clip-rt export onnx --help && clip-rt train --help",
            "clip-rt models | grep drawings",
            FAKE_CALL,
            *(
                EMPTY_HANDED.format(command, extras_of(command.split()[-1]))
                for command in ("-m export.onnx", "-m training.run", "-m benchmarks.run")
            ),
        ],
    ),
    Environment("server", ["python -m clip_rt doctor --repository model_repository"]),
    Environment("server,quickstart", ["python -c 'import examples.quickstart'"]),
    Environment("telemetry", [COUNTED_CALL]),
    Environment("export", [EXPORT_ON_SAMPLES, "python -m export.canary --name tiny", REHEARSE]),
    Environment("train", [TRAIN, "python -m training.curves runs/a", INTERPOLATE]),
    Environment("train,bench,peers"),
    Environment("export,bench,peers"),
    Environment("bench"),
    Environment("server,export,int8,train,bench"),
)
"""What no page shows, and extras by themselves."""

WHEEL_LIMIT_BYTES = 3_000_000
IN_WHEEL = (
    "clip_rt/__init__.py",
    "clip_rt/py.typed",
    "clip_rt/moderation/starters/weapons.json",
    "clip_rt/ui/static/index.html",
    "clip_rt/ui/static/main.js",
    "clip_rt_commands/console.py",
    "clip_rt_commands.pth",
    "export/onnx.py",
    "training/run.py",
)
NOT_IN_WHEEL = ("training/sample", "model_repository", "benchmarks", "examples", "tests", "docs")

TWELVE_LINES = "twelve_lines"
"""README's first example, and what it prints, in the folder outside of any checkout."""
THEIRS = (
    "mkdir -p theirs/training theirs/export && cd theirs && "
    "for each in training/__init__ training/run export/__init__ clip_rt; do "
    "echo 'raise SystemExit(1)' > $each.py; done; "
)
"""A folder of the user's own, in which they call things as we do."""
EXPORT_TINY = "--model RN26@64px --weights random --name tiny --repository"
ASK_TINY = """python -c "
import clip_rt
with clip_rt.Client(repository='{0}', model='tiny') as client:
    print(client.encode_texts(['a red shoe']).shape)
" | grep -F '(1, 256)'"""
INSTALLED = """python -c "
import sys, clip_rt, export, training
for each in (clip_rt, export, training):
    assert each.__file__.startswith(sys.prefix), each
" """
GATEWAY = """
clip-rt gateway --server in_process --port 0 > ready & pid=$!; trap 'kill $pid; wait $pid' EXIT
for _ in $(seq 60); do sleep 1; grep -q serving ready && break; done
python -c "
import json, urllib.request as http
url = open('ready').read().split()[-1]
body = json.dumps({'input': ['a red apple']}).encode()
request = http.Request(url + '/v1/embeddings', body, {'Content-Type': 'application/json'})
print(len(json.load(http.urlopen(request))['data'][0]['embedding']))
print(http.urlopen(url + '/health/ready').status)
" | tr '\\n' ' ' | grep -F '256 200'
"""
"""What deploy/Dockerfile does once it is installed, as it installs it."""
PAGE = """
clip-rt ui --server in_process --port 0 > ready & pid=$!; trap 'kill $pid; wait $pid' EXIT
for _ in $(seq 60); do sleep 1; grep -q serving ready && break; done
python -c "
import urllib.request as http
url = open('ready').read().split()[-1]
for path in ('/', '/ui/static/main.js', '/ui/settings', '/ui/index'):
    print(http.urlopen(url + path).status)
" | tr '\\n' ' ' | grep -F '200 200 200 200'
"""
"""The page is in the wheel, and needs no index."""
FROM_WHEELS = (
    # Without a server the first example runs in process by itself.
    Environment(
        "gateway,in-process",
        [f"python {TWELVE_LINES}.py | diff - {TWELVE_LINES}.txt", GATEWAY.strip(), PAGE.strip()],
    ),
    # As printed, in an empty folder.
    Environment(
        "in-process,commands",
        [line for each in readme(ROOT / "docs/command-line.md") for line in each.lines],
    ),
    Environment(
        "server",
        [
            INSTALLED,
            f"python {TWELVE_LINES}.py | diff - {TWELVE_LINES}.txt",
            "clip-rt doctor",
            "clip-rt models | grep drawings",
            "! clip-rt export onnx --model RN26@64px 2> said && grep -F 'clip-rt[export]' said",
            f"{THEIRS} clip-rt models | grep drawings && clip-rt export onnx --help",
        ],
    ),
    Environment(
        "server,export",
        [
            INSTALLED,
            f"clip-rt export onnx {EXPORT_TINY} models --cache cache",
            ASK_TINY.format("models"),
            "clip-rt models --repository models | grep tiny",
            f"{THEIRS} clip-rt export onnx {EXPORT_TINY} models --cache ../cache",
            ASK_TINY.format("theirs/models"),
            f"{THEIRS} python -m export.onnx {EXPORT_TINY} again --cache ../cache",
            ASK_TINY.format("theirs/again"),
        ],
    ),
)
"""Extras that are installed from wheels, and shell lines that run outside of any checkout."""


def all_commands() -> list[str]:
    """Return the dotted names of the commands of training, export and benchmarks."""
    found = []
    for package in ("benchmarks", "export", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if re.search(r"\b(tyro\.cli|subcommand_cli_from_dict)\(", path.read_text()):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.append(name.removesuffix(".__main__"))
    return found


class Walk:
    """Makes environments, runs their lines in a copy of the checkout, and says what came of it.

    After `build_wheels` it installs these, and runs lines in a folder outside of the copy.
    """

    def __init__(self, folder: Path, without: str | None, timeout_s: float) -> None:
        self._folder, self._without, self._timeout_s = folder, without, timeout_s
        self._checkout = self._inside = folder / "checkout"
        self._wheels: Path | None = None
        self._uv = shutil.which("uv", path=f"{ROOT / '.venv/bin'}:{os.environ['PATH']}")
        self.rows: list[tuple[str, str, float, bool]] = []

    def copy(self) -> None:
        """Copy what git knows of the checkout, and what is new in it."""
        target = self._checkout
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for each in filter(None, names.split("\0")):
            (target / each).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / each).is_file():
                shutil.copyfile(ROOT / each, target / each)

    def add_files(self) -> None:
        """Add a user's files to the copy."""
        target = self._checkout
        environment = dict(os.environ, PYTHONPATH=str(target))
        for page in documents():
            for name, content in FILE.findall(page.read_text("utf-8")):
                (target / name).write_text(content, "utf-8")
        for program in (FIXTURES, WEIGHTS):
            subprocess.run([sys.executable, "-c", program], cwd=target, env=environment, check=True)

    def build_wheels(self) -> None:
        """Build wheels of the copy as `make wheels` does, look into ours, and leave the copy."""
        self._wheels, self._inside = self._folder / "dist", self._folder / "outside"
        build = [sys.executable, "-m", "build", "--no-isolation", "--wheel"]
        for each in (".", "model_repository"):
            command = [*build, "--outdir", str(self._wheels), each]
            subprocess.run(command, cwd=self._checkout, check=True, stdout=subprocess.DEVNULL)
        faults = find_faults(next(self._wheels.glob("clip_rt-*.whl")))
        for each in faults:
            print(f"FAIL the wheel of the client {each}", flush=True)  # noqa: T201
        self.rows.append(("the wheel of the client", "", 0.0, not faults))
        self._inside.mkdir()
        text = (self._checkout / "README.md").read_text("utf-8")
        shown = re.search(r"^```python\n(.*?)^```\n\n```\n(.*?)^```", text, re.DOTALL | re.M)
        assert shown is not None
        for suffix, content in zip((".py", ".txt"), shown.groups(), strict=True):
            (self._inside / f"{TWELVE_LINES}{suffix}").write_text(content, "utf-8")

    def install(self, wanted: str, *others: str) -> Path:
        """Make an environment of the client, some extras, and nothing else, where the last one was.

        Returns:
            Its folder with `python`.
        """
        venv = self._folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv, "--without-pip"], check=True)
        python = venv / "bin/python"
        has_models = {"server", "in-process"} & set(wanted.split(","))
        bundled = ["./model_repository"] if has_models else []
        extras = f"[{wanted}]" if wanted else ""
        what = [*bundled, "-e", f".{extras}"]
        if self._wheels is not None:
            what = ["--find-links", str(self._wheels), f"clip-rt{extras}"]
        what += ["-c", "constraints.txt", *others]
        if self._uv is not None:
            pip = [self._uv, "pip"]
            where = ["--python", str(python), "--index-strategy", "unsafe-best-match"]
            where += _indexes_of_pip()
        else:
            pip, where = [sys.executable, "-m", "pip", "--python", str(python)], ["--no-compile"]
        subprocess.run([*pip, "install", "--quiet", *where, *what], cwd=self._checkout, check=True)
        if self._without is not None:
            yes = [] if self._uv is not None else ["--yes"]
            at = ["--python", str(python)] if self._uv is not None else []
            gone = self._without.split(",")
            subprocess.run([*pip, "uninstall", "--quiet", *yes, *at, *gone], check=True)
        return python.parent

    def run(self, line: str, wanted: str, binaries: Path) -> None:
        """Run a shell line, and note how it ended."""
        hidden = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
        start_s = time.perf_counter()
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=self._inside,
            env={
                **{name: text for name, text in os.environ.items() if name not in hidden},
                "PATH": f"{binaries}:{os.environ['PATH']}",
                "XDG_CACHE_HOME": str(self._folder / "cache"),
                "XDG_DATA_HOME": str(self._folder / "data"),
                # Outlives an environment: compiling what torch imports takes ten seconds. Python
                # reads none of it without its source, of the same path, time and size.
                "PYTHONPYCACHEPREFIX": str(self._folder / "bytecode"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=self._timeout_s,
        )
        took_s = time.perf_counter() - start_s
        self.rows.append((line, wanted, took_s, done.returncode == 0))
        word = "ok  " if done.returncode == 0 else f"FAIL {done.returncode}"
        print(f"{word} {took_s:6.1f} s  [{wanted}] {line[:160]!r}", flush=True)  # noqa: T201
        if done.returncode:
            print(done.stdout[-3000:], flush=True)  # noqa: T201

    def visit(self, environment: Environment) -> None:
        """Make an environment, import what it promises, and run its lines."""
        wanted = environment.extras
        start_s = time.perf_counter()
        binaries = self.install(wanted, *environment.others)
        print(f"made {time.perf_counter() - start_s:6.1f} s  [{wanted}]", flush=True)  # noqa: T201
        promised = [each for each in all_commands() if extras_of(each) == wanted]
        if promised:
            names = ", ".join(
                f"{each}.__main__" if (ROOT / each.replace(".", "/")).is_dir() else each
                for each in promised
            )
            self.run(f'python -c "import {names}"', wanted, binaries)
        for line in environment.lines:
            for part, before in BEFORE.items():
                if part in line:
                    self.run(before, wanted, binaries)
            self.run(line, wanted, binaries)

    def ask_for_help(self) -> None:
        """Ask every command for help where only the client is, and what reads options."""
        binaries = self.install("")
        for each in all_commands():
            self.run(f"python -m {each} --help > /dev/null", "", binaries)


def find_faults(wheel: Path) -> list[str]:
    """Return what a wheel of the client has too much of, and what it lacks."""
    size_bytes = wheel.stat().st_size
    faults = []
    if size_bytes > WHEEL_LIMIT_BYTES:
        faults.append(f"has {size_bytes:,} bytes, of at most {WHEEL_LIMIT_BYTES:,}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    faults += [f"lacks {each}" for each in IN_WHEEL if each not in names]
    faults += [f"holds {each}" for each in names if each.startswith(NOT_IN_WHEEL)]
    return faults


def _indexes_of_pip() -> list[str]:
    """Return pip's own indexes as options of uv, which reads no pip.conf."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    found = {}
    for key, value in re.findall(r"^[^.\n]*\.\.?([\w-]+)='(.*)'$", listed, re.MULTILINE):
        if key in ("index-url", "extra-index-url", "find-links"):
            found[key] = [f"--{key}={each}" for each in value.split()]
    return [option for options in found.values() for option in options]


ELSEWHERE = ("aarch64-apple-darwin", "x86_64-pc-windows-msvc", "aarch64-manylinux_2_28")
"""Systems, as uv calls them, that no test of ours runs on."""


def resolve_elsewhere(extras: Sequence[str] = ("in-process", "gateway")) -> list[str]:
    """Return the systems for which some of what the extras need has no wheel."""
    lacking = []
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write(f"clip-rt-drawings @ {(ROOT / 'model_repository').as_uri()}\n")
        overrides.flush()
        for system in ELSEWHERE:
            uv = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--quiet"]
            uv += ["--python-platform", system, "--python-version", "3.11"]
            uv += ["--only-binary", ":all:", "--no-binary", "clip-rt-drawings"]
            uv += ["--override", overrides.name, "--index-strategy", "unsafe-best-match"]
            uv += [*_indexes_of_pip(), *(f"--extra={each}" for each in extras)]
            done = subprocess.run(uv, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
            if done.returncode:
                lacking.append(system)
    return lacking


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which environments to make, and what to run in them; all without any."""

    extras: tyro.conf.Positional[tuple[str, ...]] = ()
    """Environments by their extras, such as server,export."""
    without: str | None = None
    """Take these packages out again, to see that it is noticed."""
    readme: bool = False
    """Commands of README and docs/ only."""
    wheels: bool = False
    """What wheels install only."""
    timeout_s: float = 600.0
    """Of each command."""


def main(options: Options) -> int:
    """Run the step; return 1 if anything did not do what it should."""
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="clip_rt-extras-") as folder:

        def walk(name: str, environments: Sequence[Environment]) -> Walk:
            walk = Walk(Path(folder, name), options.without, options.timeout_s)
            chosen = [
                each for each in environments if not options.extras or each.extras in options.extras
            ]
            if not chosen:
                return walk
            walk.copy()
            if name == "wheels":
                walk.build_wheels()
            else:
                walk.add_files()
            for environment in chosen:
                walk.visit(environment)
            if name == "more" and not options.extras:
                walk.ask_for_help()
            return walk

        walks = {"readme": environments(), "more": MORE, "wheels": FROM_WHEELS}
        if options.readme or options.wheels:
            asked = {"readme": options.readme, "wheels": options.wheels}
            walks = {name: walks[name] for name, is_asked in asked.items() if is_asked}
        # Most of the time of most commands goes into imports, which use one core.
        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(walk, *each) for each in walks.items()]
        rows = [row for each in done for row in each.result().rows]
    if not options.extras and not options.readme:
        rows += [(each, "for another system", 0.0, False) for each in resolve_elsewhere()]
    failed = [row for row in rows if not row[-1]]
    for line, wanted, *_ in failed:
        print(f"FAIL [{wanted}] {line[:160]!r}", flush=True)  # noqa: T201
    took_s = time.perf_counter() - start_s
    print(f"{len(rows)} commands, {len(failed)} failed, {took_s:.0f} s")  # noqa: T201
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python .ci/extras.py", description=__doc__)))
