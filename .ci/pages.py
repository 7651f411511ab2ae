"""The commands and Python snippets of README and docs/, as `make extras` runs them.

What takes long is run smaller (`SMALLER`) or not here (`NOT_RUN`). A command that serves runs in
the background of what stands below it on its page.
"""

from __future__ import annotations

import re
import shlex
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SHELL = (
    *("#", "clip-rt ", "curl ", "docker ", "fastapi ", "make ", "node ", "npm ", "pip ", "python "),
    "torchrun ",
)
SERVING = (
    "{serve} & pid=$!; trap 'kill $pid; wait $pid' EXIT; "
    "for _ in $(seq 60); do sleep 1; {check} && break; done; "
)
"""Runs what comes after it beside a server, which ends when it does."""
SERVERS = {
    "python -m clip_rt serve": ("8001", "python -m clip_rt doctor --url localhost:{port}"),
    "python -m clip_rt gateway": (
        "8080",
        """python -c 'import urllib.request as http; http.urlopen("http://localhost:{port}/ping")'""",
    ),
    "clip-rt ui": (
        "8081",
        """python -c 'import urllib.request as http; http.urlopen("http://localhost:{port}/ping")'""",
    ),
    "fastapi run": (
        "8090",
        """python -c 'import urllib.request as http; http.urlopen("http://localhost:{port}/docs")'""",
    ),
}
"""Commands that serve until they are told to end: the port of the pages, and how one sees that they
are ready."""
INSTALL = re.compile(
    r"pip install (?:-c constraints\.txt )?(?:\./model_repository )?"
    r"-e '\.\[([\w,-]+)\]'([\w \[\]'-]*)"
)
FILE = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""A file of the reader's: its name is the first line."""

OLD_RUN = "benchmarks/results/2026-11-26_run.json"
TINY_RUN = (
    "--suite image --contender openvino --model RN26@64px --budget-s 0.1 --starts 1 "
    "--out results --cache kit"
)

NOT_RUN = {
    "make quickstart": "is a job of its own in continuous integration",
    "make test": "is a job of its own in continuous integration",
    "make docs": "is a job of its own in continuous integration",
    "pip install --no-deps -c constraints.txt nvidia-pytriton": "is for Python 3.13 only",
    "pip install 'clip-rt[server]'": "needs an index that has the wheels",
    "pip install clip-rt": "needs an index that has the wheels",
    "python -m benchmarks.gpu*": "needs a GPU",
    "python benchmarks/run.py --full": "takes an hour or two",
    "python benchmarks/run.py --url triton-a:8001 --remote-model shop-v3": "needs that server",
    "python -m clip_rt doctor --url triton-a:8001": "needs that server",
    "python -m export.trt --model ViT-L/14": "needs a GPU with TensorRT",
    "python -m training.drawings": "fetches 100 MB and renders for minutes",
    "python -m training.run": "trains for two hours",
    "python -m training.run --sample": "trains and measures for minutes",
    "python -m training.few_shot*": "learns for minutes",
    "python -m training.run --resume --out-dir runs/web ...": "its options are printed as ...",
    "docker run*": "needs NVIDIA's container",
    "curl localhost:8000*": "needs NVIDIA's container",
}
"""Commands of the pages, by how they begin, that do not run here, and why."""

SMALLER = (
    ("python benchmarks/run.py", f"python benchmarks/run.py {TINY_RUN}"),
    ("--compare benchmarks/results/OLD_run.json", f"--compare {OLD_RUN} --against {OLD_RUN}"),
    ("torchrun --nproc-per-node 8", "torchrun --nproc-per-node 2"),
    (
        "--batch-size 32768 --chunk-size 256 --total-steps 20000",
        "--batch-size 8 --chunk-size 2 --total-steps 1 --num-threads 1",
    ),
    ("--recipe fine_tune", "--recipe fine_tune --batch-size 8 --total-steps 1"),
    # Weights that nobody trained do not pass INT8's gate; that it is reached is what is asked.
    (
        "--precision int8 --calibration photos.csv --samples val/",
        "--precision int8 --calibration photos.csv --samples val/ 2> said || grep published said",
    ),
    # The small model is no vision transformer; that this is said comes after ModelOpt's import.
    (
        "--runtime rtx --precision fp8",
        "--runtime rtx --precision fp8 2> said || grep 'FP8 is for vision' said",
    ),
    ("ViT-B/32", "RN26@64px"),
    ("ViT-L/14", "RN26@64px"),
)
"""What takes minutes is replaced, in this order, by what takes seconds and does the same."""

BEFORE = {
    "--rollback": (
        "python -m export.onnx --model RN26@64px --weights clip.safetensors --name shop-v3 "
        "--repository models --precision fp16_weights --cache cache"
    ),
    "python -m export.bundle unpack": "mv models packed",
    "python -m export.compare": "rm -r models && mv packed models",
}
"""What happened at the reader's before a command: another version, another machine."""


@dataclass
class Environment:
    """Some extras, and shell lines that run where nothing else is installed."""

    extras: str
    lines: list[str] = field(default_factory=list)
    others: tuple[str, ...] = ()
    """Packages of others that a page installs beside them."""


def commands(path: Path) -> list[str]:
    """Return the shell commands and Python snippets in a Markdown file's indented blocks."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    found: list[str] = []
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE):
        body = re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n")
        if body.startswith(SHELL):
            body = re.sub(r"(?:^|\s+)#.*$", "", body.replace("\\\n", " "), flags=re.MULTILINE)
            # A quoted text may go over lines.
            lines = re.findall(r"(?:[^\n'\"]|'[^']*'|\"[^\"]*\")+", body)
            found += [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]
        else:
            found.append(body)
    return found


def documents() -> list[Path]:
    """Return README and the pages of docs/, in the order in which they are read."""
    names = re.findall(r"[\w-]+\.md$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    pages = (ROOT / "docs" / name for name in names)
    return [ROOT / "README.md", *(page for page in pages if page.is_file())]


def readme(path: Path) -> list[Environment]:
    """Return what a page's commands are here: an environment for each `pip install`."""
    found: list[Environment] = []
    server = ""
    free = {port: str(_free_port()) for port, _ in SERVERS.values()}
    for command in commands(path):
        if (install := INSTALL.match(command)) is not None:
            found.append(Environment(install[1], others=tuple(shlex.split(install[2]))))
            continue
        if why_not(command) is not None:
            continue
        line = command
        for full, small in (*SMALLER, *free.items()):
            line = line.replace(full, small, 1)
        serving = next((each for each in SERVERS if line.startswith(each)), None)
        if serving is not None:
            # In the foreground until it is told to end; then again for what comes next.
            port, check = SERVERS[serving]
            check = check.format(port=free[port])
            server = SERVING.format(serve=line, check=check)
            line = server + check
        elif not line.startswith(SHELL):
            line = f"{server}python -c {shlex.quote(line)}"
        elif any(port in line for port in free.values()):
            line = server + line
        if not found:
            raise SystemExit(f"{path.name}: no pip install stands above {command!r}")
        found[-1].lines.append(line)
    return found


def environments() -> list[Environment]:
    """Return those of all pages; a page that installs what the one before has goes on in it."""
    found: list[Environment] = []
    for environment in (each for page in documents() for each in readme(page)):
        is_same = found and found[-1].extras == environment.extras
        if is_same and not environment.others:
            found[-1].lines += environment.lines
        else:
            found.append(environment)
    return found


def why_not(command: str) -> str | None:
    """Return the reason why a command of a page is not run here."""
    begins = (
        why for start, why in NOT_RUN.items() if start[-1] == "*" and command.startswith(start[:-1])
    )
    if command.startswith(("npm ", "node ")) and shutil.which("npm") is None:
        return "needs Node.js"
    return NOT_RUN.get(command) or next(begins, None)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
