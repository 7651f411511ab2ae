"""The commands of `python -m clip_rt`; each is at home in a module of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import tyro

import clip_rt_commands
from clip_rt.commands.exit_codes import FAILED, INTERRUPTED, WRONG_OPTIONS
from clip_rt_commands.errors import command

COMMANDS = {
    "classify": "clip_rt.commands.classify",
    "rank": "clip_rt.commands.rank",
    "score": "clip_rt.commands.score",
    "locate": "clip_rt.commands.locate",
    "index": "clip_rt.commands.index",
    "search": "clip_rt.commands.search",
    "embed": "clip_rt.commands.embed",
    "serve": "clip_rt.commands.serve",
    "gateway": "clip_rt.commands.gateway",
    "ui": "clip_rt.commands.ui",
    "reload": "clip_rt.commands.serve",
    "doctor": "clip_rt.commands.doctor",
    "cache": "clip_rt.commands.cache",
    "moderate": "clip_rt.commands.moderate",
    "calibrate": "clip_rt.commands.calibrate",
    "fairness": "clip_rt.commands.fairness",
    "plan": "clip_rt.commands.plan",
}
"""The module of each command, where a function has its name."""
_OF_SERVERS = ("serve", "gateway", "ui", "reload", "doctor")


def load(name: str) -> Callable[..., int]:
    """Return the function of a command, which tyro calls with its options."""
    function: Callable[..., int] = getattr(importlib.import_module(COMMANDS[name]), name)
    return function


def main(arguments: list[str] | None = None) -> int:
    """Run a command; `arguments` are those of the command line unless given.

    Returns:
        0 when it did what it should, 1 when `doctor` found a fault, 2 when an option's value is not
        possible, 130 when Ctrl-C cut it short; `commands.exit_codes` has those of what asks a
        model.

    Raises:
        SystemExit: with 1 where an error of ours ended it, with 2 where the options cannot be read;
            it is printed.
    """
    clip_rt_commands.print_any_text()
    given = sys.argv[1:] if arguments is None else arguments
    name = given[0] if given else ""
    program = clip_rt_commands.program("clip_rt")
    config = (tyro.conf.DisallowNone,)
    with command(input_error_status=FAILED if name in _OF_SERVERS else WRONG_OPTIONS):
        try:
            if name in COMMANDS:
                # Without the options of all others, which take their time to read.
                prog = f"{program} {name}"
                status: int = tyro.cli(load(name), prog=prog, args=given[1:], config=config)
            else:
                status = tyro.extras.subcommand_cli_from_dict(
                    {each: load(each) for each in COMMANDS},
                    prog=program,
                    description=__doc__,
                    args=given,
                    config=config,
                )
        except KeyboardInterrupt:
            return INTERRUPTED
        return status


if __name__ == "__main__":
    sys.exit(main())
