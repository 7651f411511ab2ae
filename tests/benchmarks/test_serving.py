"""What the measurements of serving are made of; not how fast anything is."""

import io
import math
import sys
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks import photos, record
from benchmarks.findings import Bar
from benchmarks.record import describe_bar
from benchmarks.serving import bench
from benchmarks.serving.bench import BareRuntime, Runtime
from benchmarks.timing import ratio, take_rounds, way_of
from clip_rt.errors import InputError


@pytest.mark.parametrize(
    ("side", "value", "is_met"),
    [
        ("at least", 0.95, True),
        ("at least", 0.949, False),
        ("at most", 2.0, True),
        ("at most", 2.001, False),
        ("at least", math.nan, False),
        ("at most", math.nan, False),
    ],
)
def test_a_bar_is_met_on_its_side_of_the_limit(side: str, value: float, is_met: bool) -> None:
    limit = 0.95 if side == "at least" else 2.0
    bar = Bar(what="x", value=value, limit=limit, side=side)  # type: ignore[arg-type]
    assert bar.is_met is is_met
    kept = describe_bar(bar)
    assert kept["met"] is is_met
    assert kept[side.replace(" ", "_")] == limit


def test_ways_take_turns() -> None:
    order: list[str] = []

    def way(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    ways = {"a": way_of(lambda: way("a", 2.0)), "b": way_of(lambda: way("b", 1.0))}
    times_s = take_rounds(ways, 3, is_warm=True)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert times_s == {"a": [2.0] * 3, "b": [1.0] * 3}
    assert bench.rates(times_s, 10, "images")["a"]["images_per_s"] == 5.0


def test_a_turn_of_single_calls_goes_on_where_the_last_ended() -> None:
    asked, latencies_s = [], [7.0]

    def call(n: int) -> float:
        asked.append(n)
        return float(n)

    turn = bench.one_by_one(call, 12, latencies_s)
    assert [turn(), turn()] == [sum(range(10)), sum([10, 11, *range(8)])]
    assert asked == [*range(12), *range(8)]
    assert latencies_s == [7.0, *asked]


def test_a_ratio_is_of_the_same_round() -> None:
    # A slow moment of the machine is in both.
    assert ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == 2.0
    with pytest.raises(InputError, match="same rounds"):
        ratio([1.0], [1.0, 2.0])


def test_threads_call_at_once_and_make_each_call_once() -> None:
    together = threading.Barrier(4, timeout=10)
    made = []

    def call(n: int) -> None:
        if n < 4:
            together.wait()
        made.append(n)

    elapsed_s, latencies_s = bench.run_threads(call, 11, 4)
    assert sorted(made) == list(range(11))
    assert len(latencies_s) == 11
    assert elapsed_s >= max(latencies_s)


def test_what_a_thread_raises_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        bench.run_threads(lambda n: 1 // (n - 2), 4, 4)


def test_embeddings_of_another_item_stop_a_measurement() -> None:
    rows = np.eye(3, dtype=np.float32)
    latencies_s: list[float] = []
    bench.embed_singly(lambda n: rows[n : n + 1], range(3), rows, 2, latencies_s)
    assert len(latencies_s) == 3
    with pytest.raises(ValueError, match="differ"):
        bench.embed_singly(lambda n: rows[n - 1 : n or None], range(3), rows, 2, [])
    with pytest.raises(ValueError, match="differ"):
        bench.check_equal(np.full_like(rows, np.nan), rows, "x")
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        bench.check_equal(rows[:2], rows, "x")


@pytest.mark.parametrize("runtime", get_args(Runtime))
def test_the_bare_runtime_embeds_the_rows_it_is_asked_for(runtime: Runtime, tmp_path: Path) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    file = tmp_path / "tower" / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    nodes = [
        helper.make_node("Cast", ["tokens"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "two"], ["embeddings"]),
    ]
    graph = helper.make_graph(
        nodes,
        "double",
        [helper.make_tensor_value_info("tokens", TensorProto.INT32, ["N", 2])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.array(2, np.float32), "two")],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), file)
    inputs = np.arange(80, dtype=np.int32).reshape(40, 2)
    with BareRuntime(file, inputs, runtime=runtime) as bare:
        times_s, rows = bare.encode(3, 40)
        assert len(times_s) == 2  # of 32 and of 5
        np.testing.assert_array_equal(rows, 2 * inputs[3:40])
        # Each answer is its own: the next does not overwrite it.
        np.testing.assert_array_equal(bare.encode(0, 3)[1], 2 * inputs[:3])
        assert 0 < bare.encode_one(3) < 5
        maps = Path(f"/proc/{bare.pid}/maps").read_text()
        assert ("libopenvino" in maps) == (runtime == "openvino")
        assert ("onnxruntime_pybind" in maps) == (runtime != "openvino")


def test_pictures_are_distinct_and_come_back_the_same() -> None:
    size = (320, 240)
    files = [photos.jpeg(size, index) for index in range(9)]
    assert files == [photos.jpeg(size, index) for index in range(9)]
    assert len(set(files)) == 9
    with Image.open(io.BytesIO(files[0])) as image:
        assert (image.size, image.mode, image.format) == (size, "RGB", "JPEG")
    assert photos.photo((1500, 20), 1).size == (1500, 20)


def test_a_result_names_no_folder_of_the_machine(monkeypatch):
    arguments = ["--out", str(record.ROOT / "results/a.json"), "--cache=/home/me/kit", "--x", "1/2"]
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    command = record.describe_result(["python"], ())["command"]
    assert command == "python --out results/a.json --cache=kit --x 1/2"
