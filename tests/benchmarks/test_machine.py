"""What is said of this machine, held against the kernel; and the real probe, once."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import findings_made_up
import psutil
import pytest

from benchmarks import machine, peaks
from benchmarks.machine import Probe, Watch, cache_bytes, describe, usable_cores
from benchmarks.peaks import MODEL_SHAPES, PROBE_SHAPE, Shape, model_rate
from benchmarks.report import answers
from clip_rt import processor


def test_it_says_what_the_kernel_says() -> None:
    found = describe()
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert found["cpu"] in cpuinfo
    assert all(flag in cpuinfo for flag in found["cpu_flags"])
    assert ("avx2" in found["cpu_flags"]) is (" avx2 " in cpuinfo)
    assert found["memory_gib"] == pytest.approx(psutil.virtual_memory().total / 2**30, rel=0.02)
    assert 1 <= found["usable_cores"] <= found["cores"]
    assert found == describe() == json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("cpuinfo", "environment", "label"),
    [
        ("model name : A\nflags : avx2\n", {}, "2 cores of A (AVX2), 8 GiB"),
        (
            "model name : B\nflags : avx2 avx512f avx512_vnni avx512_bf16\n",
            {},
            "2 cores of B (AVX-512, VNNI, BF16), 8 GiB",
        ),
        (
            "model name : C\nflags : avx2 avx512f avx512_vnni avx_vnni amx_tile amx_int8\n",
            {},
            "2 cores of C (AVX-512, VNNI, AMX), 8 GiB",
        ),
        (
            "model name : B\nflags : avx2 avx512f avx512_vnni\n",
            {"ONEDNN_MAX_CPU_ISA": "AVX2"},
            "2 cores of B (AVX-512, VNNI; ONEDNN_MAX_CPU_ISA=AVX2), 8 GiB",
        ),
        (
            "model name : D\nFeatures : asimd asimddp\n",
            {},
            "2 cores of D (NEON, dot product), 8 GiB",
        ),
    ],
)
def test_a_run_is_labelled_by_the_instruction_sets(
    cpuinfo: str,
    environment: dict[str, str],
    label: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in processor.CAP_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    found = describe()
    assert found.get("cpu_caps", {}) == environment
    facts = found | {"usable_cores": 2, "memory_gib": 8}
    made = findings_made_up.run(findings_made_up.row(), machine=facts)
    assert answers.machine(made) == label


@pytest.mark.parametrize(
    ("facts", "label"),
    [
        # As runs of before say them.
        ({"cpu": "AMD EPYC", "cores": 2}, "2 cores of AMD EPYC"),
        ({"cpu": "AMD EPYC", "cores": 2, "cpu_flags": []}, "2 cores of AMD EPYC"),
        ({"cores": 4, "cpu_flags": ["avx2"]}, "4 cores of an unnamed processor (AVX2)"),
        ({"cpu": "x", "cpu_flags": None, "cpu_caps": None, "gpu": "H100"}, "x, H100"),
    ],
)
def test_a_label_says_no_more_than_was_recorded(facts: dict[str, object], label: str) -> None:
    assert answers.machine(findings_made_up.run(machine=facts)) == label


def test_fewer_cores_where_the_process_is_pinned() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_what_a_container_may_use(
    files: dict[str, str], cores: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUP_DIR", tmp_path)
    assert describe()["container_cores"] == cores
    if cores is not None:
        assert usable_cores() == min(len(os.sched_getaffinity(0)), 2 if cores > 1 else 1)


def test_caches_of_the_cores_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, (level, size) in enumerate([(1, "32K"), (1, "32K"), (2, "2048K"), (3, "65536K")]):
        folder = tmp_path / f"cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    monkeypatch.setattr(machine, "CPU_DIR", tmp_path)
    assert cache_bytes() == (64 + 2 * usable_cores()) * 2**20
    monkeypatch.setattr(machine, "CPU_DIR", tmp_path / "nowhere")
    assert cache_bytes() == 0


def test_a_watch_sees_steal_and_a_probe_that_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(steal_s: float, idle_s: float) -> tuple[float, ...]:
        return (10.0, 0.0, 5.0, idle_s, 0.0, 0.0, 0.0, steal_s, 3.0, 0.0)

    answers = iter([times(1.0, 100.0), times(6.0, 195.0)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(answers))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    with Watch() as watch:
        found = watch.conditions([0.05] * 8 + [0.08] * 4)
    assert found.steal_share == 0.05
    assert found.probe_ms.median == pytest.approx(50.0)
    assert [text.split(" ")[0] for text in found.warnings[:2]] == ["other", "the"]
    assert "5.0%" in found.warnings[0]
    assert "probe's time varied by 60%" in found.warnings[1]


def test_a_quiet_machine_has_nothing_to_warn_of(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([2400.0, 2410.0])
    frequency = type("Frequency", (), {})
    answers = iter([(0.0,) * 8, (1.0, 0.0, 0.0, 99.0, 0.0, 0.0, 0.0, 0.0)])
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(answers))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    monkeypatch.setattr(machine, "SAMPLE_EVERY_S", 0.01)

    def cpu_freq(percpu: bool) -> list[object]:
        found = frequency()
        found.current = next(clocks, 2405.0)
        return [found, found]

    monkeypatch.setattr(psutil, "cpu_freq", cpu_freq)
    with Watch() as watch:
        time.sleep(0.2)
        found = watch.conditions([0.05, 0.0501, 0.0499])
    assert found.warnings == []
    assert found.steal_share == 0.0
    assert found.cpu_mhz is not None
    assert 2400 <= found.cpu_mhz.low <= found.cpu_mhz.high <= 2410


def test_a_watch_of_the_real_machine() -> None:
    with Watch() as watch:
        found = watch.conditions([0.05])
    assert 0 <= found.steal_share <= 1
    assert found.load_before >= 0


DIVISOR = 8
"""Of products and memory: what is tested is the program, which test_whole_run has at full size."""


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    with pytest.MonkeyPatch.context() as patch:
        # Read by OpenBLAS when it is loaded; the child must not have it.
        patch.setenv("OPENBLAS_CORETYPE", "Prescott")
        with Probe(budget_s=0.5, divisor=DIVISOR) as probe:
            yield probe


def test_peaks_are_of_this_world(probe: Probe) -> None:
    found = probe.peaks
    assert 1 < found.gemm_fp32_gflop_per_s.median < 100_000
    # What is nowhere passed: a budget of half a second leaves a few per cent of noise.
    own, highest = found.gemm_fp32_model_gflop_per_s, found.gemm_fp32_gflop_per_s
    assert 0.2 * highest.median < own.median < 1.1 * highest.median
    assert 0.1 < found.read_gb_per_s.median < 10_000
    assert found.gemm_int8_gop_per_s is not None
    assert found.gemm_int8_gop_per_s.median > 1
    assert f"{usable_cores()} threads" in found.how
    assert probe.flop_while_probe >= 2 * 2048**3 / DIVISOR


def test_the_products_of_a_layer_weigh_as_their_work_does() -> None:
    gflop = [shape.flop / 1e9 for shape in MODEL_SHAPES]
    # ViT-B/32: 12 width^2 multiplications for each of 50 tokens of 32 images.
    assert sum(gflop) == pytest.approx(2 * 12 * 768**2 * 50 * 32 / 1e9)
    rates = [100.0, 200.0, 300.0, 400.0]
    once_s = [work / rate for work, rate in zip(gflop, rates, strict=True)]
    rounds = [1.0, 1.5, 1.0, 3.0, 1.0, 1.0, 1.0]
    samples_s = [[slowness * each for slowness in rounds] for each in once_s]
    found = model_rate(dict(zip(MODEL_SHAPES, samples_s, strict=True)))
    assert found.median == pytest.approx(sum(gflop) / sum(once_s))
    assert found.low < found.median


@pytest.mark.parametrize("slowness", [20.0, 1.0])
def test_int8_by_a_plain_loop_is_no_peak_and_is_not_waited_for(
    slowness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch has it where the processor has no VNNI: minutes, of which nothing is used."""
    (product,) = peaks._products("numpy", [peaks.TRIAL_SHAPE], 1).values()
    loop_s = slowness * peaks._fastest_s(product)
    made: list[Shape] = []

    def loop(shape: Shape, num_threads: int) -> peaks.Call:
        made.append(shape)
        return lambda: time.sleep(loop_s)

    monkeypatch.setattr(peaks, "INT8_LIBRARIES", {"loop": loop})
    found = peaks._int8_products([PROBE_SHAPE], 1)
    is_fast = slowness < peaks.MAX_INT8_SLOWNESS
    assert made == [peaks.TRIAL_SHAPE, *([PROBE_SHAPE] if is_fast else [])]
    assert list(found) == ([("loop", PROBE_SHAPE)] if is_fast else [])


def test_the_probe_times_each_call(probe: Probe) -> None:
    start_s = time.perf_counter()
    times_s = probe.time(3)
    assert len(times_s) == 3
    assert 0 < sum(times_s) <= time.perf_counter() - start_s


def test_an_idle_probe_takes_no_processor_time(probe: Probe) -> None:
    child = psutil.Process(probe._process.pid)
    probe.time(1)
    before = child.cpu_times()
    time.sleep(1.0)
    after = child.cpu_times()
    # OpenBLAS threads may spin for some hundredths of a second before they sleep.
    assert after.user + after.system - before.user - before.system < 0.2


def test_the_probe_ignores_what_slows_numpy_and_ends_with_us(probe: Probe) -> None:
    child = psutil.Process(probe._process.pid)
    assert "OPENBLAS_CORETYPE" not in child.environ()
    assert child.environ()["OMP_NUM_THREADS"] == str(usable_cores())
    child.kill()
    with pytest.raises(RuntimeError, match="ended with -9"):
        probe.time(1)
    probe.close()
    with contextlib.suppress(psutil.NoSuchProcess):
        pytest.fail(f"{psutil.Process(child.pid)} is still there")
