"""Which requests a release candidate answers in place of the model they name.

A candidate is a served model like any other: a new version published under a name of its own,
beside the one it may replace. Vectors of the two mix only where `python -m export.compare` says so.
"""

from __future__ import annotations

import random
from collections.abc import Container, Mapping

from starlette.requests import Request

from clip_rt.gateway.problems import ProblemError

CANDIDATE_HEADER = "X-Clip-RT-Candidate"
"""Of a request: `always` or `never` have it answered by a candidate, instead of by chance."""
MODEL_HEADER = "X-Clip-RT-Model"
"""Of an answer: the model that made it."""

_STATE = "clip_rt_model"


class Candidates:
    """Candidates by the name of the model in whose place they answer a share of requests."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._by_model: dict[str, str] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._by_model.values()

    def add(self, candidates: Mapping[str, str]) -> None:
        """Name candidates by their models."""
        self._by_model |= candidates

    def route(self, model: str, request: Request, *, unhealthy: Container[str]) -> str:
        """Return who answers a request for a model, and note it in the request.

        Args:
            model: Its name.
            request: Its header may choose.
            unhealthy: Names of models that no request is sent to by chance.

        Raises:
            ProblemError: the header says something else.
        """
        candidate = self._by_model.get(model)
        choice = request.headers.get(CANDIDATE_HEADER, "").strip().lower()
        if choice not in ("", "always", "never"):
            raise ProblemError(
                f"{CANDIDATE_HEADER} is {choice[:20]!r}; say always or never, or leave it out.",
                param=CANDIDATE_HEADER,
            )
        if candidate is not None and choice != "never":
            is_lucky = candidate not in unhealthy and random.random() < self._share
            if choice == "always" or is_lucky:
                model = candidate
        setattr(request.state, _STATE, model)
        return model


def routed_model(request: Request) -> str | None:
    """Return the model that `Candidates.route` chose for a request; None where it was not asked."""
    return getattr(request.state, _STATE, None)
