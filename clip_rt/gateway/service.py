"""The models behind the gateway, and what the protocols ask of them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from clip_rt import telemetry
from clip_rt.async_client import AsyncClient
from clip_rt.classification.zero_shot import Scores
from clip_rt.client import Client
from clip_rt.embedding import find_dimensions
from clip_rt.errors import ClipRTError, ContractError, InputError, UnknownModelError
from clip_rt.gateway.config import GatewayConfig
from clip_rt.gateway.pictures import Pictures, is_data_uri
from clip_rt.gateway.problems import ProblemError, find_problem
from clip_rt.inputs.decoding import MAX_BYTES
from clip_rt.specs import slug
from clip_rt.wire import canary

Result = TypeVar("Result")

_NUMBERED = re.compile(r"^(image|text) \d+")
CHECK_EVERY_S = 2.0
"""An answer of the health check serves all who ask within that time."""
CHECK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Item:
    """A text or an image of a request, and where in the request it is."""

    param: str
    text: str | None = None
    image: str | bytes | None = None
    """Base64, a data URI or a URL; or the encoded bytes."""


class Service:
    """One client a model. To be opened before it is used, and closed."""

    def __init__(self, config: GatewayConfig) -> None:
        self.config = config
        self.is_draining = False
        self._clients: dict[str, AsyncClient] = {}
        self._names: dict[str, str] = {}
        self._pictures = Pictures(config.image_host, max_bytes=MAX_BYTES)
        self._checking = asyncio.Lock()
        self._checked: tuple[float, dict[str, str]] = (0.0, {})

    async def open(self) -> None:
        """Find the models, starting a server of its own where none is named.

        Raises:
            ClipRTError: there is none, or one that is named is not there.
        """
        make = partial(
            Client,
            list(self.config.url) or None,
            repository=self.config.repository,
            server=self.config.server,
            timeout_s=self.config.timeout_s,
            start_timeout_s=self.config.start_timeout_s,
        )
        with make() as client:
            found = await asyncio.to_thread(client.list_models)
            missing = [name for name in self.config.model if slug(name) not in found]
            if missing or not found:
                raise UnknownModelError(
                    f"the server has no model {missing[0]!r}; it has {', '.join(found) or 'none'}."
                    if missing
                    else "the server has no model.",
                    model=missing[0] if missing else None,
                    known=found,
                )
            for name in self.config.model or found:
                mine = AsyncClient(
                    list(self.config.url) or None,
                    repository=self.config.repository,
                    server=self.config.server,
                    model=name,
                    timeout_s=self.config.timeout_s,
                    start_timeout_s=self.config.start_timeout_s,
                )
                # Now, and not at the first request: it connects, and fetches the tokenizer.
                manifest = await mine.manifest()
                await mine.encode_texts(
                    canary.TEXT, truncate=True, timeout_s=self.config.start_timeout_s
                )
                self._clients[manifest.model] = mine
                self._names |= {each: manifest.model for each in (slug(name), manifest.model)}
        for alias, name in self.config.alias.items():
            self._names[alias] = self.find_name(name)

    async def close(self) -> None:
        """Hang up, and end a server of its own."""
        for client in self._clients.values():
            await client.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The models, the one that is used by default first."""
        return tuple(self._clients)

    def find_name(self, name: str | None) -> str:
        """Return the model that a request means; the default one if it names none.

        Raises:
            UnknownModelError: there is no such model.
        """
        if not name:
            return self.names[0]
        if found := self._names.get(name):
            return found
        raise UnknownModelError(
            f"there is no model {name[:80]!r} here; there is {', '.join(self.names)}.",
            model=name[:80],
            known=self.names,
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
        found = self._find(name)
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
            content = [await self._read(each) for each in images]
            return await client.encode_images(content, dimensions=dimensions), 0

        works: list[tuple[list[int], Awaitable[tuple[NDArray[np.float32], int]]]] = []
        if indices := [index for index, item in enumerate(items) if item.text is not None]:
            works.append((indices, embed_texts([items[index].text or "" for index in indices])))
        if indices := [index for index, item in enumerate(items) if item.text is None]:
            works.append((indices, embed_images([items[index] for index in indices])))
        answers = await asyncio.gather(*(_located(work, items, each) for each, work in works))
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
    ) -> tuple[str, Scores]:
        """Say how well each label fits each image; the classes' embeddings are cached.

        Raises:
            ProblemError: an image, a label, a template or the model cannot be used.
        """
        found = self._find(name)
        self._check_number(len(images))
        client = self._clients[found]
        try:
            # Apart from the images, so that an index in an error is of a label.
            await client.class_embeddings(labels, templates=templates)
        except InputError as error:
            param = "templates" if error.index is None else f"labels[{error.index}]"
            raise find_problem(error, param) from error
        except ClipRTError as error:
            raise find_problem(error) from error

        async def score() -> Scores:
            content = [await self._read(each) for each in images]
            return await client.zero_shot(content, labels, templates=templates)

        return found, await _located(score(), images, range(len(images)))

    async def check(self) -> dict[str, str]:
        """Have every model embed what its answer is known of; return what is wrong, by model."""
        if self.is_draining:
            return dict.fromkeys(self.names, "shutting down")
        async with self._checking:
            checked_s, found = self._checked
            if time.monotonic() - checked_s < CHECK_EVERY_S:
                return found
            found = {
                name: problem
                for name, client in self._clients.items()
                if (problem := await _check(client))
            }
            self._checked = time.monotonic(), found
            return found

    def _find(self, name: str | None) -> str:
        try:
            return self.find_name(name)
        except UnknownModelError as error:
            raise find_problem(error) from error

    def _check_number(self, number: int) -> None:
        if not number:
            raise ProblemError("The request holds nothing to embed.", param="input")
        if number > self.config.max_items:
            raise ProblemError(
                f"The request holds {number} items; {self.config.max_items} are the most. Send "
                "them in several requests.",
                status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                code="too_many_items",
                param="input",
            )

    async def _read(self, item: Item) -> bytes:
        if isinstance(item.image, bytes):
            return item.image
        return await self._pictures.read(item.image or "", item.param)


def read_item(text: str, param: str, *, is_image: bool = False) -> Item:
    """Return what a string of a request is: an image if it says so or is known to be one."""
    if is_image or is_data_uri(text):
        return Item(param, image=text)
    return Item(param, text=text)


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
        param = items[indices[index]].param
        problem = find_problem(error, param)
        # Whose number counts texts or images alone, and begins at 0 in each.
        problem.message = _NUMBERED.sub(param, problem.message, count=1)
        raise problem from error


async def _check(client: AsyncClient) -> str:
    try:
        manifest = await client.manifest()
        (image,) = await client.encode_images(canary.draw_image(), timeout_s=CHECK_TIMEOUT_S)
        (text,) = await client.encode_texts(canary.TEXT, timeout_s=CHECK_TIMEOUT_S)
        if manifest.canary is None:
            return ""
        cosines, min_cosine = canary.compare(manifest.canary, image=image, text=text)
        if min(cosines.values()) < min_cosine:
            return "embeddings differ from those of the export"
    except ContractError as error:
        return str(error)
    except ClipRTError as error:
        return find_problem(error).message
    return ""
