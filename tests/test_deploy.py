"""What `deploy/` holds: valid, and with options that the commands have. Nothing is built here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tyro
import yaml

from clip_rt.gateway.config import GatewayConfig

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
SCRIPTS = sysconfig.get_path("scripts")


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(SCRIPTS, program)), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def entrypoint() -> list[str]:
    lines = (DEPLOY / "Dockerfile").read_text("utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("ENTRYPOINT "))
    return json.loads(line.removeprefix("ENTRYPOINT "))


def parse(arguments: list[str]) -> GatewayConfig:
    """Read what comes after `clip-rt gateway` of the image's entry point."""
    begin = entrypoint()
    assert begin[:2] == ["clip-rt", "gateway"]
    return tyro.cli(GatewayConfig, args=[*begin[2:], *arguments])


@pytest.mark.skipif(not shutil.which("hadolint", path=SCRIPTS), reason="hadolint is for Linux")
@pytest.mark.parametrize("name", ["Dockerfile", "triton.Dockerfile"])
def test_hadolint_finds_nothing(name):
    done = run("hadolint", DEPLOY / name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_knows_every_field():
    done = run("kubernetes-validate", "--strict", DEPLOY / "kubernetes.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_pods_are_asked_as_the_gateway_answers():
    deployment, service, _ = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    config = parse(container["args"])
    assert (config.host, config.server) == ("0.0.0.0", "in_process")
    assert pod["terminationGracePeriodSeconds"] > config.drain_s + config.timeout_s
    assert container["ports"] == [{"name": "http", "containerPort": config.port}]
    assert service["spec"]["ports"][0]["targetPort"] == "http"
    paths = {container[each]["httpGet"]["path"] for each in ("startupProbe", "livenessProbe")}
    assert paths == {"/health/live"}
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    mounts = {each["mountPath"] for each in container["volumeMounts"]}
    assert {str(config.repository), str(config.token_file.parent)} <= mounts


def test_compose_starts_the_gateway_alone_or_before_triton():
    said = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    services = said["services"]
    alone = parse(services["gateway"]["command"])
    assert str(alone.repository) == "/models"
    before = parse(services["gateway-before-triton"]["command"])
    assert before.url == ("triton:8001",)
    for name in ("gateway", "gateway-before-triton"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
    for service in services.values():
        context = (DEPLOY / service["build"]["context"]).resolve()
        assert context == ROOT
        assert (context / service["build"]["dockerfile"]).is_file()
    assert set(said["secrets"]) == {"tokens"}


def test_the_image_gets_all_that_its_wheels_are_made_of():
    """What .dockerignore lets through, built without the rest of the checkout."""
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    ]
    assert [each for each in allowed if not (ROOT / each).exists()] == []


@pytest.mark.slow
@pytest.mark.torch
def test_wheels_are_built_of_what_the_image_gets(tmp_path):
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    ]
    for each in allowed:
        source, target = ROOT / each, tmp_path / "source" / each
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    for each in (".", "model_repository"):
        command = [sys.executable, "-m", "build", "--no-isolation", "--wheel"]
        subprocess.run(
            [*command, "--outdir", str(tmp_path / "dist"), each],
            cwd=tmp_path / "source",
            check=True,
            capture_output=True,
            timeout=200,
        )
    assert len(list((tmp_path / "dist").glob("*.whl"))) == 2
