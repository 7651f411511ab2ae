"""What `deploy/` holds: valid, and with options that the commands have. No image is built here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import tyro
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject

from clip_rt.gateway.config import GatewayConfig
from clip_rt.wire.channel import parse_url

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SCRIPTS = sysconfig.get_path("scripts")
OVERLAYS = ("cpu", "gpu", "gpus", "mig")
USER = 10001
Resource = dict


def run(
    program: str, *arguments: object, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(SCRIPTS, program)), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
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


# Images


@pytest.mark.skipif(not shutil.which("hadolint", path=SCRIPTS), reason="hadolint is for Linux")
@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*Dockerfile")), ids=lambda path: path.name)
def test_hadolint_finds_nothing(path):
    done = run("hadolint", path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*Dockerfile")), ids=lambda path: path.name)
def test_images_have_a_base_that_can_be_pinned_and_no_root(path):
    lines = path.read_text("utf-8").splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    digests = {line.partition("=")[0].split()[1] for line in lines if line.endswith('_DIGEST=""')}
    for base in bases:
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*\$\{(\w+)\}", base), base
        assert re.search(r"\{(\w+)\}", base)[1] in digests
    users = [line for line in lines if line.startswith("USER ")]
    assert users == [f"USER {USER}:{USER}"]
    for line in lines:
        if line.startswith(("ENTRYPOINT", "CMD")):
            assert "[" in line, "in exec form, which needs no shell"


def allowed() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_images_get_all_that_they_are_made_of():
    """What .dockerignore lets through, of what COPY names."""
    assert [each for each in allowed() if not (ROOT / each).exists()] == []
    for path in DEPLOY.glob("*Dockerfile"):
        copied = re.findall(r"^COPY (?!--from)(\S+)", path.read_text("utf-8"), re.MULTILINE)
        assert copied
        assert set(copied) <= {".", *allowed()}


@pytest.mark.slow
@pytest.mark.torch
def test_wheels_are_built_of_what_the_image_gets(tmp_path):
    for each in allowed():
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


@pytest.mark.slow
def test_a_bill_of_materials_names_what_is_installed(tmp_path):
    path = tmp_path / "sbom.json"
    done = run(
        "cyclonedx-py",
        "environment",
        "--output-format",
        "JSON",
        "--output-file",
        path,
        sys.prefix,
        timeout_s=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text("utf-8"))
    assert found["bomFormat"] == "CycloneDX"
    by_name = {each["name"]: each for each in found["components"]}
    assert {"clip-rt", "numpy", "tritonclient", "starlette"} <= by_name.keys()
    assert by_name["numpy"]["purl"].startswith("pkg:pypi/numpy@")
    assert (ROOT / "Makefile").read_text("utf-8").count("cyclonedx-py environment") == 1


# Compose


def compose() -> Resource:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))


def test_compose_is_what_the_compose_specification_says():
    done = run(
        "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_mistake_in_compose_would_be_noticed(tmp_path):
    said = compose()
    said["services"]["triton"]["shm_sise"] = said["services"]["triton"].pop("shm_size")
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(said))
    done = run(
        "check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.yaml"
    )
    assert done.returncode == 1
    assert "shm_sise" in done.stdout + done.stderr


def test_compose_starts_the_gateway_alone_or_before_triton():
    services = compose()["services"]
    alone, before = services["gateway"], services["gateway-before-triton"]
    config = parse(alone["command"])
    assert (config.server, str(config.repository)) == ("in_process", "/models")
    assert parse(before["command"]).url == ("triton:8001",)
    assert before["build"]["args"]["EXTRAS"] == "gateway,otlp"
    assert before["networks"]["default"]["aliases"] == ["gateway"], "as prometheus.yaml calls it"
    for service in (alone, before):
        config = parse(service["command"])
        grace_s = int(service["stop_grace_period"].removesuffix("s"))
        assert grace_s > config.drain_s + config.timeout_s
        assert str(config.token_file) == "/run/secrets/tokens"
    assert {name: service["profiles"] for name, service in services.items()} == {
        "gateway": ["cpu"],
        "gateway-before-triton": ["gpu"],
        "triton": ["gpu"],
        "prometheus": ["observe"],
        "grafana": ["observe"],
    }
    (device,) = services["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["triton"]["shm_size"] == "1g"


@pytest.mark.parametrize(
    "name", ["gateway", "gateway-before-triton", "triton", "prometheus", "grafana"]
)
def test_compose_hardens_every_service(name):
    said = compose()
    service = said["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service.get("secrets", ())) <= set(said["secrets"])
    if "build" in service:
        context = (DEPLOY / service["build"]["context"]).resolve()
        assert context == ROOT
        dockerfile = (context / service["build"]["dockerfile"]).read_text("utf-8")
        assert "HEALTHCHECK" in dockerfile
    else:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["healthcheck"]["test"][0] == "CMD"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    for volume in service.get("volumes", ()):
        source, _, rest = volume.partition(":")
        if source.startswith("./"):
            assert (DEPLOY / source).exists(), volume
            assert rest.endswith(":ro")
    # A secret is in a file, not in the environment, which every process of the container sees.
    secret = re.compile("password|token|key", re.IGNORECASE)
    for key in service.get("environment", {}):
        assert not secret.search(key) or key.endswith("__FILE")


# Kubernetes


def build(folder: Path) -> list[Resource]:
    """Return what Kustomize makes of a folder; it warns of nothing."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            break
    else:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def check_keda(resource: Resource) -> None:
    """Read it as KEDA's own types; a field that they do not know would be dropped."""
    read = ScaledObject.model_validate(resource)
    assert read.model_dump(mode="json", by_alias=True, exclude_none=True) == resource


@pytest.fixture(scope="module")
def built() -> dict[str, list[Resource]]:
    return {name: build(KUBERNETES / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(scope="module")
def with_options(tmp_path_factory) -> dict[str, list[Resource]]:
    """Overlays of a user's own, with the components that no overlay of ours has."""
    folder = tmp_path_factory.mktemp("kubernetes") / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    found = {}
    for base, component in (("cpu", "object-storage"), ("gpu", "object-storage"), ("cpu", "tls")):
        mine = folder / "mine" / f"{base}-{component}"
        mine.mkdir(parents=True)
        (mine / "kustomization.yaml").write_text(
            yaml.safe_dump(
                {
                    "resources": [f"../../overlays/{base}"],
                    "components": [f"../../components/{component}"],
                }
            )
        )
        found[mine.name] = build(mine)
    return found


def every(built: dict[str, list[Resource]], *kinds: str) -> Iterator[Resource]:
    for resources in built.values():
        yield from (each for each in resources if not kinds or each["kind"] in kinds)


def find(resources: list[Resource], kind: str, name: str) -> Resource:
    (found,) = (
        each for each in resources if each["kind"] == kind and each["metadata"]["name"] == name
    )
    return found


def pod_of(resources: list[Resource], name: str) -> Resource:
    return find(resources, "Deployment", name)["spec"]["template"]["spec"]


def container_of(pod: Resource, name: str) -> Resource:
    (found,) = (each for each in pod["containers"] if each["name"] == name)
    return found


def all_containers(pod: Resource) -> list[Resource]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def test_kubernetes_knows_every_field(built, with_options):
    version = kubernetes_validate.latest_version()
    number = 0
    for resource in every({**built, **with_options}):
        if resource["apiVersion"].startswith("keda.sh/"):
            check_keda(resource)
        else:
            kubernetes_validate.validate(resource, version, strict=True)
        number += 1
    assert number > 50


def test_a_mistake_in_a_manifest_would_be_noticed(built):
    deployment = find(built["gpu"], "Deployment", "clip-rt-triton")
    wrong = json.loads(json.dumps(deployment).replace("failureThreshold", "failureTreshold"))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)
    scaled = find(built["gpus"], "ScaledObject", "clip-rt-triton")
    wrong = json.loads(json.dumps(scaled).replace("pollingInterval", "polingInterval"))
    with pytest.raises(AssertionError):
        check_keda(wrong)


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_have_no_more_rights_than_they_need(built, name):
    accounts = {
        each["metadata"]["name"]: each for each in built[name] if each["kind"] == "ServiceAccount"
    }
    for deployment in every({name: built[name]}, "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert {security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        volumes = {each["name"] for each in pod["volumes"]}
        for container in all_containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            assert {each["name"] for each in container["volumeMounts"]} <= volumes
            for each in container["volumeMounts"]:
                if each["name"] in ("models", "tokens", "tls"):
                    assert each["readOnly"] is True


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_match_the_pods_they_are_for(built, name):
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in built[name]
        if each["kind"] == "Deployment"
    }

    def matched(selector: Resource) -> set[str]:
        return {pod for pod, own in labels.items() if selector.items() <= own.items()}

    for resource in built[name]:
        own, spec = resource["metadata"]["name"], resource.get("spec", {})
        if resource["kind"] == "Deployment":
            assert matched(spec["selector"]["matchLabels"]) == {own}
            for each in spec["template"]["spec"]["topologySpreadConstraints"]:
                assert matched(each["labelSelector"]["matchLabels"]) == {own}
        elif resource["kind"] == "PodDisruptionBudget":
            assert matched(spec["selector"]["matchLabels"]) == {own}
            assert spec["maxUnavailable"] == 1
        elif resource["kind"] == "Service":
            ((pod,), (port,)) = matched(spec["selector"]), spec["ports"]
            ports = [
                each["name"]
                for container in pod_of(built[name], pod)["containers"]
                for each in container["ports"]
            ]
            assert port["targetPort"] in ports
    policies = [each for each in built[name] if each["kind"] == "NetworkPolicy"]
    closed = find(policies, "NetworkPolicy", "clip-rt")["spec"]
    assert closed["policyTypes"] == ["Ingress", "Egress"]
    assert not closed.keys() & {"ingress", "egress"}, "nothing is let through by it"
    assert matched(closed["podSelector"]["matchLabels"]) == labels.keys()
    opened = {
        pod
        for each in policies
        if each["metadata"]["name"] != "clip-rt"
        for pod in matched(each["spec"]["podSelector"]["matchLabels"])
    }
    assert opened == labels.keys()


def test_only_the_gateway_may_ask_triton(built):
    for name in ("gpu", "gpus", "mig"):
        labels = find(built[name], "Deployment", "clip-rt-gateway")["spec"]["template"]["metadata"]
        rules = find(built[name], "NetworkPolicy", "clip-rt-triton")["spec"]["ingress"]
        grpc = [rule for rule in rules if {"port": "grpc"} in rule["ports"]]
        ((source,),) = (rule["from"] for rule in grpc)
        assert source["podSelector"]["matchLabels"].items() <= labels["labels"].items()
        assert not [rule for rule in rules if {"port": "health"} in rule["ports"]]
        egress = find(built[name], "NetworkPolicy", "clip-rt-gateway")["spec"]["egress"]
        (grpc,) = (rule for rule in egress if rule["ports"] == [{"port": 8001, "protocol": "TCP"}])
        target = find(built[name], "Deployment", "clip-rt-triton")["spec"]["template"]["metadata"]
        (allowed,) = grpc["to"]
        assert allowed["podSelector"]["matchLabels"].items() <= target["labels"].items()
    egress = find(built["cpu"], "NetworkPolicy", "clip-rt-gateway")["spec"]["egress"]
    assert [[port["port"] for port in rule["ports"]] for rule in egress] == [[53, 53]]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_gateway_is_asked_as_it_answers(built, name):
    pod = pod_of(built[name], "clip-rt-gateway")
    (container,) = pod["containers"]
    config = parse(container["args"])
    assert pod["terminationGracePeriodSeconds"] > config.drain_s + config.timeout_s
    assert container["ports"] == [{"name": "http", "containerPort": config.port}]
    probes = {each: container[each]["httpGet"]["path"] for each in container if "Probe" in each}
    assert probes == {
        "startupProbe": "/health/ready",
        "readinessProbe": "/health/ready",
        "livenessProbe": "/health/live",
    }
    start = container["startupProbe"]
    assert start["failureThreshold"] * start["periodSeconds"] > config.start_timeout_s
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    secret = volumes[mounts[str(config.token_file.parent)]]["secret"]
    assert secret["secretName"] == "clip-rt-tokens"
    if name == "cpu":
        assert container["image"] == "clip-rt"
        assert config.server == "in_process"
        assert str(config.repository) in mounts
    else:
        assert container["image"] == "clip-rt-gateway"
        (url,) = config.url
        target, is_secure = parse_url(url)
        assert (target, is_secure) == ("dns:///clip-rt-triton:8001", False)
        service = find(built[name], "Service", "clip-rt-triton")["spec"]
        assert service["clusterIP"] == "None"
        assert service["ports"][0]["port"] == 8001
        assert not [each for each in volumes if each == "models"]


@pytest.mark.parametrize("name", ["gpu", "gpus", "mig"])
def test_triton_is_ready_when_its_canary_is_and_drains_before_it_ends(built, name):
    pod = pod_of(built[name], "clip-rt-triton")
    triton, canary = container_of(pod, "triton"), container_of(pod, "canary")
    paths = {each: triton[each]["httpGet"]["path"] for each in triton if "Probe" in each}
    assert paths == {
        "startupProbe": "/v2/health/ready",
        "readinessProbe": "/v2/health/ready",
        "livenessProbe": "/v2/health/live",
    }
    config = parse(canary["args"])
    grpc = next(each for each in triton["ports"] if each["name"] == "grpc")
    assert config.url == (f"127.0.0.1:{grpc['containerPort']}",)
    assert canary["ports"] == [{"name": "canary", "containerPort": config.port}]
    assert canary["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": "canary"}
    start = canary["startupProbe"]
    assert start["failureThreshold"] * start["periodSeconds"] > config.start_timeout_s
    options = (DEPLOY / "triton.sh").read_text("utf-8")
    exit_s = int(re.search(r"--exit-timeout-secs=(\d+)", options)[1])
    pause_s = triton["lifecycle"]["preStop"]["sleep"]["seconds"]
    gateway = parse(pod_of(built[name], "clip-rt-gateway")["containers"][0]["args"])
    assert exit_s >= gateway.timeout_s, "the longest request may end"
    assert pod["terminationGracePeriodSeconds"] > pause_s + exit_s
    rollout = find(built[name], "Deployment", "clip-rt-triton")["spec"]["strategy"]
    assert rollout["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


def test_models_are_verified_before_anything_is_made_of_them(built, with_options):
    orders = {
        (name, each["metadata"]["name"]): [
            container["name"]
            for container in each["spec"]["template"]["spec"].get("initContainers", ())
        ]
        for name, resources in {**built, **with_options}.items()
        for each in resources
        if each["kind"] == "Deployment"
    }
    made = ["verify-models", "build-engines"]
    assert {key: order for key, order in orders.items() if order} == {
        ("cpu", "clip-rt-gateway"): ["verify-models"],
        ("cpu-tls", "clip-rt-gateway"): ["verify-models"],
        **{(name, "clip-rt-triton"): made for name in ("gpu", "gpus", "mig")},
        ("cpu-object-storage", "clip-rt-gateway"): ["fetch-models", "verify-models"],
        ("gpu-object-storage", "clip-rt-triton"): ["fetch-models", *made],
    }
    for name in ("cpu-object-storage", "gpu-object-storage"):
        (pod,) = (
            each["spec"]["template"]["spec"]
            for each in with_options[name]
            if each["kind"] == "Deployment"
            and each["spec"]["template"]["spec"].get("initContainers")
        )
        (models,) = (each for each in pod["volumes"] if each["name"] == "models")
        assert models.keys() == {"name", "emptyDir"}
        fetch = pod["initContainers"][0]
        assert "readOnly" not in next(
            each for each in fetch["volumeMounts"] if each["name"] == "models"
        )
        egress = [
            rule["ports"]
            for each in with_options[name]
            if each["kind"] == "NetworkPolicy" and "egress" in each["spec"]
            for rule in each["spec"]["egress"]
        ]
        assert [{"port": 443, "protocol": "TCP"}] in egress


@pytest.mark.parametrize(
    ("name", "resource"),
    [
        ("gpu", "nvidia.com/gpu"),
        ("gpus", "nvidia.com/gpu"),
        ("mig", "nvidia.com/mig-1g.10gb"),
    ],
)
def test_engines_are_built_on_what_serves_them(built, name, resource):
    from export.engine_cache import EngineCacheConfig

    pod = pod_of(built[name], "clip-rt-triton")
    (builder,) = (each for each in pod["initContainers"] if each["name"] == "build-engines")
    triton = container_of(pod, "triton")
    for container in (builder, triton):
        devices = {key for key in container["resources"]["limits"] if "/" in key}
        assert devices == {resource}
    python, m, module, *arguments = builder["command"]
    assert (python, m, module) == ("python", "-m", "export.engine_cache")
    end = arguments.index("--")
    said = dict(each.removeprefix("--").split("=") for each in arguments[:end])
    assert said.keys() == set(EngineCacheConfig.__dataclass_fields__)
    mounts = {each["mountPath"]: each for each in triton["volumeMounts"]}
    assert {"name": "MODEL_REPOSITORY", "value": said["serve"]} in triton["env"]
    for each in ("/engines", "/served"):
        assert mounts[each]["readOnly"] is True
    options = arguments[end + 1 :]
    assert f"--weights={said['source']}" in options


def test_autoscalers_have_the_replicas_and_ask_for_what_is_recorded(built):
    resources = built["gpus"]
    for deployment in every({"gpus": resources}, "Deployment"):
        assert "replicas" not in deployment["spec"]
    hpa = find(resources, "HorizontalPodAutoscaler", "clip-rt-gateway")["spec"]
    assert hpa["scaleTargetRef"]["name"] == "clip-rt-gateway"
    assert hpa["metrics"][0]["pods"]["metric"]["name"] == "clip_rt_http_requests_in_flight"
    scaled = find(resources, "ScaledObject", "clip-rt-triton")["spec"]
    assert scaled["scaleTargetRef"]["name"] == "clip-rt-triton"
    (trigger,) = scaled["triggers"]
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yaml").read_text("utf-8"))
    recorded = {rule.get("record") for group in rules["groups"] for rule in group["rules"]}
    assert re.fullmatch(r"max\((.*)\)", trigger["metadata"]["query"])[1] in recorded
    assert {"gpu", "mig", "cpu"} == {
        name for name in OVERLAYS if not any(each["kind"] == "ScaledObject" for each in built[name])
    }
    (spread,) = pod_of(resources, "clip-rt-triton")["topologySpreadConstraints"]
    assert spread["whenUnsatisfiable"] == "DoNotSchedule"


def test_tls_is_spoken_by_the_gateway_and_its_probes(with_options):
    pod = pod_of(with_options["cpu-tls"], "clip-rt-gateway")
    (container,) = pod["containers"]
    config = parse(container["args"])
    mounts = {each["mountPath"] for each in container["volumeMounts"]}
    assert {str(config.certificate.parent), str(config.private_key.parent)} <= mounts
    for each in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[each]["httpGet"]["scheme"] == "HTTPS"
    service = find(with_options["cpu-tls"], "Service", "clip-rt")["spec"]
    assert [each["port"] for each in service["ports"]] == [443]
