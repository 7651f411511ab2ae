"""The way out that a message names exists, in whatever can say the message.

How messages name a way out, which this file holds them to:

- in Python as `option=`, which each public class or function that can raise it takes;
- in the commands of training, export and benchmarks as `--option`, which each command of the
  package that imports the module has, directly or through others;
- `function(option=...)`, `clip_rt.Client(option=...)` where another interface than the one that
  raised it is meant;
- `python -m module`, `clip-rt[extra]`, `pip install package`, `$CLIP_RT_VARIABLE`, `method()`.

A bare option name, as in "raise max_things", is none of these: it is refused below.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tyro

import clip_rt
from clip_rt.async_client import AsyncClient
from clip_rt.bulk import embed
from clip_rt.ray import EmbedBatch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("clip_rt", "training", "export", "benchmarks")
FOREIGN = {
    "CREATE VIRTUAL TABLE": {"distance_metric="},
    "docker run": {"--shm-size", "--rm", "--gpus"},
    "hf download": {"--revision", "--include", "--local-dir"},
    "torchrun": {"--nproc-per-node"},
    "PYTHON_CONFIGURE_OPTS": {"--enable-shared"},
    "np.stack(": {"axis="},
    "it.InferenceSession(": {"providers="},
    "Decode its source with": {"errors="},
    ", map_location='cpu'": {"map_location="},
    "PYTHON_CONFIGURE_OPTS=": {"PYTHON_CONFIGURE_OPTS="},
}
"""Options of other programs and libraries, in messages that name these."""
ASKING = (
    "raise|lower|pass|use|set|choose|allow|give|make|ask for|leave|name|another|with|without|by|or"
)
BARE = re.compile(
    rf"\b(?:{ASKING}) (?:the |an? )?([a-z]+(?:_[a-z0-9]+)+)\b(?![=(]|\.\w)"
    r"|\b([a-z]+(?:_[a-z0-9]+)+) (?:permits|allows|helps)\b",
    re.IGNORECASE,
)
NO_OPTIONS = {"clip_rt", "quick_gelu", "open_clip", "huggingface_hub", "infinity_emb"}
LABELLED = ("training.coop", "training.evaluate", "training.few_shot", "training.probe")
"""Commands that take a model and labelled images."""
SAID_BY: dict[tuple[str, str], tuple[str, ...]] = {
    # Only a run of many processes splits a batch.
    ("training.data.batches", "--batch-size"): ("training.run",),
    ("training.data.shards", "--allow-commands"): ("training.run",),
    # What only a run reads.
    ("training.checkpoint", "--out-dir"): ("training.run",),
    # For which only evaluate has an option.
    ("training.evaluation.source", "--class-names"): ("training.evaluate",),
    # What makes the graphs; the others read what was made.
    ("export.int8", "--calibration"): ("export.onnx",),
    ("export.precision", "--fp32-island"): ("export.onnx", "export.trt"),
    ("export.storage", "--precision"): ("export.onnx",),
    # Who takes a name; the others look a model up.
    ("export.model_folders", "--name"): ("export.onnx", "export.trt", "export.repository"),
    # What joins engines to a version.
    ("export.repository", "--join"): ("export.trt",),
    ("export.pipeline", "--calibration"): ("export.onnx", "export.trt"),
    # Who loads models of other libraries.
    **{
        (f"training.{module}", option): (
            *("export.onnx", "training.interpolate", "training.run"),
            *LABELLED,
        )
        for module in (
            *("encoders.encoder", "encoders.find", "encoders.of_open_clip"),
            *("encoders.tokenizer_source", "evaluation.embed"),
        )
        for option in ("--model", "--tokenizer")
    },
    # The others always name weights, or need none.
    ("training.evaluation.embed", "--checkpoint"): LABELLED,
    # In the command of another that is printed.
    ("export.pipeline", "--rollback"): ("export.repository",),
    # Its own command.
    **{
        ("export.repository", option): ("export.repository",)
        for option in ("--ensembles", "--max-pixels", "--max-bytes")
    },
    ("benchmarks.contenders.kit", "--cache"): ("benchmarks.run",),
    ("export.repository", "--rollback"): ("export.repository",),
    ("export.repository", "--version"): ("export.repository",),
    ("export.repository", "--runtime"): ("export.repository", "export.onnx"),
}
"""Who can say a message, where that are fewer commands than those that import its module."""


# The interfaces


def parameters_of(*interfaces: Callable[..., object]) -> set[str]:
    """Return what each of the interfaces takes, constructor and public methods together."""
    taken = []
    for each in interfaces:
        members = [getattr(each, name) for name in dir(each) if name[0] != "_"]
        if each is AsyncClient:  # It passes all that a client takes on.
            each = clip_rt.Client
        callables = [each, *filter(callable, members)] if inspect.isclass(each) else [each]
        taken.append({name for one in callables for name in inspect.signature(one).parameters})
    return set.intersection(*taken)


CLIENTS = (clip_rt.Client, AsyncClient)
SERVERS = (*CLIENTS, clip_rt.EmbeddedServer, clip_rt.serve)
RAISED_BY: dict[str, tuple[Callable[..., object], ...]] = {
    "decoding": (*CLIENTS, clip_rt.preprocess),
    "job": (embed,),
    "localization": (clip_rt.locate,),
    "scoring": (clip_rt.clip_score,),
    "ray": (EmbedBatch,),
    "images": (*CLIENTS, clip_rt.preprocess),
    "transform": (*CLIENTS, clip_rt.preprocess),
    "tokenizer": (*CLIENTS, clip_rt.tokenize),
    "installation": SERVERS,
    "ownership": SERVERS,
    "server": SERVERS,
    "sharing": SERVERS,
    "foreground": (clip_rt.serve,),
    "fake_server": (clip_rt.testing.FakeServer,),
    "telemetry": (clip_rt.telemetry.enable_prometheus,),
}
"""Who can raise the messages of a module of clip_rt; of the others, the clients."""


@functools.cache
def options_of(command: str) -> frozenset[str]:
    """Return the options of a command, each with its dashes."""
    module = importlib.import_module(command)
    found: set[str] = set()
    if command == "clip_rt.__main__":
        # Commands in modules of their own, by name.
        return frozenset().union(*(_options_of(module.load(each)) for each in module.COMMANDS))
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "tyro.cli":
            found |= _options_of(getattr(module, ast.unparse(node.args[0])))
        elif name == "tyro.extras.subcommand_cli_from_dict":
            assert isinstance(node.args[0], ast.Dict)
            for each in node.args[0].values:
                found |= _options_of(getattr(module, ast.unparse(each)))
    return frozenset(found)


def _options_of(command: Callable[..., object]) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(command)
    return set(parser._option_string_actions)


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Parse all modules of the packages, by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@functools.cache
def imported_by(module: str) -> frozenset[str]:
    """Return all modules that a module imports, directly or through others, and itself."""
    found, pending = {module}, [module]
    while pending:
        for node in ast.walk(modules()[pending.pop()]):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            new = {name for name in names if name in modules()} - found
            found |= new
            pending += new
    return frozenset(found)


@functools.cache
def commands(package: str) -> tuple[str, ...]:
    return tuple(
        name
        for name, tree in modules().items()
        if name.partition(".")[0] == package and 'name__ == "__main__"' in _double(tree)
    )


def _double(tree: ast.Module) -> str:
    return "\n".join(
        ast.unparse(node.test).replace("'", '"') for node in tree.body if isinstance(node, ast.If)
    )


# The messages


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Find the sentences of a module: strings with a space that are no docstrings.

    Constants count too: messages are put together from them. What an f-string fills in is {}.
    """
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(each) for each in ast.walk(node)} - {id(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            parts = [each.value if isinstance(each, ast.Constant) else "{}" for each in node.values]
            text = "".join(map(str, parts))
        else:
            continue
        if " " in text.strip() and not text.lstrip().startswith("<"):
            yield node.lineno, text


def dead_ends(module: str, text: str) -> Iterator[str]:
    """Find the ways out in a message which are none."""
    package, _, rest = module.partition(".")
    foreign = {each for said, options in FOREIGN.items() if said in text for each in options}
    for match in BARE.finditer(text):
        if (name := match[1] or match[2]) not in NO_OPTIONS:
            yield name
    for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text):
        if option not in foreign and not _options_at(module, option, text):
            yield option
    for called, inside in re.findall(r"([\w.]+)\(([^()]*)\)", text):
        function = _function(module, called)
        for name in re.findall(r"\b([a-z_]+)=", inside) if function else ():
            foreign.add(f"{name}=")
            if name not in parameters_of(function):
                yield f"{called}({name}=)"
    for name in re.findall(r"(?<!-)\b([a-z_]+)=(?![={\"])", text):
        if package == "clip_rt":
            is_there = name in parameters_of(*RAISED_BY.get(rest.rpartition(".")[2], CLIENTS))
        else:  # For those who call it from Python, beside the option of the command.
            is_there = f"--{name.replace('_', '-')}" in text
        if f"{name}=" not in foreign and not is_there:
            yield f"{name}="
    for name in re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)", text):
        if not {name, f"{name}.__main__"} & {each for one in PACKAGES for each in commands(one)}:
            yield f"python -m {name}"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"(?:clip-rt|\.)\[([a-z0-9,-]+)\]", text):
        for each in extra.split(","):
            if not re.search(rf"^{each} = \[", project, re.MULTILINE):
                yield f"[{each}]"
    for names in re.findall(r"pip install ((?:[a-z][a-z0-9-]+ ?)+)", text):
        for each in names.split():
            if each != "clip-rt" and not re.search(rf'"{each}\b', project):
                yield f"pip install {each}"
    for name in re.findall(r"\bCLIP_RT_[A-Z_]+", text):
        if not any(name == each for tree in modules().values() for each in _constants(tree)):
            yield name
    for name in re.findall(r"\bclip_rt\.([A-Za-z]\w*)", text):
        if package == "clip_rt" and not hasattr(clip_rt, name):
            yield f"clip_rt.{name}"


def _options_at(module: str, option: str, text: str) -> bool:
    """Whether a command that a message names before it has an option, or all that can say it."""
    for name, given in re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)([^.;]*)", text):
        command = f"{name}.__main__" if f"{name}.__main__" in modules() else name
        if option in given and command in modules() and option in options_of(command):
            return True
    package = module.partition(".")[0]
    if package == "clip_rt":
        return option in options_of("clip_rt.__main__")
    able = SAID_BY.get((module, option))
    if able is None:
        able = tuple(each for each in commands(package) if module in imported_by(each))
    return bool(able) and all(option in options_of(each) for each in able)


def _function(module: str, name: str) -> Callable[..., object] | None:
    owner, _, attribute = name.rpartition(".")
    if owner == "clip_rt":
        return getattr(clip_rt, attribute, None)
    defined = {each.name for each in modules()[module].body if isinstance(each, ast.FunctionDef)}
    return getattr(importlib.import_module(module), name) if name in defined else None


def _constants(tree: ast.Module) -> Iterator[object]:
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))


@functools.cache
def found_in(package: str) -> frozenset[tuple[str, int, str]]:
    """Return the dead ends of a package: file, line, and what is named."""
    return frozenset(
        (f"{name.replace('.', '/')}.py", line, each)
        for name, tree in modules().items()
        if name.partition(".")[0] == package
        for line, text in messages(tree)
        for each in dead_ends(name, text)
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_every_way_out_exists(package: str) -> None:
    assert found_in(package) == set()


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        (
            "clip_rt.inputs.decoding",
            "too many pixels. Make it smaller or raise max_things.",
            "max_things",
        ),
        ("training.data.tables", "leaves its folder (allow_things permits it)", "allow_things"),
        ("training.run", "It diverges. Lower peak_lr.", "peak_lr"),
        ("clip_rt.client", "It was late. Allow more with timeout_ms=.", "timeout_ms="),
        ("clip_rt.embedded.ownership", "It was late. Allow more with timeout_s=.", "timeout_s="),
        (
            "clip_rt.embedded.server",
            "Name one: clip_rt.Client(address=...).",
            "clip_rt.Client(address=)",
        ),
        ("clip_rt.client", "pass a clip_rt.Tls.", "clip_rt.Tls"),
        ("clip_rt.doctor", "Allow more with --timeout.", "--timeout"),
        ("training.run", "It is there. Go on with --continue.", "--continue"),
        ("training.weights.load", "Name its --model and --teacher.", "--teacher"),
        ("export.onnx", "Or python -m training.run --precison fp32.", "--precison"),
        (
            "export.onnx",
            "Make it with python -m export.tensorrt first.",
            "python -m export.tensorrt",
        ),
        ("export.int8", "Install it: pip install 'clip-rt[int4]'", "[int4]"),
        ("export.engine", "pip install -e '.[exports]' first", "[exports]"),
        ("training.journal", "It is missing: pip install tensor-board", "pip install tensor-board"),
        ("clip_rt.client", "Set CLIP_RT_ADDRESS to the server.", "CLIP_RT_ADDRESS"),
        ("training.weights.load", "Ask by load_clip(side=...).", "load_clip(side=)"),
        ("training.data.shards", "Pass allow_commands=True.", "allow_commands="),
    ],
)
def test_a_dead_end_is_found(module: str, text: str, found: str) -> None:
    assert found in set(dead_ends(module, text))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("clip_rt.client", "It was late. Allow more with timeout_s=, or use clip_rt.serve."),
        ("clip_rt.embedded.ownership", "It was late. Allow more with start_timeout_s=."),
        ("clip_rt.inputs.tokenizer", "Shorten it or pass truncate=True."),
        ("clip_rt.doctor", "--timeout-s must be above 0"),
        ("clip_rt.embedded.installation", "docker run --shm-size=1g. Or: clip_rt.Client(url=...)."),
        ("training.run", "batch_size is 7; it must be even. Make --batch-size a multiple."),
        ("training.data.shards", "Pass --allow-commands, in Python allow_commands=True."),
        ("export.onnx", "python -m training.run --resume; pip install 'clip-rt[int8]' openvino"),
    ],
)
def test_a_way_out_is_none(module: str, text: str) -> None:
    assert set(dead_ends(module, text)) == set()


def test_messages_are_found_wherever_they_are_put_together() -> None:
    source = '''
"""Not this docstring."""
WAY_OUT = "Or use this one."
def f(name):
    """Nor this one."""
    raise InputError(f"{name} is bad. " "Raise it. " + WAY_OUT)
'''
    texts = [text for _, text in messages(ast.parse(source))]
    assert sorted(texts) == ["Or use this one.", "{} is bad. Raise it. "]
