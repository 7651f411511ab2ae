"""The commands of `python -m clip_rt`; each is at home in a module of its own."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

import clip_rt_commands
from clip_rt.commands.cache import cache
from clip_rt.commands.classify import classify
from clip_rt.commands.embed import EmbedConfig
from clip_rt.commands.exit_codes import FAILED, INTERRUPTED, WRONG_OPTIONS
from clip_rt.commands.index import index
from clip_rt.commands.rank import rank
from clip_rt.commands.search import search
from clip_rt.deadline import START_TIMEOUT_S
from clip_rt.errors import InputError
from clip_rt.gateway.config import GatewayConfig
from clip_rt_commands.errors import command

_OneOf = tyro.conf.create_mutex_group(required=False, title="one of")


def serve(
    *,
    repository: str,
    port: int = 8001,
    start_timeout_s: float = START_TIMEOUT_S,
    idle_unload_s: float = math.inf,
) -> int:
    """Run a Triton over a repository in the foreground.

    Args:
        repository: Folder of models.
        port: Of 127.0.0.1; 0 is any free one.
        start_timeout_s: To load the models in.
        idle_unload_s: A tower that was not asked for so long gives its memory back, and is loaded
            again when it is asked.
    """
    from clip_rt.embedded import runtimes
    from clip_rt.embedded.foreground import serve

    if not idle_unload_s > 0:
        raise InputError(f"--idle-unload-s is {idle_unload_s}; it must be above 0.")
    runtimes.set_idle_unload_s(idle_unload_s)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        serve(repository, url=f"127.0.0.1:{port}", start_timeout_s=start_timeout_s)
    except KeyboardInterrupt:
        return 130  # Asked twice, so it did not wait for the requests under way.
    return 0


def gateway(config: Annotated[GatewayConfig, tyro.conf.arg(name="")]) -> int:
    """Serve models over HTTP: OpenAI's embeddings, labels, Immich, Weaviate."""
    try:
        from clip_rt.gateway.server import serve
    except ModuleNotFoundError as error:
        raise InputError(
            f"the gateway needs {error.name}: pip install 'clip-rt[gateway]'."
        ) from error

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    serve(config)
    return 0


def embed(config: Annotated[EmbedConfig, tyro.conf.arg(name="")]) -> int:
    """Embed any number of images or texts into files; the same command goes on after a kill."""
    from clip_rt.commands.embed import embed

    return embed(config)


def reload(*, port: int = 8001, timeout_s: float = 90.0) -> int:
    """Have `serve` take what its repository holds now.

    Args:
        port: Of `serve`.
        timeout_s: Longest wait for the outcome.
    """
    from clip_rt.embedded.reload import reload

    is_new = reload(port, timeout_s=timeout_s)
    what = "what its repository holds now" if is_new else "what it did: nothing new is there"
    sys.stdout.write(f"the server on port {port} serves {what}\n")
    return 0


def doctor(
    *,
    url: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, _OneOf] = (),
    repository: Annotated[Path | None, _OneOf] = None,
    server: Literal["auto", "embedded", "in_process"] = "auto",
    model: str | None = None,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
    timeout_s: float = 30.0,
) -> int:
    """Is everything there, and does it answer what it should?

    Args:
        url: Address of a running server, host:port; may be repeated.
        repository: Models to run here.
        server: What runs them: a Triton of this machine, this process, or the first there is.
        model: Served name; the only one without it.
        json: Print one JSON object.
        timeout_s: For all of it, above 0.
    """
    from clip_rt.doctor import report

    if not timeout_s > 0:
        sys.stderr.write("error: --timeout-s must be above 0\n")
        return 2
    return report(
        url,
        repository=repository,
        server=server,
        model=model,
        timeout_s=timeout_s,
        as_json=json,
    )


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
    is_server = given[:1] and given[0] in ("serve", "gateway", "reload", "doctor")
    with command(input_error_status=FAILED if is_server else WRONG_OPTIONS):
        try:
            status: int = tyro.extras.subcommand_cli_from_dict(
                {
                    "classify": classify,
                    "rank": rank,
                    "index": index,
                    "search": search,
                    "embed": embed,
                    "serve": serve,
                    "gateway": gateway,
                    "reload": reload,
                    "doctor": doctor,
                    "cache": cache,
                },
                prog=clip_rt_commands.program("clip_rt"),
                description=__doc__,
                args=given,
                config=(tyro.conf.DisallowNone,),
            )
        except KeyboardInterrupt:
            return INTERRUPTED
        return status


if __name__ == "__main__":
    sys.exit(main())
