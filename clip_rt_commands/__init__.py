"""What `clip-rt` and `python -m export.onnx` need before any of their code is imported.

`python -m` looks for modules in the working folder first. There a user's own `training/`,
`export.py` or `onnx.py` would be taken for ours, or for a library's. `clip_rt_commands.pth`, which
is installed with this package, imports this module for every `python -m`. It does nothing unless
that was given a module of ours: then our packages are found where this one is, and the working
folder is searched last. A user's module with the full name of the command still wins.

The console script `clip-rt`, `clip_rt_commands.console`, never means a user's module.
"""

from __future__ import annotations

import sys

PACKAGES = ("benchmarks", "clip_rt", "export", "training")
_console = ("", "")
"""What the console script was asked for: our module, and how the user calls it."""


def find_console_module() -> str:
    """Return the module that `clip-rt` was asked for, with its dots; else nothing."""
    return _console[0]


def program(module: str) -> str:
    """Return how the user calls a command: `clip-rt export onnx`, or `python -m export.onnx`."""
    return _console[1] if module == _console[0] else f"python -m {module}"


def find_root() -> str:
    """Return the folder that our packages lie in."""
    import os

    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def start_from_console(module: str, called: str) -> None:
    """Prepare for one of our modules that `clip-rt` is to run, whatever PYTHONPATH holds.

    Args:
        module: With its dots.
        called: How the user calls it.
    """
    global _console
    _console = (module, called)
    _search_working_folder_last()
    _install("", find_root())


def prepare(package: str, folder: str) -> None:
    """Make the process fit for a command of `package`; does nothing where it runs another one.

    Our packages call it when they are imported: `clip_rt_commands.pth` is there only where this
    distribution is installed.

    Args:
        package: Name.
        folder: Where it lies.
    """
    import os

    # Here, because this module is imported for every `python -m`.
    from clip_rt_commands import extras

    command = find_console_module() or find_module(sys.orig_argv, getattr(sys, "argv", []))
    if command.partition(".")[0] == package:
        print_any_text()
        _quieten_libraries()
        _search_working_folder_last()
        if not any(isinstance(each, _Finder) for each in sys.meta_path):
            _install(command, os.path.dirname(os.path.abspath(folder)))
    extras.begin()


def print_any_text() -> None:
    r"""Let characters that the encoding of the output lacks be printed as \x.., not raised.

    Names of files, models and labels may hold any. What goes to stderr is treated so anyway.
    """
    # A test or a notebook puts there what need not be a file.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _quieten_libraries() -> None:
    """Keep libraries from the user's home folder, and from complaining that there is none."""
    import logging
    import os

    # OpenVINO cannot be imported by a user without one; / is what containers give theirs.
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/"
    # matplotlib takes a temporary folder where it has no other, and advises about it.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


class _Finder:
    """Finds our packages in the folder of this installation; an `importlib.abc.MetaPathFinder`."""

    def __init__(self, command: str, root: str) -> None:
        """Where a user's module has the name of the command, theirs is found; it may be empty."""
        self._command = command
        self._root = root
        self._is_first = bool(command)
        self._is_users = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """Answer for the names of our packages."""
        if self._is_users or name not in PACKAGES:
            return None
        from importlib.machinery import PathFinder

        # The first of them that is looked for is the command's own; the working folder is in
        # sys.path from then on.
        if self._is_first:
            if _is_users(self._command, self._root):
                self._is_users = True
                return None
            self._is_first = False
            _search_working_folder_last()
        return PathFinder.find_spec(name, [self._root])


def _install(command: str, root: str) -> None:
    sys.meta_path.insert(0, _Finder(command, root))  # type: ignore[arg-type]


def find_module(orig_argv: list[str], argv: list[str]) -> str:
    """Return the module that `python -m` was given, while Python looks for it; else nothing.

    Args:
        orig_argv: All of the process's arguments, the interpreter's included.
        argv: `sys.argv` as it is meanwhile: -m comes first.
    """
    if argv[:1] != ["-m"] or len(orig_argv) <= len(argv):
        return ""
    given = orig_argv[-len(argv)]
    # One argument in `python -mexport.onnx` and `python -umexport.onnx`.
    return given.partition("m")[2] if given.startswith("-") else given


def _is_users(command: str, root: str) -> bool:
    """Whether a package that is found before ours has a module of the command's name."""
    import os
    from importlib.machinery import PathFinder

    package, _, rest = command.partition(".")
    spec = PathFinder.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders or os.path.dirname(os.path.abspath(folders[0])) == root:
        return False
    module = rest.partition(".")[0] or "__main__"
    return PathFinder.find_spec(f"{package}.{module}", folders) is not None


def _search_working_folder_last() -> None:
    import os

    try:
        here = os.getcwd()
    except OSError:  # It was removed; nothing is found there.
        return
    if os.path.isfile(os.path.join(here, "clip_rt_commands", "__init__.py")):
        return  # A checkout of ours.
    others = [each for each in sys.path if os.path.abspath(each or ".") != here]
    if len(others) < len(sys.path):
        sys.path[:] = [*others, here]


def begin() -> None:
    """Do what `clip_rt_commands.pth` is for."""
    command = find_module(sys.orig_argv, getattr(sys, "argv", []))
    if command.partition(".")[0] in PACKAGES:
        _install(command, find_root())
