"""A benchmark of a model of another library that is in a repository: who measures what of it."""

from __future__ import annotations

from pathlib import Path

import external_models
import pytest

from benchmarks import run
from benchmarks.findings import Run
from benchmarks.record import read_run
from export.onnx import OnnxConfig, export

pytestmark = [
    pytest.mark.torch,
    pytest.mark.usefixtures("open_clip"),
    pytest.mark.timeout(600),
]

SERVED = ("onnxruntime", "openvino", "triton onnxruntime", "triton openvino")


@pytest.fixture(scope="module")
def found(open_clip: object, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("bench")
    model = external_models.write_kind(place / "m", "open_clip's SigLIP")
    export(
        OnnxConfig(model=model, name="siglip", repository=place / "models", cache=place / "exports")
    )
    arguments = ["--repository", str(place / "models"), "--name", "siglip", "--starts", "1"]
    arguments += ["--suite", "image,text,jpeg,zero_shot,stages,accuracy", "--budget-s", "0.5"]
    arguments += ["--contender", ",".join([*SERVED, "open_clip", "triton int8"])]
    arguments += ["--out", str(place / "out"), "--cache", str(place / "cache")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "home"))
        code = run.command(arguments)
    (file,) = Path(place / "out").glob("*.json")
    result = read_run(file)
    assert (code, result.failures) == (0, [])
    return result


def test_our_own_ways_answer_alike_and_are_timed(found: Run) -> None:
    suites = {row.suite for row in found.rows}
    assert suites == {"image", "text", "jpeg", "zero_shot"}
    for suite in suites:
        rows = [row for row in found.rows if row.suite == suite]
        assert {row.contender for row in rows} == set(SERVED)
        assert min(row.min_cosine for row in rows) > 0.9999
        assert all(row.time_ms.median > 0 for row in rows)
    assert {each.contender for each in found.accuracy} == set(SERVED)
    assert min(each.min_cosine for each in found.accuracy) > 0.9999
    assert {each.contender for each in found.stages} >= {"triton openvino"}


def test_what_cannot_be_compared_is_left_out_and_said(found: Run) -> None:
    absent = {each.name: each.absent for each in found.contenders if each.absent}
    assert set(absent) == {"open_clip", "triton int8"}
    assert all("exported" in reason for reason in absent.values())
    # Of an architecture that is not ours nobody counts the operations.
    assert all(row.share_of_limit is None and row.flop_per_item is None for row in found.rows)
    # The small model reads 16 tokens.
    assert any("reads 16 tokens of a text" in note for note in found.conditions.warnings)
