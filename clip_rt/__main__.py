"""The commands of `python -m clip_rt`; each is at home in a module of its own."""

from __future__ import annotations

import argparse
import logging
import sys

import clip_rt_commands
from clip_rt_commands.errors import command


def main(arguments: list[str] | None = None) -> int:
    """Run a command; `arguments` are those of the command line unless given.

    Returns:
        0 when it did what it should, 1 when `doctor` found a fault, 130 when Ctrl-C cut it short.

    Raises:
        SystemExit: with 1 where an error of ours ended it; it is printed.
    """
    clip_rt_commands.print_any_text()
    parser = argparse.ArgumentParser(prog="python -m clip_rt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run a Triton over a repository in the foreground")
    serve.add_argument("--repository", required=True, help="folder of models")
    serve.add_argument("--port", type=int, default=8001, help="of 127.0.0.1; 0 is any free one")
    serve.add_argument("--start-timeout-s", type=float, default=60.0, help="to load the models in")
    reload = commands.add_parser("reload", help="have `serve` take what its repository holds now")
    reload.add_argument("--port", type=int, default=8001, help="of `serve`")
    reload.add_argument(
        "--timeout-s", type=float, default=90.0, help="longest wait for the outcome"
    )
    commands.add_parser("doctor", add_help=False, help="check the installation and a server")
    options, rest = parser.parse_known_args(arguments)
    if options.command == "doctor":
        from clip_rt.doctor import main as examine

        return examine(rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    with command():
        if options.command == "reload":
            return _reload(options.port, options.timeout_s)
        return _serve(options.repository, options.port, options.start_timeout_s)


def _serve(repository: str, port: int, start_timeout_s: float) -> int:
    from clip_rt.embedded.foreground import serve

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        serve(repository, url=f"127.0.0.1:{port}", start_timeout_s=start_timeout_s)
    except KeyboardInterrupt:
        return 130  # Asked twice, so it did not wait for the requests under way.
    return 0


def _reload(port: int, timeout_s: float) -> int:
    from clip_rt.embedded.reload import reload

    is_new = reload(port, timeout_s=timeout_s)
    what = "what its repository holds now" if is_new else "what it did: nothing new is there"
    sys.stdout.write(f"the server on port {port} serves {what}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
