"""An address in, a model found there and checked against the contract out."""

from __future__ import annotations

import os
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clip_rt.deadline import Deadline
from clip_rt.errors import ContractError, InferenceError, UnknownModelError
from clip_rt.manifest import Manifest
from clip_rt.specs import PIXELS, TOKENS, image_model, slug, text_model
from clip_rt.transport import ServedModel, Transport

if TYPE_CHECKING:
    from clip_rt.server import EmbeddedServer

START_TIMEOUT_S = 60.0
"""Longest wait for the embedded server to load its models."""
RECHECK_AFTER_S = 0.5
"""Idle for longer, and the server may have been replaced meanwhile: ask it again what it has."""

_MUST_AGREE = (
    *("model", "architecture", "fingerprint", "embedding_dim", "side_px", "context_length"),
    *("text_buckets", "logit_scale", "logit_bias"),
)


@dataclass(frozen=True)
class Model:
    """Both towers of a model, and the way to them. A call uses one from its begin to its end."""

    transport: Transport
    image: ServedModel
    text: ServedModel
    server: EmbeddedServer | None

    @property
    def manifest(self) -> Manifest:
        """What the server says about the model."""
        return self.image.manifest

    def recheck(self, deadline: Deadline) -> None:
        """Start our own server again if it died; refuse to go on if another model came back.

        Raises:
            ContractError: the weights are not those the call began with.
            ServerStartError: our own server does not start any more.
        """
        _revive(self.server, deadline)
        found, _ = self.transport.describe((self.image.name, self.text.name), deadline)
        if found.manifest.fingerprint != self.manifest.fingerprint:
            raise ContractError(
                f"{self.image.name} at {self.transport.url} was replaced during the call: its "
                f"weights were {self.manifest.fingerprint}, now they are "
                f"{found.manifest.fingerprint}. Call again.",
                expected=self.manifest.fingerprint,
                found=found.manifest.fingerprint,
            )


class Connection:
    """A server, started here if it is our own, and the model last found on it.

    Not thread-safe; its client takes care of that. One that is dropped without being closed
    closes itself.
    """

    def __init__(self, transport: Transport, server: EmbeddedServer | None) -> None:
        self.transport = transport
        self._server = server
        self._server_id = None if server is None else server.server_id
        self._model: Model | None = None
        self._checked_at_s = float("-inf")
        self._finalizer = weakref.finalize(self, _hang_up, transport, server)

    @classmethod
    def to_url(cls, url: str) -> Connection:
        """Connect to a running server, at the first request."""
        return cls(Transport(url), None)

    @classmethod
    def to_repository(
        cls, repository: str | os.PathLike[str], *, start_timeout_s: float = START_TIMEOUT_S
    ) -> Connection:
        """Connect to this process's own server over a repository, starting it if needed.

        Raises:
            ServerStartError: it cannot run here.
        """
        # Here, because it needs Linux, and a client of a remote server does not.
        from clip_rt.server import borrow

        server = borrow(Path(repository), start_timeout_s=start_timeout_s)
        return cls(Transport(server.url, headers=server.headers, may_cancel=False), server)

    def is_lost(self) -> bool:
        """Whether our own server died, or was started anew."""
        server = self._server
        return server is not None and not (
            server.is_running and server.server_id == self._server_id
        )

    def find_model(self, name: str | None, fingerprint: str | None, deadline: Deadline) -> Model:
        """Return the model `name`, or the only one, asking the server unless it just answered.

        Raises:
            UnknownModelError: the server does not have it; carries those it has.
            ContractError: it is not what a client can use, or not the weights asked for.
            ServerError: no answer, or our own server died and does not start any more.
        """
        model = self._model
        if model is None or time.monotonic() - self._checked_at_s > RECHECK_AFTER_S:
            if name is None and model is not None:
                name = model.image.name.removesuffix("_image")
            model = self.transport.retry(lambda: self._ask(name, fingerprint, deadline), deadline)
            self._model = model
            self.trust()
        return model

    def trust(self) -> None:
        """Note that the server just answered as it should."""
        self._checked_at_s = time.monotonic()

    def distrust(self) -> None:
        """Note that something went wrong: the next call asks the server what it has."""
        self._checked_at_s = float("-inf")

    def close(self) -> None:
        """Hang up, and give back the server if it is our own. Closing twice is harmless."""
        self._finalizer()

    def _ask(self, name: str | None, fingerprint: str | None, deadline: Deadline) -> Model:
        _revive(self._server, deadline)
        name = name or _find_only_model(self.transport, deadline)
        names = image_model(name), text_model(name)
        try:
            image, text = self.transport.describe(names, deadline)
        except UnknownModelError as error:
            raise _list_known(self.transport, name, error, deadline) from error
        _check_contract(image, text)
        if fingerprint not in (None, image.manifest.fingerprint):
            raise ContractError(
                f"model {name!r} at {self.transport.url} has the weights "
                f"{image.manifest.fingerprint}; asked for were {fingerprint}.",
                expected=fingerprint,
                found=image.manifest.fingerprint,
            )
        return Model(self.transport, image, text, self._server)


def _revive(server: EmbeddedServer | None, deadline: Deadline) -> None:
    """Start our own server again if it died."""
    if server is not None and not server.is_running:
        server.start(timeout_s=min(server.start_timeout_s, deadline.remaining_s()))


def _hang_up(transport: Transport, server: EmbeddedServer | None) -> None:
    transport.close()
    if server is not None:
        from clip_rt.server import give_back

        give_back(server)


def _find_only_model(transport: Transport, deadline: Deadline) -> str:
    try:
        known = _list_models(transport, deadline)
    except InferenceError as error:
        raise UnknownModelError(
            f"{transport.url} does not list its models ({error}). Name one with model=.",
            model=None,
            known=(),
        ) from error
    if len(known) != 1:
        raise UnknownModelError(
            f"{transport.url} serves {len(known)} models: {', '.join(known) or 'none'}. Name one "
            "with model=.",
            model=None,
            known=known,
        )
    return known[0]


def _list_known(
    transport: Transport, name: str, error: UnknownModelError, deadline: Deadline
) -> UnknownModelError:
    """Say what the server has instead, if it tells."""
    try:
        known = _list_models(transport, deadline)
    except InferenceError:
        return error
    return UnknownModelError(
        f"{transport.url} serves no model {name!r}; it serves {', '.join(known) or 'none'}.",
        model=name,
        known=known,
    )


def _list_models(transport: Transport, deadline: Deadline) -> tuple[str, ...]:
    """List what has both towers, by the stem of their names."""
    names = set(transport.list_models(deadline))
    stems = (name.removesuffix("_image") for name in names if name.endswith("_image"))
    return tuple(sorted(stem for stem in stems if f"{stem}_text" in names))


def _check_contract(image: ServedModel, text: ServedModel) -> None:
    """Refuse two towers that are not of one model, or do not read what we send."""
    promised, other = image.manifest, text.manifest
    differing = [name for name in _MUST_AGREE if getattr(promised, name) != getattr(other, name)]
    expected = {f"{image.name} {name}": getattr(promised, name) for name in differing}
    found = {f"{text.name} {name}": getattr(other, name) for name in differing}
    if image_model(promised.model) != image.name:
        expected["model"], found["model"] = image.name, slug(promised.model)
    square = (promised.side_px, promised.side_px, 3)
    lengths = ((-1,), *((length,) for length in other.text_buckets))
    for served, *wanted in (image, PIXELS, "UINT8", (square,)), (text, TOKENS, "INT32", lengths):
        name, kind, possible_dims = wanted
        actual = (served.input_name, served.input_type, served.input_dims)
        if actual[:2] != (name, kind) or served.input_dims not in possible_dims:
            expected[f"input of {served.name}"] = (name, kind, possible_dims[0])
            found[f"input of {served.name}"] = actual
    if expected:
        raise ContractError(
            f"{image.name} and {text.name} are not one model that this client reads: expected "
            f"{expected}, found {found}. Export both towers together.",
            expected=expected,
            found=found,
        )
