"""A release candidate answers a share of requests, or those whose header says so, and no more."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import tiny_repository
from PIL import Image

from clip_rt.errors import InputError, UnknownModelError
from clip_rt.gateway.application import make_application
from clip_rt.gateway.config import GatewayConfig
from clip_rt.gateway.service import Service
from clip_rt.wire import canary

OLD, NEW, BROKEN = "shop-v3", "shop-v4", "shop-broken"


def png() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Three models: an old one, a new one, and one that does not embed as its export did."""
    repository = tmp_path_factory.mktemp("models")
    tiny_repository.write(repository, OLD)
    other = {"fingerprint": "b" * 64}
    tiny_repository.write(repository, NEW, image=other, text=other)
    wrong = np.eye(tiny_repository.EMBEDDING_DIM, dtype=np.float32)
    said = {"canary": canary.write(wrong[0], wrong[1], min_cosine=0.999)}
    tiny_repository.write(repository, BROKEN, image=said, text=said)
    return repository


@asynccontextmanager
async def gateway(models: Path, **options: object) -> AsyncIterator[httpx.AsyncClient]:
    service = Service(GatewayConfig(repository=models, server="in_process", **options))
    transport = httpx.ASGITransport(app=make_application(service))
    try:
        await service.open()
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            yield http
    finally:
        await service.close()


async def ask(
    http: httpx.AsyncClient, model: str | None = OLD, choice: str | None = None
) -> tuple[str, str]:
    """Return which model answered, by the header and by the body."""
    headers = {} if choice is None else {"X-Clip-RT-Candidate": choice}
    body = {"input": ["red"], "model": model}
    answer = await http.post("/v1/embeddings", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Clip-RT-Model"], answer.json()["model"]


def test_a_share_of_requests_goes_to_the_candidate_and_says_so(models):
    async def share(candidate_share: float, number: int) -> float:
        options = {"candidate": {OLD: NEW}, "candidate_share": candidate_share}
        async with gateway(models, **options) as http:
            found = [await ask(http) for _ in range(number)]
        assert set(found) <= {(OLD, OLD), (NEW, NEW)}
        return sum(model == NEW for model, _ in found) / number

    assert asyncio.run(share(0.0, 20)) == 0
    assert asyncio.run(share(1.0, 20)) == 1
    # Five standard deviations: one run in two million is outside.
    assert abs(asyncio.run(share(0.25, 400)) - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5


def test_a_header_chooses_and_a_name_is_a_name(models):
    async def check() -> None:
        options = {"candidate": {OLD: NEW}, "alias": {"shop": OLD}, "model": (OLD,)}
        async with gateway(models, **options) as http:
            assert await ask(http, choice="always") == (NEW, NEW)
            assert await ask(http, choice="never") == (OLD, OLD)
            assert await ask(http, "shop", "Always") == (NEW, NEW)
            assert await ask(http, "shop") == (OLD, "shop")
            assert await ask(http, None, "always") == (NEW, NEW)
            assert await ask(http, NEW, "never") == (NEW, NEW)
            answer = await http.post(
                "/v1/embeddings",
                json={"input": "red"},
                headers={"X-Clip-RT-Candidate": "sometimes"},
            )
            assert answer.status_code == 400
            assert "say always or never" in answer.json()["error"]["message"]
            listed = (await http.get("/v1/models")).json()["data"]
            assert [each["id"] for each in listed] == [OLD, NEW]

    asyncio.run(check())


def test_labels_are_routed_too_and_immich_and_weaviate_keep_to_one_index(models):
    async def check() -> None:
        options = {"candidate": {OLD: NEW}, "candidate_share": 1.0, "model": (OLD,)}
        async with gateway(models, **options) as http:
            body = {"images": [png()], "labels": ["red", "blue"]}
            answer = await http.post("/v1/classify", json=body)
            assert answer.headers["X-Clip-RT-Model"] == answer.json()["model"] == NEW
            answer = await http.post("/vectorize", json={"texts": ["red"]})
            assert answer.status_code == 200
            assert "X-Clip-RT-Model" not in answer.headers

    asyncio.run(check())


def test_a_candidate_that_fails_its_canary_is_not_taken_and_is_no_fault_of_the_gateway(models):
    async def check() -> None:
        options = {"candidate": {OLD: BROKEN}, "candidate_share": 1.0, "model": (OLD,)}
        async with gateway(models, **options) as http:
            assert {await ask(http) for _ in range(20)} == {(OLD, OLD)}
            assert await ask(http, choice="always") == (BROKEN, BROKEN), "whoever insists gets it"
            ready = await http.get("/health/ready")
            assert ready.status_code == 200
            assert ready.json() == {
                "status": "ok",
                "models": {OLD: "ok", BROKEN: "embeddings differ from those of the export"},
            }
            text = (await http.get("/metrics")).text
            assert f'clip_rt_model_ready{{model="{BROKEN}"}} 0.0' in text
            assert f'clip_rt_model_ready{{model="{OLD}"}} 1.0' in text

    asyncio.run(check())


def test_a_model_that_is_no_candidate_and_fails_its_canary_is_one(models):
    async def check() -> None:
        async with gateway(models, model=(OLD, BROKEN)) as http:
            ready = await http.get("/health/ready")
            assert ready.status_code == 503
            assert ready.json()["models"][OLD] == "ok"

    asyncio.run(check())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"candidate": {OLD: "shop-v5"}}, UnknownModelError, "shop-v5"),
        ({"candidate": {"shop-v2": NEW}}, InputError, "no model here"),
        ({"candidate": {NEW: NEW}}, InputError, "for itself"),
    ],
)
def test_candidates_that_there_are_not_are_refused_at_the_start(models, options, error, words):
    async def check() -> None:
        async with gateway(models, **options):
            pass

    with pytest.raises(error, match=words):
        asyncio.run(check())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidate": {OLD: NEW}, "candidate_share": 1.5}, "within 0 and 1"),
        ({"candidate_share": 0.5}, "needs --candidate"),
        ({"url": ("a:1",), "server": "in_process"}, "exclude each other"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        GatewayConfig(**options)
