"""The server side of the page, without a browser: who is answered, and what is shown."""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import io
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import tiny_repository
from gateway_process import Gateway, starting
from owners import ROOT
from PIL import Image
from search_pictures import make_index, write_drawings

from clip_rt.moderation.policy import Policy
from clip_rt.search import Index, Query
from clip_rt.ui import static_files
from clip_rt.ui.config import UiConfig, is_local_name
from clip_rt.ui.gallery import MAX_COMPARED, THUMBNAIL_PX, Gallery
from clip_rt.ui.policy import BY_HAND
from clip_rt.ui.thresholds import measure

pytestmark = pytest.mark.slow

MAX_STATIC_BYTES = 120_000
STATIC = sorted(static_files.FOLDER.iterdir())


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Gateway]]:
    with starting("ui") as start:
        yield start


@pytest.fixture(scope="module")
def index_folder(drawings_client, tmp_path_factory) -> Path:
    """Of 24 drawings, and a copy of one."""
    folder = tmp_path_factory.mktemp("index")
    make_index(folder, drawings_client, num=24)
    return folder


@pytest.fixture(scope="module")
def photos(index_folder) -> Path:
    return index_folder.with_name(f"{index_folder.name} photos")


@pytest.fixture(scope="module")
def page(start, index_folder) -> Gateway:
    return start("--server", "in_process", "--index", index_folder)


@pytest.fixture
def caller(page) -> Iterator[httpx.Client]:
    with page.client() as caller:
        yield caller


def refusal(answer: httpx.Response, status: int) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def encode(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


# The page itself


def test_the_page_is_all_there(caller):
    page = caller.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    names = set(re.findall(r"/ui/static/([\w.-]+)", page.text))
    for path in STATIC:
        if path.suffix == ".js":
            names |= set(re.findall(r'from "\./([\w.-]+)"', path.read_text("utf-8")))
    assert names == {path.name for path in STATIC} - {"index.html"}
    for name in names:
        answer = caller.get(f"/ui/static/{name}")
        assert answer.content == (static_files.FOLDER / name).read_bytes()
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert caller.get("/ui/static/../config.py").status_code == 404
    assert caller.get("/ui/static/%2e%2e/config.py").status_code == 404
    assert sum(path.stat().st_size for path in STATIC) < MAX_STATIC_BYTES


def test_a_browser_keeps_files_until_they_change(caller):
    first = caller.get("/ui/static/main.js")
    again = caller.get("/ui/static/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["cache-control"] == "no-cache"


def test_nothing_is_run_but_the_files_of_the_page(caller):
    for path in ("/", "/ui/static/main.js", "/ui/settings", "/nowhere", "/openapi.json"):
        policy = caller.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
    text = (static_files.FOLDER / "index.html").read_text("utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", text)
    for path in STATIC:
        outside = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", path.read_text("utf-8"))
        assert {each for each in outside if "www.w3.org" not in each} == set(), path


def test_the_gateway_is_there_too(caller):
    assert [each["id"] for each in caller.get("/v1/models").json()["data"]] == ["drawings"]
    assert caller.get("/health/ready").status_code == 200
    assert not [each for each in caller.get("/openapi.json").json()["paths"] if "/ui" in each]
    settings = caller.get("/ui/settings").json()
    assert [each["name"] for each in settings["models"]] == ["drawings"]
    assert "openai_imagenet" in settings["template_sets"]
    assert settings["client"] == {"server": "in_process"}


# Who is answered


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:{port}", 200),
        ("127.0.0.1:{port}", 200),
        ("[::1]:{port}", 200),
        ("LOCALHOST", 200),
        # Of a tunnel.
        ("localhost:9000", 200),
        ("127.8.8.8", 200),
        ("evil.example:{port}", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.7:{port}", 403),
        ("[", 403),
    ],
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/ui/index"])
def test_a_name_that_is_not_this_machines_is_refused(page, caller, host, status, path):
    _, port = page.address()
    answer = caller.get(path, headers={"Host": host.format(port=port)})
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "unknown_host"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "{url}"}, 200),
        ({"Origin": "{url}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "["}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/v1/embeddings", "/ui/thresholds", "/ui/index"])
def test_pages_of_other_origins_are_refused(page, caller, headers, status, path):
    headers = {name: value.format(url=page.url) for name, value in headers.items()}
    if path == "/ui/index":
        answer = caller.get(path, headers=headers)
    else:
        body = {"input": "x", "similarities": [0.1, 0.2], "is_positive": [True, False]}
        answer = caller.post(path, json=body, headers=headers)
    assert answer.status_code == status, answer.text
    if status == 403:
        assert answer.json()["error"]["code"] == "cross_origin"


def test_other_origins_may_link_to_the_page_and_no_more(caller):
    link = {
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    assert caller.get("/", headers=link).status_code == 200
    assert caller.get("/ui/index", headers=link).status_code == 403
    assert caller.get("/", headers=link | {"Sec-Fetch-Dest": "iframe"}).status_code == 403
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = caller.options("/v1/classify", headers=preflight)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.4", False),
        ("machine.example", False),
        ("", False),
    ],
)
def test_what_is_loopback_is_known(host, is_local):
    assert is_local_name(host) is is_local
    assert UiConfig(host=host).is_local is is_local


def test_a_network_needs_a_token():
    done = subprocess.run(
        [sys.executable, "-m", "clip_rt", "ui", "--host", "0.0.0.0", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "--token-file or $CLIP_RT_TOKENS" in done.stderr


def test_with_a_token_the_page_is_for_all_and_what_it_shows_is_not(start, repository, tmp_path):
    page = start(
        *("--repository", repository, "--server", "in_process", "--host", "0.0.0.0"),
        *("--index", tmp_path / "none"),
        CLIP_RT_TOKENS="s3cret",
    )
    _, port = page.address()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as caller:
        assert caller.get("/", headers={"Host": f"machine.example:{port}"}).status_code == 200
        assert caller.get("/ui/static/main.js").status_code == 200
        for path in ("/ui/settings", "/ui/index", "/ui/thumbnails/" + "0" * 64, "/v1/models"):
            assert caller.get(path).status_code == 401
        for path in ("/ui/search", "/ui/duplicates", "/ui/thresholds", "/v1/classify"):
            assert caller.post(path, json={}).status_code == 401
        known = {"Authorization": "Bearer s3cret"}
        assert caller.get("/ui/settings", headers=known).status_code == 200
        headers = known | {"Origin": "https://evil.example"}
        assert caller.get("/ui/settings", headers=headers).status_code == 403


# Search


@pytest.mark.parametrize("words", ["an owl", "a bird -yellow", '-"a cartoon" fruit'])
def test_words_find_what_a_query_finds(caller, drawings_client, index_folder, words):
    answer = caller.post("/ui/search", json={"words": words, "top": 7})
    assert answer.status_code == 200, answer.text
    query = Query.parse(words)
    with Index.open(index_folder) as index:
        hits = index.query(drawings_client, query, top=7)
    found = answer.json()
    assert [each["path"] for each in found["data"]] == [hit.path for hit in hits]
    assert [each["score"] for each in found["data"]] == pytest.approx(
        [hit.score for hit in hits], abs=1e-5
    )
    assert (found["texts"], found["minus_texts"]) == (list(query.texts), list(query.minus_texts))
    assert found["data"][0]["width_px"] > 0


def test_images_and_words_are_joined(caller, drawings_client, index_folder, photos):
    owl, other = photos / "0/003.png", photos / "1/012.png"
    sha256 = hashlib.sha256(other.read_bytes()).hexdigest()
    body = {"words": "a bird -red", "images": [encode(owl)], "like": [sha256], "top": 5}
    found = caller.post("/ui/search", json=body).json()
    query = Query(texts=["a bird"], images=[owl, other], minus_texts=["red"])
    with Index.open(index_folder) as index:
        hits = index.query(drawings_client, query, top=5)
    assert [each["sha256"] for each in found["data"]] == [hit.sha256 for hit in hits]


def test_files_of_one_content_are_one_hit(caller, photos):
    found = caller.post("/ui/search", json={"images": [encode(photos / "copy.png")]}).json()
    first = found["data"][0]
    assert first["score"] == pytest.approx(1, abs=1e-4)
    assert [first["path"], *first["copies"]] == [
        str(photos / "0/000.png"),
        str(photos / "copy.png"),
    ]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "words"),
        ({"words": "-red"}, 400, "words"),
        ({"words": "red", "top": 0}, 400, "top"),
        ({"words": "red", "top": 501}, 400, "top"),
        ({"words": "red", "model": "other"}, 404, "model"),
        ({"images": ["AAAA"]}, 400, "images[0]"),
        ({"words": "word " * 200}, 400, "words"),
        ({"like": ["0" * 64]}, 404, "like[0]"),
        ({"like": ["/etc/passwd"]}, 404, "like[0]"),
        ({"words": "red -red -red"}, 200, None),
        ({"words": 3}, 400, "words"),
    ],
)
def test_a_search_that_cannot_be_made_says_why(caller, body, status, param):
    answer = caller.post("/ui/search", json=body)
    assert answer.status_code == status, answer.text
    if param:
        assert answer.json()["error"]["param"] == param


def test_bodies_are_limited(start, repository, tmp_path):
    options = ("--repository", repository, "--server", "in_process", "--max-body-mib", "0.01")
    page = start(*options, "--index", tmp_path)
    with page.client() as caller:
        for path in ("/ui/search", "/ui/duplicates", "/ui/thresholds"):
            answer = caller.post(path, json={"words": "x" * 20_000})
            assert refusal(answer, 413)["code"] == "request_too_large"


def test_near_duplicates_are_those_of_the_index(caller, index_folder):
    found = caller.post("/ui/duplicates", json={"threshold": 0.9}).json()
    with Index.open(index_folder) as index:
        groups = index.duplicates(threshold=0.9)
    assert [[each["path"] for each in group] for group in found["data"]] == [
        [hit.path for hit in group] for group in groups
    ]
    assert found["num_groups"] == len(groups) > 0
    answer = caller.post("/ui/duplicates", json={"threshold": 2})
    assert "between -1 and 1" in refusal(answer, 400)["message"]


def test_more_images_than_a_page_waits_for_are_not_compared(index_folder, monkeypatch):
    monkeypatch.setattr(Index, "count", lambda index: {"images": MAX_COMPARED + 1})
    with pytest.raises(ValueError, match="clip-rt search --duplicates"):
        Gallery(index_folder).find_duplicates(0.9)


# Thumbnails


def test_a_thumbnail_is_small_and_of_the_index(caller, photos):
    path = photos / "0/004.png"
    answer = caller.get(f"/ui/thumbnails/{hashlib.sha256(path.read_bytes()).hexdigest()}")
    assert answer.headers["content-type"] == "image/jpeg"
    assert "private" in answer.headers["cache-control"]
    thumbnail = Image.open(io.BytesIO(answer.content))
    assert thumbnail.width <= THUMBNAIL_PX[0]
    assert thumbnail.height <= THUMBNAIL_PX[1]
    assert len(answer.content) < 40_000


def test_no_path_of_a_request_is_opened(caller, tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (64, 64), "red").save(outside)
    sha256 = hashlib.sha256(outside.read_bytes()).hexdigest()
    for name in (
        sha256,
        sha256.upper(),
        str(outside),
        str(outside).replace("/", "%2F"),
        "..%2F..%2Fetc%2Fpasswd",
        "0" * 63,
        "0" * 64 + "%0A",
        "%00",
    ):
        answer = caller.get(f"/ui/thumbnails/{name}")
        assert answer.status_code == 404, name


def test_a_file_that_has_changed_is_not_shown(tmp_path, drawings_client):
    write_drawings(tmp_path / "photos", 3)
    with Index.open(tmp_path / "index", create=True) as index:
        index.update(drawings_client, [tmp_path / "photos"])
    paths = sorted((tmp_path / "photos").rglob("*.png"))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    gallery = Gallery(tmp_path / "index")
    assert gallery.make_thumbnail(hashes[0]) is not None
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64), "red").save(secret)
    paths[1].unlink()
    paths[1].symlink_to(secret)
    assert gallery.make_thumbnail(hashes[1]) is None
    assert gallery.read(hashes[1]) is None
    paths[2].unlink()
    assert gallery.make_thumbnail(hashes[2]) is None
    # What was shown before is not, once it is taken out of the index.
    with Index.open(tmp_path / "index") as index:
        index.forget(tmp_path / "photos")
    assert gallery.make_thumbnail(hashes[0]) is None
    gallery.close()


def test_members_of_shards_are_shown(tmp_path, drawings_client):
    import tarfile

    write_drawings(tmp_path / "photos", 2)
    paths = sorted((tmp_path / "photos").rglob("*.png"))
    shard = tmp_path / "shard.tar"

    def write(chosen: list[Path]) -> None:
        with tarfile.open(shard, "w") as tar:
            for path in chosen:
                tar.add(path, path.name)

    write(paths)
    with Index.open(tmp_path / "index", create=True) as index:
        index.update(drawings_client, [shard])
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    gallery = Gallery(tmp_path / "index")
    assert gallery.make_thumbnail(hashes[0]) is not None
    # Their places in it are others now.
    write(paths[::-1])
    assert gallery.make_thumbnail(hashes[1]) is not None
    gallery.close()


# An index that comes and goes


def test_an_index_is_found_once_it_is_made(start, tmp_path, drawings_client, photos):
    folder = tmp_path / "index"
    page = start("--server", "in_process", "--index", folder)
    with page.client() as caller:
        told = caller.get("/ui/index").json()
        assert "clip-rt index FOLDER" in told["problem"]
        assert told["folder"] == str(folder)
        answer = caller.post("/ui/search", json={"words": "an owl"})
        assert "clip-rt index FOLDER" in refusal(answer, 409)["message"]
        assert caller.get(f"/ui/thumbnails/{'0' * 64}").status_code == 409
        with Index.open(folder, create=True) as index:
            index.update(drawings_client, [photos])
        assert caller.get("/ui/index").json()["images"] == 24
        assert caller.post("/ui/search", json={"words": "an owl"}).status_code == 200
        shutil.rmtree(folder)
        assert caller.get("/ui/index").json()["problem"]
        with Index.open(folder, create=True) as index:
            index.update(drawings_client, [photos / "0"])
        assert caller.get("/ui/index").json()["images"] == 10


def test_an_index_of_another_model_says_so(start, repository, index_folder):
    page = start("--repository", repository, "--server", "in_process", "--index", index_folder)
    with page.client() as caller:
        message = refusal(caller.post("/ui/search", json={"words": "red"}), 409)["message"]
    assert "another model" in message
    assert "clip-rt index --migrate" in message


# Thresholds


def test_every_threshold_has_its_precision_and_recall(caller):
    similarities = [0.1, 0.3, 0.3, 0.2, 0.5, 0.4]
    is_positive = [False, True, False, False, True, True]
    table = caller.post(
        "/ui/thresholds", json={"similarities": similarities, "is_positive": is_positive}
    ).json()
    assert table["thresholds"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    for row, threshold in enumerate([*table["thresholds"], 0.6]):
        predicted = [each >= threshold for each in similarities]
        pairs = list(zip(predicted, is_positive, strict=True))
        right = pairs.count((True, True))
        assert table["true_positives"][row] == right
        assert table["false_positives"][row] == pairs.count((True, False))
        assert table["false_negatives"][row] == pairs.count((False, True))
        assert table["true_negatives"][row] == pairs.count((False, False))
        expected = right / sum(predicted) if any(predicted) else None
        assert table["precision"][row] == pytest.approx(expected)
        assert table["recall"][row] == pytest.approx(right / sum(is_positive))
        low, high = table["recall_interval"][row]
        assert low <= table["recall"][row] <= high
        low, high = table["precision_interval"][row]
        assert low <= (expected or 0) <= high
    assert table["best_f1"] == pytest.approx(0.25)


def test_the_best_threshold_of_all_that_fit_is_the_lowest():
    table = measure([0.1, 0.2, 0.3], [True, True, False])
    assert table.best_f1 == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("similarities", "is_positive", "words"),
    [
        ([], [], "none of the 0"),
        ([0.1], [True], "fits all"),
        ([0.1], [False], "fits none"),
        ([0.1, 0.2], [True], "1 entries, and similarities 2"),
        ([0.1] * 100_001, [True] * 100_001, "100,000 are the most"),
    ],
)
def test_a_set_without_both_kinds_is_refused(caller, similarities, is_positive, words):
    body = {"similarities": similarities, "is_positive": is_positive}
    answer = caller.post("/ui/thresholds", json=body)
    assert words in refusal(answer, 400)["message"]


def test_a_policy_flags_what_its_threshold_does(caller, drawings_client, photos, tmp_path):
    images = sorted(photos.rglob("*.png"))
    templates = ["a drawing of {}", "{}"]
    scores = drawings_client.zero_shot(images, ["a face"], templates=templates)
    similarities = scores.similarities[:, 0].tolist()
    # The label fits those that are the nearest, but for one.
    order = sorted(range(len(images)), key=lambda index: -similarities[index])
    fits = {*order[:6], order[9]}
    threshold = (similarities[order[7]] + similarities[order[8]]) / 2
    body = {
        "label": "a face",
        "threshold": threshold,
        "similarities": similarities,
        "is_positive": [index in fits for index in range(len(images))],
        "templates": templates,
    }
    answer = caller.post("/ui/policy", json=body)
    assert answer.status_code == 200, answer.text
    (tmp_path / "policy.json").write_text(answer.text, "utf-8")
    policy = Policy.load(tmp_path / "policy.json")
    assert policy.is_calibrated
    assert policy.shortfalls == {"a face": BY_HAND}
    measured = policy.labels[0].measured
    assert (measured.num_images, measured.num_true, measured.num_flagged) == (25, 7, 8)
    assert measured.precision.value == pytest.approx(6 / 8)
    assert measured.recall.value == pytest.approx(6 / 7)
    decided = drawings_client.moderate(images, policy)
    assert [each == "review" for each in decided.actions] == [
        each >= threshold for each in similarities
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"is_positive": [True, True, False, False]}, "no more similar"),
        ({"is_positive": [True] * 4}, "fits all"),
        ({"label": " "}, "not blank"),
        ({"templates": ["no slot"]}, "exactly one"),
        ({"model": "other"}, "no model"),
    ],
)
def test_a_policy_that_would_mean_nothing_is_refused(caller, change, words):
    body = {
        "label": "a face",
        "threshold": 0.25,
        "similarities": [0.1, 0.2, 0.3, 0.4],
        "is_positive": [False, False, True, True],
    }
    answer = caller.post("/ui/policy", json=body | change)
    assert answer.status_code in (400, 404)
    assert words in answer.json()["error"]["message"]


# The end


def test_requests_under_way_are_answered_at_ctrl_c(start, tmp_path):
    repository = tiny_repository.write(
        tmp_path / "models", queue_policy="max_queue_delay_microseconds: 1500000"
    )
    page = start("--repository", repository, "--index", tmp_path / "index")
    with page.client() as caller, concurrent.futures.ThreadPoolExecutor() as pool:
        body = {"input": "red"}
        under_way = pool.submit(lambda: caller.post("/v1/embeddings", json=body).status_code)
        time.sleep(0.5)
        page.process.send_signal(signal.SIGINT)
        assert under_way.result(timeout=30) == 200
    assert page.process.wait(timeout=60) == 0
