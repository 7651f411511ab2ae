"""What deploy/prometheus and deploy/grafana ask for is what the gateway and Triton have.

Prometheus itself checks the rules, scrapes a real gateway and a real Triton, and answers every
expression of the dashboard.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest
import tiny_repository
import yaml
from debian_packages import find_program
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from owners import ROOT, wait_until
from PIL import Image
from processes import running

from clip_rt.embedded.server import EmbeddedServer
from clip_rt.errors import ServerStartError

DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana/dashboard.json"
GPU_ONLY = re.compile(r"\bnv_gpu_\w+")
"""What Triton has only where there is a GPU."""
SELECTOR = re.compile(r"\b((?:clip_rt|nv)_\w+)(?:\{([^}]*)\})?")
"""A metric and its matchers, as PromQL has them; `:` is in names of recording rules only."""
BY = re.compile(r"\bby \(([^)]*)\)")
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? [^ ]+$", re.MULTILINE)
"""A line of Prometheus's text format. Triton's counters do not end in _total, as parsers expect."""
LABEL = re.compile(r'(\w+)="')
OF_THE_DATA_SOURCE = {"titleFormat", "textFormat"}
"""Fields of annotations that Grafana's types leave to the data source."""
SCRAPE_S = 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rules() -> list[dict[str, object]]:
    document = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text("utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, object]:
    return json.loads(DASHBOARD.read_text("utf-8"))


def targets() -> list[tuple[str, str]]:
    """Return title and expression of all that the dashboard draws."""
    return [
        (panel["title"], target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]


def expressions() -> list[str]:
    annotations = dashboard()["annotations"]["list"]
    return [
        *(str(rule["expr"]) for rule in rules()),
        *(expression for _, expression in targets()),
        *(each["expr"] for each in annotations),
        *(
            re.findall(r"label_values\((.*), \w+\)", each["query"]["query"])[0]
            for each in queries()
        ),
    ]


def queries() -> list[dict]:
    return [each for each in dashboard()["templating"]["list"] if each["type"] == "query"]


# What needs no server


def test_the_dashboard_is_one_of_grafanas():
    """Read into Grafana's own types and written again, nothing of it is lost."""
    said = dashboard()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(said)))

    def missing(given: object, kept: object, path: str = "$") -> Iterator[str]:
        if isinstance(given, dict) and isinstance(kept, dict):
            for key, value in given.items():
                if key in kept:
                    yield from missing(value, kept[key], f"{path}.{key}")
                elif value not in (None, [], {}) and key not in OF_THE_DATA_SOURCE:
                    yield f"{path}.{key}"
        elif isinstance(given, list) and isinstance(kept, list):
            for index, (one, other) in enumerate(zip(given, kept, strict=True)):
                yield from missing(one, other, f"{path}[{index}]")
        elif given != kept:
            yield f"{path}: {given!r} is {kept!r}"

    assert list(missing(said, read)) == []


def test_panels_are_laid_out_without_gaps_or_overlaps():
    taken: dict[tuple[int, int], str] = {}
    panels = dashboard()["panels"]
    for panel in panels:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
    assert len(taken) == 24 * (1 + max(y for _, y in taken))
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_alert_says_what_to_do_and_is_tested():
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    for rule in alerts.values():
        assert rule["annotations"].keys() == {"summary", "action"}
        assert rule["labels"]["severity"] in ("warning", "critical")
    document = yaml.safe_load((PROMETHEUS / "rules_test.yaml").read_text("utf-8"))
    fires, rests = set(), set()
    for test in document["tests"]:
        for each in test.get("alert_rule_test", ()):
            (fires if each["exp_alerts"] else rests).add(each["alertname"])
        if {"expr": "ALERTS", "exp_samples": []} in [
            {key: each[key] for key in ("expr", "exp_samples")}
            for each in test.get("promql_expr_test", ())
        ]:
            rests |= alerts.keys()
    assert fires == rests == alerts.keys()


def test_provisioning_names_the_data_source_and_the_folder_of_compose():
    folder = DEPLOY / "grafana/provisioning"
    source = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text("utf-8"))
    assert source["datasources"][0]["type"] == "prometheus"
    provider = yaml.safe_load((folder / "dashboards/clip-rt.yaml").read_text("utf-8"))
    mounts = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))["services"]["grafana"]
    places = [each.split(":")[1] for each in mounts["volumes"]]
    assert f"{provider['providers'][0]['options']['path']}/clip-rt.json" in places


@pytest.fixture(scope="module")
def program(request: pytest.FixtureRequest):
    """Find a program of Debian's package prometheus."""

    def find(name: str) -> str:
        found, why_not = find_program(name, "prometheus", request.config.cache.mkdir("debian"))
        if found is None:
            pytest.skip(why_not)
        return str(found)

    return find


def run_promtool(program, *arguments: object) -> str:
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_the_rules_and_each_fires_as_its_test_says(program):
    found = run_promtool(program, "check", "rules", "rules.yaml")
    assert f"{len(rules())} rules found" in found
    run_promtool(program, "test", "rules", "rules_test.yaml")


def test_promtool_accepts_the_configuration(program):
    run_promtool(program, "check", "config", "--syntax-only", "prometheus.yaml")


def test_a_threshold_that_is_wrong_would_be_noticed(program, tmp_path):
    text = (PROMETHEUS / "rules.yaml").read_text("utf-8")
    assert "ratio_rate5m > 0.02" in text
    (tmp_path / "rules.yaml").write_text(text.replace("ratio_rate5m > 0.02", "ratio_rate5m > 0.2"))
    (tmp_path / "rules_test.yaml").write_text((PROMETHEUS / "rules_test.yaml").read_text("utf-8"))
    done = subprocess.run(
        [program("promtool"), "test", "rules", "rules_test.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "ClipRTRefusing" in done.stdout + done.stderr


# What needs both servers


def png(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (72, 64), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


class Served:
    """A gateway in front of a Triton, each with its metrics."""

    def __init__(self, gateway: str, triton: str, token: str) -> None:
        self.gateway, self.triton, self.token = gateway, triton, token
        self.http = httpx.Client(
            headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False
        )

    def ask(self) -> None:
        """Send of each kind, some of which is refused."""
        images = [png("red"), png("blue")]
        for body in (
            {"input": ["red", "a blue car"]},
            {"input": [{"image": images[0]}]},
            {"input": [""]},
        ):
            self.http.post(f"{self.gateway}/v1/embeddings", json=body)
        body = {"images": images, "labels": ["red", "blue", f"green {time.monotonic_ns()}"]}
        answer = self.http.post(f"{self.gateway}/v1/classify", json=body)
        assert answer.status_code == 200, answer.text
        assert self.http.get(f"{self.gateway}/health/ready").status_code == 200

    def scrape(self) -> dict[str, set[str]]:
        """Return the labels by the name of each metric of both."""
        found: dict[str, set[str]] = {}
        for url in (self.gateway, self.triton):
            text = self.http.get(f"{url}/metrics").raise_for_status().text
            for name, labels in SAMPLE.findall(text):
                found.setdefault(name, {"job", "instance"}).update(LABEL.findall(labels))
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    repository = tiny_repository.write(folder / "models")
    token = "a token of the test"
    (folder / "tokens").write_text(token)
    metrics_port = free_port()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    serve = [sys.executable, "-m", "clip_rt", "serve", "--repository", repository, "--port", "0"]
    gateway = [sys.executable, "-m", "clip_rt", "gateway", "--port", "0"]
    gateway += ["--token-file", folder / "tokens", "--max-concurrent-requests", "2", "--url"]
    with running(
        [*serve, "--metrics-port", str(metrics_port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as triton:
        address = triton.stdout.readline().partition(" on ")[2].partition(",")[0]
        with running(
            [*gateway, address],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as process:
            url = process.stdout.readline().partition(" on ")[2].strip()
            found = Served(url, f"http://127.0.0.1:{metrics_port}", token)
            found.ask()
            yield found
            found.http.close()
        triton.terminate()
        triton.wait(timeout=60)


@pytest.mark.slow
def test_every_metric_and_label_that_is_named_exists(served):
    found = served.scrape()
    recorded = {str(rule["record"]) for rule in rules() if "record" in rule}
    named = 0
    for expression in expressions():
        labels = {each.strip() for by in BY.findall(expression) for each in by.split(",")}
        known = {"job", "instance"}
        for match in re.finditer(r"[\w:]+", expression):
            if ":" in match[0] and match[0].partition(":")[0] in (
                "job",
                "path",
                "model",
                "gpu",
                "path_status",
            ):
                assert match[0] in recorded, f"{match[0]} of {expression}"
                known |= {"job", "path", "status", "model", "gpu_uuid"}
        for match in SELECTOR.finditer(re.sub(r"\b\w+:[\w:]+", "", expression)):
            metric, matchers = match[1], match[2] or ""
            if GPU_ONLY.fullmatch(metric):
                known |= {"gpu_uuid", "job", "instance"}
                continue
            assert metric in found, f"{metric} of {expression}"
            named += 1
            used = set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers))
            assert used <= found[metric], f"{used} of {metric} in {expression}"
            known |= found[metric]
        assert labels <= known, expression
    assert named > 50


@pytest.mark.slow
def test_what_the_rules_take_for_events_and_paths_are_such(served):
    """Values of labels, where an expression would match nothing without a word."""
    text = served.http.get(f"{served.gateway}/metrics").text
    for event in ("cache_hits", "cache_disk_hits", "cache_misses", "images", "texts", "tokens"):
        assert f'clip_rt_events_total{{event="{event}"}}' in text
    paths = set(served.http.get(f"{served.gateway}/openapi.json").json()["paths"])
    (pattern,) = {
        each for expression in expressions() for each in re.findall(r'path=~"([^"]*)"', expression)
    }
    asking = {each for each in paths if re.fullmatch(pattern, each)}
    assert asking == {"/v1/embeddings", "/v1/classify", "/predict", "/vectorize"}
    assert 'clip_rt_model_ready{model="tiny"} 1.0' in text
    assert f'clip_rt_model_info{{fingerprint="{"a" * 64}",model="tiny"}} 1.0' in text
    assert "clip_rt_http_max_concurrent_requests 2.0" in text


@pytest.mark.slow
def test_metrics_of_the_embedded_server_are_off_unless_asked_for(tmp_path):
    repository = tiny_repository.write_bare(tmp_path / "bare")
    port = free_port()

    def scrape() -> str:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        except httpx.ConnectError:
            return ""

    with EmbeddedServer(repository, metrics_port=port):
        # Triton begins with them a moment after it is ready.
        assert wait_until(lambda: "nv_inference_count" in scrape())
        with pytest.raises(ServerStartError, match=f"port {port} of 127.0.0.1 is taken"):
            EmbeddedServer(repository, metrics_port=port).start()
    with EmbeddedServer(repository):
        assert scrape() == ""


def expand(expression: str) -> str:
    """Put in what Grafana does."""
    values = {
        "$__rate_interval": "15s",
        "$gateway": "clip-rt-gateway",
        "$triton": "triton",
        "$model": ".*",
    }
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_prometheus_answers_every_expression_of_the_dashboard(served, program, tmp_path):
    """Scraped as prometheus.yaml says but for addresses and intervals."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text("utf-8"))
    config["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{SCRAPE_S}s")
    config["rule_files"] = [str(PROMETHEUS / "rules.yaml")]
    (tmp_path / "token").write_text(served.token)
    for job, url in zip(config["scrape_configs"], (served.gateway, served.triton), strict=True):
        job["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
        if "authorization" in job:
            job["authorization"]["credentials_file"] = str(tmp_path / "token")
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        program("prometheus"),
        f"--config.file={tmp_path}/prometheus.yaml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address={url.removeprefix('http://')}",
        "--log.level=error",
    ]
    with (
        running(command, stderr=subprocess.PIPE) as process,
        httpx.Client(base_url=f"{url}/api/v1", timeout=10, trust_env=False) as http,
    ):

        def query(expression: str) -> list[dict]:
            answer = http.get("query", params={"query": expression})
            assert answer.status_code == 200, (expression, answer.text)
            return answer.json()["data"]["result"]

        def is_up() -> bool:
            assert process.poll() is None, process.stderr.read()
            try:
                return len(query("up == 1")) == 2
            except httpx.TransportError:
                return False

        until_s = time.monotonic() + 60
        while not is_up():
            assert time.monotonic() < until_s, http.get("targets").text
            time.sleep(0.5)
        empty: set[str] = set()
        wanted = {
            expand(each)
            for each in [expression for _, expression in targets()]
            if not GPU_ONLY.search(each)
        }
        recorded = {str(rule["record"]) for rule in rules() if "record" in rule}
        recorded -= {each for each in recorded if each.startswith("gpu:")}
        # Nothing has failed yet in these.
        quiet = {each for each in wanted if "retries|failovers" in each or "errors_total" in each}
        until_s = time.monotonic() + 90
        while time.monotonic() < until_s:
            served.ask()
            time.sleep(SCRAPE_S)
            empty = {each for each in (wanted - quiet) | recorded if not query(each)}
            if not empty:
                break
        assert empty == set()
        for expression in quiet:
            query(expression)
        for variable in queries():
            metric, label = re.fullmatch(
                r"label_values\((.*), (\w+)\)", variable["query"]["query"]
            ).groups()
            values = http.get(f"label/{label}/values", params={"match[]": expand(metric)}).json()
            assert values["data"], variable["name"]
        found = http.get("rules").json()["data"]["groups"]
        unwell = [
            (rule["name"], rule.get("lastError"))
            for group in found
            for rule in group["rules"]
            if rule["health"] != "ok"
        ]
        assert not unwell
        firing = {each["metric"]["alertname"] for each in query('ALERTS{alertstate="firing"}')}
        assert not firing
