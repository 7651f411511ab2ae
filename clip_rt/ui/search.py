"""What the page asks of an index: by words and images, near-duplicates, thumbnails."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from functools import partial
from http import HTTPStatus
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from clip_rt.errors import ContractError, InputError, SearchIndexError
from clip_rt.gateway.application import Endpoint
from clip_rt.gateway.problems import RETRY_AFTER_S, ProblemError, find_problem
from clip_rt.gateway.reading import answer_json, read_json
from clip_rt.gateway.service import Item, Service
from clip_rt.search.index import DUPLICATE_COSINE, default_folder
from clip_rt.search.query import combine, split_words
from clip_rt.search.results import Hit
from clip_rt.ui.gallery import Gallery

MAX_HITS = 500
MAX_THUMBNAILS = 4
"""Made at a time; decoding would keep models from the cores."""

Result = TypeVar("Result")


class IndexAnswer(msgspec.Struct):
    """The index, as it is now."""

    folder: str
    is_default: bool
    """Whether commands find it unless they are told another."""
    problem: str
    """Why it cannot be searched, and the way out; empty where it can."""
    images: int
    files: int
    bad: int
    folders: list[str]


class SearchRequest(msgspec.Struct):
    """What is wanted, and what is not."""

    words: str = ""
    """As `clip_rt.search.Query.parse` reads them."""
    images: list[str] = []
    """Wanted; each base64 or a data URI."""
    like: list[str] = []
    """Wanted: images of the index, by `sha256`."""
    model: str | None = None
    top: int = 24


class Found(msgspec.Struct):
    """An image of the index."""

    path: str
    score: float
    sha256: str
    width_px: int
    height_px: int
    size_bytes: int
    modified: str
    copies: list[str]


class SearchAnswer(msgspec.Struct):
    """The nearest images, best first; and how the words were read."""

    data: list[Found]
    model: str
    texts: list[str]
    minus_texts: list[str]
    object: str = "list"


class DuplicatesRequest(msgspec.Struct):
    """How near images have to be."""

    threshold: float = DUPLICATE_COSINE
    """Smallest cosine."""
    top: int = 100
    """Groups."""


class DuplicatesAnswer(msgspec.Struct):
    """Groups, the largest first."""

    data: list[list[Found]]
    num_groups: int
    object: str = "list"


_search_decoder = msgspec.json.Decoder(SearchRequest)
_duplicates_decoder = msgspec.json.Decoder(DuplicatesRequest)


class SearchView:
    """The paths that the page searches by.

    Args:
        gallery: What is searched.
    """

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._thumbnails = asyncio.Semaphore(MAX_THUMBNAILS)
        self._comparing = asyncio.Lock()

    def list_endpoints(self) -> tuple[Endpoint, ...]:
        """Return the paths."""
        return (
            Endpoint(method="GET", path="/ui/index", handler=self.show_index, summary="The index"),
            Endpoint(
                method="POST",
                path="/ui/search",
                handler=self.search,
                summary="Images of the index by words and by images",
                is_inference=True,
            ),
            Endpoint(
                method="POST",
                path="/ui/duplicates",
                handler=self.find_duplicates,
                summary="Images of the index that are nearly the same",
                is_inference=True,
            ),
            Endpoint(
                method="GET",
                path="/ui/thumbnails/{sha256}",
                handler=self.show_thumbnail,
                summary="A small picture of an image of the index",
            ),
        )

    async def show_index(self, service: Service, request: Request) -> Response:
        """Say what there is to search."""
        return answer_json(await asyncio.to_thread(self._describe))

    def _describe(self) -> IndexAnswer:
        gallery = self._gallery
        folder, problem = _to_text(str(gallery.folder.absolute())), gallery.find_problem()
        is_default = gallery.folder == default_folder()
        if problem:
            return IndexAnswer(folder, is_default, problem, 0, 0, 0, [])
        index = gallery.open()
        folders = [_to_text(each) for each in index.folders]
        return IndexAnswer(folder, is_default, "", **index.count(), folders=folders)

    async def search(self, service: Service, request: Request) -> Response:
        """Find the images that are nearest to words and images."""
        asked = await read_json(request, _search_decoder)
        if not 1 <= asked.top <= MAX_HITS:
            raise ProblemError(
                f"top is {asked.top}; 1 to {MAX_HITS} images are shown.", param="top"
            )
        wanted, unwanted = split_words(asked.words)
        texts = [wanted] if wanted else []
        items = [Item("words", text=each) for each in texts]
        for index, image in enumerate(asked.images):
            items.append(Item(f"images[{index}]", image=image))
        for index, sha256 in enumerate(asked.like):
            content = await asyncio.to_thread(partial(self._read, sha256, f"like[{index}]"))
            items.append(Item(f"like[{index}]", image=content))
        if not items:
            raise ProblemError(
                "A search needs words or an image that is wanted; what is not wanted comes on top.",
                param="words",
            )
        num_wanted = len(items)
        items += [Item("words", text=each) for each in unwanted]
        manifest = await service.manifest(asked.model)
        model, rows, _ = await service.embed(asked.model, items)
        if await service.manifest(asked.model) != manifest:
            raise ProblemError(
                "The model was replaced during the search. Ask again.",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
                code="model_replaced",
                retry_after_s=RETRY_AFTER_S,
            )
        try:
            vector = combine(rows[:num_wanted], rows[num_wanted:])
        except InputError as error:
            raise find_problem(error, "words") from error
        hits = await _of_the_index(
            asyncio.to_thread(self._gallery.find, vector, manifest, asked.top)
        )
        return answer_json(
            SearchAnswer(
                data=list(map(_found, hits)), model=model, texts=texts, minus_texts=list(unwanted)
            )
        )

    def _read(self, sha256: str, param: str) -> bytes:
        try:
            content = self._gallery.read(sha256)
        except SearchIndexError as error:
            raise _refuse_index(error) from error
        if content is None:
            raise _not_there(sha256, param)
        return content

    async def find_duplicates(self, service: Service, request: Request) -> Response:
        """Find groups of images that are nearly the same."""
        asked = await read_json(request, _duplicates_decoder)
        # One at a time: it takes all cores, and much memory.
        async with self._comparing:
            groups = await _of_the_index(
                asyncio.to_thread(self._gallery.find_duplicates, asked.threshold)
            )
        shown = groups[: max(asked.top, 0)]
        return answer_json(
            DuplicatesAnswer([list(map(_found, each)) for each in shown], len(groups))
        )

    async def show_thumbnail(self, service: Service, request: Request) -> Response:
        """Show an image of the index, small."""
        sha256 = str(request.path_params["sha256"])
        async with self._thumbnails:
            content = await _of_the_index(asyncio.to_thread(self._gallery.make_thumbnail, sha256))
        if content is None:
            raise _not_there(sha256, "sha256")
        # Its address says what it holds.
        headers = {"Cache-Control": "private, max-age=86400, immutable"}
        return Response(content, headers=headers, media_type="image/jpeg")


async def _of_the_index(work: Awaitable[Result]) -> Result:
    """Await what is asked of the index, and say of it what the page can show."""
    try:
        return await work
    except (ContractError, SearchIndexError) as error:
        raise _refuse_index(error) from error


def _refuse_index(error: Exception) -> ProblemError:
    message = str(error)
    return ProblemError(
        message[:1].upper() + message[1:], status=HTTPStatus.CONFLICT, code="index_unusable"
    )


def _not_there(sha256: str, param: str) -> ProblemError:
    return ProblemError(
        f"The index has no image {sha256[:12]!r} whose file is unchanged. Bring it up to date with "
        "clip-rt index.",
        status=HTTPStatus.NOT_FOUND,
        code="image_not_found",
        param=param,
    )


def _found(hit: Hit) -> Found:
    return Found(
        path=_to_text(hit.path),
        score=hit.score,
        sha256=hit.sha256,
        width_px=hit.width_px,
        height_px=hit.height_px,
        size_bytes=hit.size_bytes,
        modified=hit.modified,
        copies=[_to_text(each) for each in hit.copies],
    )


def _to_text(path: str) -> str:
    """Return a path as text that can be sent: names of files need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")
