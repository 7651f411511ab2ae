"""`python -m benchmarks.gpu`: all of it at tiny size, cut off at any moment, and its page."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import document, page
from benchmarks.gpu.measuring import Measuring
from clip_rt.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "20")
RESULTS = ROOT / "benchmarks/results"
LONGEST_S = 300.0
pytestmark = [pytest.mark.slow, pytest.mark.torch]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """The document of a whole rehearsal, its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    done = subprocess.run(
        [*COMMAND, "--out", str(folder)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = folder.glob("*.json")
    return document.read(path), folder, done.stdout


@pytest.mark.timeout(LONGEST_S + 30)
def test_every_stage_runs_to_its_end_without_a_gpu(rehearsal) -> None:
    run, folder, printed = rehearsal
    assert run["is_rehearsal"]
    assert {name: each["status"] for name, each in run["stages"].items()} == dict.fromkeys(
        command.SHARES, "finished"
    )
    assert sum(each["seconds"] for each in run["stages"].values()) < LONGEST_S
    assert {path.suffix for path in folder.iterdir()} == {".json", ".png"}
    assert "not installed: TensorRT: " in printed


def test_rates_are_measured(rehearsal) -> None:
    found = document.result_of(rehearsal[0], "device")
    assert {"fp32", "bf16"} <= found["gemm_tflop_per_s"].keys()
    for rate in (*found["gemm_tflop_per_s"].values(), found["copy_gb_per_s"]):
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]


def test_our_graphs_are_held_against_torch_in_each_runtime(rehearsal) -> None:
    rows = document.result_of(rehearsal[0], "parity")["rows"]
    measured = {(row["model"], row["runtime"], row["precision"]) for row in rows if "passed" in row}
    for model in ("ViT-B/32", "ViT-L/14"):
        assert {(model, "torch", "fp16"), (model, "torch", "bf16")} <= measured
        assert (model, "ONNX Runtime", "fp16") in measured
    for row in rows:
        if "passed" in row and row["precision"] == "fp16":
            assert row["passed"]
            assert 0.9995 < row["image"]["min_cosine"] < 1
            assert row["num_cases"] > 15


def test_all_are_timed_by_turns_and_only_with_right_answers(rehearsal) -> None:
    found = document.result_of(rehearsal[0], "encoders")
    assert {(case["model"], case["tower"]) for case in found["cases"]} >= {
        (model, tower) for model in ("ViT-B/32", "ViT-L/14") for tower in ("image", "text")
    }
    for case in found["cases"]:
        assert {"torch eager", "torch compiled", "torch compiled, SDPA", "ONNX Runtime"} <= case[
            "rows"
        ].keys()
        assert {"open_clip", "transformers"} <= case["rows"].keys()
        assert case["flop_ours"] < case["flop_whole"]
        for row in case["rows"].values():
            assert 0.999 <= row["min_cosine"] <= 1.0001
            assert row["items_per_s"]["median"] == pytest.approx(
                1e3 * case["batch"] / row["device_ms"]["median"], rel=1e-3
            )
        assert case["rows"]["open_clip"]["speed_to_open_clip"] == 1


def test_training_steps_are_timed_and_a_killed_run_goes_on(rehearsal) -> None:
    found = document.result_of(rehearsal[0], "training")
    for model in found["models"]:
        ours, theirs = model["rows"]["ours"], model["rows"]["open_clip"]
        assert ours["mfu"]["median"] > 0
        # The same weights and batch; what differs is the arithmetic of bf16.
        assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=0.02)
        if not model["is_compiled"]:
            cached = model["rows"]["ours, cached gradients"]
            assert cached["losses"][0] == pytest.approx(ours["losses"][0], rel=0.02)
    assert {model["is_compiled"] for model in found["models"]} == {True, False}
    assert 20 <= found["resumed"]["killed_at_step"] < 60
    assert found["resumed"]["steps_logged"]
    assert found["resumed"]["is_finite"]


def test_pixels_prepared_on_the_device_are_nearly_the_exact_ones(rehearsal) -> None:
    found = document.result_of(rehearsal[0], "preprocessing")
    assert found["images_per_s"]["processor, 1 thread"]["median"] > 1
    assert found["mean_level_difference"]["resize only"] < 0.5


def test_a_siglip_of_open_clip_passes_the_gate_and_is_timed(rehearsal) -> None:
    found = document.result_of(rehearsal[0], "siglip")
    (row,) = [row for row in found["rows"] if row["runtime"] == "ONNX Runtime"]
    assert row["passed"]
    assert 0.9995 < row["text"]["min_cosine"] < 1
    assert {case["tower"] for case in found["cases"]} == {"image", "text"}
    for case in found["cases"]:
        assert case["rows"].keys() >= {"open_clip", "ONNX Runtime"}
    assert "ViT-B-16-SigLIP2 | ONNX Runtime | FP16" in page.render(rehearsal[0])


def test_the_page_of_a_run_has_its_figures(rehearsal) -> None:
    run = rehearsal[0]
    (path,) = rehearsal[1].glob("*.json")
    text = page.render(run, path)
    links = re.findall(r"\]\((\S+\.(?:json|png))\)", text)
    assert [(page.PAGE.parent / link).resolve() for link in links] == [
        path,
        path.with_suffix(".png"),
    ]
    case = document.result_of(run, "encoders")["cases"][0]
    assert f"| {case['model']}, {case['batch']} images | open_clip |" in text
    for title in ("Rates", "Encoders in FP16", "A training step in bf16", "Preprocessing"):
        assert f"## {title}\n" in text
    assert "Nothing of this project" not in text
    assert "- TensorRT: " in text


def test_a_rehearsal_makes_no_page(rehearsal, tmp_path: Path, monkeypatch) -> None:
    (path,) = rehearsal[1].glob("*.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "gpus.md")
    with pytest.raises(InputError, match="is a rehearsal"):
        command.main(command.GpuConfig(render=path))
    assert not page.PAGE.exists()


def test_the_page_in_docs_is_that_of_the_newest_run() -> None:
    found = document.newest(RESULTS)
    run = None if found is None else document.read(found)
    assert page.PAGE.read_text("utf-8") == page.render(run, found), (
        "python -m benchmarks.gpu --render benchmarks/results"
    )


def test_a_folder_without_runs_makes_a_page_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "gpus.md")
    command.main(command.GpuConfig(render=tmp_path))
    assert "Nothing of this project was measured on a GPU yet" in page.PAGE.read_text("utf-8")


@pytest.mark.timeout(180)
def test_a_run_killed_at_any_moment_keeps_what_it_had(tmp_path: Path) -> None:
    stages = ("--stage", "device", "--stage", "preprocessing", "--stage", "parity")
    process = subprocess.Popen(
        [*COMMAND, *stages, "--out", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seen: dict[str, Any] = {}
    end_s = time.monotonic() + 150
    try:
        while seen.get("stages", {}).get("device", {}).get("status") != "finished":
            assert time.monotonic() < end_s
            assert process.poll() is None
            for path in tmp_path.glob("*.json"):
                seen = document.read(path)  # Whole whenever it is read.
        time.sleep(random.uniform(0.0, 5.0))
        workers = children(process.pid)
    finally:
        process.kill()
        process.wait(timeout=30)
    (path,) = tmp_path.glob("*.json")
    run = json.loads(path.read_text("utf-8"))
    assert run["stages"]["device"] == seen["stages"]["device"]
    assert document.result_of(run, "device")["gemm_tflop_per_s"]
    assert page.render(run)
    while any(Path(f"/proc/{pid}").exists() for pid in workers):  # Nobody measures on.
        assert time.monotonic() < end_s
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Processes begun by one, as far as they do work of ours."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in text.split()]


@pytest.mark.timeout(180)
def test_a_stage_that_hangs_is_ended_and_the_next_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = document.begin(minutes=1, is_rehearsal=True, stages=("parity", "device"))
    path, measuring = tmp_path / "run.json", Measuring(tmp_path, is_rehearsal=True)
    try:
        with monkeypatch.context() as patch:
            # Nothing can come in the time that it takes to import torch.
            patch.setattr(command, "GRACE_S", 0.2)
            patch.setattr(command, "START_S", 0.0)
            command._measure_stage(run, path, measuring, "parity", 0.0)
        assert run["stages"]["parity"]["status"] == "cut off"
        assert "still at work" in run["stages"]["parity"]["error"]
        command._measure_stage(run, path, measuring, "device", 20.0)
    finally:
        measuring.end()
    assert document.read(path)["stages"]["device"]["status"] == "finished"


@pytest.mark.timeout(120)
def test_a_process_that_dies_is_said(tmp_path: Path) -> None:
    run = document.begin(minutes=1, is_rehearsal=True, stages=("parity",))
    measuring = Measuring(tmp_path, is_rehearsal=True)
    try:
        measuring.start()
        os.kill(measuring.pid, signal.SIGKILL)
        command._measure_stage(run, tmp_path / "run.json", measuring, "parity", 20.0)
    finally:
        measuring.end()
    stage = run["stages"]["parity"]
    assert (stage["status"], stage["error"]) == ("cut off", "its process died")


def test_a_document_is_read_back_and_nothing_else(tmp_path: Path) -> None:
    run = document.begin(minutes=6, is_rehearsal=False, stages=("device",))
    path = document.path_of(run, tmp_path)
    document.write(path, run)
    assert document.read(path) == json.loads(json.dumps(run))
    assert document.newest(tmp_path) == path
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    for text in ("{", "[]", '{"version": 99, "stages": {}}', '{"version": 1}'):
        path.write_text(text)
        with pytest.raises(InputError, match=path.name):
            document.read(path)
    assert document.newest(tmp_path / "empty") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stage", "speed"), "no stage is called 'speed'"),
        (("--minutes", "0"), "--minutes is 0"),
        (("--render", "absent.json"), "absent.json cannot be read"),
        ((), "--rehearse runs every stage without one"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: tuple[str, ...], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
