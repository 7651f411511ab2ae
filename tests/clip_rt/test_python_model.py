"""What runs inside Triton's python backend: merged requests, errors for the guilty only, runtimes.

Everything is asked of both runtimes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_repository
from owners import find_processes, wait_until
from transport_calls import infer

import clip_rt
from clip_rt.deadline import Deadline
from clip_rt.embedded import installation, runtime_choice
from clip_rt.embedded.server import EmbeddedServer
from clip_rt.wire.messages import ServedModel
from clip_rt.wire.transport import Transport

pytestmark = pytest.mark.slow

# Ids up to 59999 pass the check at the door and fail inside the graph.
WIDER = 'parameters { key: "vocab_size" value { string_value: "60000" } }\n'


def set_parameters(folder: Path, **parameters: str) -> None:
    """Add parameters to a model's config.pbtxt."""
    with (folder / "config.pbtxt").open("a") as file:
        for key, value in parameters.items():
            file.write(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n')


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def runtime(request) -> str:
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture(scope="module")
def transport(tmp_path_factory, runtime) -> Iterator[Transport]:
    repository = tiny_repository.write(tmp_path_factory.mktemp("wider"), "wider", text_config=WIDER)
    for tower in ("image", "text"):
        set_parameters(repository / f"wider_{tower}", runtime=runtime)
    with EmbeddedServer(repository) as server:
        transport = Transport(server.url, may_cancel=False)
        yield transport
        transport.close()


@pytest.fixture(scope="module")
def towers(transport) -> tuple[ServedModel, ServedModel]:
    return transport.describe(["wider_image", "wider_text"], Deadline.after(10))


def embed(transport, model, array):
    return infer(transport, model, array, timeout_s=30)


def find_stub() -> int:
    (pid,) = find_processes("/models/wider_text/", os.getpid())
    return pid


def test_merged_requests_are_split_again_and_a_bad_one_harms_no_other(transport, towers, runtime):
    _, text = towers
    rng = np.random.default_rng(0)
    good = [
        rng.integers(1, 49000, (rows, length), dtype=np.int32)
        for rows, length in ((1, 5), (3, 5), (2, 9), (1, 5), (4, 9), (2, 5))
    ]
    alone = [embed(transport, text, tokens) for tokens in good]
    outside = np.array([[1, 2, 60000, 4, 5]], np.int32)
    inside = np.array([[1, 2, 59999, 4, 5]], np.int32)
    batches = [*good[:3], outside, inside, *good[3:]]
    stub = find_stub()
    with ThreadPoolExecutor(len(batches)) as pool:
        # While the model stands still they queue, and are merged where their shapes agree.
        os.kill(stub, signal.SIGSTOP)
        calls = [pool.submit(embed, transport, text, tokens) for tokens in batches]
        time.sleep(0.5)
        os.kill(stub, signal.SIGCONT)
        errors = [call.exception(timeout=30) for call in calls]
    bad = [n for n, error in enumerate(errors) if isinstance(error, clip_rt.InferenceError)]
    # OpenVINO reads zeros where the table has no row, and says nothing.
    assert bad == ([3, 4] if runtime == "onnxruntime" else [3])
    assert "60000" in str(errors[3])
    together = [calls[n].result(60) for n in (0, 1, 2, 5, 6, 7)]
    for merged, single in zip(together, alone, strict=True):
        np.testing.assert_allclose(merged, single, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.full((1, 5), -1, np.int32), "token ids span -1"),
        (np.full((1, 78), 7, np.int32), "78 long"),
        (np.full((1, 0), 7, np.int32), "0 long"),
        (np.full((33, 5), 7, np.int32), "batch-size"),
        (np.full((5,), 7, np.int32), "shape"),
        (np.full((1, 5), 7, np.int64), "size"),
    ],
)
def test_a_request_that_is_wrong_is_refused_and_the_server_lives(transport, towers, tokens, words):
    _, text = towers
    with pytest.raises(clip_rt.InferenceError, match=words):
        embed(transport, text, tokens)
    assert embed(transport, text, np.full((1, 5), 7, np.int32)).shape == (1, 8)


def test_images_of_another_size_or_type_are_refused(transport, towers):
    image, _ = towers
    with pytest.raises(clip_rt.InferenceError, match="shape"):
        embed(transport, image, np.zeros((1, 32, 32, 3), np.uint8))
    floats = replace(image, input_type="FP32")
    with pytest.raises(clip_rt.InferenceError, match="FP32"):
        embed(transport, floats, np.zeros((1, 64, 64, 3), np.float32))


def test_answers_are_those_of_the_graph(transport, towers, runtime, tmp_path):
    import onnxruntime

    image, text = towers
    tiny_repository.write(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    tokens = np.random.default_rng(0).integers(1, 49000, (5, 7)).astype(np.int32)
    for model, array, name in ((image, pixels, "tiny_image"), (text, tokens, "tiny_text")):
        session = onnxruntime.InferenceSession(Path(tmp_path, name, "1", "model.onnx"))
        (expected,) = session.run(None, {model.input_name: array})
        # OpenVINO's LpNormalization adds an epsilon, which shows on sums as short as these.
        atol = 1e-6 if runtime == "onnxruntime" else 3e-5
        np.testing.assert_allclose(embed(transport, model, array), expected, atol=atol)


def serve(repository: Path, capfd) -> str:
    """Start and stop a server.

    Returns:
        Its log.
    """
    capfd.readouterr()
    log, num_models = "", len(list(repository.iterdir()))

    def has_all() -> bool:
        nonlocal log
        log += capfd.readouterr().err
        return log.count(" is run by ") >= num_models

    with EmbeddedServer(repository, shows_log=True):
        # What the processes of models log may come a moment after the server is ready.
        wait_until(has_all)
    return log + capfd.readouterr().err


@pytest.fixture
def tiny(tmp_path) -> Path:
    return tiny_repository.write(tmp_path / "models")


@pytest.fixture
def without_openvino(tmp_path, monkeypatch) -> None:
    """Let the server's Python find an OpenVINO that cannot be imported."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/openvino.py").write_text("raise ImportError('it is hidden')\n")
    find = installation._find_package
    monkeypatch.setattr(
        installation,
        "_find_package",
        # numpy lies beside onnxruntime.
        lambda name: tmp_path / "hidden" if name == "numpy" else find(name),
    )


SAID = re.compile(
    r"(tiny_\w+) is run by (OpenVINO|ONNX Runtime) [\d.]+[^(]*"
    r"\((OpenVINO|ONNX Runtime) is the faster here: "
    r"OpenVINO ([\d.e+-]+) ms, ONNX Runtime ([\d.e+-]+) ms, (measured .*)\)"
)


@pytest.fixture
def choices(tmp_path, monkeypatch) -> Path:
    """An empty folder of choices."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/clip_rt/runtimes"


def test_auto_is_the_faster_measured_once_and_the_log_says_so(tiny, capfd, choices):
    set_parameters(tiny / "tiny_text", runtime="auto")
    first, second = (SAID.findall(serve(tiny, capfd)) for _ in range(2))
    # One says auto, the other nothing.
    assert sorted(name for name, *_ in first) == ["tiny_image", "tiny_text"]
    for _, taken, faster, openvino_ms, onnxruntime_ms, when in first:
        expected = "OpenVINO" if float(openvino_ms) <= float(onnxruntime_ms) else "ONNX Runtime"
        assert (taken, faster, when) == (expected, expected, "measured now")
    again = sorted((*said[:-1], "measured at an earlier start") for said in first)
    assert sorted(second) == again
    assert len(list(choices.glob("*.json"))) == 2
    # ONNX Runtime would keep an identifier of this machine.
    assert [path.name for path in choices.parents[1].iterdir()] == ["clip_rt"]


@pytest.mark.parametrize("name", ["OpenVINO", "ONNX Runtime"])
def test_what_is_remembered_is_taken_without_the_other(tiny, capfd, choices, name):
    serve(tiny, capfd)
    runtime = {value: key for key, value in runtime_choice.RUNTIMES.items()}[name]
    for entry in choices.glob("*.json"):
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"runtime": runtime}))
    taken = [said[1] for said in SAID.findall(serve(tiny, capfd))]
    assert taken == [name, name]


def test_another_cap_of_the_environment_is_measured_anew(tiny, capfd, choices, monkeypatch):
    serve(tiny, capfd)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert {said[-1] for said in SAID.findall(serve(tiny, capfd))} == {"measured now"}
    assert len(list(choices.glob("*.json"))) == 4


@pytest.mark.parametrize(
    ("in_the_way", "when"),
    [("a file", "measured at each start: nothing can be kept"), ("a wrong entry", "measured now")],
)
def test_a_cache_that_is_of_no_use_fails_nothing(tiny, capfd, choices, in_the_way, when):
    if in_the_way == "a file":
        choices.parents[1].write_text("")
    else:
        serve(tiny, capfd)
        for entry in choices.glob("*.json"):
            entry.write_text('{"runtime": "../../bin/sh"}')
    assert {said[-1] for said in SAID.findall(serve(tiny, capfd))} == {when}


def test_instances_of_a_model_measure_it_once(tiny, capfd, choices):
    config = tiny / "tiny_text/config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", "count: 3"))
    said = [each[-1] for each in SAID.findall(serve(tiny, capfd)) if each[0] == "tiny_text"]
    assert sorted(said) == [*2 * ["measured at an earlier start"], "measured now"]


def test_while_others_measure_for_long_the_default_is_taken(tiny, capfd, choices, monkeypatch):
    for tower in ("image", "text"):
        file = tiny / f"tiny_{tower}/1/runtime_choice.py"
        file.write_text(file.read_text().replace("LOCK_TIMEOUT_S = 20.0", "LOCK_TIMEOUT_S = 0.1"))
    with runtime_choice.alone(choices):
        log = serve(tiny, capfd)
    assert log.count("(not measured: other models still were)") == 2
    assert not list(choices.glob("*.json"))


def test_where_nothing_can_be_written_nothing_is_measured(tiny, capfd, choices):
    choices.parents[1].write_text("")
    for tower in ("image", "text"):
        file = tiny / f"tiny_{tower}/1/runtime_choice.py"
        text = file.read_text()
        assert "tempfile.gettempdir()" in text
        file.write_text(text.replace("tempfile.gettempdir()", '"/proc"'))
    log = serve(tiny, capfd)
    assert log.count("(not measured: no folder can be written to for a lock)") == 2


@pytest.mark.parametrize(
    ("constant", "reason"),
    [("MAX_LOAD_S = 5.0", "s to load"), ("BYTES_PER_BYTE = 6", "MiB twice might not fit")],
)
def test_a_large_model_is_not_measured(tiny, capfd, choices, constant, reason):
    for tower in ("image", "text"):
        file = tiny / f"tiny_{tower}/1/runtime_choice.py"
        name, _, value = constant.partition(" = ")
        changed = {"MAX_LOAD_S": "0.0", "BYTES_PER_BYTE": "10**12"}[name]
        text = file.read_text()
        assert f"{name} = {value}" in text
        file.write_text(text.replace(f"{name} = {value}", f"{name} = {changed}"))
    log = serve(tiny, capfd)
    assert len(re.findall(rf"is run by OpenVINO .*not measured: .*{reason}", log)) == 2
    assert not list(choices.glob("*.json"))


@pytest.mark.parametrize(
    "parameters", [{"runtime": "onnxruntime"}, {"execution_providers": "CPUExecutionProvider"}]
)
def test_onnx_runtime_runs_what_names_it(tiny, capfd, parameters):
    set_parameters(tiny / "tiny_text", **parameters)
    log = serve(tiny, capfd)
    assert "tiny_text is run by ONNX Runtime" in log
    assert "with CPUExecutionProvider" in log


def test_auto_without_openvino_is_onnx_runtime(tiny, capfd, choices, without_openvino):
    log = serve(tiny, capfd)
    for tower in ("image", "text"):
        assert f"tiny_{tower} is run by ONNX Runtime" in log
    assert "not by OpenVINO, by ONNX Runtime instead" in log
    assert "it is hidden" in log


def make_int8(folder: Path) -> None:
    (folder / "1/model.onnx").rename(folder / "1/model.xml")


@pytest.mark.parametrize(
    ("parameters", "change", "words"),
    [
        ({"runtime": "tensorflow"}, None, "runtime 'tensorflow'; there are auto, onnxruntime"),
        (
            {"runtime": "openvino", "execution_providers": "CPUExecutionProvider"},
            None,
            "has runtime openvino. Its execution_providers are ONNX Runtime's. Remove one",
        ),
        ({"runtime": "onnxruntime"}, make_int8, "INT8 model, which only OpenVINO runs"),
        ({"execution_providers": "X"}, make_int8, "INT8 model, which only OpenVINO runs"),
    ],
)
def test_what_contradicts_itself_is_said_at_the_start(tiny, parameters, change, words):
    set_parameters(tiny / "tiny_text", **parameters)
    if change:
        change(tiny / "tiny_text")
    with pytest.raises(clip_rt.ServerStartError, match="model 'tiny_text'") as caught:
        EmbeddedServer(tiny).start()
    assert words in str(caught.value)


@pytest.mark.parametrize("is_int8", [False, True])
def test_openvino_that_is_asked_for_and_missing_is_an_error(tiny, without_openvino, is_int8):
    set_parameters(tiny / "tiny_text", runtime="auto" if is_int8 else "openvino")
    if is_int8:
        make_int8(tiny / "tiny_text")
    with pytest.raises(clip_rt.ServerStartError, match="pip install openvino") as caught:
        EmbeddedServer(tiny).start()
    assert "tiny_text is to be run by OpenVINO, and it is hidden" in str(caught.value)
