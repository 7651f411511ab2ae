"""Instruction sets out of the kernel's words, what caps leave of them, and what follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from clip_rt import processor
from clip_rt.processor import Processor, in_brackets, name_sets, read

X86 = "fpu sse4_2 avx f16c fma avx2 bmi2"
AVX512 = f"{X86} avx512f avx512dq avx512bw avx512vl"
CPUINFO = {
    "haswell": f"processor\t: 0\nmodel name\t: Intel(R) Xeon(R) CPU E5-2680 v4\nflags\t\t: {X86}\n",
    "alder lake": f"model name : 12th Gen Intel(R) Core(TM) i5\nflags : {X86} avx_vnni\n",
    "skylake": f"model name : Intel(R) Xeon(R) Gold 6148\nflags : {AVX512}\n",
    "cascade lake": f"model name : Intel(R) Xeon(R) Gold 6248\nflags : {AVX512} avx512_vnni\n",
    "zen 4": f"model name : AMD EPYC\nflags : {AVX512} avx512_bf16 avx512_vnni\n",
    "sapphire rapids": (
        "model name : Intel(R) Xeon(R) Platinum 8480+\n"
        f"flags : {AVX512} avx512_vnni avx512_bf16 avx512_fp16 avx_vnni "
        "amx_bf16 amx_tile amx_int8\n"
    ),
    "neoverse n1": "BogoMIPS : 50.00\nFeatures : fp asimd asimdhp asimddp\nCPU part : 0xd0c\n",
    "neoverse v1": "Features\t: fp asimd asimddp sve i8mm bf16\n",
    "old": "model name : Intel(R) Pentium(R)\nflags : fpu sse2\n",
    "nothing": "",
}


@pytest.mark.parametrize(
    ("which", "brackets", "int8", "bf16"),
    [
        ("haswell", " (AVX2)", False, False),
        ("alder lake", " (AVX2, AVX-VNNI)", True, False),
        ("skylake", " (AVX-512)", True, False),
        ("cascade lake", " (AVX-512, VNNI)", True, False),
        ("zen 4", " (AVX-512, VNNI, BF16)", True, True),
        ("sapphire rapids", " (AVX-512, VNNI, BF16, AMX)", True, True),
        ("neoverse n1", " (NEON, dot product)", True, False),
        ("neoverse v1", " (SVE, I8MM, BF16)", True, False),
        ("old", "", False, False),
        ("nothing", "", False, False),
    ],
)
def test_what_processors_are_called_and_good_for(which, brackets, int8, bf16) -> None:
    found = read(CPUINFO[which], {})
    assert found.label == found.name + brackets
    assert found.name
    assert (found.has_fast_int8, found.has_fast_bf16) == (int8, bf16)


def test_the_first_core_counts_and_the_doctor_hears_of_all_sets() -> None:
    found = read(f"{CPUINFO['zen 4']}\n{CPUINFO['haswell']}", {})
    assert found.name == "AMD EPYC"
    assert name_sets(found.flags) == ("AVX-512", "AVX2", "VNNI", "BF16")


@pytest.mark.parametrize(
    ("environment", "usable", "int8", "bf16"),
    [
        ({}, ("AVX-512", "AVX2", "VNNI", "AVX-VNNI", "BF16", "AMX"), True, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, ("AVX2",), False, False),
        ({"DNNL_MAX_CPU_ISA": "avx2"}, ("AVX2",), False, False),
        ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, (), False, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, ("AVX2", "AVX-VNNI"), True, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ("AVX-512", "AVX2"), True, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, ("AVX-512", "AVX2", "VNNI"), True, False),
        (
            {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "DNNL_MAX_CPU_ISA": "AVX2"},
            ("AVX-512", "AVX2", "VNNI", "BF16"),
            True,
            True,
        ),
        # oneDNN takes no notice of what it does not know, and OpenVINO's cap is not oneDNN's.
        (
            {"ONEDNN_MAX_CPU_ISA": "none of these", "OV_CPU_MAX_ISA": "AVX2"},
            ("AVX-512", "AVX2", "VNNI", "AVX-VNNI", "BF16", "AMX"),
            True,
            True,
        ),
    ],
)
def test_caps_of_the_environment_count(environment, usable, int8, bf16) -> None:
    found = read(CPUINFO["sapphire rapids"], environment)
    assert name_sets(found.usable_flags) == usable
    assert (found.has_fast_int8, found.has_fast_bf16) == (int8, bf16)
    assert dict(found.caps) == environment
    assert all(f"{name}={value}" in found.label for name, value in environment.items())


def test_a_cap_gives_a_processor_nothing_it_has_not() -> None:
    found = read(CPUINFO["haswell"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"})
    assert name_sets(found.usable_flags) == ("AVX2",)
    assert found.lacks("VNNI", "AMX") == "has no VNNI or AMX"


def test_whose_fault_a_missing_set_is() -> None:
    capped = read(CPUINFO["zen 4"], {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert capped.lacks("VNNI", "AMX") == "may use no VNNI or AMX (ONEDNN_MAX_CPU_ISA=AVX2)"
    assert read(CPUINFO["haswell"], {}).lacks("AMX") == "has no AMX"
    assert read(CPUINFO["haswell"], {}).lacks("a", "b", "c") == "has no a, b or c"


@pytest.mark.parametrize(
    ("flags", "caps", "said"),
    [
        ((), {}, ""),
        (["avx2", "avx512f"], {}, " (AVX-512)"),
        (["avx2"], {"OV_CPU_MAX_ISA": "A" * 99}, f" (AVX2; OV_CPU_MAX_ISA={'A' * 40})"),
        ([], {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, " (MKL_ENABLE_INSTRUCTIONS=AVX2)"),
    ],
)
def test_what_stands_behind_a_name(flags, caps, said) -> None:
    assert in_brackets(flags, caps) == said


def test_this_machine_is_as_the_kernel_has_it(monkeypatch, tmp_path) -> None:
    words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    assert {flag for flag in processor.FLAGS if flag in words} == set(read().flags)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert isinstance(read(), Processor)
    assert read().flags == ()
