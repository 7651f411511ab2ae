"""The HTTP gateway as its callers see it: a process of its own in front of a real Triton."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import http.client
import http.server
import io
import ipaddress
import json
import os
import random
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import tiny_repository
import trustme
from gateway_process import Gateway
from owners import ROOT, find_processes, find_remains
from PIL import Image
from processes import running

import clip_rt
from clip_rt.errors import InputError
from clip_rt.gateway.config import GatewayConfig
from clip_rt.gateway.pictures import ImageSource
from clip_rt.gateway.problems import ProblemError
from clip_rt.inputs import fetching

pytestmark = pytest.mark.slow

RECORDED = Path(__file__).with_name("recorded")
NUM_HOSTILE = int(os.environ.get("CLIP_RT_NUM_HOSTILE", "600"))
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(colour: str = "red", size: tuple[int, int] = (80, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(file, "PNG")
    return file.getvalue()


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Gateway]]:
    started: list[Gateway] = []

    def start(*options: object, **environment: str) -> Gateway:
        started.append(Gateway(*options, **environment))
        return started[-1]

    yield start
    for gateway in started:
        gateway.dispose()


@pytest.fixture(scope="module")
def gateway(start, server, repository):
    return start("--repository", repository, "--alias", "ViT-B-32__openai", "tiny")


@pytest.fixture
def caller(gateway) -> Iterator[httpx.Client]:
    with gateway.client() as caller:
        yield caller


@pytest.fixture
def sdk(gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


def embed(caller: httpx.Client, content: object) -> httpx.Response:
    return caller.post("/v1/embeddings", json={"input": content})


def vectors(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([each["embedding"] for each in answer.json()["data"]], np.float32)


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


@pytest.mark.parametrize("encoding", [openai.omit, "float", "base64"])
def test_openai_library_gets_the_vectors_of_the_client(sdk, client, encoding):
    answer = sdk.embeddings.create(
        model="tiny",
        input=["a red car", data_uri(png("blue")), "blue"],
        encoding_format=encoding,
    )
    rows = [each.embedding for each in answer.data]
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    rows = np.array(rows, np.float32)
    np.testing.assert_array_equal(rows[[0, 2]], client.encode_texts(["a red car", "blue"]))
    np.testing.assert_array_equal(rows[[1]], client.encode_images([png("blue")]))
    assert [each.index for each in answer.data] == [0, 1, 2]
    # begin, a, red, car, end; begin, blue, end
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 8
    assert answer.model == "tiny"


def test_openai_library_lists_models_and_raises_its_own_errors(sdk):
    assert [each.id for each in sdk.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match=r"'other'.*tiny"):
        sdk.embeddings.create(model="other", input="red")
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False") as told:
        sdk.embeddings.create(model="tiny", input=[[1, 2, 3]])
    assert told.value.param == "input[0]"


@pytest.mark.parametrize(
    "body",
    [
        {"input": data_uri(png())},
        {"input": [data_uri(png())], "model": None},
        {"input": base64.b64encode(png()).decode(), "modality": "image"},
        {"input": {"image": base64.b64encode(png()).decode()}},
        {"input": {"image": base64.encodebytes(png()).decode()}},
        {"input": [{"type": "image_url", "image_url": {"url": data_uri(png())}}]},
        {"input": [{"image_url": data_uri(png())}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": data_uri(png())}]}]},
    ],
    ids=["string", "list", "modality", "part", "lines", "image_url", "url string", "messages"],
)
def test_images_come_in_every_form_that_is_in_use(caller, client, body):
    answer = vectors(caller.post("/v1/embeddings", json=body))
    np.testing.assert_array_equal(answer, client.encode_images([png()]))


@pytest.mark.parametrize(
    ("content", "param", "words"),
    [
        (["red", ""], "input[1]", "says nothing"),
        (["red", "x " * 200], "input[1]", "202 tokens"),
        (["red", data_uri(png()), data_uri(b"none")], "input[2]", "no readable"),
        (["red", {"image": "%%"}], "input[1]", "neither base64"),
        (["red", {"image": "\u00e9" * 8}], "input[1]", "neither base64"),
        (["red", {"image": "data:image/png;base64"}], "input[1]", "without a comma"),
        ([{"text": "a", "image": "b"}], "input[0]", "exactly one"),
        ([{}], "input[0]", "exactly one"),
        ([1, 2], "input[0]", "token ids"),
        ([None], "input[0]", "Expected"),
        ([], "input", "nothing"),
        (None, "input", "input or in messages"),
        (["red"] * 257, "input", "256 are the most"),
        ([{"image": "http://127.0.0.1/a.png"}], "input[0]", "not fetched"),
    ],
)
def test_an_error_names_the_item_and_the_way_out(caller, content, param, words):
    status = 413 if words.startswith("256") else 400
    error = error_of(embed(caller, content), status)
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_text_is_cut_only_where_that_is_asked_for(caller, client):
    long = "red " * 200
    answer = caller.post("/v1/embeddings", json={"input": long, "truncate": True})
    np.testing.assert_array_equal(vectors(answer), client.encode_texts(long, truncate=True))


def test_labels_are_ranked_as_the_client_does(caller, client):
    body = {
        "images": [data_uri(png("blue")), base64.b64encode(png("red")).decode()],
        "labels": ["red", "green", "blue"],
        "templates": ["a photo of a {}.", "{}"],
        "top_k": 2,
    }
    answer = caller.post("/v1/classify", json=body).json()
    scores = client.zero_shot(
        [png("blue"), png("red")], body["labels"], templates=body["templates"]
    )
    ranked = [
        [(each["label"], each["probability"]) for each in row["labels"]] for row in answer["data"]
    ]
    assert [[label for label, _ in row] for row in ranked] == [
        [label for label, _ in row] for row in scores.top(2)
    ]
    np.testing.assert_allclose(
        [[each for _, each in row] for row in ranked],
        [[each for _, each in row] for row in scores.top(2)],
        atol=1e-6,
    )
    assert answer["score"] == "softmax"


def test_an_image_that_cannot_be_used_is_skipped_where_that_is_asked_for(caller, client):
    images = [png("blue"), b"no image", png("red"), b""]
    body = {
        "images": [*(base64.b64encode(each).decode() for each in images), "%%"],
        "labels": ["red", "green", "blue"],
        "none_of_these": True,
        "on_error": "skip",
    }
    answer = caller.post("/v1/classify", json=body).json()
    assert [each["index"] for each in answer["data"]] == [0, 2]
    assert [(each["index"], each["code"]) for each in answer["errors"]] == [
        (1, "invalid_image"),
        (3, "invalid_image"),
        (4, "invalid_image"),
    ]
    assert "no readable" in answer["errors"][0]["message"]
    assert "neither base64" in answer["errors"][2]["message"]
    scores = client.zero_shot([images[0], images[2]], body["labels"], none_of_these=True)
    for row, told in enumerate(answer["data"]):
        assert told["labels"][0]["label"] == scores.best[row]
        by_label = {each["label"]: each for each in told["labels"]}
        assert by_label["none of these"]["similarity"] is None
        for index, label in enumerate(body["labels"]):
            said = by_label[label]
            assert said["probability"] == pytest.approx(scores.probabilities[row, index], abs=1e-6)
            assert said["similarity"] == pytest.approx(scores.similarities[row, index], abs=1e-6)
    whole = {**body, "on_error": "raise"}
    assert error_of(caller.post("/v1/classify", json=whole))["param"] == "images[4]"


def test_all_images_may_be_skipped(caller):
    body = {"images": ["AAAA", "BBBB"], "labels": ["red"], "on_error": "skip"}
    answer = caller.post("/v1/classify", json=body).json()
    assert answer["data"] == []
    assert [each["index"] for each in answer["errors"]] == [0, 1]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"labels": ["red", ""]}, "labels[1]"),
        ({"labels": []}, "labels"),
        ({"labels": ["a"] * 10_001}, "labels"),
        ({"templates": ["no slot"]}, "templates"),
        ({"images": ["AAAA"]}, "images[0]"),
        ({"images": []}, "images"),
        ({"top_k": -3}, "top_k"),
        ({"labels": ["red", "none of these"], "none_of_these": True}, "labels[1]"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_what_cannot_be_classified_is_named(caller, change, param):
    body = {"images": [data_uri(png())], "labels": ["red", "blue"]} | change
    status = 413 if len(body["labels"]) > 10_000 else 400
    assert error_of(caller.post("/v1/classify", json=body), status)["param"] == param


def test_immich_gets_a_vector_as_a_string(caller, client):
    assert caller.get("/ping").text == "pong"
    visual = {"clip": {"visual": {"modelName": "ViT-B-32__openai"}}}
    answer = caller.post(
        "/predict", data={"entries": json.dumps(visual)}, files={"image": png("green")}
    ).json()
    assert (answer["imageWidth"], answer["imageHeight"]) == (80, 64)
    found = np.array(json.loads(answer["clip"]), np.float32)
    np.testing.assert_array_equal(found, client.encode_images([png("green")])[0])
    textual = {"clip": {"textual": {"modelName": "tiny", "options": {"language": "de"}}}}
    answer = caller.post("/predict", data={"entries": json.dumps(textual), "text": "red " * 99})
    found = np.array(json.loads(answer.json()["clip"]), np.float32)
    np.testing.assert_array_equal(found, client.encode_texts("red " * 99, truncate=True)[0])


def replay(gateway: Gateway, name: str) -> dict[str, object]:
    """Send what a client of this protocol sent, byte by byte, and return the answer."""
    with socket.create_connection(gateway.address(), timeout=30) as connection:
        connection.sendall((RECORDED / f"{name}.http").read_bytes())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        content = answer.read()
        assert answer.status == 200, content
        return json.loads(content)


def test_what_immich_sends_is_answered(gateway, client):
    """Node's fetch of a form, as Immich's server makes it."""
    found = replay(gateway, "immich_visual")
    assert found.keys() == {"clip", "imageHeight", "imageWidth"}
    assert (found["imageWidth"], found["imageHeight"]) == (80, 64)
    vector = np.array(json.loads(found["clip"]), np.float32)
    np.testing.assert_array_equal(vector, client.encode_images([png("green", (80, 64))])[0])
    found = replay(gateway, "immich_textual")
    assert found.keys() == {"clip"}
    vector = np.array(json.loads(found["clip"]), np.float32)
    np.testing.assert_array_equal(vector, client.encode_texts("a réd car")[0])


def test_what_weaviate_sends_is_answered(gateway, client):
    """As Go's HTTP client writes it: no type of the content, and null for no images."""
    found = replay(gateway, "weaviate_texts")
    assert found["imageVectors"] == []
    vectors = np.array(found["textVectors"], np.float32)
    np.testing.assert_array_equal(vectors, client.encode_texts(["a red car", "blue"]))
    found = replay(gateway, "weaviate_images")
    assert found["textVectors"] == []
    vectors = np.array(found["imageVectors"], np.float32)
    np.testing.assert_array_equal(vectors, client.encode_images([png("green", (80, 64))]))


def test_immich_is_told_what_is_missing(caller):
    def post(entries: object, **parts: object) -> httpx.Response:
        return caller.post("/predict", data={"entries": json.dumps(entries)}, **parts)

    textual = {"clip": {"textual": {"modelName": "tiny"}}}
    assert error_of(post(textual))["param"] == "text"
    assert error_of(post({"clip": {"visual": {"modelName": "tiny"}}}))["param"] == "image"
    assert error_of(caller.post("/predict", data={"text": "red"}))["param"] == "entries"
    assert "--immich-url" in error_of(post({"ocr": {}}), 501)["message"]
    assert error_of(caller.post("/predict", content=b"no form"))["param"] == "entries"


class _Recorder(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"ocr": "from elsewhere"}')

    def log_message(self, *_: object) -> None:
        pass


def test_immich_tasks_of_others_are_passed_on_as_they_came(start, repository, server):
    with http.server.HTTPServer(("127.0.0.1", 0), _Recorder) as other:
        other.bodies = []
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{other.server_port}"
            gateway = start("--repository", repository, "--immich-url", url)
            with gateway.client() as caller:
                request = caller.build_request(
                    "POST",
                    "/predict",
                    data={"entries": json.dumps({"ocr": {"detection": {"modelName": "x"}}})},
                    files={"image": png()},
                )
                content = request.read()
                assert caller.send(request).json() == {"ocr": "from elsewhere"}
            assert other.bodies == [content]
        finally:
            other.shutdown()
            thread.join(timeout=60)


def test_weaviate_gets_vectors_and_errors_of_its_own_form(caller, client):
    assert caller.get("/.well-known/live").status_code == 204
    assert caller.get("/.well-known/ready").status_code == 204
    assert caller.get("/meta").json()["model"] == "tiny"
    body = {"texts": ["red", "blue"], "images": [base64.b64encode(png("green")).decode()]}
    answer = caller.post("/vectorize", json=body).json()
    np.testing.assert_array_equal(
        np.array(answer["textVectors"], np.float32), client.encode_texts(body["texts"])
    )
    np.testing.assert_array_equal(
        np.array(answer["imageVectors"], np.float32), client.encode_images([png("green")])
    )
    assert caller.post("/vectorize", json={}).json() == {"textVectors": [], "imageVectors": []}
    answer = caller.post("/vectorize", json={"images": ["AAAA"]})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("images[0]")


def test_metrics_and_a_description_are_there(caller):
    embed(caller, "red")
    metrics = caller.get("/metrics").text
    assert 'clip_rt_http_request_seconds_count{path="/v1/embeddings",status="200"}' in metrics
    assert "clip_rt_http_requests_in_flight 0.0" in metrics
    assert 'clip_rt_call_seconds_count{method="encode_texts"}' in metrics
    described = caller.get("/openapi.json").json()
    schema = described["components"]["schemas"]["EmbeddingsRequest"]
    assert {"input", "encoding_format", "dimensions"} <= set(schema["properties"])
    assert described["paths"]["/predict"]["post"]["summary"]
    for path, name in (("/v1/embeddings", "Problem"), ("/vectorize", "Refusal")):
        refused = described["paths"][path]["post"]["responses"]["default"]["content"]
        assert refused == {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    assert list(described["paths"]["/.well-known/ready"]["get"]["responses"]) == ["204", "default"]
    assert error_of(caller.get("/nowhere"), 404)["code"] == "not_found"
    answer = caller.get("/v1/embeddings")
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["Allow"] == "POST"
    assert caller.get("/ping/").status_code == 404


def test_dimensions_are_those_a_model_was_trained_for(start, caller, tmp_path):
    error = error_of(caller.post("/v1/embeddings", json={"input": "red", "dimensions": 4}))
    assert error["param"] == "dimensions"
    said = {"matryoshka_dimensions": (3,)}
    repository = tiny_repository.write(tmp_path / "models", image=said, text=said)
    gateway = start("--repository", repository)
    with gateway.client() as other:
        body = {"input": ["red", data_uri(png())], "dimensions": 3}
        cut = vectors(other.post("/v1/embeddings", json=body))
    whole = vectors(embed(caller, body["input"]))[:, :3]
    np.testing.assert_allclose(cut, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-6)


def test_a_server_of_its_own_unloads_what_is_idle(start, caller, tmp_path):
    options = ("--repository", tiny_repository.write(tmp_path), "--server", "in_process")
    gateway = start(*options, "--idle-unload-s", "0.2")
    with gateway.client() as other:
        for number in range(1, 3):
            gateway.wait_for("tiny_text was idle for 0.2 s: unloaded", number)
            found, expected = vectors(embed(other, "red")), vectors(embed(caller, "red"))
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_tokens_are_asked_for_everywhere_but_at_health_checks(start, repository, server, tmp_path):
    (tmp_path / "tokens").write_text("first\nsecond\n")
    gateway = start("--repository", repository, "--token-file", tmp_path / "tokens")
    with gateway.client() as caller:
        for given in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}):
            answer = caller.post("/v1/embeddings", json={"input": "red"}, headers=given)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert caller.get("/metrics", headers=given).status_code == 401
        for path in ("/health/live", "/health/ready", "/ping", "/.well-known/ready"):
            assert caller.get(path).status_code in (200, 204)
        for token in ("first", "second"):
            given = {"Authorization": f"Bearer {token}"}
            assert caller.get("/v1/models", headers=given).status_code == 200
        operation = caller.get("/openapi.json").json()["paths"]["/v1/embeddings"]["post"]
        assert operation["security"] == [{"token": []}]


def test_tls_is_spoken_with_a_certificate(start, repository, server, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "certificate")
    certificate.private_key_pem.write_to_path(tmp_path / "key")
    authority.cert_pem.write_to_path(tmp_path / "authority")
    gateway = start(
        *("--repository", repository),
        *("--certificate", tmp_path / "certificate", "--private-key", tmp_path / "key"),
    )
    assert gateway.url.startswith("https://")
    context = ssl.create_default_context(cafile=str(tmp_path / "authority"))
    with gateway.client(verify=context) as caller:
        assert embed(caller, "red").status_code == 200


def test_tokens_that_are_there_and_empty_let_nobody_in(repository):
    done = subprocess.run(
        [sys.executable, "-m", "clip_rt", "gateway", "--repository", str(repository)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=os.environ | {"CLIP_RT_TOKENS": ""},
    )
    assert done.returncode == 1
    assert "$CLIP_RT_TOKENS holds no token" in done.stderr


def test_base64_may_have_lines(caller, client):
    body = {"input": base64.encodebytes(png("blue")).decode(), "modality": "image"}
    answer = vectors(caller.post("/v1/embeddings", json=body))
    np.testing.assert_array_equal(answer, client.encode_images([png("blue")]))


def test_models_run_in_the_gateways_own_process(start, repository, client):
    gateway = start("--repository", repository, "--server", "in_process")
    with gateway.client() as caller:
        answer = vectors(embed(caller, ["red", data_uri(png())]))
        assert caller.get("/health/ready").status_code == 200
    expected = np.concatenate([client.encode_texts("red"), client.encode_images([png()])])
    np.testing.assert_allclose(answer, expected, atol=1e-6)
    assert not find_processes("tritonserver", gateway.process.pid)
    assert gateway.end() == 0


def test_a_server_of_its_own_serves_all_models_and_ends_with_it(start, tmp_path):
    repository = tiny_repository.write(tmp_path / "models")
    tiny_repository.write(repository, "other")
    gateway = start("--repository", repository, "--model", "other", "tiny")
    with gateway.client() as caller:
        assert [each["id"] for each in caller.get("/v1/models").json()["data"]] == ["other", "tiny"]
        assert embed(caller, "red").json()["model"] == "other"
        body = {"input": "red", "model": "tiny"}
        assert caller.post("/v1/embeddings", json=body).json()["model"] == "tiny"
    pid = gateway.process.pid
    assert find_processes("/models/tiny_text/", pid)
    assert gateway.end() == 0
    assert not find_remains(pid)
    assert "Traceback" not in "".join(gateway.log)


def test_it_stands_before_a_server_somebody_else_runs(start, tmp_path):
    repository = tiny_repository.write(tmp_path / "models")
    command = [sys.executable, "-m", "clip_rt", "serve", "--repository", str(repository)]
    other = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        url = other.stdout.readline().partition(" on ")[2].partition(",")[0]
        gateway = start("--url", url)
        with gateway.client() as caller:
            assert embed(caller, "red").status_code == 200
        assert gateway.end() == 0
    finally:
        other.terminate()
        other.communicate(timeout=60)


def test_it_waits_for_a_server_that_is_not_there_yet(start, tmp_path):
    repository = tiny_repository.write(tmp_path / "models")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "clip_rt", "serve", "--repository", str(repository)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start, "--url", f"127.0.0.1:{port}")
        with pytest.raises(concurrent.futures.TimeoutError):
            starting.result(timeout=8)
        with running([*command, "--port", str(port)], stdout=subprocess.DEVNULL, cwd=ROOT):
            gateway = starting.result(timeout=60)
            gateway.wait_for(f"waiting for 127.0.0.1:{port}")
            with gateway.client() as caller:
                assert embed(caller, "red").status_code == 200


def test_it_ends_when_no_server_comes(tmp_path):
    command = [sys.executable, "-m", "clip_rt", "gateway", "--url", "127.0.0.1:1", "--port", "0"]
    done = subprocess.run(
        [*command, "--start-timeout-s", "1"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 1
    assert "error: 127.0.0.1:1" in done.stderr


def test_health_is_false_while_the_server_is_away_and_true_afterwards(start, tmp_path):
    gateway = start("--repository", tiny_repository.write(tmp_path / "models"))
    (stub,) = find_processes("/models/tiny_text/", gateway.process.pid)
    with gateway.client() as caller:
        assert caller.get("/health/ready").json() == {"status": "ok", "models": {"tiny": "ok"}}
        os.kill(stub, signal.SIGSTOP)
        try:
            deadline_s = time.monotonic() + 20
            while (answer := caller.get("/health/ready")).status_code != 503:
                assert time.monotonic() < deadline_s
                time.sleep(0.5)
            assert "tiny" in answer.json()["models"]
            assert caller.get("/health/live").status_code == 200
        finally:
            os.kill(stub, signal.SIGCONT)
        deadline_s = time.monotonic() + 30
        while caller.get("/health/ready").status_code != 200:
            assert time.monotonic() < deadline_s
            time.sleep(0.5)


def test_told_to_end_it_answers_what_is_under_way_and_sends_others_elsewhere(start, tmp_path):
    repository = tiny_repository.write(
        tmp_path / "models", queue_policy="max_queue_delay_microseconds: 1500000"
    )
    gateway = start("--repository", repository, "--drain-s", 1.0)
    with gateway.client() as caller, concurrent.futures.ThreadPoolExecutor() as pool:
        under_way = pool.submit(lambda: embed(caller, "red").status_code)
        time.sleep(0.5)
        gateway.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        answer = caller.get("/health/ready")
        assert (answer.status_code, answer.json()["models"]["tiny"]) == (503, "shutting down")
        assert under_way.result(timeout=30) == 200
    assert gateway.process.wait(timeout=60) == 0


def test_more_requests_than_there_may_be_are_refused_at_once(start, tmp_path):
    repository = tiny_repository.write(
        tmp_path / "models", queue_policy="max_queue_delay_microseconds: 1000000"
    )
    gateway = start("--repository", repository, "--max-concurrent-requests", 2)
    with gateway.client() as caller, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def ask(_: int) -> tuple[int, str, float]:
            start_s = time.monotonic()
            answer = embed(caller, "red")
            return (
                answer.status_code,
                answer.headers.get("Retry-After", ""),
                time.monotonic() - start_s,
            )

        answers = list(pool.map(ask, range(8)))
    assert {status for status, _, _ in answers} == {200, 429}
    assert sum(status == 200 for status, _, _ in answers) >= 2
    for status, retry_after, seconds in answers:
        if status == 429:
            assert int(retry_after) >= 1
            assert seconds < 0.9  # Not queued behind those that wait a second.


def test_a_body_over_the_limit_or_too_slow_is_refused(start, repository, server):
    gateway = start("--repository", repository, "--max-body-mib", 0.01, "--timeout-s", 1.0)
    with gateway.client() as caller:
        assert error_of(embed(caller, "x" * 20_000), 413)["code"] == "request_too_large"

        def parts() -> Iterator[bytes]:
            yield b"x" * 20_000

        assert caller.post("/v1/embeddings", content=parts()).status_code == 413
        assert embed(caller, "red").status_code == 200
    with socket.create_connection(gateway.address(), timeout=20) as link:
        link.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in link.recv(100)


def test_headers_that_are_huge_or_never_end_are_not_waited_for(gateway, caller):
    with socket.create_connection(gateway.address(), timeout=30) as link:
        link.sendall(b"GET /ping HTTP/1.1\r\nHost: a\r\n")
        start_s = time.monotonic()
        assert link.recv(100) == b""
        assert 5 < time.monotonic() - start_s < 20
    with socket.create_connection(gateway.address(), timeout=30) as link:
        link.sendall(b"GET /ping HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000)
        assert b" 400 " in link.recv(100)
    assert caller.get("/ping").text == "pong"


def test_a_caller_that_goes_away_is_not_worked_for(start, tmp_path):
    repository = tiny_repository.write(
        tmp_path / "models", queue_policy="max_queue_delay_microseconds: 5000000"
    )
    gateway = start("--repository", repository)
    body = b'{"input": "red"}'
    with socket.create_connection(gateway.address(), timeout=20) as link:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        link.sendall(head.encode() + body)
        time.sleep(0.5)
    with gateway.client() as caller:
        deadline_s = time.monotonic() + 3
        while 'status="499"' not in (metrics := caller.get("/metrics").text):
            assert time.monotonic() < deadline_s, metrics
            time.sleep(0.1)
        assert "clip_rt_http_requests_in_flight 0.0" in metrics


class _Pictures(http.server.BaseHTTPRequestHandler):
    """Answers by path: an image, a redirect, one that is compressed, and one without end."""

    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])
        content, headers = png("blue"), {}
        if self.path == "/moved":
            headers["Location"] = "/image"
        elif self.path == "/packed":
            content, headers = zlib.compress(bytes(10**6)), {"Content-Encoding": "deflate"}
        elif self.path == "/large":
            content = bytes(200_000)
        self.send_response(302 if self.path == "/moved" else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def pictures() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Pictures) as server:
        server.hosts = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=60)


async def fetch(url: str, *, max_bytes: int = 100_000) -> bytes:
    async with httpx.AsyncClient(trust_env=False) as client:
        source = ImageSource(client, ["images.example"], max_bytes=max_bytes)
        return await source.read(url, "input[3]")


def test_an_image_is_fetched_from_the_address_that_was_checked(pictures, monkeypatch):
    """Addresses of this machine are public here: no other is to be had."""
    asked = []

    async def resolve(loop: object, host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr("asyncio.BaseEventLoop.getaddrinfo", resolve)
    url = f"http://images.example:{pictures.server_port}"
    with pytest.raises(ProblemError, match="in a private network") as refused:
        asyncio.run(fetch(f"{url}/image"))
    assert (refused.value.param, refused.value.code) == ("input[3]", "url_not_allowed")
    assert pictures.hosts == []
    monkeypatch.setattr("clip_rt.inputs.fetching.is_public", lambda address: True)
    assert asyncio.run(fetch(f"{url}/image")) == png("blue")
    assert pictures.hosts == [f"images.example:{pictures.server_port}"]
    for path, words in (("moved", "answers 302"), ("packed", "deflate"), ("large", "larger than")):
        with pytest.raises(ProblemError, match=words):
            asyncio.run(fetch(f"{url}/{path}"))
    assert set(asked) <= {"images.example", "127.0.0.1"}


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::ffff:10.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("fe80::1", False),
    ],
)
def test_only_public_addresses_are_asked(address, is_public):
    assert fetching.is_public(ipaddress.ip_address(address)) == is_public


def bomb() -> bytes:
    """Return a PNG of a few bytes that says it is 60,000 pixels wide and high."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", len(head))
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
    )


def test_hostile_requests_get_4xx_and_nothing_else(gateway):
    """Of the kinds that have brought servers of this field down."""
    draw = random.Random(0)
    good = json.dumps({"input": ["red", data_uri(png())], "model": "tiny"}).encode()
    paths = ("/v1/embeddings", "/v1/classify", "/vectorize", "/predict")

    def make() -> tuple[str, bytes, dict[str, str]]:
        kind = draw.randrange(8)
        headers = {"Content-Type": "application/json"}
        if kind == 0:
            content = bytearray(good)
            for _ in range(draw.randrange(1, 20)):
                content[draw.randrange(len(content))] = draw.randrange(256)
            body = bytes(content)
        elif kind == 1:
            body = good[: draw.randrange(len(good))]
        elif kind == 2:
            body = b"[" * draw.randrange(1, 100_000)
        elif kind == 3:
            body = json.dumps({"input": {"image": data_uri(bomb())}}).encode()
        elif kind == 4:
            body = draw.randbytes(draw.randrange(2_000))
        elif kind == 5:
            body = json.dumps(
                {"input": [draw.choice([None, 1e400, -1, {}, [], "\ud800"])]}
            ).encode()
        elif kind == 6:
            headers = {"Content-Type": "multipart/form-data; boundary=x"}
            body = b"--x\r\nContent-Disposition: form-data; name=" + draw.randbytes(200)
        else:
            body = json.dumps(
                {"images": [data_uri(png()[: draw.randrange(40)])], "labels": ["a"] * 3}
            ).encode()
        return draw.choice(paths), body, headers

    requests = [make() for _ in range(NUM_HOSTILE)]
    with gateway.client() as caller, concurrent.futures.ThreadPoolExecutor(8) as pool:
        statuses = list(
            pool.map(
                lambda each: caller.post(each[0], content=each[1], headers=each[2]).status_code,
                requests,
            )
        )
        # A change of a byte may leave a request as good as it was.
        assert {status // 100 for status in statuses} <= {2, 4}
        assert statuses.count(400) > NUM_HOSTILE / 2
        assert caller.get("/health/ready").status_code == 200
        assert embed(caller, "red").status_code == 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": ("a:1",), "repository": Path("x")}, "exclude each other"),
        ({"certificate": Path("x")}, "go together"),
        ({"port": 70_000}, "within 0 and 65535"),
        ({"max_items": 0}, "--max-items is 0"),
        ({"max_concurrent_requests": 0}, "--max-concurrent-requests is 0"),
        ({"timeout_s": float("inf")}, "--timeout-s is inf"),
        ({"image_host": ("https://a",)}, "no name of a host"),
        ({"idle_unload_s": 0.0}, "--idle-unload-s is 0"),
        ({"drain_s": -1.0}, "--drain-s is -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        GatewayConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--token-file", "/nowhere"), "cannot be read"),
        (("--url", "127.0.0.1:1", "--start-timeout-s", "3"), "127.0.0.1:1"),
    ],
)
def test_a_start_that_fails_ends_with_one_line(options, words):
    done = subprocess.run(
        [sys.executable, "-m", "clip_rt", "gateway", "--port", "0", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_there_is_said(server, repository):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "clip_rt", "gateway", "--port", "0"),
            *("--repository", str(repository), "--model", "other"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "no model 'other'; it has tiny" in done.stderr


def test_models_are_listed_by_the_client_too(client, tmp_path):
    assert client.list_models() == ("tiny",)
    repository = tiny_repository.write(tmp_path / "models", "b")
    tiny_repository.write(repository, "a")
    with clip_rt.Client(repository=repository) as several:
        assert several.list_models() == ("a", "b")
