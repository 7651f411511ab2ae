"""The console script `clip-rt`: one door to every command, from any folder.

`clip-rt export onnx ...` runs what `python -m export.onnx ...` runs. Nothing of a command is
imported before it is known which one it is, so that help is there at once. The modules are ours
whatever the working folder and PYTHONPATH hold, see `clip_rt_commands`.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import NoReturn

import clip_rt_commands

COMMANDS = {
    "classify": ("clip_rt", "say which of some labels fits each image best"),
    "rank": ("clip_rt", "order captions or answers by how well they fit an image"),
    "moderate": ("clip_rt", "allow, review or block images by a policy"),
    "calibrate": ("clip_rt", "fit a policy on labelled images"),
    "fairness": ("clip_rt", "compare how often groups of images are given labels"),
    "locate": ("clip_rt", "say where in an image something is, as boxes"),
    "score": ("clip_rt", "say how well images fit their prompts, as CLIP score"),
    "cache": ("clip_rt", "show or clear the cache of label embeddings"),
    "index": ("clip_rt", "embed the images of folders, and keep up with them"),
    "search": ("clip_rt", "find images by words or by an image; near-duplicates"),
    "serve": ("clip_rt", "run a Triton over a repository in the foreground"),
    "gateway": ("clip_rt", "serve models over HTTP, as OpenAI's API does"),
    "ui": ("clip_rt", "classify and search images on a page in the browser"),
    "reload": ("clip_rt", "have `serve` take what its repository holds now"),
    "plan": ("clip_rt", "how many of which machine a load needs, and the cost"),
    "doctor": ("clip_rt", "check the installation and a server"),
    "embed": ("clip_rt", "embed any number of images or texts into files"),
    "completion": ("clip_rt_commands.completion", "let a shell complete commands and options"),
    "models": ("export.models", "list the models of a repository"),
    "export onnx": ("export.onnx", "weights to ONNX or INT8, gated by parity"),
    "export trt": ("export.trt", "weights to TensorRT engines, gated by parity"),
    "export repository": ("export.repository", "versions, rollback, serving settings, ensembles"),
    "export checksums": ("export.checksums", "list the files of a repository, and verify them"),
    "export engine-cache": ("export.engine_cache", "engines for this machine, built once"),
    "export compare": ("export.compare", "may old and new embeddings share one index?"),
    "export bundle": ("export.bundle", "a model as one file, for a machine without a network"),
    "export canary": ("export.canary", "give an ONNX model the answers that doctor checks"),
    "train": ("training.run", "train a model, from nothing or from weights"),
    "evaluate": ("training.evaluate", "zero-shot accuracy or retrieval of a checkpoint"),
    "probe": ("training.probe", "fit a linear classifier on embeddings"),
    "coop": ("training.coop", "learn the prompt in front of class names (CoOp)"),
    "few-shot": ("training.few_shot", "all ways to adapt, against the number of examples"),
    "interpolate": ("training.interpolate", "mix fine-tuned with zero-shot weights (WiSE-FT)"),
    "curves": ("training.curves", "draw the curves of a run again"),
    "drawings": ("training.drawings", "make the drawings data set"),
}
"""Module and one line of help of each command."""


def main() -> None:
    """Run the command that the arguments begin with; its exit status is this process's."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        _prepare("clip_rt", "clip-rt")
        from clip_rt import __version__

        print(__version__)  # noqa: T201
        return
    names = (" ".join(arguments[:num_words]) for num_words in (2, 1))
    name = next((each for each in names if each in COMMANDS), None)
    if name is None:
        raise SystemExit(_explain(arguments))
    module, _ = COMMANDS[name]
    # The client's module reads by itself which of its commands is meant.
    words = [] if module == "clip_rt" else name.split()
    sys.argv[1:] = arguments[len(words) :]
    _prepare(module, " ".join(["clip-rt", *words]))
    # Here, because our own help does without it.
    import runpy

    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _explain(arguments: list[str]) -> int:
    """Print the commands, those of a group where one is named; return the exit status."""
    words = [each for each in arguments[:1] if not each.startswith("-")]
    shown = {name: line for name, (_, line) in COMMANDS.items() if name.split()[:1] == words}
    if not shown:
        words, shown = [], {name: line for name, (_, line) in COMMANDS.items()}
    rest = arguments[len(words) :]
    is_asked = rest[:1] in (["-h"], ["--help"])
    stream = sys.stdout if is_asked else sys.stderr
    stream.write(f"usage: {' '.join(['clip-rt', *words])} COMMAND [OPTIONS]\n\n")
    width = max(map(len, shown))
    stream.writelines(f"  {name:<{width}}  {line}\n" for name, line in shown.items())
    stream.write("\nclip-rt COMMAND --help shows the options of a command.\n")
    if rest and not is_asked:
        stream.write(f"error: there is no command {' '.join([*words, rest[0]])[:80]!r}\n")
    return 0 if is_asked else 2


def _prepare(module: str, called: str) -> None:
    """Let our own `module` be found, or say what stands in the way and end."""
    clip_rt_commands.start_from_console(module, called)
    package = module.partition(".")[0]
    root = clip_rt_commands.find_root()
    ours = os.path.join(root, package)
    loaded = sys.modules.get(package)
    if loaded is not None:
        # By what Python runs when it starts, such as a sitecustomize.py.
        places = [*getattr(loaded, "__path__", ()), getattr(loaded, "__file__", None) or "?"]
        if os.path.abspath(places[0]) != ours:
            _fail(
                f"{places[0]} shadows clip-rt's own {package}, in {root}: Python imports it when "
                "it starts. Start clip-rt without it, or rename it."
            )
    # Imports the package, which then prepares for the command.
    elif not os.path.isdir(ours) or find_spec(module) is None:
        _fail(
            f"clip-rt's own {module} is missing in {root}. Another distribution that brings a "
            f"package {package} may have replaced it; if so, uninstall that. Then install clip-rt "
            "anew: pip install --force-reinstall clip-rt"
        )


def _fail(reason: str) -> NoReturn:
    sys.stderr.write(f"error: {reason}\n")
    raise SystemExit(1)
