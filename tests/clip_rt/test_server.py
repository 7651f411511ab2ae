"""The embedded server: on loopback, its owner's alone, and gone without a trace when that ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
import tiny_repository
from owners import (
    ROOT,
    find_processes,
    find_remains,
    is_listening,
    is_running,
    read_command,
    wait_until,
)
from tritonclient.grpc import service_pb2, service_pb2_grpc

import clip_rt
from clip_rt.deadline import Deadline
from clip_rt.embedded import installation
from clip_rt.embedded import server as server_module
from clip_rt.embedded.server import EmbeddedServer, acquire_server
from clip_rt.wire.model_config import read_config
from clip_rt.wire.transport import Transport

pytestmark = pytest.mark.slow

OWNER = """
import os, signal, sys, time
import clip_rt
from clip_rt.embedded.server import EmbeddedServer
server = EmbeddedServer(sys.argv[1])
print(server.start(), flush=True)
"""


def find_server_pid(server: EmbeddedServer) -> int:
    (pid,) = [
        pid
        for pid in find_processes("bin/tritonserver", os.getpid())
        if server.server_id in read_command(pid)
    ]
    return pid


def find_listeners(pid: int) -> set[str]:
    """Read the addresses a process listens on, as the kernel writes them."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_it_listens_on_one_port_of_loopback_only(server):
    (listener,) = find_listeners(find_server_pid(server))
    address, port = listener.split(":")
    # 127.0.0.1, as it is or mapped into IPv6.
    assert address in ("0100007F", "0000000000000000FFFF00000100007F")
    assert f"127.0.0.1:{int(port, 16)}" == server.url


def test_it_cannot_be_reached_over_another_address(server):
    port = int(server.url.rsplit(":", 1)[1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # Sends nothing; tells which address we would have.
        own = probe.getsockname()[0]
    with socket.socket() as probe:
        assert probe.connect_ex((own, port)) != 0


def test_only_the_owner_may_ask_for_what_is_restricted(server):
    with pytest.raises(clip_rt.InferenceError, match="restricted"):
        Transport(server.url).list_models(Deadline.after(5))
    names = Transport(server.url, headers=server.headers).list_models(Deadline.after(5))
    assert names == ("tiny_image", "tiny_text")


@pytest.mark.parametrize("with_token", [False, True])
def test_nobody_can_load_or_unload_a_model(server, with_token):
    metadata = tuple(server.headers.items()) if with_token else ()
    with grpc.insecure_channel(server.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for call, request in (
            (stub.RepositoryModelLoad, service_pb2.RepositoryModelLoadRequest),
            (stub.RepositoryModelUnload, service_pb2.RepositoryModelUnloadRequest),
        ):
            with pytest.raises(grpc.RpcError):
                call(request(model_name="tiny_image"), metadata=metadata, timeout=5)


def test_the_token_is_not_shown(server):
    (token,) = server.headers.values()
    assert token not in repr(server)


def test_the_repository_is_left_as_it_was(repository, client):
    assert client.encode_texts(["red"]).shape == (1, 8)
    names = {path.name for path in repository.rglob("*")}
    files = {"config.pbtxt", "dlpack.py", "model.onnx", "model.py"}
    files |= {"processor.py", "runtime_choice.py", "runtimes.py"}
    assert names == {"tiny_image", "tiny_text", "1"} | files


def test_two_servers_do_not_touch_each_other(server, bare_repository):
    with EmbeddedServer(bare_repository) as other:
        assert other.url != server.url
        assert find_listeners(find_server_pid(other)) != find_listeners(find_server_pid(server))
    assert server.is_running
    assert is_listening(server.url)


def test_the_folder_that_the_python_backend_makes_is_gone_once_it_is_ready(bare_repository):
    before = set(Path("/tmp").glob("python_env_*"))
    with EmbeddedServer(bare_repository):
        # The owner says that it is ready, and goes on.
        assert wait_until(lambda: not set(Path("/tmp").glob("python_env_*")) - before)


def test_stop_leaves_nothing_and_it_can_start_again(start_owner, bare_repository):
    before = set(find_remains(os.getpid()))
    server = EmbeddedServer(bare_repository)
    url = server.start()
    assert set(find_remains(os.getpid())) > before
    server.stop()
    assert not is_listening(url)
    assert set(find_remains(os.getpid())) == before
    assert server.start() == url
    server.stop()
    server.stop()
    assert set(find_remains(os.getpid())) == before
    with pytest.raises(clip_rt.ServerStartError, match="not running"):
        _ = server.url


def test_a_server_that_hangs_dies_or_loses_a_process_is_cleaned_up_and_comes_back(bare_repository):
    with EmbeddedServer(bare_repository) as server:
        os.kill(find_server_pid(server), signal.SIGSTOP)
        server.stop()
        server.start()
        os.kill(find_server_pid(server), signal.SIGKILL)
        assert wait_until(lambda: not server.is_running)
        first, url = server.server_id, server.url
        assert server.start() == url
        assert server.server_id != first
        (stub,) = [
            pid
            for pid in find_processes("triton_python_backend_stub", os.getpid())
            if server.server_id.removeprefix("clip_rt-") in read_command(pid)
        ]
        os.kill(stub, signal.SIGKILL)
        assert wait_until(lambda: not server.is_running)
        own = server.server_id.removeprefix("clip_rt-")
    assert not [name for name in find_remains(os.getpid()) if own in name]


def test_a_killed_supervisor_takes_its_server_along(bare_repository):
    server = EmbeddedServer(bare_repository)
    url = server.start()
    pid = find_server_pid(server)
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    assert "supervisor.py" in read_command(parent)
    os.kill(parent, signal.SIGKILL)
    assert wait_until(lambda: not is_running(pid))
    own = server.server_id.removeprefix("clip_rt-")
    server.stop()
    assert not is_listening(url)
    assert wait_until(lambda: not [name for name in find_remains(os.getpid()) if own in name])


ENDS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "exits at once": "os._exit(3)",
    "returns": "",
    "raises": "raise RuntimeError('on purpose')",
    "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "is terminated": "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
}


def test_it_is_gone_however_its_owner_ends(start_owner, bare_repository):
    program = OWNER + "sys.stdin.readline()\n"
    owners = {end: start_owner(program + code, bare_repository) for end, code in ENDS.items()}
    urls = {end: owner.read_line() for end, owner in owners.items()}
    for end, owner in owners.items():
        owner.go_on()
        owner.process.wait(timeout=10)
        assert wait_until(lambda owner=owner: not owner.find_remains()), (
            end,
            owner.find_remains(),
        )
        assert not is_listening(urls[end]), end
        assert len(owner.helpers) == 3, end  # Supervisor, server, stub.


def test_a_start_may_take_as_long_as_it_takes(bare_repository):
    with EmbeddedServer(bare_repository, start_timeout_s=float("inf")) as server:
        assert is_listening(server.url)


def test_it_outlives_the_thread_that_started_it(bare_repository):
    server = EmbeddedServer(bare_repository)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join(60)
    pid = find_server_pid(server)
    assert not wait_until(lambda: not is_running(pid), timeout_s=1.0)
    server.stop()
    assert not is_running(pid)


def test_a_forked_child_neither_ends_nor_keeps_it(start_owner, bare_repository):
    owner = start_owner(
        OWNER
        + """
if os.fork() == 0:
    os.setsid()
    time.sleep(30)
    os._exit(0)
child = os.fork()
if child == 0:
    server.stop()
    os._exit(0)
os.waitpid(child, 0)
print(server.is_running, flush=True)
sys.stdin.readline()
os._exit(0)
""",
        bare_repository,
    )
    url = owner.read_line()
    assert owner.read_line() == "True"
    owner.go_on()
    owner.process.wait(timeout=10)
    assert wait_until(lambda: not is_listening(url))
    assert wait_until(lambda: not find_remains(owner.pid))
    for pid in owner.helpers:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_port_taken_meanwhile_is_not_used(bare_repository, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [taken.getsockname()[1]]
        find_free_port = server_module._find_free_port
        monkeypatch.setattr(
            server_module, "_find_free_port", lambda: ports.pop() if ports else find_free_port()
        )
        with EmbeddedServer(bare_repository) as server:
            assert server.url != f"127.0.0.1:{taken.getsockname()[1]}"
            assert not ports


def test_a_server_that_somebody_else_runs_is_not_taken_for_ours(
    server, bare_repository, monkeypatch
):
    ports = [int(server.url.rsplit(":", 1)[1])]
    find_free_port = server_module._find_free_port
    monkeypatch.setattr(
        server_module, "_find_free_port", lambda: ports.pop() if ports else find_free_port()
    )
    with EmbeddedServer(bare_repository) as other:
        assert other.url != server.url


def test_clients_share_one_server_until_the_last_releases_it(bare_repository):
    first, second = acquire_server(bare_repository), acquire_server(bare_repository)
    assert first.server_id == second.server_id
    first.stop()
    assert second.is_running
    second.stop()
    assert not second.is_running


def break_model(folder: Path) -> None:
    (folder / "1" / "model.onnx").write_bytes(b"no graph")


def ask_for_gpu(folder: Path) -> None:
    config = (folder / "config.pbtxt").read_text()
    parameter = 'parameters { key: "execution_providers" value { string_value: "NoSuchProvider" } }'
    (folder / "config.pbtxt").write_text(config + parameter)


@pytest.mark.parametrize(
    ("change", "words"),
    [(break_model, "Protobuf parsing failed"), (ask_for_gpu, "wants NoSuchProvider")],
)
def test_a_model_that_does_not_load_is_named_with_its_reason(tmp_path, change, words):
    tiny_repository.write(tmp_path)
    change(tmp_path / "tiny_text")
    before = set(find_remains(os.getpid()))
    with pytest.raises(clip_rt.ServerStartError, match=words) as caught:
        EmbeddedServer(tmp_path).start()
    assert "model 'tiny_text'" in str(caught.value)
    assert "tiny_text" in caught.value.log_tail
    assert set(find_remains(os.getpid())) == before


def test_a_gpu_model_fails_without_a_gpu_instead_of_running_on_the_processor(tmp_path):
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    tiny_repository.write(tmp_path, kind="KIND_GPU")
    with pytest.raises(clip_rt.ServerStartError, match="tiny_image"):
        EmbeddedServer(tmp_path).start()


def test_models_for_other_backends_are_left_out(tmp_path):
    tiny_repository.write_bare(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.pbtxt").write_text('name: "other"\nbackend: "tensorrt"\n')
    with EmbeddedServer(tmp_path) as server:
        names = Transport(server.url, headers=server.headers).list_models(Deadline.after(5))
    assert names == ("bare",)


def test_a_repository_without_models_says_how_to_get_one(tmp_path):
    with pytest.raises(clip_rt.ServerStartError, match=r"no model .* export\.onnx"):
        EmbeddedServer(tmp_path).start()
    with pytest.raises(clip_rt.ServerStartError, match="does not exist"):
        EmbeddedServer(tmp_path / "missing").start()


def test_models_that_take_too_long_are_given_up(bare_repository):
    before = set(find_remains(os.getpid()))
    with pytest.raises(clip_rt.ServerStartError, match=r"not ready after 0\.1 s"):
        EmbeddedServer(bare_repository, start_timeout_s=0.1).start()
    assert set(find_remains(os.getpid())) == before


@pytest.mark.parametrize(
    ("name", "found", "words"),
    [
        ("platform", "darwin", "Linux x86-64 only; this is darwin"),
        ("machine", "aarch64", "Linux x86-64 only; this is linux aarch64"),
        ("libc", "", "needs glibc.*musl"),
        ("libc", "glibc 2.31", r"glibc 2\.35 or newer; this system has 2\.31"),
    ],
)
def test_on_another_system_the_error_says_which_it_needs(
    bare_repository, monkeypatch, name, found, words
):
    with monkeypatch.context() as patch:
        if name == "platform":
            patch.setattr(installation.sys, "platform", found)
        elif name == "machine":
            patch.setattr(installation.platform, "machine", lambda: found)
        else:
            patch.setattr(installation.os, "confstr", lambda _: found)
        with pytest.raises(clip_rt.ServerStartError, match=rf"{words}.*url="):
            EmbeddedServer(bare_repository).start()


@pytest.mark.parametrize("package", ["pytriton", "onnxruntime"])
def test_a_missing_wheel_is_named_with_the_command_that_installs_it(
    bare_repository, monkeypatch, package
):
    find_spec = installation.importlib.util.find_spec
    monkeypatch.setattr(
        installation.importlib.util,
        "find_spec",
        lambda name: None if name == package else find_spec(name),
    )
    with pytest.raises(clip_rt.ServerStartError, match=r"pip install 'clip-rt\[server\]'.*url="):
        EmbeddedServer(bare_repository).start()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a wheel of empty files in the place of the real one."""
    package = tmp_path / "pytriton"
    stubs = package / "tritonserver" / "python_backend_stubs"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for path in (
        package / "__init__.py",
        package / "tritonserver" / "bin" / "tritonserver",
        package / "tritonserver" / "backends" / "python" / "libtriton_python.so",
        stubs / version / "triton_python_backend_stub",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o755)
    monkeypatch.syspath_prepend(str(tmp_path))
    return package / "tritonserver"


def test_a_binary_that_may_not_be_executed_is_named(bare_repository, wheel):
    (wheel / "bin" / "tritonserver").chmod(0o644)
    with pytest.raises(clip_rt.ServerStartError, match=r"bin/tritonserver cannot be .*noexec"):
        EmbeddedServer(bare_repository).start()


def test_a_python_the_wheel_has_no_part_for_is_told_which_it_has(bare_repository, wheel):
    stubs = wheel / "python_backend_stubs"
    (only,) = stubs.iterdir()
    only.rename(stubs / "3.9")
    with pytest.raises(clip_rt.ServerStartError, match=r"no part for Python 3\.\d+, only for 3\.9"):
        EmbeddedServer(bare_repository).start()


def test_a_binary_of_another_kind_is_reported_by_the_system(bare_repository, wheel):
    before = set(find_remains(os.getpid()))
    with pytest.raises(clip_rt.ServerStartError, match=r"Exec format error.*x86-64"):
        EmbeddedServer(bare_repository).start()
    assert set(find_remains(os.getpid())) == before


def test_a_library_the_system_lacks_is_named(bare_repository, wheel):
    words = "tritonserver: error while loading shared libraries: libnuma.so.1: not there"
    (wheel / "bin" / "tritonserver").write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 127\n")
    with pytest.raises(clip_rt.ServerStartError, match=r"libnuma.*Install the package"):
        EmbeddedServer(bare_repository).start()


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "model" / "config.pbtxt").mkdir(parents=True)
    with pytest.raises(clip_rt.ServerStartError, match=r"config\.pbtxt .* cannot be read"):
        EmbeddedServer(tmp_path).start()


@pytest.mark.parametrize("content", [b'backend: "python', b"max_batch_size: many", b"name: '\xff'"])
def test_a_configuration_that_is_none_is_named_with_the_reason(tmp_path, content):
    tiny_repository.write_bare(tmp_path)
    (tmp_path / "bare" / "config.pbtxt").write_bytes(content)
    with pytest.raises(
        clip_rt.ServerStartError, match=r"bare/config\.pbtxt .* cannot be read: .*Export"
    ):
        EmbeddedServer(tmp_path).start()


def test_a_configuration_is_read_whatever_its_layout(tmp_path):
    tiny_repository.write_bare(tmp_path)
    config = tmp_path / "bare" / "config.pbtxt"
    config.write_text(" ".join(config.read_text().split()) + " # backend: 'tensorrt'")
    assert list(installation.find_models(tmp_path)) == ["bare"]


@pytest.mark.parametrize(
    ("config", "mib"),
    [
        # A batch of images, as a list and as protobuf prints it; texts, which take less than the
        # least; each instance by itself.
        ("max_batch_size: 64\ninput [ { data_type: TYPE_UINT8 dims: [224, 224, 3] } ]", 9.2),
        ("max_batch_size: 64\ninput {\n data_type: TYPE_UINT8\n dims: 392\n dims: 384\n}", 9.2),
        ("max_batch_size: 64\ninput [ { data_type: TYPE_INT32 dims: [ -1 ] } ]", 1.0),
        ("max_batch_size: 8\ninstance_group [ { count: 3 kind: KIND_CPU } ]", 3.0),
        # In other words of the text format.
        ("max_batch_size: 64 input { data_type: TYPE_UINT8 dims: 392 dims: 384 } # a comment", 9.2),
    ],
)
def test_shared_memory_is_reckoned_from_the_configuration(config, mib, tmp_path):
    (tmp_path / "config.pbtxt").write_text(f'backend: "python"\n{config}')
    found = installation._estimate_shared_memory(read_config(tmp_path))
    assert found / 2**20 == pytest.approx(mib, abs=0.05)


ELSEWHERE = """
import os, subprocess, sys, tempfile
import clip_rt
from clip_rt.embedded.server import EmbeddedServer
def mount(target, options):
    os.makedirs(target, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", target], check=True)
def start(repository):
    try:
        with EmbeddedServer(repository):
            print("started", flush=True)
    except clip_rt.ServerStartError as error:
        print(error, flush=True)
repository, folder = sys.argv[1:]
mount("/dev/shm", "size=1M")
start(repository)
mount("/dev/shm", "size=64M")
start(repository)
mount(folder + "/noexec", "noexec,mode=700")
tempfile.tempdir = folder + "/noexec"
start(repository)
mount(folder + "/full", "nr_inodes=6,mode=700")
tempfile.tempdir = folder + "/full"
start(repository)
tempfile.tempdir = None
subprocess.run(["mount", "--bind", repository, repository], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", repository], check=True)
start(repository)
"""


def test_disks_that_are_small_full_read_only_or_noexec(tmp_path):
    namespace = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, timeout=120).returncode:
        pytest.skip("this user may not mount anything in a namespace of its own")
    repository = tiny_repository.write(tmp_path / "models")
    done = subprocess.run(
        [*namespace, sys.executable, "-c", ELSEWHERE, str(repository), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | {"XDG_RUNTIME_DIR": ""},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    small, usual, noexec, full, read_only = done.stdout.splitlines()
    assert re.search(r"1\.0 MiB left.*need 2\.0 MiB.*--shm-size=1g", small)
    assert re.search(r"No space left on device.*TMPDIR", full)
    assert usual == noexec == read_only == "started"


def test_a_missing_libpython_names_the_package_to_install(tmp_path):
    with pytest.raises(clip_rt.ServerStartError, match=r"apt install python3\.99-dev"):
        installation._find_libpython("3.99", tmp_path)
    (tmp_path / "libpython3-0123abcd.99.so.1.0").touch()
    assert installation._find_libpython("3.99", tmp_path) is None
