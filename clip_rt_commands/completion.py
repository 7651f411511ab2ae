"""Print a script that lets a shell complete `clip-rt`: its commands, and most of their options.

    source <(clip-rt completion bash)

Options of training and export are left out: to know them is to import what may not be installed.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, Literal, Union

import tyro

import clip_rt.__main__ as client
from clip_rt_commands import program
from clip_rt_commands.console import COMMANDS
from clip_rt_commands.errors import command


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print the script of a shell."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """Which is to read it."""


def make_script(shell: str) -> str:
    """Return the script that tyro writes for a shell, mended where it is wanting."""
    known: dict[str, Callable[..., object]] = {}
    groups: dict[str, dict[str, Callable[..., object]]] = {}
    for name, (module, line) in COMMANDS.items():
        group, _, member = name.partition(" ")
        if module == "clip_rt":
            known[name] = client.load(name)
        elif member:
            groups.setdefault(group, {})[member] = _make_stand_in(line)
        else:
            known[name] = _make_stand_in(line)
    known |= {group: _make_group(members) for group, members in groups.items()}
    written = io.StringIO()
    # tyro ends the process once it has printed.
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            known,
            prog="clip-rt",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.DisallowNone, tyro.conf.OmitSubcommandPrefixes),
        )
    # Its completer prints a suggestion a line, with the help of the option, which may have several.
    script = re.sub(
        r"^COMPLETION_SPEC = .*$",
        lambda line: line[0].replace(r"\n", " "),
        written.getvalue(),
        flags=re.MULTILINE,
    )
    # Where no option fits, the names of files do.
    return script.replace("complete -F _tyro", "complete -o default -F _tyro")


def _make_stand_in(line: str) -> Callable[[], None]:
    """Return a command that has a line of help, and no options."""

    def stand_in() -> None:
        raise NotImplementedError

    stand_in.__doc__ = line
    return stand_in


def _make_group(members: Mapping[str, Callable[..., object]]) -> Callable[..., object]:
    """Return a command that is followed by the name of another."""
    kinds = tuple(
        Annotated[Any, tyro.conf.subcommand(name=name, constructor=member)]
        for name, member in members.items()
    )
    one_of: Any = Union[kinds]  # noqa: UP007
    return make_dataclass("Group", [("command", one_of)])


def main(config: CompletionConfig) -> None:
    """Print the script."""
    sys.stdout.write(make_script(config.shell))


if __name__ == "__main__":
    with command():
        main(tyro.cli(CompletionConfig, prog=program(__spec__.name), description=__doc__))
