"""deploy/triton.sh with a real Triton: what it leaves open, what it closes, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from owners import ROOT, wait_until
from processes import running
from tritonclient.grpc import service_pb2, service_pb2_grpc

from clip_rt.embedded.installation import find_home

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "deploy/triton.sh"


@dataclass
class Started:
    """A server that the script has started."""

    process: subprocess.Popen[bytes]
    http: httpx.Client
    stub: service_pb2_grpc.GRPCInferenceServiceStub
    metrics_port: int

    def call(self, method: str, request: object) -> object:
        return getattr(self.stub, method)(request, timeout=10)

    def is_ready(self) -> bool:
        assert self.process.poll() is None
        try:
            return self.http.get("/v2/health/ready").status_code == 200
        except httpx.TransportError:
            return False


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def triton(tmp_path_factory) -> Iterator[Started]:
    folder = tmp_path_factory.mktemp("triton")
    home = find_home()
    # Its python backend is put together by the embedded server; without models it needs none.
    (folder / "models").mkdir()
    (folder / "bin").mkdir()
    (folder / "bin/tritonserver").symlink_to(home.binary)
    http_port, grpc_port, metrics_port = free_ports(3)
    environment = os.environ | {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(home.libraries),
        "MODEL_REPOSITORY": str(folder / "models"),
    }
    command = [
        str(SCRIPT),
        *("--http-address=127.0.0.1", f"--http-port={http_port}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={grpc_port}"),
        *("--metrics-address=127.0.0.1", f"--metrics-port={metrics_port}"),
    ]
    with (
        running(command, env=environment, stderr=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{http_port}", trust_env=False) as http,
        grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        found = Started(process, http, stub, metrics_port)
        assert wait_until(found.is_ready, 60)
        yield found


def test_the_shell_becomes_the_server_and_hears_its_signals(triton):
    command = Path(f"/proc/{triton.process.pid}/cmdline").read_bytes().split(b"\0")
    assert command[0] == b"tritonserver"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("get", "/v2/logging"),
        ("post", "/v2/logging"),
        ("get", "/v2/trace/setting"),
        ("get", "/v2/systemsharedmemory/status"),
        ("post", "/v2/systemsharedmemory/region/x/register"),
        ("get", "/v2/cudasharedmemory/status"),
        ("post", "/v2/repository/index"),
        ("post", "/v2/repository/models/x/load"),
    ],
)
def test_http_answers_nobody_where_no_client_asks(triton, method, path):
    for headers in ({}, {"admin-key": ""}, {"admin-key": "guess"}):
        options = {"json": {}} if method == "post" else {}
        answer = getattr(triton.http, method)(path, headers=headers, **options)
        assert answer.status_code == 403, answer.text


@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        ("LogSettings", service_pb2.LogSettingsRequest),
        ("TraceSetting", service_pb2.TraceSettingRequest),
        ("SystemSharedMemoryStatus", service_pb2.SystemSharedMemoryStatusRequest),
        ("SystemSharedMemoryRegister", service_pb2.SystemSharedMemoryRegisterRequest),
        ("CudaSharedMemoryStatus", service_pb2.CudaSharedMemoryStatusRequest),
    ],
)
def test_grpc_answers_nobody_where_no_client_asks(triton, method, request_type):
    with pytest.raises(grpc.RpcError) as refused:
        triton.call(method, request_type())
    assert "This protocol is restricted" in refused.value.details()


def test_models_are_neither_loaded_nor_unloaded(triton):
    for method, request in (
        ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="x")),
        ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="x")),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            triton.call(method, request)
        assert "not allowed" in refused.value.details()


def test_what_clients_and_probes_ask_is_open(triton):
    assert triton.call("RepositoryIndex", service_pb2.RepositoryIndexRequest()).models == []
    assert triton.call("ServerReady", service_pb2.ServerReadyRequest()).ready
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert triton.http.get(path).status_code == 200
    url = f"http://127.0.0.1:{triton.metrics_port}/metrics"
    assert "nv_" in httpx.get(url, trust_env=False).text


def test_it_ends_with_code_0_when_it_is_told_to(triton):
    """Last: the others need it."""
    triton.http.close()  # It waits for connections of HTTP to end, as long as it may.
    triton.process.send_signal(signal.SIGTERM)
    assert triton.process.wait(timeout=60) == 0
