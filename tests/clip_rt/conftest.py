"""A real Triton over a tiny model for the tests of the client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_repository
from owners import Owner
from search_pictures import write_drawings

import clip_rt
from clip_rt.embedded.bundled import find_model_repository
from clip_rt.embedded.server import EmbeddedServer, acquire_server
from clip_rt.search import Index


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository.write(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="session")
def bare_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_repository.write_bare(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[EmbeddedServer]:
    server = acquire_server(repository)
    yield server
    server.stop()


@pytest.fixture(scope="session", params=["embedded", "in_process"])
def client(
    server: EmbeddedServer, repository: Path, request: pytest.FixtureRequest
) -> Iterator[clip_rt.Client]:
    """A client of the embedded server, and one whose process runs the models itself."""
    with clip_rt.Client(repository=repository, server=request.param) as client:
        yield client


@pytest.fixture(scope="session")
def drawings_client() -> Iterator[clip_rt.Client]:
    """A client of the bundled model, which this process runs itself."""
    with clip_rt.Client(repository=find_model_repository(), server="in_process") as client:
        yield client


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of different drawings, to be searched."""
    write_drawings(tmp_path / "photos", 12)
    return tmp_path / "photos"


@pytest.fixture
def index(photos: Path, tmp_path: Path, drawings_client: clip_rt.Client) -> Iterator[Index]:
    with Index.open(tmp_path / "index", create=True) as index:
        index.update(drawings_client, [photos])
        yield index


@pytest.fixture
def start_owner() -> Iterator[Callable[..., Owner]]:
    owners: list[Owner] = []

    def start(program: str, *args: object) -> Owner:
        owners.append(Owner(program, *args))
        return owners[-1]

    yield start
    for owner in owners:
        owner.end()
