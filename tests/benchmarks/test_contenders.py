"""Contenders in their processes: what they answer, how they fail, and that nothing is left."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec as find_module
from pathlib import Path

import numpy as np
import planted_contender
import psutil
import pytest
import tiny_clip
from PIL import Image
from processes import running

from benchmarks import contenders, findings
from benchmarks.contenders import AbsentError, ContenderError, forms, start
from benchmarks.contenders.implementation import Order
from benchmarks.contenders.infinity import find_executable
from benchmarks.contenders.kit import Kit, make_kit
from benchmarks.contenders.process import ContenderProcess
from benchmarks.contenders.worker import split_items
from clip_rt import tokenize
from clip_rt.errors import InputError, UnknownModelError
from clip_rt.specs import END_OF_TEXT, MODELS, find_spec
from export.repository import configure
from export.triton_config import read_manifest
from training.weights.naming import to_openai_names

ROOT = Path(__file__).parents[2]
TEXTS = ["a photo of a cat.", "A  Dog & a café, number 12's", "two owls"]
LABELS = ["cat", "great white shark", "owl"]
UNKNOWN = findings.Contender(name="fake", what="a test", kind="runtime", precision="fp32")


def jpeg(index: int) -> bytes:
    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((160, 120), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_items(side_px: int) -> dict[str, object]:
    jpegs = [jpeg(index) for index in range(4)]
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 256, (5, side_px, side_px, 3), dtype=np.uint8),
        "jpegs": jpegs,
        "texts": TEXTS,
        "classifier": LABELS,
        "zero_shot": (jpegs, LABELS),
    }


def load_all(contender: ContenderProcess, items: dict[str, object]) -> None:
    for call in sorted(contender.calls):
        contender.load(call, call, items[call])


def min_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(axis=1) / lengths).min())


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for_end(pids: list[int], limit_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not all(map(has_ended, pids)):
        assert time.monotonic() < deadline_s, f"{pids} still run"
        time.sleep(0.05)


# Items


@pytest.mark.parametrize("call", ["pixels", "jpegs", "texts", "classifier", "zero_shot"])
def test_items_are_dealt_out_in_parts_of_a_size(call):
    items = make_items(32)[call]
    parts = split_items(call, items, 2)
    singles = [part[0] for part in parts] if call == "zero_shot" else parts
    whole = items[0] if call == "zero_shot" else items
    assert [len(part) for part in singles] == [2] * (len(whole) // 2)
    np.testing.assert_array_equal(np.concatenate(singles), whole[: 2 * len(singles)])
    assert call != "zero_shot" or all(labels == LABELS for _, labels in parts)
    with pytest.raises(ValueError, match="not enough"):
        split_items(call, items, 6)


# Plants


class Rows:
    calls, versions = frozenset({"pixels"}), {}

    def __init__(self, seconds=0.0):
        self.seconds = seconds

    def prepare(self, call, items):
        return items

    def run(self, call, prepared):
        time.sleep(self.seconds)
        return prepared

    def pids(self):
        return [7]

    def close(self):
        pass


def test_what_is_planted_is_there():
    rows = np.eye(3, dtype=np.float32)
    wrong = planted_contender.plant(Rows(), slow_down=1.0, is_wrong=True)
    np.testing.assert_array_equal(wrong.run("pixels", rows), rows[[2, 0, 1]])
    assert (wrong.run("pixels", rows[:1]) != rows[:1]).any()
    slow = planted_contender.plant(Rows(0.05), slow_down=2.0, is_wrong=False)
    start_s = time.perf_counter()
    np.testing.assert_array_equal(slow.run("pixels", rows), rows)
    assert time.perf_counter() - start_s >= 0.1
    assert slow.pids() == [7]


# The registry


def test_every_contender_is_named_once_and_has_a_module():
    expected = "onnxruntime, openvino, openvino int8, triton onnxruntime, triton openvino, "
    expected += (
        "triton int8, gateway openvino, gateway int8, tensorrt, open_clip, transformers, infinity"
    )
    assert ", ".join(contenders.NAMES) == expected
    for name in contenders.NAMES:
        assert find_module(contenders.find(name).module) is not None
    remote = contenders.find("triton localhost:8001")
    assert (remote.options, remote.kind, remote.needs) == ({"url": "localhost:8001"}, "served", ())
    with pytest.raises(KeyError, match="openvino int8"):
        contenders.find("triton")


def test_who_cannot_take_part_needs_nothing(monkeypatch):
    spec = find_spec("RN26@64px")
    assert "no CLIPModel" in str(contenders.why_absent("transformers", spec))
    assert contenders.why_absent("onnxruntime", spec) is None
    needs = contenders.find_needs(("transformers", "triton openvino"), spec)
    assert needs == ("openvino", "checkpoint")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert contenders.why_absent("openvino", spec) == "openvino is not installed"


def test_who_asks_imports_none_of_them():
    code = (
        "import sys, benchmarks.contenders, benchmarks.contenders.worker\n"
        "heavy = 'torch', 'onnx', 'onnxruntime', 'openvino', 'grpc', 'PIL', 'skimage', 'httpx'\n"
        "sys.exit(str([name for name in heavy if name in sys.modules] or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr.strip() == ""


# Clip_rt's own, on the bundled model


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Kit:
    kit = Kit(folder=tmp_path_factory.mktemp("kit"), spec=find_spec("RN26@64px"), name="drawings")
    source, target = ROOT / "model_repository", kit.repository("onnxruntime")
    for tower in ("drawings_image", "drawings_text"):
        shutil.copytree(source / tower, target / tower)
    configure(target, "drawings", runtime="onnxruntime")
    return replace(kit, logit_scale=read_manifest(target / "drawings_image").logit_scale)


@pytest.fixture(scope="module")
def expected(drawings) -> dict[str, np.ndarray]:
    with start("onnxruntime", drawings) as contender:
        items = make_items(drawings.spec.side_px)
        load_all(contender, items)
        return {call: contender.answer(call) for call in contender.calls}


def test_a_contender_says_what_it_is(drawings):
    with start("onnxruntime", drawings) as contender:
        facts = contender.facts
        assert facts.name == contender.name == "onnxruntime"
        assert set(facts.versions) == {"onnxruntime"}
        assert facts.startup is not None
        assert facts.startup.ready_s > 0.1
        assert 0 < facts.startup.first_answer_s < 30
        now, peak = contender.memory_mib()
        assert 30 < now <= peak < 2000
        load_all(contender, make_items(64))
        times_s = contender.time("pixels", 3)
        assert len(times_s) == 3
        assert min(times_s) > 1e-4
        contender.forget("pixels")
        with pytest.raises(ContenderError, match="KeyError"):
            contender.answer("pixels")
        with pytest.raises(ContenderError, match="no client"):
            contender.stages("jpegs", 1)
        # It is as good as before.
        assert contender.answer("texts").shape == (3, 256)
    assert contender.facts.startup.peak_rss_mib >= peak


def test_openvino_says_which_operators_take_the_time(drawings):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 64, 3), dtype=np.uint8)
    with start("openvino", drawings) as contender:
        contender.load("many", "pixels", pixels)
        _, peak_before = contender.memory_mib()
        calls = contender.stages("many", 3)
        _, peak = contender.memory_mib()
        assert peak - peak_before < 40  # The second copy was elsewhere.
        contender.load("texts", "texts", TEXTS)
        with pytest.raises(ContenderError, match="only the image tower"):
            contender.stages("texts", 1)
        assert contender.answer("many").shape == (32, 256)
    assert len(calls) == 3
    for call in calls:
        total_s = call.pop("total")
        assert 0.7 * total_s < sum(call.values()) < 1.02 * total_s
        # It is a ResNet.
        assert max(call, key=call.__getitem__) == "convolution"
        assert {"matrix products", "elementwise"} <= set(call)


def test_an_idle_contender_burns_nothing(drawings):
    with start("openvino", drawings) as contender:
        load_all(contender, make_items(64))
        contender.time("pixels", 20)
        process = psutil.Process(contender._process.pid)
        time.sleep(0.3)
        before = sum(process.cpu_times()[:2])
        time.sleep(0.5)
        assert sum(process.cpu_times()[:2]) - before < 0.05


def check_answers(contender: ContenderProcess, expected: dict[str, np.ndarray]) -> None:
    assert {"pixels", "jpegs", "texts", "classifier", "zero_shot"} <= contender.calls
    for call in contender.calls:
        assert min_cosine(contender.answer(call), expected[call]) > 0.99999, call


def find_runtimes(contender: ContenderProcess) -> set[str]:
    """What the processes of a server's models have loaded, whatever anyone says."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in contender.pids())
    return {name for name in ("libopenvino", "onnxruntime_pybind") if name in maps}


@pytest.fixture(scope="module")
def with_openvino(drawings) -> Kit:
    shutil.copytree(drawings.repository("onnxruntime"), drawings.repository("openvino"))
    configure(drawings.repository("openvino"), "drawings", runtime="openvino")
    return drawings


@pytest.mark.parametrize("name", ["openvino", "triton openvino"])
def test_all_answer_the_same(name, with_openvino, expected):
    with start(name, with_openvino) as contender:
        load_all(contender, make_items(64))
        check_answers(contender, expected)
        if name == "triton openvino":
            assert find_runtimes(contender) == {"libopenvino"}


def test_the_gateway_answers_the_same_and_ends_with_its_server(with_openvino, expected):
    with start("gateway openvino", with_openvino) as contender:
        load_all(contender, make_items(64))
        for call in ("jpegs", "texts"):
            assert min_cosine(contender.answer(call), expected[call]) > 0.99999, call
        assert contender.run_clients("jpegs", 3, 0.5).num_failed == 0
        assert find_runtimes(contender) == {"libopenvino"}
        pids = contender.pids()
        assert any("triton" in psutil.Process(pid).name() for pid in pids)
        contender.load("bad", "jpegs", [b"no picture"])
        with pytest.raises(ContenderError, match="HTTP 400"):
            contender.answer("bad")
    wait_for_end(pids)


def test_the_int8_model_is_the_one_that_is_run(drawings, expected):
    openvino = pytest.importorskip("openvino")
    for tower in ("image", "text"):
        file = drawings.tower("int8", tower, "model.xml")
        file.parent.mkdir(parents=True)
        model = openvino.Core().read_model(drawings.tower("onnxruntime", tower))
        openvino.save_model(model, file, compress_to_fp16=True)
    with start("openvino int8", drawings) as contender:
        assert contender.facts.precision == "int8"
        load_all(contender, make_items(64))
        assert min_cosine(contender.answer("pixels"), expected["pixels"]) > 0.999


def test_a_served_contender_answers_the_same_under_load_and_apart(drawings, expected):
    with start("triton onnxruntime", drawings) as contender:
        load_all(contender, make_items(64))
        check_answers(contender, expected)
        assert find_runtimes(contender) == {"onnxruntime_pybind"}
        pids = contender.pids()
        names = [psutil.Process(pid).name() for pid in pids]
        assert any("triton" in name for name in names), names
        # Triton, two models, and the client.
        assert contender.memory_mib()[0] > 150

        load = contender.run_clients("jpegs", 3, 0.5)
        assert load.num_failed == 0
        assert len(load.latencies_s) >= 3
        assert 0.5 <= load.elapsed_s < 10
        assert sum(load.latencies_s) <= 3 * load.elapsed_s + 0.1

        due_at_s = [0.0, 0.0, 0.1, 0.4]
        arrivals = contender.run_arrivals("texts", due_at_s, items_per_call=3)
        assert (len(arrivals.latencies_s), arrivals.num_failed) == (4, 0)
        assert arrivals.elapsed_s >= 0.4

        for stages in contender.stages("jpegs", 2):
            assert {"decode", "server_compute", "total"} <= set(stages)
            assert 0 < stages["server_compute"] < stages["total"]
    wait_for_end(pids)


def test_a_remote_triton_is_asked_by_url(drawings, expected):
    from clip_rt.embedded.server import EmbeddedServer

    with (
        ThreadPoolExecutor(1) as pool,
        EmbeddedServer(drawings.repository("onnxruntime")) as server,
    ):
        # A client tries for seconds; meanwhile the other one answers.
        nowhere = pool.submit(start, "triton localhost:1", drawings)
        with start(f"triton {server.url}", drawings, model="drawings") as contender:
            assert contender.pids() == []
            load_all(contender, make_items(64))
            assert min_cosine(contender.answer("jpegs"), expected["jpegs"]) > 0.99999
        with pytest.raises(AbsentError, match=r"triton localhost:1:"):
            nowhere.result(60)


def test_a_planted_fault_is_there_in_the_process(drawings, expected, monkeypatch):
    planted_contender.plant_in(monkeypatch, "onnxruntime", is_wrong=True)
    with start("onnxruntime", drawings) as contender:
        load_all(contender, make_items(64))
        assert min_cosine(contender.answer("pixels"), expected["pixels"]) < 0.99
        assert min_cosine(contender.answer("pixels"), np.roll(expected["pixels"], 1, 0)) > 0.9999


# Peers, on a small random model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Kit:
    kit = Kit(folder=tmp_path_factory.mktemp("kit"), spec=tiny_clip.VIT)
    clip = tiny_clip.make(tiny_clip.VIT)
    forms.write_checkpoint(clip, kit)
    forms.write_hub(clip, kit.hub)
    return kit


@pytest.fixture(scope="module")
def peers(tiny) -> Iterator[dict[str, ContenderProcess]]:
    """Started all at once, because most of that is one processor that imports."""
    names = ["torch", "open_clip", "transformers"]
    if find_executable() is not None:
        names.append("infinity")
    with ExitStack() as stack, ThreadPoolExecutor(len(names)) as pool:
        started = [pool.submit(start, name, tiny) for name in names]
        # Each that has started is closed, whatever became of the others.
        for future in started:
            if future.exception(60) is None:
                stack.enter_context(future.result(60))
        yield {name: future.result(60) for name, future in zip(names, started, strict=True)}


@pytest.fixture(scope="module")
def of_torch(tiny, peers) -> dict[str, np.ndarray]:
    with peers["torch"] as contender:
        items = make_items(tiny.spec.side_px)
        load_all(contender, items)
        return {call: contender.answer(call) for call in contender.calls}


@pytest.mark.parametrize("name", ["open_clip", "transformers", "infinity"])
def test_peers_answer_as_our_own_model(name, tiny, peers, of_torch):
    if name not in peers:
        pytest.skip("infinity is not installed; $CLIP_RT_INFINITY may name its environment")
    with peers[name] as contender:
        assert contender.calls >= {"jpegs", "texts"}
        load_all(contender, make_items(tiny.spec.side_px))
        for call in contender.calls:
            assert min_cosine(contender.answer(call), of_torch[call]) > 0.9999, call
        pids = contender.pids()
        if name == "infinity":
            assert pids
            assert contender.run_clients("jpegs", 4, 0.5).num_failed == 0
            contender.load("bad", "jpegs", [b"no picture"])
            with pytest.raises(ContenderError, match="HTTP 4"):
                contender.answer("bad")
    wait_for_end(pids)


def test_names_of_hugging_face_and_back():
    tensors = tiny_clip.make(tiny_clip.VIT).state_dict()
    theirs = forms.to_hugging_face(tensors)
    back = to_openai_names(theirs)
    assert back.keys() == tensors.keys()
    assert all((back[name] == tensors[name]).all() for name in tensors)


def test_their_tokenizer_gives_our_ids(tiny):
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(tiny.hub / "tokenizer.json"))
    texts = [*TEXTS[:1], "two owls", "ÉCOLE naïve 北京 😀", "don't 3 1/2 __init__"]
    for text, ours in zip(texts, tokenize(texts), strict=True):
        ids = theirs.encode(text).ids
        assert ids == ours[: len(ids)].tolist()
        assert ids[-1] == END_OF_TEXT


@pytest.mark.parametrize("name", list(MODELS))
def test_open_clip_knows_the_architectures_as_we_describe_them(name, open_clip):
    from benchmarks.contenders.torch_based import architecture

    spec = MODELS[name]
    if architecture(spec) not in open_clip.list_models():
        pytest.skip("open_clip does not have it")
    theirs = open_clip.get_model_config(architecture(spec))
    ours = forms.describe_for_open_clip(spec)
    assert ours["quick_gelu"] == theirs.get("quick_gelu", False)
    for part in ("vision_cfg", "text_cfg"):
        for key, value in theirs[part].items():
            if key == "mlp_ratio":
                assert ours[part][key] == pytest.approx(value, rel=1e-4)
            elif key in ours[part]:
                assert ours[part][key] == value, key


# Kits


def test_a_kit_is_made_once_and_says_what_is_missing(tmp_path):
    said: list[str] = []
    kit = make_kit("RN26@64px", "random", tmp_path, ("checkpoint", "hub"), say=said.append)
    assert kit.checkpoint.is_file()
    assert json.loads(kit.open_clip_config.read_text())["vision_cfg"]["layers"] == [2, 2, 2, 2]
    assert set(kit.missing) == {"hub"}
    assert "no CLIPModel like RN26@64px" in kit.missing["hub"]
    assert said[0] == "RN26@64px: making checkpoint"
    said.clear()
    again = make_kit("RN26@64px", "random", tmp_path, ("checkpoint",), say=said.append)
    assert (again.folder, said) == (kit.folder, [])


def test_weights_and_models_that_are_not_there(tmp_path):
    with pytest.raises(UnknownModelError):
        make_kit("ViT-Z/1", "random", tmp_path, ())
    with pytest.raises(InputError, match="no weights"):
        make_kit("ViT-B/32", str(tmp_path / "none.safetensors"), tmp_path, ())


def test_what_could_not_be_made_makes_its_contender_absent(tiny):
    broken = replace(tiny, missing={"hub": "the disk is full"})
    with pytest.raises(AbsentError) as raised:
        start("transformers", broken)
    assert raised.value.contender.absent == "the disk is full"


# Ends


FAKE = """
import os, subprocess, sys, time
import numpy as np

class Fake:
    calls, versions = frozenset({"texts"}), {}
    def __init__(self, what):
        self.what = what
        self.child = subprocess.Popen(["sleep", "600"])
    def prepare(self, call, items):
        return items
    def run(self, call, prepared):
        if prepared == ["die"]:
            print("the last words", flush=True)
            os._exit(3)
        if prepared == ["hang"]:
            time.sleep(600)
        return np.zeros((len(prepared), 4), np.float32)
    def pids(self):
        return [self.child.pid]
    def close(self):
        raise RuntimeError("it cannot close either")

def make(kit, what="nothing"):
    if what == "slow to start":
        time.sleep(600)
    if what == "broken":
        print("a library complains", flush=True)
        raise OSError("no such device")
    return Fake(what)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_contender.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    kit = Kit(folder=tmp_path, spec=tiny_clip.VIT)

    def make(what: str = "nothing", **limits: float) -> ContenderProcess:
        order = Order(module="fake_contender", kit=kit, options={"what": what})
        return ContenderProcess(UNKNOWN, order, **limits)

    return make


def pids_of(contender: ContenderProcess) -> list[int]:
    return [contender._process.pid, *contender.pids()]


def test_whatever_it_started_ends_with_it(fake):
    with fake() as contender:
        pids = pids_of(contender)
        assert not any(map(has_ended, pids))
    wait_for_end(pids, 5)
    contender.close()


def test_a_contender_that_dies_is_told_with_its_last_words(fake):
    with fake() as contender:
        pids = pids_of(contender)
        contender.load("x", "texts", ["die"])
        with pytest.raises(ContenderError, match=r"exit code 3.*\n?.*\n?the last words"):
            contender.answer("x")
    wait_for_end(pids, 5)


def test_a_contender_that_hangs_is_given_up(fake):
    with fake(call_limit_s=0.5) as contender:
        pids = pids_of(contender)
        contender.load("x", "texts", ["hang"])
        with pytest.raises(ContenderError, match=r"more than 0\.5 s to answer"):
            contender.answer("x")
        with pytest.raises(ContenderError, match="given up on"):
            contender.time("x", 1)
        start_s = time.monotonic()
    assert time.monotonic() - start_s < 5
    wait_for_end(pids, 5)


def test_one_that_does_not_start_says_why(fake):
    with pytest.raises(ContenderError, match=r"OSError: no such device[\s\S]*a library complains"):
        fake("broken")
    with pytest.raises(ContenderError, match=r"more than 0\.5 s to start"):
        fake("slow to start", start_limit_s=0.5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_the_one_that_asks_ends(number, tmp_path):
    (tmp_path / "fake_contender.py").write_text(FAKE)
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from benchmarks import findings
from benchmarks.contenders.kit import Kit
from benchmarks.contenders.implementation import Order
from benchmarks.contenders.process import ContenderProcess
from clip_rt.specs import find_spec
folder = Path({str(tmp_path)!r})
facts = findings.Contender(name="fake", what="a test", kind="runtime", precision="fp32")
order = Order(module="fake_contender", kit=Kit(folder=folder, spec=find_spec("RN50")), options={{}})
with ContenderProcess(facts, order) as contender:
    contender.load("x", "texts", ["hang"])
    print(contender._process.pid, *contender.pids(), flush=True)
    contender.answer("x")
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with running(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as asker:
        assert asker.stdout is not None
        pids = [int(pid) for pid in asker.stdout.readline().split()]
        assert len(pids) == 2
        time.sleep(0.2)
        asker.send_signal(number)
        asker.wait(30)
    wait_for_end(pids)
