"""The precision a run takes by itself, says in its log and keeps when it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors import safe_open

from clip_rt.errors import InputError
from clip_rt.processor import Processor
from clip_rt.specs import MODELS
from training import parallel, precision
from training.journal import read_journal
from training.precision import choose, has_fast_bf16
from training.run import main

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "is_fast", "earlier", "taken", "reason"),
    [
        ("auto", True, None, "bf16", "X multiplies BF16 as such"),
        ("auto", False, None, "fp32", "X has no fast BF16"),
        ("auto", False, "bf16", "bf16", "the run was begun with it"),
        ("auto", True, "fp32", "fp32", "the run was begun with it"),
        ("auto", True, "fp16", "fp16", "the run was begun with it"),
        ("fp32", True, None, "fp32", "it was asked for"),
        ("fp16", False, None, "fp16", "it was asked for"),
        ("bf16", True, None, "bf16", "it was asked for"),
        ("bf16", False, None, "bf16", "it was asked for"),
    ],
)
def test_what_is_taken_and_why(asked, is_fast, earlier, taken, reason) -> None:
    found = choose(asked, has_fast_bf16=is_fast, device="X", earlier=earlier)
    assert (found.precision, found.reason) == (taken, reason)
    assert bool(found.warning) is (asked == "bf16" and not is_fast)


@pytest.mark.parametrize(
    ("flags", "is_fast"),
    [
        (("avx2",), False),
        (("avx2", "avx512f", "avx512_vnni"), False),
        (("asimd", "bf16"), False),
        ((), False),
    ],
)
def test_a_processor_without_instructions_for_it_is_not_fast(flags, is_fast) -> None:
    assert has_fast_bf16(CPU, Processor("x", flags)) is is_fast


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_both_the_processor_and_torch_must_have_it(monkeypatch, flag) -> None:
    found = Processor("x", ("avx512f", flag))
    for answer in (True, False):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=answer: answer
        )
        assert has_fast_bf16(CPU, found) is answer


@pytest.mark.parametrize("is_supported", [True, False])
def test_a_gpu_is_asked_without_emulation(monkeypatch, is_supported) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return is_supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert has_fast_bf16(torch.device("cuda"), Processor("x", ())) is is_supported


def test_a_cap_of_the_environment_makes_it_fp32(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    config = tiny_run.config(tmp_path, tmp_path)
    config, found = precision.settle(config, parallel.World(0, 1, CPU))
    assert config.precision == found.precision == "fp32"
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in found.reason


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(MODELS, tiny_run.TINY.name, tiny_run.TINY)
    return tiny_run.write_classes(tmp_path / "images")


def run(data: Path, monkeypatch, *, is_fast: bool, **changes: object) -> list[dict[str, object]]:
    """Train for a few steps on a machine that is fast or slow in BF16.

    Returns:
        The lines of the log that tell the precision.
    """
    monkeypatch.setattr(precision, "has_fast_bf16", lambda device: is_fast)
    out_dir = data.parent / "out"
    main(replace(tiny_run.config(data, out_dir), **changes))
    return [line for line in read_journal(out_dir / "log.jsonl") if "precision" in line]


@pytest.mark.parametrize(("is_fast", "taken"), [(True, "bf16"), (False, "fp32")])
def test_a_run_says_its_precision_and_keeps_it_elsewhere(
    data, monkeypatch, capsys, is_fast, taken
) -> None:
    (line,) = run(data, monkeypatch, is_fast=is_fast, total_steps=3)
    assert line["step"] == 0
    assert line["precision"] == taken
    assert f"precision {taken}: " in capsys.readouterr().out
    with safe_open(data.parent / "out/checkpoint.safetensors", framework="numpy") as file:
        assert f'"precision": "{taken}"' in file.metadata()["config"]
    # Three of three steps are done, so nothing is trained: only what it would be is of interest.
    lines = run(data, monkeypatch, is_fast=not is_fast, total_steps=3, resume=True)
    assert [each["precision"] for each in lines] == [taken, taken]
    assert lines[-1]["precision_reason"] == "the run was begun with it"


def test_what_is_asked_for_is_done_with_a_warning_where_it_is_slow(
    data, monkeypatch, capsys
) -> None:
    (line,) = run(data, monkeypatch, is_fast=False, total_steps=1, precision="bf16")
    assert line["precision"] == "bf16"
    said = capsys.readouterr().out
    assert said.count("warning: bf16 is slow here") == 1
    assert "--precision fp32 is faster" in said


def test_a_run_is_not_resumed_in_another_precision_that_is_asked_for(data, monkeypatch) -> None:
    run(data, monkeypatch, is_fast=False, total_steps=3)
    with pytest.raises(InputError, match="precision was 'fp32' and is 'bf16'"):
        run(data, monkeypatch, is_fast=False, total_steps=3, precision="bf16", resume=True)
