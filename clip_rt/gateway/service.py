"""The models behind the gateway, and what the protocols ask of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from clip_rt import telemetry
from clip_rt.async_client import AsyncClient
from clip_rt.classification import open_set
from clip_rt.classification.zero_shot import Scores
from clip_rt.client import Client
from clip_rt.embedding import find_dimensions
from clip_rt.errors import (
    ClipRTError,
    ContractError,
    InputError,
    ServerOverloadedError,
    ServerUnavailableError,
    UnknownModelError,
)
from clip_rt.gateway.candidates import Candidates
from clip_rt.gateway.config import GatewayConfig
from clip_rt.gateway.pictures import ImageSource, is_data_uri
from clip_rt.gateway.problems import RETRY_AFTER_S, ProblemError, find_problem
from clip_rt.inputs.decoding import MAX_BYTES
from clip_rt.inputs.items import OnError
from clip_rt.inputs.prompts import find_templates
from clip_rt.specs import slug
from clip_rt.wire import canary
from clip_rt.wire.manifest import Manifest

Result = TypeVar("Result")

_NUMBERED = re.compile(r"^(image|text) \d+")
MAX_MIXED_TRIES = 2
"""Of a request with texts and images, while whose model is replaced."""
START_POLL_S = 1.0
"""Pause between two looks for servers that are not there yet."""
CHECK_EVERY_S = 2.0
"""An answer of the health check serves all who ask within that time."""
CHECK_TIMEOUT_S = 5.0
MAX_CHECK_WAIT_S, MAX_CHECK_AGE_S = 0.5, 10.0
"""After that time a health check is answered by what was last found, unless that is so old."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classification:
    """How well labels fit images."""

    model: str
    scores: Scores
    """Of the images that could be used."""
    indices: tuple[int, ...]
    """Whose the rows of the scores are."""
    problems: dict[int, ProblemError]
    """Why the others could not be used."""


@dataclass(frozen=True)
class Item:
    """A text or an image of a request, and where in the request it is."""

    param: str
    text: str | None = None
    image: str | bytes | None = None
    """Base64, a data URI or a URL; or the encoded bytes."""


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """A model as it was last seen."""

    name: str
    fingerprint: str
    """Of its weights."""
    is_ready: bool | None
    """Whether the last health check found it well; None before the first."""


class Service:
    """One client a model. To be opened before it is used, and closed."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.is_draining = False
        self._clients: dict[str, AsyncClient] = {}
        self._names: dict[str, str] = {}
        self._fingerprints: dict[str, str] = {}
        self._candidates = Candidates(config.candidate_share)
        # One for all, because making one reads the certificates of this system.
        self.http = httpx.AsyncClient(timeout=config.timeout_s, trust_env=False)
        """Fetches images, and passes tasks on."""
        self._images = ImageSource(self.http, config.image_host, max_bytes=MAX_BYTES)
        self._checking: asyncio.Task[dict[str, str]] | None = None
        self._checked_s, self._problems = -math.inf, dict[str, str]()

    async def open(self) -> None:
        """Find the models, starting a server of its own where none is named.

        Raises:
            ClipRTError: there is none, or one that is named is not there.
        """
        config = self.config
        options: dict[str, Any] = {
            "url": config.url or None,
            "repository": config.repository,
            "server": config.server,
            "timeout_s": config.timeout_s,
            "start_timeout_s": config.start_timeout_s,
        }
        with Client(**options) as client:
            found = await self._list_models(client)
            candidates = tuple(config.candidate.values())
            named = (*config.model, *candidates)
            missing = [name for name in named if slug(name) not in found]
            if missing or not found:
                raise UnknownModelError(
                    f"the server has no model {missing[0]!r}; it has {', '.join(found) or 'none'}."
                    if missing
                    else "the server has no model.",
                    model=missing[0] if missing else None,
                    known=found,
                )
            served = config.model or [each for each in found if each not in map(slug, candidates)]
            for name in dict.fromkeys((*served, *candidates)):
                mine = AsyncClient(model=name, **options)
                # Now, and not at the first request: it connects, and fetches the tokenizer.
                manifest = await mine.manifest()
                await mine.encode_texts(
                    canary.TEXT, truncate=True, timeout_s=config.start_timeout_s
                )
                self._clients[manifest.model] = mine
                self._fingerprints[manifest.model] = manifest.fingerprint
                self._names |= {each: manifest.model for each in (slug(name), manifest.model)}
        for alias, name in config.alias.items():
            if name not in self._names:
                raise InputError(
                    f"--alias {alias[:80]!r} stands for {name[:80]!r}, which is no model here; "
                    f"there is {', '.join(self.names)}."
                )
            self._names[alias] = self._names[name]
        for name, candidate in config.candidate.items():
            if name not in self._names:
                raise InputError(
                    f"--candidate {candidate[:80]!r} is for {name[:80]!r}, which is no model here; "
                    f"there is {', '.join(self.names)}."
                )
            model, candidate = self._names[name], self._names[candidate]
            if model == candidate:
                raise InputError(f"--candidate {candidate[:80]!r} is for itself; name another.")
            # Known before the first request is sent to it.
            if problem := await _check(self._clients[candidate]):
                _log.warning("the candidate %s is not asked: %s", candidate, problem)
                self._problems[candidate] = problem
            self._candidates.add({model: candidate})

    async def _list_models(self, client: Client) -> tuple[str, ...]:
        """Return what the servers have; servers of somebody else may be about to start."""
        until_s = time.monotonic() + self.config.start_timeout_s
        is_told = False
        while True:
            try:
                return await asyncio.to_thread(client.list_models)
            except ServerUnavailableError as error:
                if not self.config.url or time.monotonic() > until_s:
                    raise
                if not is_told:
                    _log.warning("waiting for %s: %s", ", ".join(self.config.url), error)
                is_told = True
                await asyncio.sleep(START_POLL_S)

    async def close(self) -> None:
        """Hang up, and end a server of its own."""
        await self.http.aclose()
        for client in self._clients.values():
            await client.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The models, the one that is used by default first."""
        return tuple(self._clients)

    def find_name(self, name: str | None) -> str:
        """Return the model that a request means; the default one if it names none.

        Raises:
            ProblemError: there is no such model.
        """
        if not name:
            return self.names[0]
        if found := self._names.get(name):
            return found
        raise ProblemError(
            f"There is no model {name[:80]!r} here; there is {', '.join(self.names)}.",
            status=HTTPStatus.NOT_FOUND,
            code="model_not_found",
            param="model",
        )

    async def manifest(self, name: str | None) -> Manifest:
        """Return what a model says of itself.

        Raises:
            ProblemError: there is no such model.
        """
        return await self._clients[self.find_name(name)].manifest()

    def route(self, name: str | None, request: Request) -> str:
        """Return the model that answers a request for `name`, which may be its candidate.

        Raises:
            ProblemError: there is no such model, or the request's header cannot be read.
        """
        return self._candidates.route(self.find_name(name), request, unhealthy=self._problems)

    def answers_as(self, asked: str | None, model: str) -> str:
        """Return what an answer calls its model: as the request does, but for a candidate."""
        return model if not asked or model in self._candidates else asked

    def is_available(self, problems: Mapping[str, str]) -> bool:
        """Whether all models answer that requests name; of candidates none is needed."""
        return all(name in self._candidates for name in problems)

    def states(self) -> Iterator[ModelState]:
        """Yield what was last found of each model, without asking."""
        for name, fingerprint in self._fingerprints.items():
            is_checked = self._checked_s > -math.inf
            yield ModelState(
                name=name,
                fingerprint=fingerprint,
                is_ready=name not in self._problems if is_checked else None,
            )

    async def embed(
        self,
        name: str | None,
        items: Sequence[Item],
        *,
        truncate: bool = False,
        dimensions: int | None = None,
    ) -> tuple[str, NDArray[np.float32], int]:
        """Embed texts and images, mixed.

        Returns:
            Name of the model; float32 (N, D), rows of length 1, in the order of the items; how many
            tokens the texts had.

        Raises:
            ProblemError: an item, or the model, cannot be used.
        """
        found = self.find_name(name)
        self._check_number(len(items))
        client = self._clients[found]
        if dimensions is not None:
            try:
                find_dimensions(await client.manifest(), dimensions)
            except ClipRTError as error:
                raise find_problem(error, "dimensions") from error

        async def embed_texts(texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
            with telemetry.measure() as timings:
                rows = await client.encode_texts(texts, truncate=truncate, dimensions=dimensions)
            return rows, timings.counts.get("tokens", 0)

        async def embed_images(images: Sequence[Item]) -> tuple[NDArray[np.float32], int]:
            content = await self._read_all(images)
            return await client.encode_images(content, dimensions=dimensions), 0

        texts = [index for index, item in enumerate(items) if item.text is not None]
        images = [index for index, item in enumerate(items) if item.text is None]
        is_mixed = bool(texts and images)
        for num_left in reversed(range(MAX_MIXED_TRIES)):
            before = (await client.manifest()).fingerprint if is_mixed else ""
            works: list[tuple[list[int], Awaitable[tuple[NDArray[np.float32], int]]]] = []
            if texts:
                works.append((texts, embed_texts([items[index].text or "" for index in texts])))
            if images:
                works.append((images, embed_images([items[index] for index in images])))
            answers = await _all(_located(work, items, each) for each, work in works)
            # Each call is of one model, and the two of a mixed request must be of the same.
            if not is_mixed or (await client.manifest()).fingerprint == before:
                break
            if not num_left:
                raise ProblemError(
                    "The model was replaced while texts and images were embedded. Send them again.",
                    status=HTTPStatus.SERVICE_UNAVAILABLE,
                    code="model_replaced",
                    retry_after_s=RETRY_AFTER_S,
                )
        dim = answers[0][0].shape[1]
        rows = np.empty((len(items), dim), np.float32)
        for (indices, _), (part, _) in zip(works, answers, strict=True):
            rows[indices] = part
        return found, rows, sum(num_tokens for _, num_tokens in answers)

    async def classify(
        self,
        name: str | None,
        images: Sequence[Item],
        labels: Sequence[str],
        templates: str | Sequence[str] | None,
        *,
        none_of_these: bool = False,
        on_error: OnError = "raise",
    ) -> Classification:
        """Say how well each label fits each image; the classes' embeddings are cached.

        Raises:
            ProblemError: a label, a template or the model cannot be used; or an image, unless
                `on_error` is "skip".
        """
        found = self.find_name(name)
        self._check_number(len(images), "images")
        if not labels:
            raise ProblemError("The request has no labels.", param="labels")
        if len(labels) > self.config.max_labels:
            raise _too_many("labels", len(labels), self.config.max_labels, "labels")
        client = self._clients[found]
        try:
            find_templates(templates)
        except InputError as error:
            raise find_problem(error, "templates") from error
        try:
            # Apart from the images, so that an index in an error is of a label.
            if none_of_these:
                open_set.check_labels(labels)
            await client.class_embeddings(labels, templates=templates)
        except InputError as error:
            param = "labels" if error.index is None else f"labels[{error.index}]"
            raise find_problem(error, param) from error
        except ClipRTError as error:
            raise find_problem(error) from error

        problems: dict[int, ProblemError] = {}

        async def score() -> Scores:
            content = await self._read_all(images, problems if on_error == "skip" else None)
            return await client.zero_shot(
                content,
                labels,
                templates=templates,
                none_of_these=none_of_these,
                on_error=on_error,
            )

        scores = await _located(score(), images, range(len(images)))
        for failure in scores.failures:
            index = getattr(failure, "index", None)
            if index is not None:
                problems.setdefault(index, _locate(failure, images[index].param))
        indices = range(len(images)) if scores.indices is None else scores.indices.tolist()
        return Classification(found, scores, tuple(indices), problems)

    async def check(self) -> dict[str, str]:
        """Have every model embed what its answer is known of; return what is wrong, by model."""
        if self.is_draining:
            return dict.fromkeys(self.names, "shutting down")
        age_s = time.monotonic() - self._checked_s
        if age_s < CHECK_EVERY_S:
            return self._problems
        if self._checking is None:
            self._checking = asyncio.ensure_future(self._check_all())
        checking = asyncio.shield(self._checking)
        if age_s > MAX_CHECK_AGE_S:
            return await checking
        try:
            return await asyncio.wait_for(checking, MAX_CHECK_WAIT_S)
        # Under load its turn comes late; what was found last is young enough.
        except asyncio.TimeoutError:
            return self._problems

    async def _check_all(self) -> dict[str, str]:
        try:
            found: dict[str, str] = {}
            for name, client in self._clients.items():
                if problem := await _check(client):
                    found[name] = problem
                else:
                    with contextlib.suppress(ClipRTError):  # It went away since.
                        self._fingerprints[name] = (await client.manifest()).fingerprint
            self._checked_s, self._problems = time.monotonic(), found
            return found
        finally:
            self._checking = None

    def _check_number(self, number: int, param: str = "input") -> None:
        if not number:
            raise ProblemError("The request holds nothing to embed.", param=param)
        if number > self.config.max_items:
            raise _too_many("items", number, self.config.max_items, param)

    async def _read_all(
        self, items: Sequence[Item], problems: dict[int, ProblemError] | None = None
    ) -> list[bytes]:
        """Return the bytes of images; those that are fetched are fetched a few at a time.

        Args:
            items: Images.
            problems: Takes the problem of each image that cannot be used, which then has no bytes;
                without it the first is raised.
        """
        room_bytes = self.config.max_body_bytes

        async def read(item: Item) -> bytes:
            nonlocal room_bytes
            if isinstance(item.image, bytes):
                return item.image
            content = await self._images.read(item.image or "", item.param)
            room_bytes -= len(content)
            if room_bytes < 0:
                raise ProblemError(
                    f"The images together are larger than {self.config.max_body_mib:g} MiB. Send "
                    "them in several requests.",
                    status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    code="request_too_large",
                    param=item.param,
                )
            return content

        async def attempt(index: int, item: Item) -> bytes:
            try:
                return await read(item)
            except ProblemError as problem:
                if problems is None or problem.status != HTTPStatus.BAD_REQUEST:
                    raise
                problems[index] = problem
                return b""

        return await _all(attempt(index, item) for index, item in enumerate(items))


def _too_many(what: str, number: int, limit: int, param: str) -> ProblemError:
    return ProblemError(
        f"The request holds {number} {what}; {limit} are the most. Send them in several requests.",
        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        code="too_many_items",
        param=param,
    )


def read_item(text: str, param: str, *, is_image: bool = False) -> Item:
    """Return what a string of a request is: an image if it says so or is known to be one."""
    if is_image or is_data_uri(text):
        return Item(param, image=text)
    return Item(param, text=text)


async def _all(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Await all at once; when one fails, the others are called off before that is raised."""
    works = list(works)
    if len(works) == 1:  # Most requests are of one item, and a task costs turns of the loop.
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _located(
    work: Awaitable[Result], items: Sequence[Item], indices: Sequence[int]
) -> Result:
    """Await a call on some of the items, and say of an error which item it is about."""
    try:
        return await work
    except ClipRTError as error:
        index = getattr(error, "index", None)
        if index is None:
            raise find_problem(error) from error
        raise _locate(error, items[indices[index]].param) from error


def _locate(error: ClipRTError, param: str) -> ProblemError:
    """Return what a caller is told of an error of an item."""
    problem = find_problem(error, param)
    # Whose number counts texts or images alone, and begins at 0 in each.
    problem.message = _NUMBERED.sub(param, problem.message, count=1)
    return problem


async def _check(client: AsyncClient) -> str:
    try:
        manifest = await client.manifest()
        (image,) = await client.encode_images(canary.draw_image(), timeout_s=CHECK_TIMEOUT_S)
        (text,) = await client.encode_texts(canary.TEXT, truncate=True, timeout_s=CHECK_TIMEOUT_S)
        if manifest.canary is None:
            return ""
        cosines, min_cosine = canary.compare(manifest.canary, image=image, text=text)
        if min(cosines.values()) < min_cosine:
            return "embeddings differ from those of the export"
    except ServerOverloadedError:
        return ""  # It is at work.
    except ContractError as error:
        _log.warning("%s", error)
        return "the server has another model than it should"
    except ClipRTError as error:
        return find_problem(error).message
    return ""
