"""The doctor finds what is wrong, says the way out, ends in time, and tells no secrets."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_repository

import clip_rt
from clip_rt import doctor
from clip_rt.__main__ import main
from clip_rt.deadline import Deadline
from clip_rt.embedded import installation, runtime_choice
from clip_rt.embedded import server as server_module
from clip_rt.embedded.server import EmbeddedServer
from clip_rt.errors import ServerStartError
from clip_rt.processor import Processor
from clip_rt.wire import canary
from clip_rt.wire.messages import ServerFacts

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("CLIP_RT_URL", "CLIP_RT_REPOSITORY", "CLIP_RT_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def patients(tmp_path_factory, client):
    """A server of models with a right, a wrong and a damaged canary."""
    (image,) = client.encode_images(canary.draw_image())
    (text,) = client.encode_texts(canary.TEXT)
    written = canary.write(image, text, min_cosine=0.9995)
    repository = tmp_path_factory.mktemp("patients")
    for name, carried in (
        ("well", written),
        ("ill", written | {"text": written["image"]}),
        ("damaged", written | {"text": "?"}),
    ):
        facts = {"canary": carried}
        tiny_repository.write(repository, name, image=facts, text=facts)
    with EmbeddedServer(repository) as server:
        yield server


def consult(capsys, *arguments):
    """Run the command and return its exit code and its findings by check."""
    code = main(["doctor", *map(str, arguments), "--json"])
    output = capsys.readouterr().out
    document = json.loads(output)
    assert document["ok"] is (code == 0)
    return code, {finding["check"]: finding for finding in document["findings"]}


def failures(findings):
    return [name for name, finding in findings.items() if finding["status"] == "fail"]


@pytest.mark.slow
def test_all_is_well_with_the_bundled_model_on_a_server_of_its_own(capsys):
    code, found = consult(capsys, "--repository", ROOT / "model_repository")
    assert code == 0
    assert found["canary"]["status"] == "ok"
    assert min(found["canary"]["numbers"].values()) > 0.9999
    assert "nvidia-pytriton" in found["parts"]["detail"]
    assert found["server"]["status"] == "warn"
    assert doctor.SECURITY_PAGE in found["server"]["way_out"]
    assert "drawings is RN26@64px in fp16_weights" in found["contract"]["detail"]
    assert "drawings_text by the python backend, 1 on CPU" in found["execution"]["detail"]
    assert found["latency"]["numbers"].keys() == {"image_ms", "text_ms"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedded", "in_process"])
def test_what_models_hold_in_memory_is_said(capsys, kind):
    options = ("--repository", ROOT / "model_repository", "--server", kind)
    code, found = consult(capsys, *options)
    assert code == 0
    numbers = found["memory"]["numbers"]
    assert numbers.keys() == {"drawings_image_bytes", "drawings_text_bytes"}
    assert 2**20 < min(numbers.values()) < max(numbers.values()) < 2**30
    assert "drawings_text by" in found["execution"]["detail"]
    if kind == "in_process":
        assert found["memory"]["server"] == "in process"
        assert found["parts"]["detail"].startswith("models run in this process, by OpenVINO")
        assert "server" not in found


def test_without_a_runtime_it_says_how_to_get_one(capsys, monkeypatch):
    monkeypatch.setattr(runtime_choice, "installed", lambda name: False)
    code, found = consult(
        capsys, "--repository", ROOT / "model_repository", "--server", "in_process"
    )
    assert code == 1
    assert "clip-rt[in-process]" in found["parts"]["way_out"]


class TestCanary:
    def test_right(self, capsys, patients):
        code, found = consult(capsys, "--url", patients.url, "--model", "well")
        assert (code, found["canary"]["status"]) == (0, "ok")
        assert found["canary"]["numbers"]["text_cosine"] > 0.99999

    def test_wrong(self, capsys, patients):
        code, found = consult(capsys, "--url", patients.url, "--model", "ill")
        assert (code, failures(found)) == (1, ["canary"])
        numbers = found["canary"]["numbers"]
        assert numbers["image_cosine"] > 0.9995 > numbers["text_cosine"]

    def test_damaged(self, capsys, patients):
        code, found = consult(capsys, "--url", patients.url, "--model", "damaged")
        assert (code, failures(found)) == (1, ["canary"])
        assert "Export the model again" in found["canary"]["detail"]

    def test_missing(self, capsys, server):
        code, found = consult(capsys, "--url", server.url, "--model", "tiny")
        assert (code, found["canary"]["status"]) == (0, "warn")


class TestServer:
    def test_the_table_has_a_line_for_each_finding_and_no_secret(self, capsys, patients):
        assert main(["doctor", "--url", patients.url, "--model", "well"]) == 0
        output = capsys.readouterr().out
        lines = output.splitlines()
        assert {line.split()[0] for line in lines} == {"ok", "warn"}
        assert sum(f"{patients.url} " in line for line in lines) == 9
        (token,) = patients.headers.values()
        assert token not in output

    def test_none_is_started_beside_one_that_is_named(self, capsys, patients, monkeypatch):
        monkeypatch.setattr(server_module, "acquire_server", None)
        monkeypatch.setenv("CLIP_RT_URL", patients.url)
        assert consult(capsys, "--model", "well")[0] == 0

    def test_an_unknown_model_fails_the_contract(self, capsys, patients):
        code, found = consult(capsys, "--url", patients.url, "--model", "other")
        assert (code, failures(found)) == (1, ["contract"])

    def test_nobody_listens(self, capsys):
        start_s = time.monotonic()
        code, found = consult(capsys, "--url", "127.0.0.1:1")
        assert (code, failures(found)) == (1, ["server"])
        assert "gRPC port" in found["server"]["way_out"]
        assert time.monotonic() - start_s < 5

    def test_one_that_hangs_leaves_time_for_the_other(self, capsys, patients):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            hanging = f"127.0.0.1:{silent.getsockname()[1]}"
            start_s = time.monotonic()
            addresses = ["--url", hanging, "--url", patients.url]
            code = main(["doctor", *addresses, "--model", "well", "--timeout-s", "4"])
            duration_s = time.monotonic() - start_s
        lines = capsys.readouterr().out.splitlines()
        assert code == 1
        assert duration_s < 5
        assert next(line for line in lines if line.startswith("fail")).split()[1] == hanging
        assert any(f"{patients.url} latency" in line for line in lines)

    def test_a_wrong_address_is_a_finding(self, capsys):
        code, found = consult(capsys, "--url", "http://example.org/v2")
        assert (code, failures(found)) == (1, ["server"])
        assert "host:port" in found["server"]["detail"]


@pytest.mark.parametrize(
    ("url", "version", "status"),
    [
        ("127.0.0.1:8001", "2.51.0", "warn"),
        ("[::1]:8001", "2.70.9", "warn"),
        ("localhost:8001", "2.71.0", "ok"),
        ("triton.example.org:8001", "2.70.0", "fail"),
        ("dns:///triton:8001", "2.51.0", "fail"),
        ("10.0.0.7:8001", "2.71.0", "ok"),
        ("10.0.0.7:8001", "3.0.0", "ok"),
        ("10.0.0.7:8001", "unknown", "ok"),
    ],
)
def test_a_version_with_known_holes_must_not_be_reached_from_elsewhere(url, version, status):
    class Asked:
        def read_server(self, *, timeout_s):
            return ServerFacts(name="triton", version=version)

    asked = Asked()
    asked.url = url
    found = doctor._check_version(asked, url, Deadline.after(1))
    assert found.status == status
    assert (doctor.SECURITY_PAGE in found.way_out) is (status != "ok")


@pytest.mark.parametrize(
    ("url", "status"),
    [("localhost:1", "ok"), ("10.0.0.7:1", "warn"), ("grpcs://10.0.0.7:1", "ok")],
)
def test_warns_of_what_others_can_read(url, status):
    assert doctor._check_encryption(url).status == status


ZEN4 = Processor("AMD EPYC", ("avx2", "avx512f", "avx512_bf16", "avx512_vnni"))
HASWELL = Processor("Intel(R) Xeon(R) CPU E5-2680 v4", ("avx2",))
CAPPED = replace(ZEN4, caps=(("ONEDNN_MAX_CPU_ISA", "AVX2"),))
NEOVERSE = Processor("aarch64", ("asimd", "asimddp", "bf16", "i8mm", "sve"))


class TestProcessor:
    @pytest.mark.parametrize(
        ("found", "words"),
        [
            (ZEN4, "AMD EPYC has AVX-512, AVX2, VNNI, BF16; INT8 is fast, BF16 training fast"),
            (HASWELL, "v4 has AVX2; INT8 is no faster than FP32, BF16 training slow"),
            (NEOVERSE, "aarch64 has SVE, NEON, dot product, I8MM, BF16; INT8 is fast"),
            (Processor("x", ()), "x has no instruction set that we know; INT8 is no faster"),
        ],
    )
    def test_its_instruction_sets_are_named(self, found, words):
        finding = doctor.check_processor(found)
        assert finding.status == "ok"
        assert words in finding.detail
        assert finding.numbers["int8_is_fast"] == found.has_fast_int8
        assert set(found.flags) < set(finding.numbers)

    def test_a_cap_is_a_warning_and_named(self):
        finding = doctor.check_processor(CAPPED)
        assert finding.status == "warn"
        assert "ONEDNN_MAX_CPU_ISA=AVX2 leaves AVX2" in finding.detail
        assert finding.way_out == "Unset ONEDNN_MAX_CPU_ISA to use all of it."
        assert (finding.numbers["avx2"], finding.numbers["avx512_vnni"]) == (1.0, 0.0)

    @pytest.mark.parametrize(
        ("precision", "found", "status", "words"),
        [
            ("int8", ZEN4, "ok", "fastest in int8"),
            ("int8", HASWELL, "warn", "a processor that has no AVX-512, VNNI or AMX"),
            ("int8", CAPPED, "warn", "may use no AVX-512, VNNI or AMX (ONEDNN_MAX_CPU_ISA"),
            ("fp16", ZEN4, "warn", "computes FP16 in FP32"),
            ("fp32", ZEN4, "ok", "fastest in int8"),
            ("fp32", HASWELL, "ok", "fastest in fp32"),
            ("fp16_weights", HASWELL, "ok", "fastest in fp32"),
        ],
    )
    def test_a_served_precision_that_is_slow_here_is_a_warning(
        self, precision, found, status, words
    ):
        finding = doctor.check_precision(precision, found, {}, name="embedded", is_here=True)
        assert finding.status == status
        assert words in finding.detail
        assert ("--precision fp32" in finding.way_out) is (status == "warn")

    def test_of_a_server_elsewhere_it_only_speaks_of_this_machine(self):
        finding = doctor.check_precision("int8", HASWELL, {}, name="a:1", is_here=False)
        assert finding.status == "ok"
        assert "that is about this machine, the server may be another" in finding.detail

    def test_what_was_measured_is_said(self, capsys, patients):
        # The server of the fixture measured its towers, on this machine.
        _, found = consult(capsys, "--url", patients.url, "--model", "well")
        assert {"bf16_is_fast", "int8_is_fast"} <= set(found["processor"]["numbers"])
        precision = found["precision"]
        assert "well_image: " in precision["detail"]
        assert precision["numbers"].keys() == {
            f"well_{tower}_{runtime}_ms"
            for tower in ("image", "text")
            for runtime in ("openvino", "onnxruntime")
        }
        # The models of the fixture are of the precision fp16.
        assert precision["status"] == "warn"


class TestThisMachine:
    def examine(self, **options):
        deadline = Deadline.after(5)
        found = list(doctor.examine(["127.0.0.1:1"], deadline=deadline, **options))
        return {finding.check: finding for finding in found}

    def test_a_missing_package_is_named_and_ends_it(self, monkeypatch):
        monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
        found = self.examine()
        assert list(found) == ["python", "packages"]
        assert found["packages"].status == "fail"
        assert "no-such-package" in found["packages"].detail

    def test_an_untested_python_is_a_warning(self, monkeypatch):
        monkeypatch.setattr(doctor, "PYTHONS", ((2, 6), (2, 7)))
        assert self.examine()["python"].status == "warn"

    def test_a_cache_folder_is_made_and_left_empty(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CLIP_RT_CACHE_DIR", str(tmp_path / "a" / "b"))
        assert self.examine()["cache folder"].status == "ok"
        assert os.listdir(tmp_path / "a" / "b") == []

    def test_a_cache_folder_that_cannot_be_written_is_a_warning(self, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("CLIP_RT_CACHE_DIR", str(tmp_path / "file" / "cache"))
        found = self.examine()["cache folder"]
        assert found.status == "warn"
        assert "CLIP_RT_CACHE_DIR" in found.way_out

    def test_parts_of_the_server_that_are_missing_are_named(self, monkeypatch, capsys):
        def find_home():
            raise ServerStartError("the embedded server is not installed. Install it with ...")

        monkeypatch.setattr(installation, "find_home", find_home)
        code, found = consult(capsys, "--repository", ROOT / "model_repository")
        assert (code, failures(found)) == (1, ["parts"])
        assert "server" not in found

    def test_little_shared_memory_is_a_warning(self, monkeypatch):
        monkeypatch.setattr(doctor, "SHARED_MEMORY_BYTES", 2**60)
        found = doctor._check_shared_memory()
        assert found.status == "warn"
        assert "--shm-size" in found.way_out

    def test_a_repository_without_models_fails(self, capsys, tmp_path):
        code, found = consult(capsys, "--repository", tmp_path)
        assert (code, failures(found)) == (1, ["server"])
        assert "export.onnx" in found["server"]["detail"]


@pytest.mark.parametrize(
    "arguments",
    [["--timeout-s", "0"], ["--timeout-s", "nan"], ["--url", "a:1", "--repository", "x"], ["--no"]],
)
def test_refuses_what_it_cannot_do(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(["doctor", *arguments]))
    assert capsys.readouterr().err


def test_an_embedded_server_is_released(capsys, client, repository):
    # The same that the client has, which must not lose it.
    assert main(["doctor", "--repository", str(repository)]) == 0
    with contextlib.closing(clip_rt.Client(repository=repository)) as other:
        assert other.encode_texts("red").shape == (1, tiny_repository.EMBEDDING_DIM)
    assert client.encode_texts("red").shape == (1, tiny_repository.EMBEDDING_DIM)
