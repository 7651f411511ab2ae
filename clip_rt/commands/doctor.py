"""`clip-rt doctor`: is everything there, and does it answer what it should?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

_OneOf = tyro.conf.create_mutex_group(required=False, title="one of")


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
